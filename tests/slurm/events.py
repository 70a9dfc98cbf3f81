"""What can happen to a job, by its name in docs/slurm.md: how a test brings it about, and the options a job needs."""

from typing import Callable, NamedTuple


class Event(NamedTuple):
    """One of them."""

    happen: Callable[[object, object], object]  # with the cluster and the job
    options: tuple[str, ...] = ()


def command(*words):
    """An event that a command brings about; `J` is the job."""
    return lambda cluster, job: cluster.command(*(job.number if word == "J" else word for word in words))


def _end_soon(cluster, job):
    """The controller looks for time limits every 30 s; its resolution is a minute."""
    cluster.command("scontrol", "update", f"jobid={job}", "EndTime=now+1")


def _end_in_a_minute(cluster, job):
    """Inside of the @seconds of `--signal`."""
    cluster.command("scontrol", "update", f"jobid={job}", "EndTime=now+59")


def _somebody_urgent(cluster, job):
    """A job of more priority, that needs the same nodes; it stays until the test is over."""
    cluster.submit(
        "#!/bin/bash\nsleep 600\n", "--partition=urgent", "--nodes=2", "--exclusive", name="urgent"
    )


EVENTS = {
    "scancel": Event(command("scancel", "J")),
    "scancel -f": Event(command("scancel", "-f", "J")),
    "scontrol requeue": Event(command("scontrol", "requeue", "J")),
    "node down": Event(
        command("scontrol", "update", "nodename=n5", "state=down", "reason=test"), ("--partition=down",)
    ),
    "time limit": Event(_end_soon),
    "preempted": Event(_somebody_urgent, ("--partition=requeue",)),
    "preempted with GraceTime": Event(_somebody_urgent, ("--partition=requeue_grace",)),
    "preempted with GraceTime, cancelled": Event(_somebody_urgent, ("--partition=cancel_grace",)),
    "--signal=TERM@": Event(_end_in_a_minute, ("--signal=TERM@60",)),
    "--signal=USR1@": Event(_end_in_a_minute, ("--signal=USR1@60",)),
    "--signal=B:USR1@": Event(_end_in_a_minute, ("--signal=B:USR1@60",)),
    "scancel -s TERM": Event(command("scancel", "-s", "TERM", "J")),
    "scancel -b -s TERM": Event(command("scancel", "-b", "-s", "TERM", "J")),
    "scancel -f -s TERM": Event(command("scancel", "-f", "-s", "TERM", "J")),
    "scontrol suspend": Event(command("scontrol", "suspend", "J")),
}
