"""Training jobs on a cluster: their scripts and their results."""

import os
import re
import sys
from pathlib import Path

from harness import wait_until

TRAINING = Path(__file__).with_name("training.py")
BIN = Path(sys.executable).parent
_TORCHRUN = f"{sys.executable} -m torch.distributed.run"
_RANK = (
    "bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; "
    f"exec {sys.executable} {TRAINING} $TRAIN'"
)
_TWO_NODES = (
    f"srun {_TORCHRUN} --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=n1:29400 "
    f"--rdzv-id=$SLURM_JOB_ID {TRAINING} $TRAIN"
)
_ONE_NODE = f"{_TORCHRUN} --standalone --nproc-per-node=2 {TRAINING} $TRAIN"

# The batch script, by what it starts.
SHAPES = {
    "srun": f"srun {_RANK}",
    "srun a shell": f"srun {_RANK.replace('exec ', '').replace(chr(36) + 'TRAIN', chr(36) + 'TRAIN; true')}",
    "exec srun": f"exec srun {_RANK}",
    "srun torchrun": _TWO_NODES.replace("n1:", "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):"),
    "torchrun": _ONE_NODE,
    "exec torchrun": f"exec {_ONE_NODE}",
}


def environment(cluster, train, grace, **changes):
    """What a job is submitted with."""
    env = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TRAIN": train,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "AUTOTEARDOWN": "1",
        "AUTOTEARDOWN_GRACE": str(grace),
        "AUTOTEARDOWN_EXIT_CODE": "signal",
        "AUTOTEARDOWN_RUNTIME_DIR": str(cluster.folder / "registry"),
    }
    return {**env, **changes}


def trains(job, ranks=2):
    """Wait until all its ranks have made some steps since it began."""
    since = len(job.output) if job.output else 0

    def stepping():
        assert job.state in ("PENDING", "RUNNING"), job.transcript()
        return len(set(re.findall(r"^rank (\d) pid \d+ step \d", job.output[since:], re.M))) == ranks

    wait_until(stepping, "a job that trains")


def ranks_left(cluster):
    """Pids in the cluster of ranks, and of DataLoader workers, that are still there."""
    return cluster.command("pgrep", "-f", f"{TRAINING}", check=False).split()


def over(job):
    """Wait until nothing of the job runs any more, whether it will be started again or not; give its state."""
    job.wait_for_state("PENDING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
    return job.state


def saved(cluster):
    """The step that each rank has saved."""
    return {int(path.name): int(path.read_text()) for path in (cluster.folder / "saved").glob("?")}


def both_saved(cluster):
    """Whether both ranks have, and the same step."""
    steps = saved(cluster)
    return len(steps) == 2 and steps[0] == steps[1] > 0
