"""Whose handler a signal is for, in orders of events that real processes cannot produce at will."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest

from autoteardown.rank import repeated_signals
from autoteardown.rank.eviction_owner import EvictionOwner
from autoteardown.rank.main_thread import MainThread
from autoteardown.rank.repeated_signals import RepeatedSignals
from autoteardown.settings import SAME_EVICTION
from autoteardown.training import gate

SIGNUM = signal.SIGTERM


@pytest.fixture
def called():
    """What the application's handler was called with."""
    return []


@pytest.fixture
def clock(monkeypatch):
    """The clock of repeated signals."""
    found = SimpleNamespace(now=100.0, while_asleep=lambda: None)
    monkeypatch.setattr(repeated_signals, "monotonic", lambda: found.now)
    monkeypatch.setattr(repeated_signals, "sleep", lambda seconds: found.while_asleep())
    return found


@pytest.fixture
def main(called):
    """Of a rank of a world of one, whose program has a handler; it has been signalled, and its stop is under way."""
    armed = SimpleNamespace(
        settings=SimpleNamespace(yield_seconds=10.0, handlers="together", signals=(SIGNUM,)),
        interceptor=SimpleNamespace(application_owns=lambda signum: True),
        listener=SimpleNamespace(deliver=called.append, loop=None),
        joined=True,
        channel=None,
        signum=SIGNUM,
        teardown=SimpleNamespace(committed=False, leaving=False, also_signalled=lambda signum, sure: None),
        gate=gate.Gate(lambda event: None),
    )
    return MainThread(armed, EvictionOwner(armed), RepeatedSignals())


def trampoline(main, called):
    """What the interceptor does when Python's handler is called."""
    if not main.on_signal(SIGNUM):
        called.append(SIGNUM)


def test_the_driver_is_faster_than_python_s_handler(main, called):
    """On a busy machine the interrupt of the main thread is handled first: one signal, one call."""
    main.deliver(SIGNUM)
    trampoline(main, called)
    assert called == [SIGNUM]


def test_python_s_handler_is_faster(main, called):
    trampoline(main, called)
    main.deliver(SIGNUM)
    assert called == [SIGNUM]


def test_a_second_signal_is_the_application_s(main, called, clock):
    main.deliver(SIGNUM)
    trampoline(main, called)
    clock.now += SAME_EVICTION
    trampoline(main, called)
    assert called == [SIGNUM, SIGNUM]


def test_a_repetition_is_the_same_eviction(main, called, clock):
    """SLURM's time limit: TERM, CONT, TERM."""
    main.deliver(SIGNUM)
    trampoline(main, called)
    clock.now += 0.02
    trampoline(main, called)
    assert called == [SIGNUM]


def test_a_repetition_on_top_of_the_first(main, called, monkeypatch):
    """Python calls the handler of the second signal while that of the first has hardly begun."""
    main._armed.channel = object()  # there are peers: the handler is called later, at the agreed iteration

    def monotonic():
        monkeypatch.setattr(repeated_signals, "monotonic", lambda: 100.0)
        trampoline(main, called)
        return 100.0

    monkeypatch.setattr(repeated_signals, "monotonic", monotonic)
    trampoline(main, called)
    assert called == [] and repeated_signals.monotonic is not monotonic


@pytest.fixture
def repeats(clock):
    return repeated_signals.RepeatedSignals()


def test_the_time_of_the_arrival_counts(repeats, clock):
    """The main thread was in C when the repetition came."""
    assert not repeats.handled(None)
    assert not repeats.arrived()
    clock.now += 0.02
    assert repeats.arrived()
    clock.now += 30
    assert repeats.handled(None)
    assert not repeats.arrived()
    assert not repeats.handled(None)


def test_a_signal_that_the_loop_thread_has_not_read_yet(repeats, clock):
    assert not repeats.handled(None)
    assert not repeats.arrived()
    clock.now += SAME_EVICTION + 1
    clock.while_asleep = repeats.arrived
    assert not repeats.handled(None)


def test_a_program_that_raises_the_signal_again_means_it(repeats, clock):
    def ends(raised=False):
        if raised:
            signal.raise_signal(SIGNUM)
        return sys._getframe()

    assert not repeats.handled(None)
    assert not repeats.arrived()
    assert not repeats.handled(ends())
