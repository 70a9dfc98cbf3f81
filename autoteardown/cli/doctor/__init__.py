"""`autoteardown doctor`: checks whether the agent is active in this interpreter and this image, and says why if not.

1. `activation` starts a child process and examines it.
2. `vehicles` finds the start-up files that can start the agent.
3. `configuration` checks the settings, the folders, and the versions of torch and wrapt.
4. `checkpoints` imports the frameworks that `AUTOTEARDOWN_CHECKPOINT` hooks.
5. `surroundings` reports what the platform will do on an eviction.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

import autoteardown
from autoteardown import settings
from autoteardown.cli.doctor import activation, checkpoints, configuration, surroundings, vehicles
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding
from autoteardown.node.entry import printable

_MARKS = {OK: "ok", NOTE: "note", WARNING: "WARNING", PROBLEM: "PROBLEM"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for the CI of an image")
    parser.epilog = "Exit status: 1 if there is a PROBLEM, else 0 (also with a WARNING)."


def run(args: argparse.Namespace) -> int:
    """Run all checks and print the findings; return 1 if there is a problem, else 0."""
    environ = dict(os.environ)
    process = activation.look(environ)
    found, refused = settings.load(environ)
    findings = [
        *activation.check(environ, process),
        *vehicles.check(environ, process.start),
        *configuration.check(environ, found, refused, process),
        *checkpoints.check(environ, found),
        *surroundings.check(environ, found),
    ]
    bad = any(finding.level == PROBLEM for finding in findings)
    if args.json:
        print(json.dumps(_as_dict(process, found, findings), indent=2))
    else:
        for line in _as_text(process, found, refused, findings):
            print(line and printable(line))
    return 1 if bad else 0


def _as_dict(
    process: activation.Process, found: settings.Settings, findings: list[Finding]
) -> dict[str, object]:
    return {
        "schema": 1,
        "version": autoteardown.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "active": process.active,
        "started_by": process.started_by,
        "problems": _count(findings, PROBLEM),
        "warnings": _count(findings, WARNING),
        "findings": [finding._asdict() for finding in findings],
        "settings": {
            variable: {"given": given, "effective": configuration.shown(variable, effective)}
            for variable, (given, effective) in found.sources.items()
        },
    }


def _as_text(
    process: activation.Process, found: settings.Settings, refused: list[str], findings: list[Finding]
) -> list[str]:
    state = f"ACTIVE, started by {process.started_by}" if process.active else "NOT ACTIVE"
    version = (
        f"autoteardown {autoteardown.__version__}, Python {platform.python_version()} ({sys.executable})"
    )
    lines = [version, f"New processes of this interpreter: {state}", ""]
    area_width = max(len(finding.area) for finding in findings)
    for finding in findings:
        lines.append(f"{_MARKS[finding.level]:<8} {finding.area:<{area_width}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{area_width}}  -> {finding.advice}")
    lines += ["", *configuration.table(found, refused), ""]
    problems, warnings = _count(findings, PROBLEM), _count(findings, WARNING)
    lines.append(f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return lines


def _count(findings: list[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)
