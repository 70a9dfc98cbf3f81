"""One look at the libraries, among the quick tests, where `make nccl` has made its environment."""

import subprocess

import pytest
from harness import TESTS

from nccl import build

ENVIRONMENT = TESTS.parent / ".venv-nccl"
PROGRAM = """
import torch
weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
optimizer = torch.optim.SGD([weight], lr=0.5)
(weight * 3).sum().backward()
optimizer.step()
print(weight.tolist(), torch.cuda.get_device_name())
"""


def test_an_optimizer_step_on_the_libraries():
    sites = list(ENVIRONMENT.glob("lib/python*/site-packages"))
    if not sites or not build.folder_of(sites[0]).exists():
        pytest.skip("`make nccl` has made no environment here, or has not built these sources")
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", PROGRAM],
        env={"LD_PRELOAD": build.preload(build.build(sites[0]))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split("\n")[0] == "[-0.5, -0.5, -0.5, -0.5] Simulated H100", done.stderr
