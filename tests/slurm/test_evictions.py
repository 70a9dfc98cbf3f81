"""What happens to a training job with the agent: by the shape of its batch script, and by what happens to it."""

import shutil
import signal

import pytest
from events import EVENTS
from harness import wait_until
from jobs import SHAPES, both_saved, environment, over, ranks_left, saved, trains

KILL_WAIT = 20
GRACE = 15


def start(cluster, shape, event, train, grace=GRACE, **env):
    """A job that trains, with what it needs for the event."""
    job = cluster.submit(
        f"#!/bin/bash\n{SHAPES[shape]}\n",
        "--nodes=2", "--ntasks-per-node=1", "--time=5", *EVENTS[event].options,
        env=environment(cluster, train, grace, **env),
    )  # fmt: skip
    trains(job)
    return job


def evicted(cluster, shape, event, train, **options):
    """The same, after the event and its end."""
    job = start(cluster, shape, event, train, **options)
    EVENTS[event].happen(cluster, job)
    over(job)
    wait_until(lambda: not ranks_left(cluster), "the ranks' end")
    return job


def check_saved(cluster, job):
    assert both_saved(cluster), f"saved: {saved(cluster)}\n{job.transcript()}"


# What SLURM makes of a job whose ranks have saved and left with 0. (torchrun: with 1.)
STATES = {
    "scancel": {"CANCELLED"},
    "scontrol requeue": {"PENDING"},
    "time limit": {"TIMEOUT"},
    "preempted": {"PENDING"},
    # Nothing but the exit code counts in these, since SLURM has only announced the end. (PENDING: on a busy machine
    # torchrun has not ended when GraceTime is over, and SLURM then preempts the job itself.)
    "preempted with GraceTime": {"COMPLETED", "FAILED", "PENDING"},
    "--signal=TERM@": {"COMPLETED", "FAILED"},
    "scancel -s TERM": {"COMPLETED", "FAILED"},
}


@pytest.mark.slurm
@pytest.mark.parametrize("event", STATES)
@pytest.mark.parametrize("shape", ["srun", "exec srun", "srun torchrun"])
def test_all_ranks_save(cluster_of, shape, event):
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = evicted(cluster, shape, event, "polls")
    check_saved(cluster, job)
    assert job.state in STATES[event]


@pytest.mark.slurm
@pytest.mark.parametrize("shape", ["srun", "srun torchrun"])
def test_a_launcher_without_a_handler_costs_the_checkpoint(cluster_of, shape):
    """`scancel -f -s TERM` reaches srun. The ranks may get it, too, a moment before SIGKILL: no save is that quick.

    On a busy machine the job's end can come first, and its KillWait leaves the ranks the time: so up to three times.
    """
    cluster = cluster_of(kill_wait=60)
    for _ in range(3):
        evicted(cluster, shape, "scancel -f -s TERM", "polls slow", grace=55)
        if not saved(cluster):
            return
        shutil.rmtree(cluster.folder / "saved")
    raise AssertionError("saved three times")


@pytest.mark.slurm
@pytest.mark.parametrize("proctrack", ["cgroup", "linuxproc"])
def test_a_shell_as_a_task(cluster_of, proctrack):
    """It dies of the signal. With proctrack/cgroup it alone gets it, and SLURM kills the rank. The save takes 35 s."""
    cluster = cluster_of(kill_wait=60, proctrack=proctrack)
    job = evicted(cluster, "srun a shell", "scancel", "polls slow", grace=55)
    if proctrack == "cgroup":
        assert saved(cluster) == {}, job.transcript()
    else:
        check_saved(cluster, job)


@pytest.mark.slurm
@pytest.mark.parametrize("shape", ["torchrun", "exec torchrun"])
@pytest.mark.parametrize("proctrack", ["cgroup", "linuxproc"])
def test_torchrun_in_the_script(cluster_of, shape, proctrack):
    """With proctrack/cgroup SLURM signals the shell alone, which ends of it, and then everything is killed."""
    cluster = cluster_of(kill_wait=KILL_WAIT, proctrack=proctrack)
    job = evicted(cluster, shape, "scancel", "polls")
    if shape == "torchrun" and proctrack == "cgroup":
        assert saved(cluster) == {}, job.transcript()
    else:
        check_saved(cluster, job)


@pytest.mark.slurm
@pytest.mark.parametrize("event", ["--signal=TERM@", "preempted with GraceTime"])
def test_torchrun_in_the_script_gets_no_notice(cluster_of, event):
    """Announcements reach the processes of steps; the script has none. The end itself it gets as in the test above."""
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = start(cluster, "exec torchrun", event, "polls")
    EVENTS[event].happen(cluster, job)
    if event == "preempted with GraceTime":
        over(job)
        assert "DUE TO PREEMPTION" in job.output
    else:
        wait_until(lambda: over(job) == "TIMEOUT", "the time limit")
    check_saved(cluster, job)


@pytest.mark.slurm
def test_usr1_as_early_notice(cluster_of):
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = evicted(cluster, "exec srun", "--signal=USR1@", "polls", AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1")
    check_saved(cluster, job)


@pytest.mark.slurm
def test_usr1_for_the_script_ends_the_job(cluster_of):
    """A shell without a handler dies of it, and the job ends long before its time; its ranks get SIGTERM then."""
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = evicted(cluster, "srun", "--signal=B:USR1@", "polls", AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1")
    assert (job.state, job.show("ExitCode")) == ("FAILED", f"0:{signal.SIGUSR1}")
    assert "SIGUSR1: " not in job.output


@pytest.mark.slurm
def test_suspended_and_resumed_it_trains_on(cluster_of):
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = start(cluster, "srun", "scontrol suspend", "polls")
    EVENTS["scontrol suspend"].happen(cluster, job)
    job.wait_for_state("SUSPENDED")
    cluster.command("scontrol", "resume", job)
    trains(job)
    assert "evicted" not in job.output and "SIGTERM" not in job.output


@pytest.mark.slurm
@pytest.mark.parametrize("kill_on_bad_exit", [False, True])
def test_a_rank_that_is_killed_frees_its_peer(cluster_of, kill_on_bad_exit):
    """SLURM leaves the other alone without -K, and with gloo it sees the closed connection; nobody saves."""
    cluster = cluster_of(kill_wait=KILL_WAIT)
    job = start(cluster, "srun", "scancel", "polls", SLURM_KILL_BAD_EXIT=str(int(kill_on_bad_exit)))
    cluster.command("kill", "-KILL", job.pid_of_rank(0))
    assert over(job) == "FAILED"
    wait_until(lambda: not ranks_left(cluster), "the ranks' end")
    assert saved(cluster) == {}


# -- what SLURM has shown to be wrong, and what still is --------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.parametrize("event", ["time limit", "preempted"])
def test_two_sigterms_are_one_eviction(cluster_of, event):
    cluster = cluster_of(kill_wait=KILL_WAIT)
    check_saved(cluster, evicted(cluster, "srun", event, "flag uneven"))


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["polls", "flag", "callback"])
def test_workers_outlive_the_signal(cluster_of, how):
    cluster = cluster_of(kill_wait=KILL_WAIT)
    check_saved(cluster, evicted(cluster, "srun", "scancel", f"{how} workers"))


@pytest.mark.slurm
def test_torchrun_waits_as_long_as_the_grace_period(cluster_of):
    cluster = cluster_of(kill_wait=70)
    check_saved(cluster, evicted(cluster, "srun torchrun", "scancel -s TERM", "callback slow", grace=60))


@pytest.mark.slurm
def test_torchrun_returns_what_the_settings_say(cluster_of):
    job = evicted(cluster_of(kill_wait=KILL_WAIT), "srun torchrun", "scancel -s TERM", "callback")
    assert job.show("ExitCode") == "143:0", job.transcript()


@pytest.mark.slurm
def test_torchrun_passes_usr1_on(cluster_of):
    job = evicted(cluster_of(kill_wait=KILL_WAIT), "srun torchrun", "--signal=USR1@", "callback",
                  AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1")  # fmt: skip
    check_saved(job.cluster, job)
    assert job.show("ExitCode") == f"{128 + signal.SIGUSR1}:0", job.transcript()


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["polls", "flag"])
def test_a_half_trained_job_is_not_completed(cluster_of, how):
    job = evicted(cluster_of(kill_wait=KILL_WAIT), "exec srun", "scancel -s TERM", how)
    assert (job.state, job.show("ExitCode")) == ("FAILED", "143:0"), job.transcript()
