"""Workers with an interpreter of their own: `py_executable`, `uv run`, and what has to be in there.

Another environment is a venv that sees this one's packages but not its start-up files, as when a project's own
dependencies are installed anew and the agent is not among them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness import PROGRAMS, alive, free_port, wait_until
from test_ray_ways import head  # noqa: F401

ray = pytest.importorskip("ray")
sys.path.insert(0, str(PROGRAMS))
import ray_worlds  # noqa: E402

import autoteardown  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The other environment's interpreter."""
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [sysconfig.get_path("purelib"), str(Path(autoteardown.__file__).parents[1])]
    (site / "theirs.pth").write_text("\n".join(paths))  # adds paths, and runs none of the .pth files there
    return folder / "bin" / "python"


def injected():
    """A PYTHONPATH with the agent's folder on it."""
    command = [sys.executable, "-m", "autoteardown", "path"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() + f":{PROGRAMS}"


def there(job, executable, **env):
    """What a worker says of the agent in it, and which interpreter runs it; and the actor."""
    job.reports.mkdir(exist_ok=True)
    env["AUTOTEARDOWN_REPORT_DIR"] = str(job.reports)
    runtime_env = {"env_vars": env, "py_executable": str(executable)}
    actor = ray.remote(num_cpus=0, runtime_env=runtime_env)(ray_worlds.Restless).remote()
    pid, interpreter, status = ray.get(actor.there.remote(), timeout=120)
    return actor, pid, interpreter, json.loads(status)


def test_it_is_not_there_by_itself(head, job, other):  # noqa: F811
    _, _, interpreter, status = there(job, other)
    assert Path(interpreter).parent == other.parent
    assert (status["active"], status["state"]) == (False, "off")


def test_installed_into_it(head, job, other):  # noqa: F811
    """What `pip install autoteardown` or `uv add autoteardown` would put there."""
    (site,) = other.parents[1].glob("lib/python*/site-packages")
    start_up = Path(autoteardown.__file__).parents[1] / "startup_files" / "autoteardown.pth"
    shutil.copy(start_up, site)
    try:
        actor, pid, interpreter, status = there(job, other)
        assert Path(interpreter).parent == other.parent
        assert (status["active"], status["state"]) == (True, "idle")
        assert_guarded(job, actor, pid)
    finally:
        (site / "autoteardown.pth").unlink()


def test_injected(head, job, other):  # noqa: F811
    """`PYTHONPATH=$(autoteardown path)`, here for one actor, else in the environment of `ray start`."""
    found = injected()
    actor, pid, interpreter, status = there(job, other, PYTHONPATH=found)
    assert Path(interpreter).parent == other.parent
    assert (status["active"], status["state"]) == (True, "idle")
    assert_guarded(job, actor, pid)


@pytest.mark.slow
def test_uv_run(head, job, other):  # noqa: F811
    """The worker is a child of uv, which hands signals on."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("no uv")
    found = injected()
    command = f"{uv} run --offline --no-project --no-config --python {other} python"
    actor, pid, interpreter, status = there(job, command, PYTHONPATH=found)
    assert Path(interpreter).parent == other.parent
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert Path(f"/proc/{parent}/comm").read_text() == "uv\n"
    assert (status["active"], status["state"]) == (True, "idle")
    assert_guarded(job, actor, pid)


def assert_guarded(job, actor, pid):
    """It is armed by an init, and torn down when it is evicted."""
    assert ray.get(actor.stay.remote(free_port()), timeout=60) == "armed"
    os.kill(pid, signal.SIGTERM)
    (path,) = wait_until(lambda: list(job.reports.glob(f"*-{pid}-*Z.json")), "its report")
    report = json.loads(path.read_text())
    assert (report["cause"], report["exit_code"]) == ("signal", 0)
    wait_until(lambda: not alive(pid), "its end")
