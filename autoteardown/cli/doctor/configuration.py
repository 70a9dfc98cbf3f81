"""Checks the settings, the registry and report folders, and the versions of wrapt, torch and NCCL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from autoteardown import settings
from autoteardown.cli.doctor.activation import Process
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding
from autoteardown.node import registry, safe_folder
from autoteardown.node.entry import printable

_OLDEST_WRAPT, _FIRST_WRAPT_TOO_NEW = (1, 14), (3,)
_OLDEST_TORCH = (2, 4)
_ABORT_WORKS = (2, 26, 2)  # NCCL 2.25.1 hangs in an abort (pytorch/pytorch#149153)


def check(
    environ: Mapping[str, str], found: settings.Settings, refused: list[str], process: Process
) -> list[Finding]:
    """Return the findings of all these checks."""
    return [
        *_settings(environ, found, refused),
        *_folders(found),
        *_wrapt(),
        *_torch(process),
    ]


def shown(variable: str, value: object) -> object:
    """A setting's value as it would be written in the environment."""
    if variable == "AUTOTEARDOWN_SIGNALS" and isinstance(value, tuple):
        return ",".join(map(settings.signal_name, value))
    if value is None:
        return "signal" if variable == "AUTOTEARDOWN_EXIT_CODE" else None
    if variable == "AUTOTEARDOWN_ON_TEARDOWN" and isinstance(value, tuple):
        return ",".join(":".join(name) for name in value) or None
    if isinstance(value, bool):
        return "on" if value else "off"
    return round(value, 3) if isinstance(value, float) else value


def table(found: settings.Settings, refused: list[str]) -> list[str]:
    """The effective settings with the source of each, as lines."""
    bad = {line.partition("=")[0] for line in refused}
    rows = [("setting", "in force", "from")]
    for variable, default, _ in settings.VARIABLES:
        given, effective = found.sources[variable]
        text = shown(variable, effective)
        source = "default" if given is None or not given.strip() else f"environment: {given}"
        if variable in bad:
            source = f"default, {given!r} is not allowed"
        if found.scaled < 1 and variable.endswith("_TIMEOUT"):
            source += f", scaled to fit (default {default})" if source[:7] == "default" else ", scaled to fit"
        text = f"{text:g}" if isinstance(text, float) else "off" if text is None else str(text)
        rows.append((variable, text, source))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows]


def _settings(environ: Mapping[str, str], found: settings.Settings, refused: list[str]) -> list[Finding]:
    findings = [Finding("settings", PROBLEM, line, "correct it or take it out") for line in refused]
    for variable in sorted(environ):
        if variable.startswith("AUTOTEARDOWN") and not settings.known(variable):
            text = f"{variable} has no effect: the agent has no such variable"
            findings.append(Finding("settings", WARNING, text, "check its spelling against the table below"))
    if found.scaled < 1:
        much = "the time-outs add up to more than the {:g} s there are: all are shortened to {:.0%}"
        if found.step_auto:
            much = "drain, abort and exit would take too much of the {:g} s: these and destroy are shortened to {:.0%}"
        text = much.format(found.hard, found.scaled)
        findings.append(
            Finding("settings", NOTE, text, "raise AUTOTEARDOWN_GRACE if the platform gives more time")
        )
    if not findings:
        findings.append(Finding("settings", OK, f"a rank exits at most {found.hard:g} s after the signal"))
    return findings


def _folders(found: settings.Settings) -> list[Finding]:
    findings = []
    try:
        os.close(safe_folder.open_own(safe_folder.absolute(found.runtime_dir)))
        ranks = registry.read(found.runtime_dir)
        findings.append(
            Finding("registry", OK, f"{found.runtime_dir}, armed ranks on this node: {len(ranks)}")
        )
        for rank in ranks:
            if rank.alone:
                text = f"rank {rank.place} (pid {rank.pid}) could not notify its peers of an eviction now: "
                advice = (
                    "it retries as long as its group exists; until then, an eviction stops this rank alone"
                )
                findings.append(Finding("peers", WARNING, text + printable(rank.alone), advice))
    except FileNotFoundError:
        findings.append(_creatable("registry", Path(found.runtime_dir), "AUTOTEARDOWN_RUNTIME_DIR"))
    except OSError as error:
        text = f"{found.runtime_dir} cannot be used: {error}"
        advice = "remove it, or set AUTOTEARDOWN_RUNTIME_DIR; without it `ps` and `drain` see no ranks"
        findings.append(Finding("registry", PROBLEM, text, advice))
    if found.report_dir is not None:
        findings.append(_creatable("reports", Path(found.report_dir), "AUTOTEARDOWN_REPORT_DIR"))
    return findings


def _creatable(area: str, path: Path, variable: str) -> Finding:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return Finding(area, OK, f"{path}{'' if nearest == path else ' (made when needed)'}")
    what = "cannot be written to" if nearest.is_dir() else "is no folder"
    advice = f"export {variable}=/a/folder/that/can/be/written"
    if nearest.is_dir() and os.statvfs(nearest).f_flag & os.ST_RDONLY:
        what = "is on a read-only file system"
        advice += ", or mount a volume there (Kubernetes: an emptyDir at /tmp)"
    return Finding(area, PROBLEM, f"{path} cannot be used: {nearest} {what}", advice)


def _wrapt() -> list[Finding]:
    version = _version("wrapt")
    if version is None:
        return [Finding("wrapt", PROBLEM, "wrapt is not installed", "pip install 'wrapt>=1.14,<3'")]
    if not _OLDEST_WRAPT <= numbers(version) < _FIRST_WRAPT_TOO_NEW:
        return [Finding("wrapt", WARNING, f"wrapt {version} is untested", "pip install 'wrapt>=1.14,<3'")]
    return [Finding("wrapt", OK, version)]


def _torch(process: Process) -> list[Finding]:
    version = _version("torch")
    if version is None:
        text = "torch is not installed for this interpreter: there is nothing to guard"
        return [Finding("torch", PROBLEM, text, "run doctor with the interpreter that trains")]
    findings = [Finding("torch", OK, f"{version}{_path_taken(process)}")]
    if numbers(version) < _OLDEST_TORCH:
        findings.append(
            Finding("torch", WARNING, f"{version} is untested", "2.4 is the oldest version that is tested")
        )
    nccl = process.torch.get("nccl")
    if nccl and numbers(nccl) < _ABORT_WORKS:
        text = f"NCCL {nccl} can hang when a wedged rank is aborted; the exit then comes at the time-out"
        findings.append(
            Finding("torch", WARNING, text, "2.26.2 or later does not (comes with torch 2.7 and later)")
        )
    return findings


def _path_taken(process: Process) -> str:
    how = {
        "ProcessGroup.abort": "by the abort() of its process groups",
        "ProcessGroupNCCL.abort": "by the abort() of their NCCL backends (torch 2.6)",
        "ProcessGroupNCCL._shutdown": "by the _shutdown() of their NCCL backends, an abort in torch 2.4 and 2.5",
        None: "by its exit (no NCCL here)",
    }.get(process.torch.get("abort", ""))
    if how is None:  # torch could not be examined
        return ""
    nccl = process.torch.get("nccl")
    return f": a wedged rank is released {how}{f'; NCCL {nccl}' if nccl else ''}"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, as (2, 13, 0) for 2.13.0+cpu."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
