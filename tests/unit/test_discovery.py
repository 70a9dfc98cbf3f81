"""When a rank without its hub tries again, in virtual time: the hub relies on these times."""

from types import SimpleNamespace

import pytest

from autoteardown.channel import discovery, hub
from autoteardown.channel.connection import Connection
from autoteardown.channel.rendezvous import STORE_CLOSED


class VirtualClock:
    """A loop whose timers are called one after another, at once."""

    def __init__(self):
        self.now = 0.0
        self._timers = []

    def at(self, wait, call):
        timer = SimpleNamespace(due=self.now + wait, call=call)
        timer.cancel = lambda: timer in self._timers and self._timers.remove(timer)
        self._timers.append(timer)
        return timer

    def run(self, until):
        while self._timers and min(timer.due for timer in self._timers) <= until:
            timer = min(self._timers, key=lambda each: each.due)
            self._timers.remove(timer)
            self.now = timer.due
            timer.call()


def tries(monkeypatch, seconds, waiting=False):
    """Times at which a rank tries in vain to reach a hub whose address it has."""
    clock, found = VirtualClock(), []

    def dial(loop, address, hello, finished):
        found.append(clock.now)
        finished(None, 0, [], "refused")

    monkeypatch.setattr(discovery, "Connector", dial)
    client = SimpleNamespace(connected=False, waiting=waiting)
    one = discovery.Discovery(clock, SimpleNamespace(look=lambda done: True), client, 4096)
    one.address = object()
    one.start()
    clock.run(seconds)
    return found


def longest(times):
    return max(after - before for before, after in zip(times, times[1:]))


def test_who_could_not_reach_the_hub_for_a_while_is_back_before_it_counts_as_dead(monkeypatch):
    """`hub.DEAD_AFTER`: for half of that time; its tries are spread at random."""
    for _ in range(100):
        assert longest(tries(monkeypatch, 3 * hub.DEAD_AFTER)) < hub.DEAD_AFTER / 2 - hub.RECONNECT_SECONDS


def test_in_an_eviction_it_tries_often(monkeypatch):
    assert longest(tries(monkeypatch, 60, waiting=True)) < 1


def test_a_job_without_a_hub_is_not_kept_busy(monkeypatch):
    """A day of it."""
    assert len(tries(monkeypatch, 86400)) < 5000


def test_after_rank_0_has_left_it_looks_for_another_for_a_minute():
    """Without haste: all ranks look in one store."""
    clock, looks = VirtualClock(), []
    clock.call = lambda function: clock.at(0.0, function)

    def look(done):
        looks.append(clock.now)
        done(None, "there is none")
        return True

    client = SimpleNamespace(connected=False, waiting=False)
    discovery.Discovery(clock, SimpleNamespace(look=look), client, 4096).after_rank_0_left()
    clock.run(86400)
    assert 40 < looks[-1] < 90
    assert len(looks) < 20


@pytest.mark.parametrize(
    "why, lost",
    [(STORE_CLOSED, True), ("rank 0 has not published its hub", False)],
    ids=["the store has gone", "a firewall"],
)
def test_rank_0_that_was_never_reached(why, lost):
    """A rank on its way to the hub hears of its end from the store only."""
    clock, heard = VirtualClock(), []
    clock.call = lambda function: clock.at(0.0, function)
    rendezvous = SimpleNamespace(look=lambda done: done(None, why) or True)
    Connection(clock, rendezvous, 1, 2, lambda kind, value: heard.append((kind, value))).start()
    clock.run(60)
    assert heard == ([("lost", 0)] if lost else [])
