"""Turns reports into metrics for node exporter's textfile collector: `python textfile.py REPORTS FILE.prom`.

Counts what lies in the folder: stops by outcome, seconds to the last rank, steps lost. Standard library only. Reports
that are rotated away are no longer counted, which PromQL's `increase` takes for a restart of the counter.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

OUTCOMES = ("clean", "partial", "aborted", "forced")
MOST_BYTES = 4 << 20
DAY = 86_400


def read(folder: Path) -> list[dict[str, Any]]:
    """The reports of a folder; what is none is left out. Any process of any job may have written there."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            if not path.is_file():  # a FIFO would never end
                continue
            with path.open("rb") as file:
                report = json.loads(file.read(MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(report, dict) and report.get("schema") in (1, 2):
            found.append(report)
    return found


def read_notices(folder: Path) -> list[dict[str, Any]]:
    """What `autoteardown watch` has recorded in that folder, oldest first."""
    found = []
    for path in sorted(folder.glob("*.notice")):
        try:
            if not path.is_file():
                continue
            with path.open("rb") as file:
                notice = json.loads(file.read(MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            continue
        if (
            isinstance(notice, dict)
            and notice.get("schema") == 1
            and isinstance(notice.get("received_at"), str)
        ):
            found.append(notice)
    return sorted(found, key=lambda notice: str(notice["received_at"]))


def job_of(report: dict[str, Any]) -> str:
    """The name of its job, as UTF-8 can write it."""
    return str(report.get("job") or "")[:200].encode("utf-8", "replace").decode()


def lasted(report: dict[str, Any]) -> float:
    """Seconds to the end of its last phase."""
    phases = report.get("phases")
    ends = (
        [phase.get("end") for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    )
    return max((float(end) for end in ends if type(end) in (int, float) and 0 <= end <= DAY), default=0.0)


def metrics(reports: list[dict[str, Any]], notices: list[dict[str, Any]]) -> str:
    """The text of the exposition format."""
    ranks: Counter[tuple[str, str]] = Counter()
    evictions: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    latest: dict[str, str] = {}
    for report in reports:
        job = job_of(report)
        ranks[job, str(report.get("outcome"))] += 1
        evictions[job] += report.get("cause") == "signal"
        received = str(report.get("received_at"))
        stop = received[:16]  # the minute: the ranks of one stop hear of it within a second or so
        if stop > latest.get(job, ""):
            latest[job], slowest[job] = stop, 0.0
        if stop == latest[job]:
            slowest[job] = max(slowest[job], lasted(report))
    lines = []

    def family(name: str, kind: str, text: str, rows: list[tuple[dict[str, str], float]]) -> None:
        lines.extend([f"# HELP {name} {text}", f"# TYPE {name} {kind}"])
        for labels, value in rows:
            inner = ",".join(f'{key}="{escape(label)}"' for key, label in labels.items())
            lines.append(f"{name}{{{inner}}} {value:g}")

    family(
        "autoteardown_ranks_total",
        "counter",
        "Torn-down ranks by outcome.",
        [
            ({"job_name": job, "outcome": outcome}, ranks[job, outcome])
            for job in sorted({job for job, _ in ranks})
            for outcome in OUTCOMES
        ],
    )
    family(
        "autoteardown_evictions_total",
        "counter",
        "Ranks that got the eviction signal themselves.",
        [({"job_name": job}, count) for job, count in sorted(evictions.items())],
    )
    family(
        "autoteardown_last_stop_seconds",
        "gauge",
        "Seconds from its signal to the exit of the slowest rank, in the latest stop.",
        [({"job_name": job}, value) for job, value in sorted(slowest.items())],
    )
    family(
        "autoteardown_steps_lost_total",
        "counter",
        "Steps that a rank had begun and not completed at the agreed one: 0 where the stop was agreed.",
        [({"job_name": job}, value) for job, value in sorted(lost(reports).items())],
    )
    counts: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for notice in notices:
        source = job_of({"job": notice.get("source")})
        counts[source] += 1
        given = notice.get("seconds")
        if type(given) in (int, float) and 0 <= given <= DAY:
            seconds[source] = float(given)
    family(
        "autoteardown_notices_total",
        "counter",
        "Notices of the cloud at which a node was drained.",
        [({"source": source}, count) for source, count in sorted(counts.items())],
    )
    family(
        "autoteardown_seconds_of_notice",
        "gauge",
        "Seconds from the drain to the end of the machine, as the latest notice gave them.",
        [({"source": source}, value) for source, value in sorted(seconds.items())],
    )
    return "\n".join(lines) + "\n"


def lost(reports: list[dict[str, Any]]) -> Counter[str]:
    """Ranks that stopped at no agreed step, by job: each has thrown a step away."""
    found: Counter[str] = Counter()
    for report in reports:
        steps = report.get("steps")
        if isinstance(steps, dict):
            found[job_of(report)] += steps.get("agreed") is None or steps.get("stopped_at") is None
    return found


def escape(label: str) -> str:
    """A label's value as the format wants it."""
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def main() -> int:
    """Write the file, whole or not at all: the collector may read at any time."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(metrics(read(folder), read_notices(folder)), "utf-8")
    temporary.chmod(0o644)
    temporary.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
