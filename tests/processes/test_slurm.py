"""What of SLURM can be tried without one; the rest is in `tests/slurm`."""

import signal
import subprocess
from pathlib import Path

SLURM = Path(__file__).parents[2] / "docker" / "slurm"


def test_the_batch_script_is_a_script():
    for path in SLURM.iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "=USR1" not in (SLURM / "train.sbatch").read_text()


def test_torchrun_dies_of_the_early_signal(job):
    """Why nobody is told to use SIGUSR1: SLURM signals torchrun, too, which has no handler for it."""
    torchrun = job.torchrun("train.py", ranks=1, AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1")
    torchrun.wait_for(" step ")
    torchrun.signal(signal.SIGUSR1)
    assert torchrun.wait() == -signal.SIGUSR1  # 138 for a shell
