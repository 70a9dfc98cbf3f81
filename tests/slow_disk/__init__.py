"""A slow disk for whatever a test starts: a library for LD_PRELOAD, built when first asked for."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("slow_disk.c")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoteardown-tests"


def environment(folder, rate):
    """What makes the disk slow: `rate` bytes a second for all files below `folder`. Skips where nothing compiles it."""
    return {"LD_PRELOAD": str(_library()), "SLOW_DISK": str(folder), "SLOW_DISK_RATE": str(rate)}


def _library():
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("a slow disk needs a C compiler, and there is none on the PATH")
    made = CACHE / f"slow_disk-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        mine = made.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(mine), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        mine.replace(made)
    return made
