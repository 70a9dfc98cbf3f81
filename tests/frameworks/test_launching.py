"""`accelerate launch` with one process, and `deepspeed`: they pass signals on, wait, and return the right exit code."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import AGENT, NONE, SIGTERM, free_port, wait_until
from test_frameworks import START, workers

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
PATIENT = {"AUTOTEARDOWN_GRACE": 60}


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No GPU, no configuration of the user's."""
    for name, value in {
        "HF_HOME": str(tmp_path / "hf"),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
    }.items():
        monkeypatch.setenv(name, value)


def accelerate(job, mode=AGENT, command=(str(BIN / "accelerate"), "launch"), **env):
    """One process with a group of one, started by the launcher; both are there."""
    pytest.importorskip("accelerate")
    options = (
        "--cpu",
        "--num_processes=1",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    )
    where = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    python = (*command, *options)
    launcher = job.start(
        "launched.py", "saves", fresh=True, python=python, mode=mode, **{**PATIENT, **where, **env}
    )
    launcher.wait_for("^attempt 0 rank 0", START)
    return launcher


@pytest.mark.parametrize("given, code", [(None, 0), ("signal", 143)])
def test_accelerate_with_one_process(job, given, code):
    env = {} if given is None else {"AUTOTEARDOWN_EXIT_CODE": given}
    launcher = accelerate(job, **env)
    launcher.signal()
    assert launcher.wait() == code, launcher.transcript()
    assert (job.folder / "saved-0").exists()
    assert "Traceback" not in launcher.stderr, launcher.transcript()
    assert (
        f"autoteardown: accelerate launch: SIGTERM: 1 of 1 workers have left; exit {code}" in launcher.stderr
    )
    wait_until(lambda: not job.survivors(), "the end of all processes")


def test_accelerate_as_a_module(job):
    launcher = accelerate(job, command=("-m", "accelerate.commands.launch"), AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal()
    assert launcher.wait() == 143, launcher.transcript()
    assert (job.folder / "saved-0").exists()
    assert "accelerate launch: SIGTERM: 1 of 1 workers have left; exit 143" in launcher.stderr


@pytest.mark.parametrize("given, code", [("0", 0), ("signal", 1)])
def test_accelerate_whose_rank_is_evicted(job, given, code):
    """The launcher is not signalled: its own code, 1 after any code of the rank's that is not 0."""
    launcher = accelerate(job, AUTOTEARDOWN_EXIT_CODE=given)
    os.kill(int(launcher.wait_for(r"^attempt 0 rank 0 pid (\d+)$")[1]), SIGTERM)
    assert launcher.wait() == code, launcher.transcript()
    assert (job.folder / "saved-0").exists()


def test_accelerate_gets_an_early_notice(job):
    launcher = accelerate(job, AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1", AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal(signal.SIGUSR1)
    assert launcher.wait() == 128 + signal.SIGUSR1, launcher.transcript()
    assert (job.folder / "saved-0").exists()


def test_accelerate_reports_a_failure_as_before(job):
    """The rank is killed: no eviction."""
    launcher = accelerate(job, AUTOTEARDOWN_EXIT_CODE="signal")
    os.kill(int(launcher.wait_for(r"^attempt 0 rank 0 pid (\d+)$")[1]), signal.SIGKILL)
    assert launcher.wait() == 1
    assert "CalledProcessError" in launcher.stderr and "autoteardown: accelerate" not in launcher.stderr


def test_control_accelerate(job):
    """Without the agent it dies of the signal, and the rank runs on."""
    launcher = accelerate(job, mode=NONE)
    launcher.signal()
    assert launcher.wait() == -SIGTERM
    time.sleep(2)
    assert job.survivors()


@pytest.mark.parametrize(
    "mode, given, code", [(AGENT, None, 1), (AGENT, "signal", 143), (NONE, None, -SIGTERM)]
)
def test_deepspeed(job, mode, given, code):
    """The launcher is signalled, not the process of its own that starts the ranks. Without the agent, all run on."""
    pytest.importorskip("deepspeed")
    python = (str(BIN / "deepspeed"), "--num_gpus=2", "--no_local_rank")
    env = {} if given is None else {"AUTOTEARDOWN_EXIT_CODE": given}
    launcher = job.start("fw_deepspeed.py", fresh=True, python=python, mode=mode, **PATIENT, **env)
    workers(launcher)
    launcher.signal()
    assert launcher.wait() == code, launcher.transcript()
    if mode == NONE:
        time.sleep(2)
        assert job.survivors()
    else:
        wait_until(lambda: not job.survivors(), "the end of all processes")
        assert {report["outcome"] for report in job.all_reports().values()} == {"clean"}


@pytest.mark.parametrize("given, code", [("0", 143), ("signal", 143)])
def test_deepspeed_whose_rank_is_evicted(job, given, code):
    """The launcher is not signalled: the code of the rank that failed first, to it; that of the peer is 143."""
    pytest.importorskip("deepspeed")
    python = (str(BIN / "deepspeed"), "--num_gpus=2", "--no_local_rank")
    launcher = job.start(
        "fw_deepspeed.py", fresh=True, python=python, **PATIENT, AUTOTEARDOWN_EXIT_CODE=given
    )
    os.kill(workers(launcher)[0], SIGTERM)
    assert launcher.wait() == code, launcher.transcript()
