"""Finds the files that can start the agent (.pth, .start, sitecustomize), and other code that runs at start-up."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from autoteardown import startup
from autoteardown.cli import path
from autoteardown.cli.doctor.finding import NOTE, OK, WARNING, Finding


def check(environ: Mapping[str, str], start: Mapping[str, Any]) -> list[Finding]:
    """Return the findings on the start-up files.

    Args:
        environ: the environment of a new process.
        start: the state of such a process after start-up (`activation.Process.start`).
    """
    return [*_vehicles(environ), *_shadows(start), *_order(start)]


def site_folders() -> list[Path]:
    """The folders in which `.pth` files are read, in this order."""
    # In the order of `site`: the virtual environment's, the user's, the interpreter's.
    own = site.getsitepackages()
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(folder) for folder in ([*own, *user] if sys.prefix != sys.base_prefix else [*user, *own])]


def start_up_files(folders: list[Path], customize: str | None) -> list[str]:
    """The files that a new process runs before the program, in order: `.pth` with code, `.start`, sitecustomize."""
    found: list[str] = []
    for folder in folders:
        try:
            names = sorted(each.name for each in folder.iterdir() if each.suffix in (".pth", ".start"))
        except OSError:
            continue
        for name in names:
            # .start files (PEP 829) run from Python 3.15 on, instead of the import lines of the .pth of the same name.
            if name.endswith(".start"):
                runs = sys.version_info >= (3, 15)
            else:
                lines = (folder / name).read_text("utf-8", "replace").splitlines()
                runs = any(line.startswith(("import ", "import\t")) for line in lines)
            if runs:
                found.append(str(folder / name))
    return found + ([customize] if customize else [])


def _order(start: Mapping[str, Any]) -> list[Finding]:
    files = start_up_files(site_folders(), start.get("customize"))
    return (
        [Finding("start-up", NOTE, f"code at start-up, in this order: {', '.join(files)}")] if files else []
    )


def _vehicles(environ: Mapping[str, str]) -> list[Finding]:
    """The installed files and the injection folder that can start the agent."""
    findings = []
    for folder in site_folders():
        names = [name for name in ("autoteardown.pth", "autoteardown.start") if (folder / name).is_file()]
        if names:
            findings.append(Finding("vehicle", OK, f"{' and '.join(names)} in {folder}"))
            if len(names) == 1:
                text = f"one of autoteardown.pth and autoteardown.start is missing in {folder}"
                findings.append(
                    Finding("vehicle", WARNING, text, "pip install --force-reinstall autoteardown")
                )
    inject = path.injection_folder()
    if inject is not None and str(inject) in environ.get("PYTHONPATH", "").split(os.pathsep):
        findings.append(Finding("vehicle", OK, f"injection by PYTHONPATH: {inject}"))
    if not site.ENABLE_USER_SITE and (Path(site.getusersitepackages()) / "autoteardown.pth").is_file():
        text = f"{site.getusersitepackages()} has autoteardown.pth, but this interpreter does not read that folder"
        findings.append(Finding("vehicle", WARNING, text, "install into the environment that trains"))
    return findings


def _shadows(start: Mapping[str, Any]) -> list[Finding]:
    """More than one copy of the package."""
    findings = []
    copies = sorted({str(each.locate_file("")) for each in metadata.distributions(name="autoteardown")})
    if len(copies) > 1:
        text = f"installed {len(copies)} times, the first on the path wins: {', '.join(copies)}"
        findings.append(Finding("vehicle", WARNING, text, "uninstall all but one"))
    used = start.get("package")
    if used and Path(used).resolve() != Path(startup.__file__).resolve():
        text = f"new processes use {Path(used).parent}, this doctor is from {Path(startup.__file__).parent}"
        findings.append(Finding("vehicle", WARNING, text, "run that installation's doctor"))
    return findings
