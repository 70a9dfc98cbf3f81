"""Actors for the ways in which a Ray node goes: trainers, of whom two wait for each other, and an engine for weights.

Nothing tells ranks 1 and 2 that rank 0 has ended: as in an NCCL job, they wait on other connections than those to it.
"""

import itertools
import json
import os
import time
from pathlib import Path

from custom_group import init_custom_process_group
from ray_ranks import say


class Trainer:
    """A rank of a default group of three."""

    def join(self, folder, rank, port):
        """Join the others; the pid as this container has it."""
        import torch.distributed as dist

        self.folder, self.rank = folder, rank
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
        self.pairs = [dist.new_group([1, 2]), dist.new_group([1, 2])]
        dist.barrier()
        return os.getpid()

    def sync(self, port):
        """Make a group with the engine."""
        import torch
        import torch.distributed as dist

        self.weights = init_custom_process_group(port, 0, 2)
        dist.all_reduce(torch.ones(1), group=self.weights)

    def wait(self):
        """In a collective that does not end."""
        import torch
        import torch.distributed as dist

        say(self.folder, "waits", self.rank)
        dist.all_reduce(torch.ones(1), group=self.pairs[self.rank - 1] if self.rank else None)

    def pid(self):
        """Answer."""
        return os.getpid()


class Engine:
    """Has no default group."""

    def join(self, folder, port):
        """Make a group with trainer 0; the pid as this container has it."""
        import torch
        import torch.distributed as dist

        self.folder = folder
        self.weights = init_custom_process_group(port, 1, 2)
        dist.all_reduce(torch.ones(1), group=self.weights)
        return os.getpid()

    def receive(self):
        """Wait for weights that never come."""
        import torch
        import torch.distributed as dist

        say(self.folder, "receives", 0)
        try:
            dist.broadcast(torch.ones(1), 0, group=self.weights)
        except RuntimeError as error:
            return type(error).__name__

    def pid(self):
        """Answer."""
        return os.getpid()


class Stepper:
    """A rank of a small world that trains, until somebody says stop."""

    def join(self, folder, rank, port):
        """Join the other one."""
        import torch.distributed as dist

        self.folder, self.rank, self.steps = folder, rank, 0
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        dist.barrier()
        return os.getpid()

    def train(self, stop):
        """Step until there is such a file; how many steps it were."""
        import torch
        import torch.distributed as dist

        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        done = torch.zeros(1)
        while not done.item():
            parameter.grad = torch.ones(1)
            dist.all_reduce(parameter.grad)
            optimizer.step()
            self.steps += 1
            if self.steps == 5:
                say(self.folder, "steps", self.rank)
            done[0] = float(self.rank == 0 and Path(stop).exists())
            dist.broadcast(done, 0)
            time.sleep(0.01)
        return self.steps


class Saver:
    """A rank alone in its world, whose checkpoint takes some seconds."""

    def train(self, folder, port, seconds):
        """Step for ever."""
        import torch
        import torch.distributed as dist

        import autoteardown

        @autoteardown.on_teardown
        def save():
            time.sleep(seconds)
            say(folder, "saved", 0)

        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for step in itertools.count():
            parameter.grad = torch.ones(1)
            dist.all_reduce(parameter.grad)
            optimizer.step()
            if step == 5:
                say(folder, "trains", 0)
            time.sleep(0.01)


class Restless:
    """Inits and destroys."""

    def again(self, port, times):
        """So often, alone in its world; what it holds after each time."""
        import torch
        import torch.distributed as dist

        import autoteardown

        held = []
        for number in range(times):
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port + number}", rank=0, world_size=1)
            dist.all_reduce(torch.ones(1))
            armed = autoteardown.status()["state"]
            dist.destroy_process_group()
            state = autoteardown.status()["state"]
            files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            held.append((armed, state, files, threads))
        return held

    def stay(self, port):
        """Init, and leave it at that; what the agent says then."""
        import torch.distributed as dist

        import autoteardown

        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        return autoteardown.status()["state"]

    def there(self):
        """What the agent says, and where it was started."""
        import sys

        import autoteardown

        return os.getpid(), sys.executable, json.dumps(autoteardown.status())
