"""`python -m autoteardown` in an injected container: it says why the agent is not active there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A Python without this environment's packages: what the image of somebody else has.
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """The tree that the init container copies."""
    folder = tmp_path_factory.mktemp("volume")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "autoteardown", folder / "autoteardown", ignore=ignore)
    shutil.copytree(ROOT / "sitecustomize", folder / "autoteardown" / "_inject", ignore=ignore)
    return folder


def run(volume, *words, before=(), **environ):
    folders = [*map(str, before), str(volume / "autoteardown" / "_inject")]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [PYTHON, *words], cwd="/", env={**env, **environ}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "switch", [{}, {"AUTOTEARDOWN": "0"}, {"AUTOTEARDOWN": "1"}, {"AUTOTEARDOWN": "maybe"}]
)
def test_doctor_runs_whatever_the_switch_says(volume, switch):
    done = run(volume, "-m", "autoteardown", "doctor", "--json", **switch)
    assert done.returncode == 1 and "No module named" not in done.stderr, done.stderr  # there is no torch
    found = json.loads(done.stdout)
    assert found["active"] == (switch.get("AUTOTEARDOWN") == "1"), found


def test_doctor_runs_behind_a_sitecustomize_that_imports_no_other(volume, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("")
    done = run(volume, "-m", "autoteardown", "doctor", "--json", before=[tmp_path], AUTOTEARDOWN="1")
    found = json.loads(done.stdout)
    assert not found["active"]
    (said,) = (each for each in found["findings"] if "hides the sitecustomize" in each["text"])
    inject = volume / "autoteardown" / "_inject"
    assert said["advice"] == f"export PYTHONPATH={inject}:{tmp_path}"


def test_the_public_api_can_be_imported_where_the_agent_is_off(volume):
    code = "import autoteardown, sys; print(autoteardown.__file__); autoteardown.disarm(); print(sys.path.count({!r}))"
    done = run(volume, "-c", code.format(str(volume / "autoteardown" / "_inject")))
    assert done.stdout.splitlines() == [str(volume / "autoteardown" / "__init__.py"), "1"], done.stderr


def test_switched_off_nothing_of_ours_is_imported(volume):
    done = run(
        volume, "-c", "import sys; print([name for name in sys.modules if name.startswith('autoteardown')])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_installed_agent_comes_before_the_injected_one(volume, tmp_path):
    installed = tmp_path / "autoteardown"
    installed.mkdir()
    (installed / "__init__.py").write_text("mark = 'installed'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import autoteardown; print(autoteardown.mark)"
    assert run(volume, "-c", code).stdout == "installed\n"
