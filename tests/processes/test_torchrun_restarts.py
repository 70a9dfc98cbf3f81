"""What torchrun makes of programs that evict themselves, end an eviction by themselves, or fail on another node."""

import os

import pytest
from harness import NONE, SIGTERM, free_port, wait_until
from test_launchers import OWN_STORE, listening
from test_torchrun import LINE, launcher_line, met, start

CODES = {"AUTOTEARDOWN_EXIT_CODE": "signal", "AUTOTEARDOWN_PEER_EXIT_CODE": 77}


def evicted(job, *what):
    """A torchrun without restarts, one of whose workers was evicted."""
    launcher = start(job, *what, **CODES)
    os.kill(met(2, launcher)[1], SIGTERM)
    launcher.wait()
    return launcher


@pytest.mark.parametrize("code, returned", [(143, 143), (3, 1)])
def test_a_handler_that_ends_the_program_is_an_eviction(job, code, returned):
    """Whatever code it has: one line, no traceback. torchrun returns the code if it is the one of the settings."""
    launcher = evicted(job, "exits", code)
    assert launcher.code == returned, launcher.transcript()
    assert launcher_line(launcher).startswith("its workers were evicted (exited with "), launcher.transcript()
    assert "ChildFailedError" not in launcher.stderr


def test_a_handler_that_raises_is_a_failure(job):
    """The exception of the program's own is reported as by plain torchrun."""
    launcher = evicted(job, "raises")
    assert launcher.code == 1, launcher.transcript()
    assert "ChildFailedError" in launcher.stderr and "exitcode  : 1" in launcher.stderr, launcher.transcript()
    assert LINE.findall(launcher.stderr) == []


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_program_that_evicts_itself_runs_out_of_restarts(job):
    """Five are free, and the one of --max-restarts: seven attempts."""
    options = ("--standalone", "--max-restarts=1")
    launcher = start(job, "loops", options=options, ranks=1, world=0, **CODES, **OWN_STORE)
    assert launcher.wait(600) == 143, launcher.transcript()
    assert launcher.stdout.count("rank 0 pid ") == 7, launcher.transcript()
    *free, paid, last = LINE.findall(launcher.stderr)
    assert [line.endswith("1 restarts are left") for line in free] == [True] * 5
    assert "0 restarts are left; one was used up" in paid and last.endswith("; exit 143")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["agent", NONE])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_crash_on_another_node_is_no_eviction(job, mode, restarts):
    """Both torchruns return 1 and neither says that its workers were evicted, as without the agent.

    One of two workers of the first node crashes, and torchrun signals the other.
    """
    port = free_port()
    nodes = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}"]
    nodes += ["--local-addr=127.0.0.1", f"--max-restarts={restarts}"]
    agents = []
    for _ in range(2):  # the first one hosts the rendezvous
        agents.append(start(job, "fails", options=nodes, ranks=2, world=4, mode=mode, **CODES, **OWN_STORE))
        wait_until(lambda: listening(port), "the rendezvous")
    met(4, *agents)
    (job.folder / "go").touch()
    assert [agent.wait() for agent in agents] == [1, 1], [agent.transcript() for agent in agents]
    assert [LINE.findall(agent.stderr) for agent in agents] == [[], []], [
        agent.transcript() for agent in agents
    ]
    # The other one may end with a RendezvousClosedError instead.
    assert any("ChildFailedError" in agent.stderr for agent in agents)
