"""What SLURM makes of a task's exit code, by what has happened: the table of docs/slurm.md. No agent, no torch."""

import pytest
from events import EVENTS

# Two tasks that end with this code when they get SIGTERM.
SCRIPT = """#!/bin/bash
trap : TERM
srun bash -c 'trap "exit {code}" TERM; echo ready; while :; do sleep 0.2; done'
exit $?
"""

ROWS = {
    "scancel": ("CANCELLED", "CANCELLED"),
    "time limit": ("TIMEOUT", "TIMEOUT"),
    "preempted": ("PENDING", "PENDING"),
    "scontrol requeue": ("PENDING", "PENDING"),
    "node down": ("PENDING", "PENDING"),
    "preempted with GraceTime": ("COMPLETED", "FAILED"),
    "--signal=TERM@": ("COMPLETED", "FAILED"),
    "scancel -s TERM": ("COMPLETED", "FAILED"),
}


@pytest.mark.slurm
@pytest.mark.parametrize("code", [0, 143])
@pytest.mark.parametrize("event", ROWS)
def test_the_state_of_the_job(cluster, event, code):
    """Where SLURM ends the job it knows why, and where it has only announced the end nothing but the code counts."""
    job = cluster.submit(
        SCRIPT.format(code=code), "--nodes=2", "--ntasks-per-node=1", "--time=5", *EVENTS[event].options
    )
    job.wait_for("^ready$", times=2)
    EVENTS[event].happen(cluster, job)
    state = job.wait_for_state(
        "PENDING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"
    )
    assert state == ROWS[event][code == 143], job.transcript()
