"""Evictions of Ray actors on torch's own ProcessGroupNCCL."""

import os
import re
import signal

import pytest
from harness import NONE, TESTS, alive, free_port, wait_until

from nccl.conftest import AGENT_PATH, START

pytest.importorskip("ray")


def test_two_actors(job, devices, libraries):
    """All stop after the same step, and release the group together."""
    env = {
        "AUTOTEARDOWN": "1",
        "AUTOTEARDOWN_GRACE": 25,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **devices.settings(devices="2"),
        **libraries,
    }
    launcher = ("env", f"PYTHONPATH={AGENT_PATH}")
    driver = job.start(str(TESTS / "nccl" / "ray_actors.py"), mode=NONE, fresh=True, launcher=launcher, **env)
    driver.wait_for("^training 1", START)
    driver.wait_for("^training 0", START)
    pids = {
        int(rank): int(pid) for rank, pid in re.findall(r"^training (\d) (\d+)$", driver.stdout, re.MULTILINE)
    }
    os.kill(pids[1], signal.SIGTERM)
    driver.wait_for("^over$", START)
    reports = wait_until(lambda: len(job.all_reports()) == 2 and job.all_reports(), "both reports")
    assert [reports[rank]["pid"] for rank in (0, 1)] == [pids[0], pids[1]]
    assert [reports[rank]["exit_code"] for rank in (0, 1)] == [143, 0], driver.transcript()
    assert [reports[rank]["outcome"] for rank in (0, 1)] == ["clean", "clean"], driver.transcript()
    assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1
    wait_until(lambda: not any(map(alive, pids.values())), "the ends of both")
