"""Ray actors and tasks that are ranks, without code for evictions.

Each says where it is by way of a file in `folder`, `<what>-<rank>`, that holds its pid and its thread's number.
"""

import asyncio
import contextlib
import os
import threading
import time
from pathlib import Path

import ray


def say(folder, what, rank):
    """Leave a file, whole."""
    path = Path(folder, f"{what}-{rank}")
    path.with_suffix(".new").write_text(f"{os.getpid()} {threading.get_native_id()}")
    path.with_suffix(".new").rename(path)


class Rank:
    """An actor; which thread its methods run on is up to how it is made."""

    def init(self, folder, rank, port):
        """Join a world of two."""
        import torch.distributed as dist

        self.folder, self.rank = folder, rank
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        dist.barrier()
        return os.getpid(), threading.current_thread().name

    def busy(self):
        """Compute, for ever."""
        say(self.folder, "busy", self.rank)
        while True:
            sum(range(1000))

    def blocked(self):
        """Wait in a collective that the other rank never joins."""
        import torch
        import torch.distributed as dist

        say(self.folder, "blocked", self.rank)
        dist.all_reduce(torch.ones(1))
        return "the all_reduce returned"

    def sleeps(self, folder):
        """What an actor that is no rank may do."""
        say(folder, "sleeps", "none")
        time.sleep(3600)

    def pid(self):
        """Answer."""
        return os.getpid()

    def linger(self):
        """Have the next call take long before its method begins, in a part of Ray's that is Python."""

        @contextlib.contextmanager
        def lingers():
            say(self.folder, "lingers", self.rank)
            time.sleep(60)
            yield

        ray._raylet.disable_client_hook = lingers


class AsyncRank(Rank):
    """One `async def` puts every method on the thread "AsyncIO Thread: default"."""

    async def awaits(self):
        """Run, without anything to do."""
        say(self.folder, "awaits", self.rank)
        await asyncio.sleep(3600)


class GroupsRank(Rank):
    """Concurrency groups: it joins on a thread of one pool and works on one of another; a third answers."""

    @ray.method(concurrency_group="io")
    def init(self, folder, rank, port):
        """Join a world of two."""
        return super().init(folder, rank, port)

    @ray.method(concurrency_group="io")
    def pid(self):
        """Answer."""
        return super().pid()

    @ray.method(concurrency_group="io")
    def linger(self):
        """Have the next call take long."""
        super().linger()

    @ray.method(concurrency_group="compute")
    def busy(self):
        """Compute, for ever."""
        super().busy()

    @ray.method(concurrency_group="compute")
    def blocked(self):
        """Wait in a collective."""
        return super().blocked()


class AsyncGroupsRank(GroupsRank):
    """The same, with an event loop for each group."""

    @ray.method(concurrency_group="compute")
    async def awaits(self):
        """Run, without anything to do."""
        say(self.folder, "awaits", self.rank)
        await asyncio.sleep(3600)


@ray.remote(num_cpus=0, max_retries=0)
def task(folder, rank, port, what):
    """A rank that is a task."""
    actor = Rank()
    actor.init(folder, rank, port)
    getattr(actor, what)()
