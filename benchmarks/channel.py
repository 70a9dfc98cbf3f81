"""Measures the channel with thousands of ranks, and what its hub needs: simulated ranks, real connections.

    python -m benchmarks.channel [--ranks 64 1024 4096] [--rounds 3]

Rank 0 is a process of its own, with the agent's hub and the store's server. The other ranks share eight processes, and
are measured in two ways. With the agent's own channel in each: one loop thread and one store client serve hundreds of
them, which is work that ranks do not have (each looks through all descriptors of its process before it uses the store,
and polls them all), on cores that they share with the hub. And light: ranks that hold a connection, prove who they are
and answer, and the hub is the bottleneck, as it is where ranks have machines of their own; they look into the store
once a process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from typing import Any

from benchmarks import channel_ranks

PROCESSES = 8


class Simulation:
    """A world of so many ranks; those beside rank 0 of this kind (see `channel_ranks`)."""

    def __init__(self, world: int, kind: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self.processes: list[Any] = []

        def start(target: Any, ranks: range, port: int) -> Any:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, port, ranks, world), daemon=True)
            process.start()
            self.processes.append(process)
            return ours

        self.hub = start(channel_ranks.real, range(1), 0)
        port = self.hub.recv()
        size = -(-(world - 1) // PROCESSES)
        parts = [range(low, min(low + size, world)) for low in range(1, world, size)]
        self.rest = [start(kind, ranks, port) for ranks in parts]
        for pipe in self.rest:
            pipe.recv()

    @staticmethod
    def _tell(pipes: list[Any], what: str, value: Any = None) -> None:
        for pipe in pipes:
            pipe.send((what, value))

    def _hub(self, what: str, value: Any = None) -> Any:
        self.hub.send((what, value))
        return self.hub.recv()

    @staticmethod
    def _answers(pipes: list[Any]) -> list[Any]:
        return [pipe.recv() for pipe in pipes]

    def round(self, number: int) -> dict[str, float]:
        """From init to the plan; milliseconds."""
        everybody = [self.hub, *self.rest]
        found = {}
        start = time.monotonic()
        self._tell(everybody, "open", number)
        self._tell([self.hub], "hear", "complete")
        self._tell(self.rest, "hear", "up")
        costs = self._answers(everybody)
        found["open0"], found["open"] = costs[0], statistics.median(costs[1:])
        found["connected"] = max(map(max, self._answers(everybody))) - start
        found["process connect"], found["hub connect"] = self._hub("spent")
        self._tell(self.rest, "hear", "notice")
        start = self._hub("post", ("tell", {"rank": 0, "host": "node", "pid": 1}))
        times = sorted(when for times in self._answers(self.rest) for when in times)
        found["first"], found["last"] = times[0] - start, times[-1] - start
        found["hub notice"] = self._hub("spent")[1]
        # Everybody but rank 0 answers, and then rank 0.
        self._hub("hear", "notice")
        start = time.monotonic()
        self._tell(self.rest, "post", ("answer", [1200, False, False]))
        self._tell(self.rest, "hear", "plan")
        self._hub("post", ("answer", [1200, False, False]))
        self._answers(self.rest)
        found["plan"] = max(map(max, self._answers(self.rest))) - start
        found["hub plan"] = self._hub("spent")[1]
        self._tell(everybody, "close")
        self._answers(everybody)
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
    "hub connect": "  of it processor time of the hub's thread",
    "process connect": "  and of rank 0's process, the store's server with it",
    "first": "notice to the first rank told",
    "last": "notice to the last rank told",
    "hub notice": "  of it processor time of the hub's thread",
    "plan": "first answer to the plan known to all",
    "hub plan": "  of it processor time of the hub's thread",
}
KINDS = {"the agent in every rank": channel_ranks.real, "light ranks": channel_ranks.arm}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["agent", "light"], help="only this kind of ranks beside rank 0")
    options = parser.parse_args(argv)
    print(f"{options.rounds} rounds, {os.cpu_count()} cores; milliseconds: median (least to most)")
    for world in options.ranks:
        for words, kind in KINDS.items():
            if (options.only or words) not in words:
                continue
            simulation = Simulation(world, kind)
            rounds = [simulation.round(number) for number in range(options.rounds)]
            simulation.close()
            print(f"\n{world} ranks, {words}")
            for name, text in ROWS.items():
                if name == "open" and kind is channel_ranks.arm:
                    continue
                values = [each[name] for each in rounds]
                middle, spread = statistics.median(values), f"({min(values):.2f} to {max(values):.2f})"
                print(f"  {text:55} {middle:9.2f}  {spread}", flush=True)


if __name__ == "__main__":
    main()
