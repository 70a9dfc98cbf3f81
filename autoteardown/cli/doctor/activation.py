"""Checks whether the agent is active: starts a child process of this interpreter and examines it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoteardown import startup
from autoteardown.cli import path
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, Finding
from autoteardown.cli.doctor.vehicles import site_folders
from autoteardown.switch import SWITCH, switch

# Prints two lines of JSON: the state after start-up, and, if the agent is active, the state after an import of torch.
# The second line is missing if torch crashes or hangs.
_PROBE = """
import sys
startup = sys.modules.get("autoteardown.startup")
customize = sys.modules.get("sitecustomize")
active = startup is not None and startup.active()
import json
print(json.dumps(dict(active=active, started_by=startup and startup.started_by, why_off=startup and startup.why_off,
    package=startup and startup.__file__, customize=getattr(customize, "__file__", None))), flush=True)
if active:
    import signal
    interception = sys.modules.get("autoteardown.signals.interception")
    found = dict(intercepts=getattr(interception, "interceptor", None) is not None)
    try:
        import torch.distributed as distributed
    except ImportError as error:
        found["missing"] = str(error)
    except Exception as error:
        found["broken"] = repr(error)
    else:
        c10d = sys.modules.get("torch.distributed.distributed_c10d")
        found["distributed"] = distributed.is_available()
        found["hooked"] = all(hasattr(getattr(module, "init_process_group", None), "_autoteardown_wrapped")
            for module in (distributed, c10d))
        ways = ("ProcessGroup", "abort"), ("ProcessGroupNCCL", "abort"), ("ProcessGroupNCCL", "_shutdown")
        found["abort"] = next((f"{name}.{way}" for name, way in ways if hasattr(getattr(c10d, name, None), way)), None)
        try:
            found["nccl"] = ".".join(map(str, distributed.torch.cuda.nccl.version()))
        except Exception:
            found["nccl"] = None
    print(json.dumps(found), flush=True)
"""
_TIMEOUT = 120.0  # seconds; importing torch from a cold network file system takes long


class Process:
    """The state of a new process of this interpreter."""

    def __init__(self, lines: list[str], stderr: str, ended: str | None) -> None:
        parts: list[dict[str, Any]] = [json.loads(line) for line in lines[:2]]
        self.start: dict[str, Any] = parts[0] if parts else {}
        self.torch: dict[str, Any] = parts[1] if len(parts) > 1 else {}
        self.stderr = stderr.strip()
        self.ended = ended
        self.active: bool = bool(self.start.get("active"))
        self.started_by: str | None = self.start.get("started_by")


def look(environ: Mapping[str, str]) -> Process:
    """Start a new process and return its state."""
    command = [sys.executable, *_flags(), "-c", _PROBE]
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return Process(_json_lines(text), "", f"it had not ended after {_TIMEOUT:.0f} s")
    ended = f"it ended with status {done.returncode}" if done.returncode else None
    return Process(_json_lines(done.stdout), done.stderr, ended)


def check(environ: Mapping[str, str], process: Process) -> list[Finding]:
    """Return the findings on the switch, the start-up and the hooks."""
    return [
        *_switch(environ),
        *_active(environ, process),
        *_hooks(process),
    ]


def _json_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]


def _flags() -> list[str]:
    """The flags of this interpreter that change its start-up."""
    if sys.flags.isolated:
        return ["-I"] + ["-S"] * sys.flags.no_site
    return (
        ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site + ["-S"] * sys.flags.no_site
    )


def _switch(environ: Mapping[str, str]) -> list[Finding]:
    on, problem = switch(environ)
    value = environ.get(SWITCH)
    advice = f"set {SWITCH}=1 in the image (ENV) or in the job's environment"
    if problem is not None:
        found = Finding("switch", PROBLEM, problem, advice)
    elif not on:
        what = f"{SWITCH} is not set" if value is None else f"{SWITCH}={value!r} switches it off"
        found = Finding("switch", PROBLEM, what, advice)
    else:
        found = Finding("switch", OK, f"{SWITCH}={value}")
    skip = environ.get("AUTOTEARDOWN_SKIP", "").strip()
    if not skip:
        return [found]
    return [found, Finding("switch", NOTE, f"programs that match AUTOTEARDOWN_SKIP={skip} are not guarded")]


def _active(environ: Mapping[str, str], process: Process) -> list[Finding]:
    findings = []
    if process.active:
        package = Path(process.start["package"]).parent
        findings.append(Finding("start-up", OK, f"started by {process.started_by}, from {package}"))
    elif not process.start:
        text = f"a new process of {sys.executable} could not be examined: {process.ended}"
        findings.append(
            Finding("start-up", PROBLEM, text, process.stderr.splitlines()[-1] if process.stderr else None)
        )
    elif switch(environ)[0]:
        reason, advice = _why(environ, process)
        findings.append(Finding("start-up", PROBLEM, f"switched on, but not active: {reason}", advice))
    if process.stderr and process.start:
        level = PROBLEM if "autoteardown" in process.stderr else NOTE
        for line in process.stderr.splitlines()[-3:]:
            findings.append(Finding("start-up", level, f"a new process says: {line}"))
    return findings


def _why(environ: Mapping[str, str], process: Process) -> tuple[str, str | None]:
    if process.start.get("why_off"):
        return str(process.start["why_off"]), None
    if sys.flags.no_site:
        return "the interpreter runs with -S, which switches all start-up code off", "leave -S out"
    folder, package = path.injection_folder(), Path(startup.__file__).parent.parent
    inject = f"export PYTHONPATH={os.pathsep.join(_first(str(folder), environ))}"
    on_path = folder is not None and str(folder) in environ.get("PYTHONPATH", "").split(os.pathsep)
    if on_path and (sys.flags.isolated or sys.flags.ignore_environment):
        return (
            "the interpreter runs with -I or -E, which ignore PYTHONPATH",
            "install the package with pip instead",
        )
    if on_path:
        first = process.start.get("customize")
        return (
            f"{first} hides the sitecustomize in {folder}, and does not import the next one",
            f"export PYTHONPATH={os.pathsep.join(_first(str(folder), environ))}",
        )
    if (package / "autoteardown.pth").is_file() and package not in site_folders():
        return f"{package} is no site-packages folder, so its .pth files are not read", inject
    if any((folder / "autoteardown.pth").is_file() for folder in site_folders()):
        return "autoteardown.pth is there, but did not start it", "pip install --force-reinstall autoteardown"
    return "no autoteardown.pth in any site-packages folder", f"pip install autoteardown, or: {inject}"


def _first(folder: str, environ: Mapping[str, str]) -> list[str]:
    """The folders of PYTHONPATH, with this one first."""
    others = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != folder]
    return [folder, *others]


def _hooks(process: Process) -> list[Finding]:
    if not process.active:
        return []
    found = process.torch
    if not found:
        return [
            Finding(
                "hook",
                PROBLEM,
                f"importing torch.distributed in a new process failed: {process.ended or 'no answer'}",
            )
        ]
    findings = []
    if not found["intercepts"]:
        findings.append(
            Finding("hook", PROBLEM, "the functions of `signal` are not replaced once it is imported")
        )
    if "broken" in found:
        findings.append(Finding("hook", PROBLEM, f"torch.distributed cannot be imported: {found['broken']}"))
    elif "missing" not in found and not found["distributed"]:
        findings.append(
            Finding("hook", PROBLEM, "this torch is built without torch.distributed: nothing to guard")
        )
    elif "missing" not in found and not found["hooked"]:
        findings.append(Finding("hook", PROBLEM, "init_process_group is not wrapped once torch is imported"))
    elif "missing" not in found:
        findings.append(
            Finding("hook", OK, "the functions of `signal` are replaced, and init_process_group is wrapped")
        )
    return findings
