"""How fast the channel is with thousands of ranks, and what its hub needs: simulated ranks, real connections.

    python -m benchmarks.channel [--ranks 64 1024 4096] [--rounds 3]

Rank 0 is a process of its own; the other ranks share a few processes, each of which has one loop thread and one store
client for all of its ranks. All of it runs on this machine: with more ranks than cores the figures are what the machine
needs for all of them together, more than ranks with machines of their own would see.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import resource
import statistics
import time
from typing import Any

PROCESSES = 8
INFINITY = float("inf")


class Council:
    """As much of a council as an eviction needs: passes the notice on, and makes one word of all answers."""

    def __init__(self, world: int) -> None:
        self.wake = INFINITY
        self._world = world
        self._joined = 0
        self._answers = 0

    def on(self, rank: int, kind: str, value: Any, now: float) -> list[tuple[Any, str, Any]]:
        if kind == "joined":
            self._joined += 1
            return [(0, "complete", None)] if self._joined == self._world else []
        if kind == "notice":
            return [(None, "notice", value)]
        if kind == "answer":
            self._answers += 1
            return [(None, "plan", value)] if self._answers == self._world else []
        return []


class OneClient:
    """The store as each rank has it: one client, which nobody else uses.

    Here hundreds of ranks share the client of their process. A rank that finds its client taken for long makes another
    one (the program may be waiting in it): thousands of those are what no job has, and what did not come to an end.
    """

    def __init__(self, store: Any) -> None:
        self.set, self.check, self.get = store.set, store.check, store.get


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def simulate(pipe: Any, port: int, ranks: range, world: int) -> None:
    """Some of the ranks; rank 0 serves the store as well. Each message on the pipe is (what to do, argument)."""
    import torch.distributed as dist

    from autoteardown.channel.channel import Channel
    from autoteardown.channel.loop import Loop

    first = ranks[0] == 0
    if not first:  # many ranks in one process: these are no rank's own limits
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = dist.TCPStore("127.0.0.1", port, is_master=first, wait_for_workers=False)
    pipe.send(server.port)
    heard: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
    loop = Loop(lambda data: None, lambda error: None, lambda: None)
    channels: list[Channel] = []

    def deliver(kind: str, value: Any) -> None:
        if kind in ("up", "complete", "notice", "plan"):
            heard.put((kind, time.monotonic()))

    while True:
        what, value = pipe.recv()
        if what == "end":
            return
        if what == "open":
            store = OneClient(dist.PrefixStore(f"round{value}", server))
            used, costs = cpu(), []
            for rank in ranks:
                start = time.perf_counter()
                channels.append(Channel.open(store, rank, world, loop, deliver, lambda: Council(world)))
                costs.append(time.perf_counter() - start)
            pipe.send(statistics.median(costs))
        elif what == "hear":
            times = []
            while len(times) < len(ranks):
                kind, when = heard.get(timeout=120)
                if kind == value:
                    times.append(when)
            pipe.send(times)
        elif what == "post":
            used, start = cpu(), time.monotonic()
            for channel in channels:
                channel.post(*value)
            pipe.send(start)
        elif what == "cpu":
            pipe.send(cpu() - used)
        elif what == "close":
            for channel in channels:
                channel.close()
            channels.clear()
            pipe.send(None)


class Simulation:
    """A world of so many ranks."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self.processes: list[Any] = []

        def start(ranks: range, port: int) -> Any:
            ours, theirs = context.Pipe()
            process = context.Process(target=simulate, args=(theirs, port, ranks, world), daemon=True)
            process.start()
            self.processes.append(process)
            return ours

        self.hub = start(range(1), 0)
        port = self.hub.recv()
        size = -(-(world - 1) // PROCESSES)
        parts = [range(low, min(low + size, world)) for low in range(1, world, size)]
        self.rest = [start(ranks, port) for ranks in parts]
        for pipe in self.rest:
            pipe.recv()

    @staticmethod
    def _ask(pipes: list[Any], what: str, value: Any = None) -> list[Any]:
        for pipe in pipes:
            pipe.send((what, value))
        return [pipe.recv() for pipe in pipes]

    def round(self, number: int) -> dict[str, float]:
        """From init to the plan; milliseconds."""
        everybody = [self.hub, *self.rest]
        found = {}
        start = time.monotonic()
        costs = self._ask(everybody, "open", number)
        found["open0"], found["open"] = costs[0], statistics.median(costs[1:])
        found["connected"] = (
            max(when for times in self._ask([self.hub], "hear", "complete") for when in times) - start
        )
        found["cpu connect"] = self._ask([self.hub], "cpu")[0]
        self._ask(self.rest, "hear", "up")
        (start,) = self._ask([self.hub], "post", ("notice", {"rank": 0, "host": "node", "pid": 1}))
        times = sorted(when for times in self._ask(everybody, "hear", "notice") for when in times)
        found["first"], found["last"] = times[0] - start, times[-1] - start
        found["cpu notice"] = self._ask([self.hub], "cpu")[0]
        # Everybody but rank 0, and then rank 0: from the last answer, or the hub's last work on them, to the plan.
        start = time.monotonic()
        self._ask(self.rest, "post", ("answer", 1200))
        self._ask([self.hub], "post", ("answer", 1200))
        times = sorted(when for times in self._ask(everybody, "hear", "plan") for when in times)
        found["plan"] = times[-1] - start
        found["cpu plan"] = self._ask([self.hub], "cpu")[0]
        self._ask(everybody, "close")
        return {name: seconds * 1000 for name, seconds in found.items()}

    def close(self) -> None:
        for pipe in [self.hub, *self.rest]:
            pipe.send(("end", None))
        for process in self.processes:
            process.join(10)


ROWS = {
    "open0": "what an init waits for the channel, rank 0",
    "open": "what an init waits for the channel, other ranks",
    "connected": "from the first init to all connected",
    "cpu connect": "  of it processor time of rank 0's process",
    "first": "notice to the first rank told",
    "last": "notice to the last rank told",
    "cpu notice": "  of it processor time of rank 0's process",
    "plan": "first answer to the plan known to all",
    "cpu plan": "  of it processor time of rank 0's process",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    print(f"{options.rounds} rounds, {os.cpu_count()} cores; milliseconds: median (least to most)")
    for world in options.ranks:
        simulation = Simulation(world)
        rounds = [simulation.round(number) for number in range(options.rounds)]
        simulation.close()
        print(f"\n{world} ranks")
        for name, text in ROWS.items():
            values = [each[name] for each in rounds]
            print(f"  {text:50} {statistics.median(values):9.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
