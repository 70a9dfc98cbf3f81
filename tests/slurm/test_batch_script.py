"""`docker/slurm/train.sbatch` as it is, on two nodes with a rank each: saved, and put back into the queue or not."""

import contextlib
import re
import time
from pathlib import Path

import pytest
from events import EVENTS
from jobs import TRAINING, both_saved, environment, over, saved, trains

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "docker" / "slurm" / "train.sbatch").read_text()


def submit(cluster, *options, train="callback"):
    """Two ranks instead of sixteen, and the early notice only where the event is one."""
    env = environment(cluster, str(TRAINING), 25)
    small = ("--ntasks-per-node=1", "--gpus-per-node=1", "--time=5", "--signal=CONT@1")
    return cluster.submit(SCRIPT, *small, *options, env=env, args=[train])


QUICK = {"scancel -s TERM"}  # announced as by --signal, which takes the controller half a minute longer
BROUGHT_BACK = [
    "scancel -s TERM",
    "--signal=TERM@",
    "time limit",
    "preempted",
    "preempted with GraceTime",
    "preempted with GraceTime, cancelled",
    "scontrol requeue",
    "node down",
]


@pytest.mark.parametrize(
    "event", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slurm) for each in BROUGHT_BACK]
)
def test_it_saves_and_goes_on_there(cluster_of, event):
    cluster = cluster_of(kill_wait=30)
    job = submit(cluster, *EVENTS[event].options)
    trains(job)
    EVENTS[event].happen(cluster, job)
    job.wait_for_state("PENDING")
    assert both_saved(cluster), f"saved: {saved(cluster)}\n{job.transcript()}"
    if event in QUICK:  # once is enough: SLURM lets it wait for two minutes
        (step,) = set(saved(cluster).values())
        # slurmctld sets the two minutes again when the job's last step has completed, which is after PENDING; and a job
        # that starts in the second of its own end fails ("Job credential revoked"). Less and less often: each update
        # keeps the controller from scheduling, for longer on a busy machine.
        for pause in (4, 6, 8, 16, 32, 64):
            time.sleep(4)
            cluster.command("scontrol", "update", f"jobid={job}", "StartTime=now", "TimeLimit=5", check=False)
            with contextlib.suppress(AssertionError):
                job.wait_for(f"begins at {step}\n", times=2, patience=pause)
                break
        trains(job)
        assert job.show("Restarts") == "1"
        # A user's own scancel is the end.
        EVENTS["scancel"].happen(cluster, job)
        assert over(job) == "CANCELLED"
        assert both_saved(cluster) and saved(cluster)[0] > step
        assert len(list((cluster.folder / f"reports-{job}").glob("*.json"))) == 4


@pytest.mark.slurm
def test_cancelled_it_saves_and_stays_away(cluster_of):
    cluster = cluster_of(kill_wait=30)
    job = submit(cluster)
    trains(job)
    EVENTS["scancel"].happen(cluster, job)
    assert over(job) == "CANCELLED"
    assert both_saved(cluster), job.transcript()
    assert job.show("Restarts") == "0"


@pytest.mark.slurm
def test_a_job_that_fails_by_itself_is_not_requeued(cluster):
    job = submit(cluster, train="fails")
    job.wait_for("begins at 0")
    assert over(job) == "FAILED"
    assert (job.show("ExitCode"), job.show("Restarts")) == ("3:0", "0")


@pytest.mark.slurm
@pytest.mark.parametrize("train", ["polls", "flag"])
def test_a_program_that_leaves_by_itself_is_requeued_too(cluster_of, train):
    cluster = cluster_of(kill_wait=30)
    job = submit(cluster, *EVENTS["--signal=TERM@"].options, train=train)
    trains(job)
    EVENTS["--signal=TERM@"].happen(cluster, job)
    assert over(job) == "PENDING", job.transcript()
    assert both_saved(cluster)


@pytest.mark.slurm
@pytest.mark.parametrize(("event", "state"), [("scancel -s TERM", "PENDING"), ("scancel", "CANCELLED")])
def test_requeue_exit_does_without_the_script(cluster_of, event, state):
    """`RequeueExit=143` in slurm.conf: every job that ends with that code, but none that was cancelled."""
    cluster = cluster_of(kill_wait=30, more="RequeueExit=143\n")
    script = SCRIPT.partition("# RUNNING: ")[0] + 'exit "$code"\n'
    assert 'requeue "' not in script
    env = environment(cluster, str(TRAINING), 25)
    job = cluster.submit(
        script, "--ntasks-per-node=1", "--gpus-per-node=1", "--time=5", env=env, args=["callback"]
    )
    trains(job)
    EVENTS[event].happen(cluster, job)
    assert over(job) == state, job.transcript()
    assert both_saved(cluster)


@pytest.mark.slurm
def test_torchrun_in_place_of_the_ranks(cluster_of):
    """As docs/slurm.md writes it: one torchrun a node, although the script asks for more tasks than that."""
    (line,) = re.findall(r"^srun [^`]*torchrun[^`]*", (ROOT / "docs" / "slurm.md").read_text(), re.M)
    line = line.replace("--nproc-per-node=8", "--nproc-per-node=1").replace("train.py", '"$TRAIN" "$@"')
    before, after = SCRIPT.partition("srun bash")[0], SCRIPT.partition("code=$?")[2]
    cluster = cluster_of(kill_wait=30)
    env = environment(cluster, str(TRAINING), 25)
    options = ("--ntasks-per-node=2", "--gpus-per-node=2", "--time=5", "--signal=CONT@1")
    job = cluster.submit(f"{before}{line}code=$?{after}", *options, env=env, args=["callback"])
    trains(job)
    EVENTS["scancel"].happen(cluster, job)
    assert over(job) == "CANCELLED"
    assert both_saved(cluster), job.transcript()


@pytest.mark.slurm
def test_gpus_per_task_shows_a_rank_one_gpu_alone(cluster):
    """Which is number 0 to it, whatever its LOCAL_RANK."""
    script = "#!/bin/bash\nsrun bash -c 'echo rank $SLURM_LOCALID sees $CUDA_VISIBLE_DEVICES.'\n"
    each, all_of_node = (
        cluster.submit(script, "--nodes=1", "--ntasks-per-node=2", option, name=name)
        for name, option in (("each", "--gpus-per-task=1"), ("all", "--gpus-per-node=2"))
    )
    each.wait_for(r"rank . sees \d+\.$", times=2)
    all_of_node.wait_for(r"rank . sees \d+,\d+\.$", times=2)
