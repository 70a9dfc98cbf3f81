"""The one thread of an armed rank."""

import os
import queue
import select
import signal
import socket
import threading
import time

import pytest
from harness import wait_until

from autoteardown import fail_open
from autoteardown.event_loop import loop as loops

PATIENCE = 20


@pytest.fixture
def heard():
    return queue.SimpleQueue()


@pytest.fixture
def loop(heard):
    loop = loops.Loop(
        lambda data: heard.put(("signal", data)), lambda error: heard.put(("deaf", str(error))), lambda: None
    )
    yield loop
    loop.close()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def threads():
    return len(os.listdir("/proc/self/task"))


def test_calls_come_in_order_and_from_any_thread(loop, heard):
    def many(name):
        for number in range(500):
            loop.call(lambda number=number: heard.put((name, number)))

    started = [threading.Thread(target=many, args=(name,)) for name in "abc"]
    for thread in started:
        thread.start()
    found = [heard.get(timeout=PATIENCE) for _ in range(1500)]
    for name in "abc":
        assert [number for said, number in found if said == name] == list(range(500))


def test_calls_from_a_signal_handler(loop, heard):
    """At any bytecode of the main thread."""
    count = 0

    def handler(signum, frame):
        nonlocal count
        count += 1
        loop.call(lambda: heard.put("from the handler"))

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            loop.call(lambda: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert count
    for _ in range(count):
        assert heard.get(timeout=PATIENCE) == "from the handler"


def test_signals_are_told_from_calls(loop, heard):
    loop.write(15)
    loop.call(lambda: None)
    loop.write(10)
    found = b""
    while len(found) < 2:
        what, data = heard.get(timeout=PATIENCE)
        assert what == "signal"
        found += data
    assert found == bytes([15, 10])


def test_timers(loop, heard):
    loop.at(0.2, lambda: heard.put("second"))
    loop.at(0.1, lambda: heard.put("first"))
    loop.at(0.15, lambda: heard.put("never")).cancel()
    loop.call(lambda: loop.at(0.05, lambda: heard.put("soon")))
    assert [heard.get(timeout=PATIENCE) for _ in range(3)] == ["soon", "first", "second"]


def test_watching(loop, heard):
    ours, theirs = socket.socketpair()

    def read(events):
        data = ours.recv(10)
        if not data:
            loop.unwatch(ours.fileno())
        heard.put((loop.is_current, data))

    loop.watch(ours.fileno(), select.POLLIN, read)
    theirs.send(b"x")
    assert heard.get(timeout=PATIENCE) == (True, b"x")
    theirs.close()
    assert heard.get(timeout=PATIENCE) == (True, b"")
    loop.unwatch(ours.fileno())
    ours.close()


@pytest.mark.parametrize("problem", [ValueError("seen"), SystemExit(3), KeyboardInterrupt()])
def test_what_is_called_may_fail(loop, heard, monkeypatch, problem):
    """Said once; a descriptor whose callback fails is watched no more, or the thread would spin."""
    said = []
    monkeypatch.setattr(fail_open, "say", said.append)
    monkeypatch.setattr(fail_open, "_reported", set())

    def fail(*args):
        raise problem

    ours, theirs = socket.socketpair()
    loop.watch(ours.fileno(), select.POLLIN, fail)
    theirs.send(b"x")
    for _ in range(3):
        loop.call(fail)
        loop.at(0, fail)
    loop.at(0.1, lambda: heard.put("alive"))
    assert heard.get(timeout=PATIENCE) == "alive"
    assert len(said) == 1
    loop.write(15)
    assert heard.get(timeout=PATIENCE) == ("signal", bytes([15]))
    ours.close()
    theirs.close()


def test_a_hearer_that_fails_hears_the_next_signal(monkeypatch):
    monkeypatch.setattr(fail_open, "say", lambda text: None)
    heard = queue.SimpleQueue()

    def hear(data):
        heard.put(data)
        raise ValueError("a hearer")

    loop = loops.Loop(hear, heard.put, lambda: None)
    for signum in (15, 10):
        loop.write(signum)
        assert heard.get(timeout=PATIENCE) == bytes([signum])
    loop.close()


def test_nothing_is_left_of_it():
    before = open_files(), threads()
    for _ in range(20):
        loop = loops.Loop(print, print, print)
        loop.at(1000, print)
        loop.close()
        loop.close()
        assert not loop.running
        loop.write(15)
        loop.call(print)
    # Fewer: what an earlier test has left may end meanwhile.
    wait_until(lambda: open_files() <= before[0] and threads() <= before[1], "the threads' end")


def test_it_may_be_closed_on_its_own_thread(heard):
    before = open_files()
    loop = loops.Loop(print, heard.put, print)
    loop.call(loop.close)
    wait_until(lambda: open_files() == before, "its end")
    assert heard.empty()


def test_a_child_is_not_heard(loop, heard):
    """A forked child has the descriptors until its fork hooks run, or for ever where it has none."""
    pid = os.fork()
    if pid == 0:
        try:
            assert not loop.here and not loop.running
            loop.write(15)
            loop.forget()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    loop.write(10)
    assert heard.get(timeout=PATIENCE) == ("signal", bytes([10]))
    assert loop.running


def test_a_closed_descriptor_is_said(heard):
    loop = loops.Loop(print, lambda error: heard.put(str(error)), print)
    os.close(loop.fd)
    assert "closed" in heard.get(timeout=PATIENCE)
    file = os.open("/dev/null", os.O_RDONLY)  # very likely of the same number
    loop.close()
    os.fstat(file)
    os.close(file)
