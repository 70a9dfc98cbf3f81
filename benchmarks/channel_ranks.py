"""The simulated ranks of `benchmarks.channel`: with the agent's own channel, or light ones that speak its protocol.

Each function serves some ranks in a process of its own. What comes over its pipe is (what to do, argument).
"""

from __future__ import annotations

import gc
import os
import queue
import resource
import select
import socket
import statistics
import threading
import time
from typing import Any

from autoteardown.stop.coordinator import Coordinator

Pipe = Any


class Counting(Coordinator):
    """The agent's own coordinator, which also announces when all ranks have joined."""

    def __init__(self, world: int) -> None:
        super().__init__(world)
        self._missing = set(range(world))

    def on(self, rank: int, kind: str, value: Any = None, now: float = 0.0) -> Any:
        told = super().on(rank, kind, value, now)
        if kind == "joined" and rank in self._missing:
            self._missing.discard(rank)
            if not self._missing:
                told.append((self.hub, "complete", None))
        return told


class OneClient:
    """The store as each rank has it: one client, which nobody else uses.

    Here hundreds of ranks share the client of their process. A rank that finds its client taken for long makes another
    one (the program may be waiting in it): thousands of those are what no job has, and what did not come to an end.
    """

    def __init__(self, store: Any) -> None:
        self.set, self.check, self.get = store.set, store.check, store.get


class Spent:
    """Seconds of processor time since it was made: of the process, and of one of its threads."""

    def __init__(self, thread: int) -> None:
        self._clock = time.pthread_getcpuclockid(thread)
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._before = self._now()

    def _now(self) -> tuple[float, float]:
        return time.process_time(), time.clock_gettime(self._clock)

    def seconds(self) -> tuple[float, float]:
        before, now = self._before, self._now()
        return now[0] - before[0], now[1] - before[1]


def many_files() -> None:
    """Many ranks in one process: these are no rank's own limits."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def real(pipe: Pipe, port: int, ranks: range, world: int) -> None:
    """Ranks with the agent's channel; rank 0 serves the store as well."""
    import torch.distributed as dist

    from autoteardown.channel.channel import Channel
    from autoteardown.event_loop.loop import Loop

    first = ranks[0] == 0
    if not first:
        many_files()
    server = dist.TCPStore("127.0.0.1", port, is_master=first, wait_for_workers=False)
    pipe.send(server.port)
    heard: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
    threads: queue.SimpleQueue[int] = queue.SimpleQueue()
    loop = Loop(lambda data: None, lambda error: None, lambda: None)
    loop.call(lambda: threads.put(threading.get_ident()))
    spent = Spent(threads.get())
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
            gc.enable()
            spent.start()
            costs = []
            for rank in ranks:
                start = time.perf_counter()
                channels.append(Channel.open(store, rank, world, loop, deliver, lambda: Counting(world)))
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
            gc.disable()  # as a stop does: a collection takes as long as a plan
            spent.start()
            start = time.monotonic()
            for channel in channels:
                channel.post(*value)
            pipe.send(start)
        elif what == "spent":
            pipe.send(spent.seconds())
        elif what == "close":
            for channel in channels:
                channel.close()
            channels.clear()
            pipe.send(None)


def arm(pipe: Pipe, port: int, ranks: range, world: int) -> None:
    """Ranks that each hold a connection, say what they have to, and do no more; one look into the store for all."""
    import torch.distributed as dist

    from autoteardown.channel.rendezvous import KEY, HubAddress
    from autoteardown.channel.wire import encode, proof

    many_files()
    server = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    pipe.send(server.port)
    socks: list[socket.socket] = []
    poll, by_fd = select.epoll(), {}
    rests: dict[int, bytes] = {}
    posted = 0

    def hear(kind: str) -> list[float]:
        """When each of them has heard that."""
        mark, times = f'"{kind}"'.encode(), []
        while len(times) < len(socks):
            for fd, _ in poll.poll(120):
                data = by_fd[fd].recv(65536)
                if not data:
                    raise RuntimeError("the hub has closed the connection")
                *lines, rests[fd] = (rests[fd] + data).split(b"\n")
                times += [time.monotonic() for line in lines if mark in line]
        return times

    while True:
        what, value = pipe.recv()
        if what == "end":
            return
        if what == "open":
            start = time.perf_counter()
            address = HubAddress.decode(dist.PrefixStore(f"round{value}", server).get(KEY))
            posted = 0
            for rank in ranks:
                hello = (rank, world, os.urandom(8).hex(), 1, 0, 0)
                sock = socket.create_connection(address.hosts[0])
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.send(encode("hello", *hello, proof(address.token, "hello", *hello)))
                socks.append(sock)
                by_fd[sock.fileno()], rests[sock.fileno()] = sock, b""
                poll.register(sock.fileno(), select.EPOLLIN)
            pipe.send((time.perf_counter() - start) / len(ranks))
        elif what == "hear":
            pipe.send(hear({"up": "welcome"}.get(value, value)))
        elif what == "post":
            start, posted = time.monotonic(), posted + 1
            line = encode("p", posted, *value)
            for sock in socks:
                sock.send(line)
            pipe.send(start)
        elif what == "close":
            for sock in socks:
                sock.send(encode("bye"))
                sock.close()
            socks.clear()
            by_fd.clear()
            pipe.send(None)
