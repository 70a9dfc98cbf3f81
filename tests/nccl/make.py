"""`make nccl`: makes an environment with a CUDA build of torch, builds the libraries, and runs what needs no GPU there.

    python make.py ENVIRONMENT [PYTEST ARGUMENTS]

NCCL_TORCH is the version of torch. Where something is missing (Python 3.11, a compiler, the wheel) it says so, and
exits 0, as a skipped test does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from nccl import build  # noqa: E402

TORCH = os.environ.get("NCCL_TORCH", "2.14.1")
PYTHON = "3.11"
PACKAGES = [
    f"torch=={TORCH}",
    "numpy",
    "wrapt>=1.14,<3",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "jsonschema",
    "ray",
]


def skip(why):
    print(f"make nccl: skipped: {why}")
    raise SystemExit(0)


def interpreter():
    """The first python3.11 that runs: a version manager may have a name without a Python behind it."""
    for folder in os.get_exec_path():
        found = Path(folder) / f"python{PYTHON}"
        if (
            found.exists()
            and subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0
        ):
            return found
    return skip(f"there is no Python {PYTHON} on the PATH")


def environment(folder):
    """Make it, if it is not there (5.5 GB); return its Python."""
    python, stamp, wanted = folder / "bin" / "python", folder / ".has", "\n".join(PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if not shutil.which("g++"):
        skip("there is no g++ on the PATH, and the libraries that stand for CUDA and NCCL are C++")
    if not stamp.exists():
        subprocess.run([interpreter(), "-m", "venv", "--clear", folder], check=True)
    if subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES]
    ).returncode:
        shutil.rmtree(folder)
        skip(f"pip finds no torch {TORCH} for CUDA, or not all of {' '.join(PACKAGES[1:])}")
    stamp.write_text(wanted)
    return python


def main(folder, *arguments):
    python = environment(Path(folder).absolute())
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    try:
        build.build(site)
    except build.CannotBuild as reason:
        skip(reason)
    options = ["-p", "nccl.plugin", "-o", "addopts=-ra"]
    command = [python, "-m", "pytest", *options, *(arguments or ("tests/gpu", "tests/nccl"))]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(HERE.parent)}).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
