"""How many of torchrun's restarts after evictions are free: what `before_restart` makes of torch's own counters."""

from types import SimpleNamespace

import pytest

from autoteardown.launchers import elastic_agent


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(elastic_agent, "monotonic", lambda: now[0])
    return now


def restart(launcher, agent, evicted):
    """As torch does: the restart is paid for first."""
    agent._remaining_restarts -= 1
    launcher.evicted = evicted
    launcher.before_restart(agent, agent.group)


@pytest.fixture
def agent():
    spec = SimpleNamespace(max_restarts=20)
    return SimpleNamespace(
        _remaining_restarts=20, group=SimpleNamespace(state=SimpleNamespace(name="FAILED"), spec=spec)
    )


def test_five_an_hour_are_free(clock, agent, capfd):
    launcher = elastic_agent.Launcher()
    left = []
    for _ in range(7):
        restart(launcher, agent, evicted=True)
        left.append(agent._remaining_restarts)
        clock[0] += 60
    assert left == [20, 20, 20, 20, 20, 19, 18]
    assert agent.group.spec.max_restarts == 25  # so that the number of the attempt still grows
    assert capfd.readouterr().err.count("one was used up, after 5 evictions within an hour") == 2
    clock[0] += 3600
    restart(launcher, agent, evicted=True)
    assert agent._remaining_restarts == 18


def test_evictions_far_apart_are_all_free(clock, agent):
    launcher = elastic_agent.Launcher()
    for _ in range(20):
        restart(launcher, agent, evicted=True)
        clock[0] += 721
    assert agent._remaining_restarts == 20


def test_failures_are_never_free(clock, agent):
    launcher = elastic_agent.Launcher()
    restart(launcher, agent, evicted=False)
    agent.group.state.name = "UNHEALTHY"
    restart(launcher, agent, evicted=True)
    assert (agent._remaining_restarts, agent.group.spec.max_restarts) == (18, 20)
