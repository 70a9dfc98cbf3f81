"""A training beside which another thread launches collectives at its own pace: `background.py DEVICE WHAT STYLE`.

DEVICE   cpu: gloo; cuda: `cpu:gloo,cuda:nccl`, where the host runs ahead of its device
WHAT     async     one `torch.distributed.checkpoint.async_save` after the other, on a thread of DCP's own, on a gloo
                   group (with cuda: on the default group's gloo half); the last rank writes more slowly than the others
         process   the same in a process of DCP's own
         group     all_reduces on a gloo group of its own; the last rank comes to each later than the others
         default   the same on the default group's gloo half (cuda only)
         device    the same on a device group of its own (cuda only)
         nothing   no other thread: the control
STYLE    none, flag (a handler that sets a flag), callback (`on_teardown`), poll (`stop_requested()`)

Prints `step K`, and `saving` while DCP writes (else when the thread has launched some collectives). Leaves `final-R.pt`
of each rank, with the iteration at which it was saved, and DCP's checkpoints `dcp-N`.
--uneven: rank 0 has skipped an optimizer step, so that its count is one behind.
"""

import argparse
import contextlib
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import autoteardown

with contextlib.suppress(ImportError):  # torch 2.6
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

parser = argparse.ArgumentParser()
parser.add_argument("device", choices=["cpu", "cuda"])
parser.add_argument("what", choices=["async", "process", "group", "default", "device", "nothing"])
parser.add_argument("style", choices=["none", "flag", "callback", "poll"])
parser.add_argument(
    "--write", type=float, default=1.5, help="seconds that the last rank takes to write its part"
)
parser.add_argument("--ms", type=float, default=20, help="what a step takes")
parser.add_argument("--uneven", action="store_true")
options = parser.parse_args()

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
last = rank == size - 1
cuda = options.device == "cuda"
device = torch.device("cuda", rank) if cuda else torch.device("cpu")
AHEAD = 10  # steps that the host may be ahead of its device
flagged = False


def say(*words):
    """One line, at once: several threads print."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class SlowWriter(FileSystemWriter):
    """A storage on which the last rank takes its time."""

    def write_data(self, plan, planner):
        """Write, slowly."""
        say("saving")
        time.sleep(options.write if last else 0.1)
        return super().write_data(plan, planner)


class Saves:
    """DCP's asynchronous saves, one after the other."""

    def __init__(self, group):
        self._group = group
        self._future, self._count, self._turns = None, 0, 0

    def next(self, model):
        """At every hundredth iteration, as a trainer's interval has it: wait for the last one, and begin the next."""
        self._turns += 1
        if self._turns % 100 != 1:
            return
        self.wait()
        more = {"process_group": self._group} if self._group is not None else {}
        if options.what == "process":
            more["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
        writer = SlowWriter(f"dcp-{self._count}")
        self._count += 1
        self._future = dcp.async_save({"model": model.state_dict()}, storage_writer=writer, **more)

    def wait(self):
        """As a trainer does before it leaves."""
        if self._future is not None:
            self._future.result()


class Service:
    """A thread that all_reduces at its own pace: the last rank is late each time, so the others are one ahead."""

    def __init__(self, group, where):
        self._group, self._where = group, where
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        if not cuda:
            self._serve()
            return
        torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream()):  # on the training's own, each would wait for the other
            self._serve()

    def _serve(self):
        for turn in range(10**6):
            if last:
                time.sleep(0.15)
            over = torch.tensor([float(self._over)], device=self._where)
            dist.all_reduce(over, dist.ReduceOp.MAX, group=self._group)
            if over.item():
                return
            if turn == 5:
                say("saving")

    def next(self, model):
        """Nothing."""

    def wait(self):
        """All ranks' threads end after the same collective."""
        self._over = True
        self._thread.join()


class Nothing:
    """The control."""

    def next(self, model):
        """Nothing."""

    def wait(self):
        """Nothing."""


def background():
    """What runs beside the training."""
    if options.what == "nothing":
        say("saving")
        return Nothing()
    if options.what in ("async", "process"):
        return Saves(None if cuda else dist.new_group(backend="gloo"))
    groups = {
        "group": lambda: dist.new_group(backend="gloo"),
        "default": lambda: None,
        "device": dist.new_group,
    }
    return Service(groups[options.what](), device if options.what == "device" else torch.device("cpu"))


class Training:
    """DDP on inputs that are on the device."""

    def __init__(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(
            device
        )
        self.model = torch.nn.parallel.DistributedDataParallel(model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._inputs = torch.randn(8, 16).to(device)
        self._marks = []
        self.step = 0

    def iterate(self):
        """One iteration."""
        loss = self.model(self._inputs).square().mean()
        if cuda:
            torch.cuda._sleep(int(options.ms * 1e6))  # a cycle a nanosecond
        else:
            time.sleep(options.ms / 1000)
        loss.backward()
        if not (options.uneven and rank == 0 and self.step == 3):
            self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        say("step", self.step)
        if cuda:
            self._marks.append(torch.cuda.Event())
            self._marks[-1].record()
            while self._marks and (self._marks[0].query() or len(self._marks) >= AHEAD):
                if self._marks[0].query():
                    self._marks.pop(0)
                else:
                    time.sleep(0.001)

    def save(self):
        """This rank's part of the last checkpoint."""
        weights = {name: each.detach().cpu() for name, each in self.model.state_dict().items()}
        torch.save({"step": self.step, "weights": weights}, f"final-{rank}.pt")
        say("saved", self.step)


def set_flag(signum, frame):
    """What many trainers do."""
    global flagged
    flagged = True


def main():
    """Train until the eviction."""
    if options.style == "flag":
        signal.signal(signal.SIGTERM, set_flag)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    training = Training()
    for _ in range(3):
        training.iterate()
    beside = background()
    if options.style == "callback":
        autoteardown.on_teardown(training.save)
    while True:
        training.iterate()
        beside.next(training.model)
        if flagged or (options.style == "poll" and autoteardown.stop_requested()):
            beside.wait()
            training.save()
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
