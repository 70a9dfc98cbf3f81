"""Evictions in the images that docker or podman builds from the Dockerfiles: what docs/kubernetes.md says of process 1.

`container_engine.py` describes where the base images come from.
"""

import json

import pytest
from container_engine import ROOT, Engine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]

_TORCHRUN = ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
_COMMAND = " ".join(_TORCHRUN)
_TRAP = f"trap 'kill -TERM $pid' TERM; {_COMMAND} & pid=$!; wait $pid"


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    try:
        engine.build()
        yield engine
    finally:
        engine.close()


def _check_saved(job, log, ranks=2):
    """A checkpoint of each rank, and reports that call the stop clean, after the same iteration."""
    reports = [json.loads(path.read_text()) for path in (job / "reports").glob("*.json")]
    outcomes = sorted((report["rank"], report["outcome"]) for report in reports)
    assert outcomes == [(rank, "clean") for rank in range(ranks)], log
    assert len({report["steps"]["stopped_at"] for report in reports}) == 1, log
    assert {path.name for path in job.glob("*.pt")} == {f"checkpoint-{rank}.pt" for rank in range(ranks)}, log
    return reports


def _check_nothing_saved(job, log):
    assert not list(job.glob("*.pt")) and not list(job.glob("reports/*.json")), log


@pytest.mark.parametrize("options", [(), ("--tty",)], ids=["plain", "tty"])
def test_torchrun_is_process_1(engine, tmp_path, options):
    code, log = engine.evict(engine.start(tmp_path / "job", _TORCHRUN, *options))
    _check_saved(tmp_path / "job", log)
    assert code == 143 and "2 of 2 workers have left" in log, log


def test_the_entrypoint_is_process_1(engine, tmp_path):
    code, log = engine.evict(engine.start(tmp_path / "job", []))
    (report,) = _check_saved(tmp_path / "job", log, ranks=1)
    assert (report["pid"], code) == (1, 143), log


def test_control_without_the_agent(engine, tmp_path):
    code, log = engine.evict(engine.start(tmp_path / "job", _TORCHRUN, AUTOTEARDOWN="0"))
    _check_nothing_saved(tmp_path / "job", log)
    assert code == 1 and "SignalException" in log, log


@pytest.mark.parametrize(
    "shell, script, saves, code",
    [
        ("sh", _COMMAND, False, 137),  # after the whole grace period
        ("sh", f"exec {_COMMAND}", True, 143),
        ("bash", _COMMAND, True, 143),
        ("sh", _TRAP, False, 143),  # at once: the kernel kills the ranks when process 1 ends
        ("sh", f"{_TRAP}; wait $pid", True, 143),
    ],
    ids=["sh", "sh-exec", "bash", "trap-and-wait", "trap-and-two-waits"],
)
def test_a_shell_is_process_1(engine, tmp_path, shell, script, saves, code):
    words = ["--rm", *engine.running, "--entrypoint=readlink", engine.train, "-f", "/bin/sh"]
    if shell == "sh" and not engine("run", *words).endswith("dash"):
        pytest.skip("the image's sh is not dash")
    found, log = engine.evict(engine.start(tmp_path / "job", [shell, "-c", script]), grace=40 if saves else 5)
    (_check_saved if saves else _check_nothing_saved)(tmp_path / "job", log)
    assert found == code, log


def test_the_injected_agent(engine, tmp_path):
    """The init container fills a volume. The base image, which has no agent, trains with that."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    engine("run", "--rm", *engine.running, f"--volume={volume}:/autoteardown", engine.inject)
    options = (f"--volume={volume}:/autoteardown:ro", f"--volume={ROOT / 'docker'}:/app:ro", "--workdir=/app")
    env = {"AUTOTEARDOWN": "1", "PYTHONPATH": "/autoteardown/autoteardown/_inject:/job"}
    code, log = engine.evict(engine.start(tmp_path / "job", _TORCHRUN, *options, image=engine.base, **env))
    _check_saved(tmp_path / "job", log)
    assert code == 143, log
