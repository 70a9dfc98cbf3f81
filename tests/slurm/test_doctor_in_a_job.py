"""The commands in a real job: `doctor` asks SLURM what time a rank will have, `ps` and `drain` find the job's ranks."""

import json

import pytest
from jobs import BIN, SHAPES, both_saved, environment, over, trains


def examine(cluster, script, *options, grace=25):
    """Doctor's findings, by area."""
    env = environment(cluster, "", grace, container="podman")
    job = cluster.submit(f"#!/bin/bash\n{script} > doctor.json\n", *options, env=env)
    job.wait_for_state("COMPLETED", "FAILED")
    report = json.loads((cluster.folder / "doctor.json").read_text())
    return [finding for finding in report["findings"] if finding["area"] in ("SLURM", "PID 1")]


def test_the_shortest_time_of_a_step(cluster_of):
    """Not what `--signal` gives: SIGKILL comes KillWait after scancel all the same."""
    cluster = cluster_of(kill_wait=12)
    words = f"srun {BIN}/autoteardown doctor --json"
    pid_1, slurm = examine(cluster, words, "--signal=TERM@120", grace=110)
    assert (pid_1["level"], slurm["level"]) == ("note", "problem")
    assert slurm["text"].startswith("AUTOTEARDOWN_GRACE=110, and KillWait is 12 s")
    assert slurm["advice"] == "export AUTOTEARDOWN_GRACE=7"


@pytest.mark.slurm
def test_the_partitions_grace_time(cluster_of):
    cluster = cluster_of(kill_wait=30, grace_time=20)
    words = f"srun {BIN}/autoteardown doctor --json"
    _, slurm = examine(cluster, words, "--partition=requeue_grace")
    assert slurm["text"].startswith("AUTOTEARDOWN_GRACE=25, and GraceTime of the partition is 20 s")
    assert slurm["advice"] == "export AUTOTEARDOWN_GRACE=15"
    _, slurm = examine(cluster, words, "--partition=requeue")
    assert (slurm["level"], slurm["text"]) == (
        "ok",
        "KillWait is 30 s, and AUTOTEARDOWN_GRACE is 25: it fits",
    )


@pytest.mark.slurm
def test_a_batch_script_is_told_to_use_srun(cluster_of):
    found = examine(cluster_of(kill_wait=30), f"{BIN}/autoteardown doctor --json")
    assert found[-1]["advice"] == "start the ranks with srun"


@pytest.mark.slurm
def test_ps_and_drain_by_a_step_of_their_own(cluster_of):
    cluster = cluster_of(kill_wait=30)
    env = environment(cluster, "callback", 20)
    job = cluster.submit(
        f"#!/bin/bash\n{SHAPES['srun']}", "--nodes=2", "--ntasks-per-node=1", "--time=5", env=env
    )
    trains(job)
    step = ("srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", BIN / "autoteardown")
    listed = json.loads(cluster.command(*step, "ps", "--json", env=env))
    assert [(each["job"], each["world_size"]) for each in listed] == [(job.number, 2)] * 2
    # The batch script ends with its ranks, and SLURM then ends this step, too: its exit status says nothing.
    assert "2 of 2 left cleanly" in cluster.command(*step, "drain", "--job", job, check=False, env=env)
    over(job)
    assert both_saved(cluster), job.transcript()
