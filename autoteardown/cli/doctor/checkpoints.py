"""Checks that `AUTOTEARDOWN_CHECKPOINT=on` can hook this image's frameworks, by importing them in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata

from autoteardown import settings
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

_PACKAGES = ("transformers", "lightning", "pytorch_lightning", "accelerate")
_LONGEST = 180.0  # seconds for the imports
# Prints, for each module that could be imported, the error of its hook, or None.
_LOOK = """
import importlib, json, sys
import torch
from autoteardown.rank import framework_checkpoints as hooks
found = {}
for name in hooks.HOOKS:
    if name.partition(".")[0] in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except Exception as error:
            found[name] = repr(error)
        else:
            found[name] = hooks.not_placed.get(name)
print("\\n" + json.dumps(found))
"""


def check(environ: Mapping[str, str], found: settings.Settings) -> list[Finding]:
    """Return the findings; none if the setting is off."""
    if not found.checkpoint:
        return []
    installed = [name for name in _PACKAGES if _version(name)]
    if not installed:
        text = f"AUTOTEARDOWN_CHECKPOINT=on saves nothing here: none of {', '.join(_PACKAGES)} is installed"
        return [Finding("checkpoint", WARNING, text, "save in an `autoteardown.on_teardown` callback")]
    try:
        child = subprocess.run(
            [sys.executable, "-c", _LOOK, *installed],
            env={**environ, settings.SWITCH: "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LONGEST,
            check=True,
        )
        errors = json.loads(child.stdout.decode().splitlines()[-1])
    except subprocess.TimeoutExpired:
        text = f"not checked: importing {', '.join(installed)} took longer than {_LONGEST:g} s"
        return [Finding("checkpoint", NOTE, text)]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return [Finding("checkpoint", NOTE, f"not checked: {error}")]
    findings = [
        Finding(
            "checkpoint",
            PROBLEM,
            f"AUTOTEARDOWN_CHECKPOINT=on saves nothing through {name}: {problem}",
            "use a version that docs/compatibility.md names, or save in an `autoteardown.on_teardown` callback",
        )
        for name, problem in errors.items()
        if problem is not None
    ]
    if not findings:
        names = ", ".join(f"{name} {_version(name)}" for name in installed)
        findings.append(Finding("checkpoint", OK, f"hooked at an eviction: {names}"))
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
