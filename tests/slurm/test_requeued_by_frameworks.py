"""submitit and Lightning requeue their jobs themselves, also with the agent; the second run goes on there."""

import re
import sys
from pathlib import Path

import pytest
from cluster import Batch
from events import EVENTS
from harness import wait_until
from jobs import environment, over, trains

pytestmark = [pytest.mark.slurm, pytest.mark.frameworks]
HERE = Path(__file__).parent


def again(cluster, job):
    """Start the second run now; return the step at which it begins."""
    job.wait_for_state("PENDING")
    assert job.show("Restarts") == "1"
    cluster.command("scontrol", "update", f"jobid={job}", "StartTime=now", "TimeLimit=5")
    begins = r"^rank 0 begins at ([1-9]\d*)$"
    return int(wait_until(lambda: re.search(begins, job.output, re.M), "the second run")[1])


def test_lightning(cluster_of):
    pytest.importorskip("lightning")
    cluster = cluster_of(kill_wait=30)
    script = f"#!/bin/bash\ntrap : TERM\nsrun {sys.executable} {HERE / 'requeued_lightning.py'}\n"
    event = EVENTS["--signal=USR1@"]
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=5", *event.options)
    job = cluster.submit(script, *options, env=environment(cluster, "", 25))
    trains(job)
    event.happen(cluster, job)
    job.wait_for_state("PENDING")
    assert len(list(cluster.folder.glob("hpc_ckpt_*.ckpt"))) == 1, job.transcript()
    assert again(cluster, job) > 0


class Submitted(Batch):
    """A job whose tasks write files of their own."""

    @property
    def output(self):
        return "".join(path.read_text() for path in sorted(self._output.glob(f"{self.number}_*_log.out")))


@pytest.fixture
def submitted(cluster_of):
    pytest.importorskip("submitit")
    cluster = cluster_of(kill_wait=30)
    env = environment(cluster, "", 25, AUTOTEARDOWN_REPORT_DIR=str(cluster.folder / "reports"))
    said = cluster.command(sys.executable, HERE / "requeued_submitit.py", env=env, cwd=cluster.folder)
    job = Submitted(cluster, said.split()[-1], cluster.folder / "submitit")
    trains(job)
    return cluster, job


def test_submitit(submitted):
    cluster, job = submitted
    EVENTS["--signal=TERM@"].happen(cluster, job)  # its own options say SIGUSR2
    assert again(cluster, job) > 0


def test_submitit_cancelled(submitted):
    """Its own SIGTERM handler only logs, and the job would train on until SIGKILL; the agent stops the ranks."""
    cluster, job = submitted
    EVENTS["scancel"].happen(cluster, job)
    assert over(job) == "CANCELLED"
    assert len(list((cluster.folder / "reports").glob("*Z.json"))) == 2
