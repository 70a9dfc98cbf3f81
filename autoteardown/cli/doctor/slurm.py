"""Asks SLURM how long it waits between SIGTERM and SIGKILL here, and checks which processes its signals reach.

1. A job's environment does not contain these times, so `scontrol` is asked for KillWait and the partition's GraceTime.
2. The shortest counts. `--signal=TERM@120` gives two minutes before a time limit, but after `scancel` SIGKILL still
   comes KillWait after SIGTERM: a grace period that fits the first alone loses the checkpoint at the second.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from autoteardown import settings
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

_KILL_WAIT = 30  # SLURM's own default
_SPARE = 5  # seconds for the signals to arrive, and for what runs after the ranks
_PATIENCE = 5.0  # for a controller that does not answer


def check(environ: Mapping[str, str], found: settings.Settings) -> list[Finding]:
    """The findings in a job of SLURM; none elsewhere."""
    if "SLURM_JOB_ID" not in environ:
        return []
    findings = [_grace(environ, found)]
    if "SLURM_STEP_ID" not in environ:
        text = "the batch script, not a step: --signal and `scancel -s` reach the processes of srun alone"
        findings.append(Finding("SLURM", NOTE, text, "start the ranks with srun"))
    return findings


def in_step(proc: Path) -> bool:
    """Whether a step daemon of SLURM, which signals the processes of its step itself, has started this process."""
    pid = "self"
    for _ in range(64):
        try:
            name, _, rest = (
                (proc / pid / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
            )
        except OSError:
            return False
        if name == "slurmstepd":
            return True
        pid = rest.split()[1]
    return False


def _grace(environ: Mapping[str, str], found: settings.Settings) -> Finding:
    times = _times(environ)
    known = bool(times)
    if not known:
        times = {"KillWait": _KILL_WAIT}
    name = min(times, key=lambda each: times[each])
    shortest = times[name]
    fits = max(2, shortest - _SPARE)
    told = (
        f"{name} is {shortest} s"
        if known
        else f"{name} is {shortest} s by default (scontrol cannot be asked)"
    )
    if found.grace > shortest:
        text = f"AUTOTEARDOWN_GRACE={found.grace:g}, and {told}: SLURM kills first, for example after scancel"
        return Finding("SLURM", PROBLEM if known else WARNING, text, f"export AUTOTEARDOWN_GRACE={fits}")
    more = (
        f"export AUTOTEARDOWN_GRACE={fits} for all of it" if known and fits > found.grace + _SPARE else None
    )
    return Finding(
        "SLURM", OK if known else NOTE, f"{told}, and AUTOTEARDOWN_GRACE is {found.grace:g}: it fits", more
    )


def _times(environ: Mapping[str, str]) -> dict[str, int]:
    """Seconds that an event may give, by their name in slurm.conf; empty when SLURM cannot be asked."""
    times = {}
    wait = re.search(r"^KillWait\s*=\s*(\d+)", _scontrol(environ, "config"), re.M)
    if wait:
        times["KillWait"] = int(wait[1])
        # 0 gives no time: KillWait begins at once.
        grace = re.search(
            r"\bGraceTime=(\d+)", _scontrol(environ, "partition", environ.get("SLURM_JOB_PARTITION", ""))
        )
        if grace and int(grace[1]):
            times["GraceTime of the partition"] = int(grace[1])
    return times


def _scontrol(environ: Mapping[str, str], *what: str) -> str:
    program = shutil.which("scontrol", path=environ.get("PATH", ""))
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "show", *filter(None, what)],
            env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
