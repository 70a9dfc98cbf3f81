"""Whose handler a signal is for, in the orders that no test of real processes can bring about at will."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from autoteardown.rank.eviction_owner import EvictionOwner
from autoteardown.rank.main_thread import MainThread
from autoteardown.training import gate

SIGNUM = signal.SIGTERM


@pytest.fixture
def called():
    """What the application's handler was called with."""
    return []


@pytest.fixture
def main(called):
    """Of a rank of a world of one, whose program has a handler; it has been signalled, and its stop is under way."""
    armed = SimpleNamespace(
        settings=SimpleNamespace(yield_seconds=10.0, handlers="together", signals=(SIGNUM,)),
        interceptor=SimpleNamespace(application_owns=lambda signum: True),
        listener=SimpleNamespace(deliver=called.append),
        joined=True,
        channel=None,
        signum=SIGNUM,
        teardown=SimpleNamespace(committed=False, leaving=False, also_signalled=lambda signum, sure: None),
        gate=gate.Gate(lambda event: None),
    )
    return MainThread(armed, EvictionOwner(armed))


def trampoline(main, called):
    """What the tap does when Python's handler is called."""
    if not main.on_signal(SIGNUM):
        called.append(SIGNUM)


def test_the_driver_is_faster_than_python_s_handler(main, called):
    """On a busy machine its doorbell is answered first: one signal, one call."""
    main.deliver(SIGNUM)
    trampoline(main, called)
    assert called == [SIGNUM]


def test_python_s_handler_is_faster(main, called):
    trampoline(main, called)
    main.deliver(SIGNUM)
    assert called == [SIGNUM]


def test_a_second_signal_is_the_application_s(main, called):
    main.deliver(SIGNUM)
    trampoline(main, called)
    trampoline(main, called)
    assert called == [SIGNUM, SIGNUM]
