"""Which process of a job gets which signal when: the table of docs/slurm.md, row by row. No agent, no torch."""

import re
import sys
import time
from pathlib import Path

import pytest
from events import EVENTS
from harness import wait_until

RECORDER = f"{sys.executable} {Path(__file__).with_name('recorder.py')}"

# The batch script is a recorder, and the parent of srun, whose tasks are recorders.
SCRIPT = f"""#!/bin/bash
srun --ntasks=2 {{options}} bash -c 'exec {RECORDER} task$SLURM_PROCID {{family}}' &
echo srun $!
exec {RECORDER} batch
"""


class Recorded:
    """A job of recorders that runs."""

    def __init__(self, cluster, options=(), srun="", family=""):
        self.cluster = cluster
        self.folder = cluster.folder / "records"
        self.folder.mkdir(mode=0o777)
        script = SCRIPT.format(options=srun, family=family)
        self.job = cluster.submit(
            script, "--ntasks=2", "--time=5", *options, env={"RECORDS": str(self.folder)}
        )
        names = (
            "batch",
            "task0",
            "task1",
            *(f"task{n}-{kind}" for n in "01" for kind in ("child", "session") if family),
        )
        self._until(lambda: all(self._alive(name).exists() for name in names), f"{names}")
        self.since = time.time()

    def _alive(self, name):
        return self.folder / f"{name}.alive"

    def _lines(self, name):
        return [line.split() for line in (self.folder / name).read_text().splitlines()]

    def signals(self, name):
        """The names of those that it got, in their order."""
        return [words[1] for words in self._lines(name) if words[1] != "pid"]

    def when(self, name, number):
        """When it got its n-th, in seconds since the event."""
        return float([words for words in self._lines(name) if words[1] != "pid"][number][0]) - self.since

    def pid(self, name):
        """In the cluster."""
        return self._lines(name)[0][2]

    def happen(self, event):
        self.since = time.time()
        event.happen(self.cluster, self.job)

    def _until(self, condition, what):
        try:
            wait_until(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.transcript()}") from None

    def wait(self, name, *signals):
        """Wait until it has got these. SLURM may send SIGCONT before the other or after it."""
        self._until(lambda: sorted(self.signals(name)) == sorted(signals), f"{name} to get {signals}")

    def killed(self, name):
        """Wait until it is dead (it ends of SIGKILL alone); give the seconds since the event."""
        alive = self._alive(name)
        self._until(lambda: time.time() - alive.stat().st_mtime > 2, f"the end of {name}")
        return alive.stat().st_mtime - self.since

    def live(self, name):
        return time.time() - self._alive(name).stat().st_mtime < 2

    def transcript(self):
        texts = [f"{path.name}: {path.read_text()}" for path in sorted(self.folder.iterdir())]
        return "\n".join((*texts, self.job.output))


TERMINATED = ["CONT", "TERM"]
TWICE = ["TERM", "CONT", "TERM"]  # within 2 to 120 ms

# Event: what the tasks get, what the batch script gets, what becomes of the job.
ENDS_AFTER_KILL_WAIT = {
    "scancel": (TERMINATED, TERMINATED, "CANCELLED"),
    "scancel -f": (TERMINATED, TERMINATED, "CANCELLED"),
    "scontrol requeue": (TERMINATED, TERMINATED, "PENDING"),
    "node down": (TERMINATED, TERMINATED, "PENDING"),
    "time limit": (TWICE, TERMINATED, "TIMEOUT"),
    "preempted": (TWICE, TERMINATED, "PENDING"),
}
QUICK = {"scancel"}


@pytest.mark.parametrize(
    "event",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slurm) for each in ENDS_AFTER_KILL_WAIT],
)
def test_sigterm_and_sigkill_after_kill_wait(cluster, event):
    tasks, batch, state = ENDS_AFTER_KILL_WAIT[event]
    recorded = Recorded(cluster, EVENTS[event].options)
    recorded.happen(EVENTS[event])
    for name in ("task0", "task1"):
        recorded.wait(name, *tasks)
    recorded.wait("batch", *batch)
    for name in ("task0", "task1", "batch"):
        assert recorded.killed(name) - recorded.when(name, -1) > cluster.kill_wait - 3, recorded.transcript()
    recorded.job.wait_for_state(state)


@pytest.mark.slurm
@pytest.mark.parametrize("event", ["preempted with GraceTime", "preempted with GraceTime, cancelled"])
def test_grace_time_comes_before_kill_wait(cluster, event):
    recorded = Recorded(cluster, EVENTS[event].options)
    recorded.happen(EVENTS[event])
    recorded.wait("task0", *TERMINATED)
    assert recorded.signals("batch") == []
    recorded.wait("task0", *TERMINATED, *TWICE)
    recorded.wait("batch", *TERMINATED)
    assert recorded.when("task0", 2) - recorded.when("task0", 1) > cluster.grace_time - 3, (
        recorded.transcript()
    )
    assert recorded.killed("task0") - recorded.when("task0", -1) > cluster.kill_wait - 3, (
        recorded.transcript()
    )
    recorded.job.wait_for_state("PENDING" if event == "preempted with GraceTime" else "PREEMPTED")


# -- signals that somebody asks for ------------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("event", "tasks", "batch"),
    [
        ("--signal=TERM@", ["CONT", "TERM"], []),
        ("--signal=USR1@", ["CONT", "USR1"], []),
        ("--signal=B:USR1@", [], ["CONT", "USR1"]),
        ("scancel -s TERM", ["TERM"], []),
        ("scancel -b -s TERM", [], ["TERM"]),
    ],
)
def test_signals_that_were_asked_for(cluster, event, tasks, batch):
    recorded = Recorded(cluster, EVENTS[event].options)
    recorded.happen(EVENTS[event])
    for name in ("task0", "task1"):
        recorded.wait(name, *tasks)
    recorded.wait("batch", *batch)
    time.sleep(3)
    assert all(map(recorded.live, ("task0", "task1", "batch"))), recorded.transcript()
    assert (sorted(recorded.signals("task0")), sorted(recorded.signals("batch"))) == (tasks, batch)
    assert recorded.job.state == "RUNNING"


def killed_at_once(recorded):
    """Long before KillWait."""
    for name in ("task0", "task1"):
        assert recorded.killed(name) < recorded.cluster.kill_wait / 2, recorded.transcript()


@pytest.mark.slurm
def test_scancel_f_s_term_kills_the_tasks(cluster):
    """It reaches srun as well, which dies of it; SLURM then ends the step."""
    recorded = Recorded(cluster)
    recorded.happen(EVENTS["scancel -f -s TERM"])
    killed_at_once(recorded)
    assert "TERM" in recorded.signals("batch") and recorded.live("batch")


@pytest.mark.slurm
@pytest.mark.parametrize("signal", ["TERM", "HUP", "KILL"])
def test_a_signal_to_srun_kills_the_tasks(cluster, signal):
    recorded = Recorded(cluster)
    recorded.since = time.time()
    cluster.command("kill", f"-{signal}", re.search(r"^srun (\d+)", recorded.job.output, re.M)[1])
    killed_at_once(recorded)


# -- one task of several -----------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_the_others_run_on_when_one_task_is_killed(cluster):
    recorded = Recorded(cluster)
    cluster.command("kill", "-KILL", recorded.pid("task0"))
    recorded.killed("task0")
    time.sleep(3)
    assert recorded.live("task1") and recorded.signals("task1") == []


@pytest.mark.slurm
def test_with_kill_on_bad_exit_they_are_ended(cluster):
    recorded = Recorded(cluster, srun="-K")
    recorded.since = time.time()
    cluster.command("kill", "-KILL", recorded.pid("task0"))
    recorded.wait("task1", *TERMINATED)
    assert recorded.killed("task1") - recorded.when("task1", -1) > cluster.kill_wait - 3, (
        recorded.transcript()
    )


@pytest.mark.slurm
def test_suspend_and_resume(cluster):
    recorded = Recorded(cluster)
    recorded.happen(EVENTS["scontrol suspend"])
    recorded.wait("task0", "TSTP")
    wait_until(lambda: not recorded.live("task0"), "SIGSTOP, which follows two seconds later")
    cluster.command("scontrol", "resume", recorded.job)
    recorded.wait("task0", "TSTP", "CONT")
    assert recorded.live("task1")


# -- which processes of a task -----------------------------------------------------------------------------------------

REACHED = {"linuxproc": ("child", "session"), "pgid": ("child",), "cgroup": ()}


@pytest.mark.slurm
@pytest.mark.parametrize("proctrack", REACHED)
def test_processes_of_a_task(cluster_of, proctrack):
    """The task itself always; a child in its process group, and one in a session of its own, by `ProctrackType`."""
    recorded = Recorded(cluster_of(proctrack=proctrack), family="family")
    recorded.happen(EVENTS["scancel -s TERM"])
    recorded.wait("task0", "TERM")
    for kind in ("child", "session"):
        recorded.wait(f"task0-{kind}", *(["TERM"] if kind in REACHED[proctrack] else []))
    time.sleep(2)
    assert [kind for kind in ("child", "session") if recorded.signals(f"task0-{kind}")] == list(
        REACHED[proctrack]
    )
