"""A pytest plugin (`-p nccl.plugin`): every process that the tests start runs on the libraries of this folder.

The process of pytest itself does not, and needs no CUDA.
"""

import os
import sys
from importlib import util
from pathlib import Path

from nccl import build


def environment():
    """What a process needs to run on the libraries that stand for CUDA and NCCL.

    Raises:
        build.CannotBuild: there are none for this Python's torch.
    """
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        raise build.CannotBuild(f"{sys.executable} has no torch")
    site = Path(found.origin).parents[1]
    return {"LD_PRELOAD": build.preload(build.build(site)), "OMP_NUM_THREADS": "1"}


def pytest_configure():
    os.environ.update(environment())
