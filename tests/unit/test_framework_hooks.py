"""`AUTOTEARDOWN_CHECKPOINT=on` with frameworks that import torch before they are complete, or that cannot be hooked."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from autoteardown.rank.partial_imports import when_imported

PARTIAL = """
import hooks
hooks.register("{name}")
class Trainer:
    pass
{rest}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package; returns what the hook has seen of it."""
    seen = []

    def make(name, rest=""):
        def hook(module):
            seen.append(hasattr(module, "Trainer"))

        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PARTIAL.format(name=name, rest=rest))
        monkeypatch.setitem(
            sys.modules, "hooks", type("", (), {"register": lambda each: when_imported(each, hook)})
        )
        return seen

    monkeypatch.syspath_prepend(tmp_path)
    return make


def test_a_module_that_is_being_imported_is_hooked_when_it_is_complete(package):
    seen = package("complete_later")
    module = importlib.import_module("complete_later")
    assert seen == [True]
    assert type(module.__spec__).__name__ == "ModuleSpec" and not module.__spec__._initializing
    importlib.reload(module)  # registers once more
    assert seen == [True, True]


def test_every_hook_is_called(package):
    seen = package("hooked_twice", 'hooks.register("hooked_twice")')
    importlib.import_module("hooked_twice")
    assert seen == [True, True]


def test_a_module_whose_import_fails_is_not_hooked(package):
    seen = package("fails_later", "raise ValueError")
    with pytest.raises(ValueError):
        importlib.import_module("fails_later")
    assert seen == []


@pytest.fixture
def broken(tmp_path):
    """A version of Accelerate that nobody has seen yet. Returns the environment of an image that has it."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "__init__.py").write_text("import torch\nfrom accelerate import accelerator\n")
    (tmp_path / "accelerate" / "accelerator.py").write_text("")
    about = tmp_path / "accelerate-99.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 99.0\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "AUTOTEARDOWN": "1", "AUTOTEARDOWN_CHECKPOINT": "on"}


def test_doctor_finds_a_framework_that_cannot_be_hooked(broken):
    doctor = [sys.executable, "-m", "autoteardown", "doctor", "--json"]
    found = json.loads(subprocess.run(doctor, env=broken, capture_output=True, text=True, timeout=120).stdout)
    (finding,) = [each for each in found["findings"] if each["area"] == "checkpoint"]
    assert finding["level"] == "problem"
    assert "saves nothing through accelerate.accelerator: AttributeError" in finding["text"]
    broken["AUTOTEARDOWN_CHECKPOINT"] = "off"
    found = json.loads(subprocess.run(doctor, env=broken, capture_output=True, text=True, timeout=120).stdout)
    assert "checkpoint" not in {each["area"] for each in found["findings"]}
