"""What of SLURM can be tried without one; the rest is in `tests/slurm`."""

import subprocess
from pathlib import Path

SLURM = Path(__file__).parents[2] / "docker" / "slurm"


def test_the_batch_script_is_a_script():
    for path in SLURM.iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "=USR1" not in (SLURM / "train.sbatch").read_text()
