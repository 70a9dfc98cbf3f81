"""Reads and validates the JSON reports of a job.

Any process of the job can write to the shared folder of the reports, possibly while this runs. So no content is
trusted: sizes are bounded, numbers are finite, control characters are removed from text, and a report that cannot be
read is named and left out.
"""

from __future__ import annotations

import json
import re
import signal as signals
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autoteardown.timeline.stops import Phase, Rank, Stop, group, ranges

SCHEMAS = (1, 2)
MAX_BYTES = 4 << 20
# Seconds. No grace period is a day long: a longer phase comes from a broken clock, and would make all other bars
# invisible.
LONGEST = 86_400.0
MOST_RANKS = 1 << 17
MOST_PHASES = 100

REQUIRED = ("host", "pid", "rank", "world_size", "cause", "received_at", "phases", "outcome", "exit_code")


def read(folder: Path) -> tuple[list[Stop], list[str]]:
    """The stops in a folder of reports, oldest first, and one line for each thing wrong with the reports.

    Raises:
        OSError: the folder cannot be read.
    """
    ranks: list[Rank] = []
    problems: list[str] = []
    # Not `glob`, which treats a folder without read permission as an empty one.
    for path in sorted(path for path in folder.iterdir() if path.suffix == ".json"):
        name = plain(path.name)
        try:
            value = _load(path)
            if (
                isinstance(value, dict) and "traceEvents" in value
            ):  # this command's own output, in the same folder
                continue
            rank, wrong = _rank(name, value)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{name}: left out: {plain(str(error)) or type(error).__name__}")
            continue
        ranks.append(rank)
        if wrong:
            problems.append(f"{name}: drawn without {', '.join(wrong)}")
    stops = group(ranks)
    for number, stop in enumerate(stops, 1):
        if stop.missing:
            which = f"stop {number}: " if len(stops) > 1 else ""
            problems.append(
                f"{which}no report from {ranges(stop.missing)}: killed, not armed, or not in this folder"
            )
    return stops, problems


def _load(path: Path) -> Any:
    if not path.is_file():  # opening a FIFO would wait for ever
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(data, parse_constant=_not_finite)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _rank(file: str, value: Any) -> tuple[Rank, list[str]]:
    """A report with each field validated, and the names of fields that are missing or unreadable."""
    if not isinstance(value, dict) or "schema" not in value:
        raise ValueError("not a report (no schema)")
    if value["schema"] not in SCHEMAS or isinstance(value["schema"], bool):
        known = " and ".join(map(str, SCHEMAS))
        raise ValueError(f"schema {plain(str(value['schema']), 20)}, and this version reads {known}")
    wrong = [name for name in REQUIRED if name not in value]
    given = value.get("steps")
    steps: dict[str, Any] = given if isinstance(given, dict) else {}
    rank = Rank(
        file=file,
        job=_text(value.get("job")),
        host=_text(value.get("host")) or "?",
        pid=_whole(value.get("pid")),
        rank=_whole(value.get("rank"), most=MOST_RANKS),
        world_size=_whole(value.get("world_size"), most=MOST_RANKS),
        program=_text(value.get("program")),
        cause=_text(value.get("cause")) or "?",
        signal=_signal(value.get("signal")),
        origin=_origin(value.get("origin")),
        received=_time(value.get("received_at")),
        at_signal=_whole(steps.get("at_signal")),
        stopped_at=_whole(steps.get("stopped_at")),
        stuck=stacks(value.get("stuck")),
        stuck_at=stuck_at(value.get("stuck")),
        outcome=_text(value.get("outcome")) or "unknown",
        why=_text(value.get("why")),
        exit_code=_whole(value.get("exit_code"), least=-255),
        grace=_number(value.get("grace")),
    )
    rank.phases, bad = _phases(value.get("phases"))
    if bad:
        wrong.append(f"{bad} of its phases")
    if rank.received is None and "received_at" in value:
        wrong.append("received_at")
    return rank, wrong


def _phases(value: Any) -> tuple[list[Phase], int]:
    phases: list[Phase] = []
    bad = 0
    for item in value if isinstance(value, list) else []:
        entry = item if isinstance(item, dict) else {}
        start, end = _number(entry.get("start")), _number(entry.get("end"))
        if start is None or (end is not None and end < start) or len(phases) >= MOST_PHASES:
            bad += 1
            continue
        phases.append(
            Phase(
                _text(entry.get("name"), 20) or "?",
                start,
                end,
                _text(entry.get("outcome"), 20) or "?",
                _text(entry.get("detail")),
            )
        )
    return sorted(phases, key=lambda p: p.start), bad


def _origin(value: Any) -> tuple[int | None, str, int | None] | None:
    if not isinstance(value, dict):
        return None
    return _whole(value.get("rank")), _text(value.get("host")), _whole(value.get("pid"))


def _whole(value: Any, least: int = 0, most: int = 1 << 53) -> int | None:
    return (
        value if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most else None
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Compared before float(): a JSON integer can be too large for a float.
    return max(0.0, float(value)) if -1 < value <= LONGEST else None


def _signal(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return signals.Signals(value).name
        except ValueError:
            return f"signal {value}"
    return _text(value, 20)


def _time(value: Any) -> float | None:
    """An ISO 8601 time as seconds since the epoch; UTC if it names no zone."""
    if not isinstance(value, str):
        return None
    # fromisoformat of Python 3.9 and 3.10 accepts no Z, and only 3 or 6 decimals of a second.
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", value.strip()
    )
    if match is None:
        return None
    zone = match[3] or "Z"
    zone = "+00:00" if zone == "Z" else zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
    try:
        when = datetime.fromisoformat(f"{match[1]}.{(match[2] or '0')[:6]:0<6}{zone}")
        return (when - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
    except (ValueError, OverflowError):
        return None


def stuck_at(value: Any) -> str:
    """The last position of a thread of the program, as `all_reduce, at /app/train.py:61`; empty if unknown."""
    for entry in reversed(value[:1000] if isinstance(value, list) else []):
        frames = entry.get("frames") if isinstance(entry, dict) else None
        named = (
            [frame for frame in frames[:200] if isinstance(frame, str)] if isinstance(frames, list) else []
        )
        # The program's own line: the functions that it called are in packages and in the standard library.
        own = next((f for f in named if "/site-packages/" not in f and "/lib/python" not in f), None)
        if own is not None:
            place, _, _ = own.rpartition(" in ")
            function = named[0].rpartition(" in ")[2]
            return plain(f"{function}, at {place}" if own != named[0] else own, 200)
    return ""


def stacks(value: Any, indent: str = "") -> str:
    """The report's `stuck` as text, whatever its structure: stacks by thread, by time, or lines."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, dict):
        short = {k: v for k, v in value.items() if not isinstance(v, (dict, list)) and "\n" not in str(v)}
        lines = [indent + ", ".join(f"{plain(str(k), 80)} {plain(str(v), 400)}" for k, v in short.items())]
        lines += [stacks(v, indent + "  ") for k, v in value.items() if k not in short]
        text = "\n".join(filter(str.strip, lines))
    elif isinstance(value, list):
        text = "\n".join(stacks(inner, indent) for inner in value)
    else:
        text = "\n".join(indent + plain(line, 400) for line in str(value).splitlines()[:400])
    return text if len(text) <= 20_000 else text[:20_000] + "\n... (cut)"


def _text(value: Any, limit: int = 300) -> str:
    return "" if value is None else plain(str(value), limit)


def plain(text: str, limit: int = 300) -> str:
    """Text without control, bidirectional and surrogate characters: they can rewrite a terminal or a page."""
    kept = "".join(
        c if c.isprintable() else " " if c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:limit]
    )
    return kept + "..." if len(text) > limit else kept
