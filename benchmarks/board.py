"""How fast the notice board is, and what it asks of the store: simulated ranks on a real TCPStore server.

    python -m benchmarks.board [--ranks 64 256 1024 4096] [--rounds 3]

The ranks are threads of a few processes (16 at most), the server is a process of its own, all on this machine: with
more ranks than cores the figures are what the machine needs for all of them together, more than ranks with machines of
their own would see. Connecting includes reverse DNS look-ups, which c10d's server makes one after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import resource
import statistics
import threading
import time
from typing import Any

os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")  # a lost packet costs the server a time-out
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a name that is not found, a line: there are thousands

COUNTED = {"set": 1, "add": 1, "append": 1, "check": 1, "compare_set": 1, "get": 2}  # get: a wait, then a get


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(pipe: Any, libuv: bool) -> None:
    """A store's server, until the pipe closes."""
    raise_limit()
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=libuv)
    pipe.send(store.port)
    pipe.recv()


def simulate(pipe: Any, port: int, ranks: range, world: int) -> None:
    """Some of the ranks. Each message on the pipe is (what to do, argument)."""
    raise_limit()
    import torch.distributed as dist

    from autoteardown.channel.board import Board
    from autoteardown.channel.relay import Relay
    from autoteardown.channel.stores import Line

    counts: dict[int, int] = {}

    def client(rank: int) -> Any:
        def counting(name: str, cost: int) -> Any:
            real = getattr(dist.TCPStore, name)

            def call(self: Any, *args: Any) -> Any:
                counts[rank] += cost
                return real(self, *args)

            return call

        return type(
            "Client", (dist.TCPStore,), {name: counting(name, cost) for name, cost in COUNTED.items()}
        )

    boards: dict[int, Board] = {}
    heard: queue.SimpleQueue[tuple[int, str, float]] = queue.SimpleQueue()
    while True:
        what, value = pipe.recv()
        if what == "end":
            return
        if what == "join":
            counts.update(dict.fromkeys(ranks, 0))
            for rank in ranks:
                line = Line(Relay(client(rank), "localhost", port, rank), f"round{value}", rank == 0)
                boards[rank] = Board(line, rank, world)

                def deliver(kind: str, _: Any, rank: int = rank) -> None:
                    heard.put((rank, kind, time.monotonic()))

                threading.Thread(target=boards[rank].watch, args=(deliver,), daemon=True).start()
            while any(board._prefix is None for board in boards.values()):
                time.sleep(0.01)
            pipe.send(dict(counts))
        elif what == "hear":
            said = [heard.get() for _ in ranks]
            assert all(kind == value for _, kind, _ in said), said
            pipe.send([when for _, _, when in said])
        elif what == "leave":
            for board in boards.values():
                board.close()
            boards.clear()
            pipe.send(dict(counts))
        else:
            method, rank, args = what, *value
            start = time.monotonic()
            for each in ranks if rank is None else [rank]:
                if each or rank is not None:  # rank 0 is the one to be last
                    getattr(boards[each], method)(*args)
            pipe.send(start)


class Simulation:
    """A world of so many ranks."""

    def __init__(self, world: int, libuv: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self.processes = []

        def start(target: Any, *args: Any) -> Any:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *args), daemon=True)
            process.start()
            self.processes.append(process)
            return ours

        self.server = start(serve, libuv)
        port = self.server.recv()
        size = -(-world // min(16, -(-world // 64)))
        self.pipes = [
            start(simulate, port, range(first, min(first + size, world)), world)
            for first in range(0, world, size)
        ]

    def ask(self, what: str, value: Any = None, only: int | None = None) -> list[Any]:
        pipes = self.pipes if only is None else [self.pipes[only]]
        for pipe in pipes:
            pipe.send((what, value))
        return [pipe.recv() for pipe in pipes]

    def all_hear(self, kind: str) -> list[float]:
        return sorted(when for times in self.ask("hear", kind) for when in times)

    def round(self, number: int) -> dict[str, float]:
        """One eviction, up to where everybody knows that every device is quiet; milliseconds and operations."""
        start = time.monotonic()
        enrolled = sum(sum(counts.values()) for counts in self.ask("join", number))
        found = {"join": time.monotonic() - start}
        (start,) = self.ask("tell", (0, ({"rank": 0, "host": "node", "pid": 1},)), only=0)
        times = self.all_hear("notice")
        found["first told"], found["last told"] = times[0] - start, times[-1] - start
        start = time.monotonic()
        self.ask("answer", (None, (1200,)))
        found["answers"] = time.monotonic() - start
        (start,) = self.ask("answer", (0, (1200,)), only=0)
        found["plan"] = self.all_hear("plan")[-1] - start
        self.ask("quiet", (None, (True,)))
        (start,) = self.ask("quiet", (0, (True,)), only=0)
        found["quiet"] = self.all_hear("quiet")[-1] - start
        counts: dict[int, int] = {}
        for each in self.ask("leave"):
            counts.update(each)
        found = {name: seconds * 1000 for name, seconds in found.items()}
        operations = sorted(counts.values())
        found["operations"], found["enrol"] = sum(operations) - enrolled, enrolled / self.world
        found["per rank"] = statistics.median(operations) - enrolled / self.world
        found["most"] = operations[-1] - enrolled / self.world
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(("end", None))
        self.server.send(None)
        for process in self.processes:
            process.join(10)


TIMES = {
    "first told": "notice to the first rank told",
    "last told": "notice to the last rank told",
    "answers": "all ranks but one answer",
    "plan": "last answer to the plan known to all",
    "quiet": "last quiet to all knowing",
    "join": "all boards connected",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--legacy", action="store_true", help="the server without libuv")
    options = parser.parse_args(argv)
    server = "server without libuv" if options.legacy else "libuv server"
    print(f"{server}, {options.rounds} rounds, {os.cpu_count()} cores")
    print("milliseconds: median (least to most)")
    for world in options.ranks:
        simulation = Simulation(world, not options.legacy)
        rounds = [simulation.round(number) for number in range(options.rounds)]
        simulation.close()
        print(f"\n{world} ranks")
        for name, text in TIMES.items():
            values = [each[name] for each in rounds]
            print(f"  {text:38} {statistics.median(values):9.1f}  ({min(values):.1f} to {max(values):.1f})")
        middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        print(
            f"  store operations: {middle['operations']:.0f} in all, {middle['per rank']:.0f} a rank, "
            f"{middle['most']:.0f} at most; before the notice {middle['enrol']:.0f} a rank"
        )


if __name__ == "__main__":
    main()
