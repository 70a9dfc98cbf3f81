"""`autoteardown timeline DIR`: draws the reports of a job as a page, a picture or a trace."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from autoteardown.timeline import drawing, page, perfetto, picture, reports, summary
from autoteardown.timeline.stops import DEFAULT_GRACE, Rank, Stop, seconds, verdict

DEFAULT_FILE = {"html": "timeline.html", "perfetto": "timeline.perfetto.json", "svg": "timeline.svg"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Draw the reports of a job (the files in AUTOTEARDOWN_REPORT_DIR): one lane for each rank, one bar for "
        "each phase."
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of the reports")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; - for standard output")
    parser.add_argument(
        "--format",
        choices=sorted(DEFAULT_FILE),
        default="html",
        help="html: one page; perfetto: a trace for ui.perfetto.dev; svg: the picture alone (default: %(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=_positive,
        metavar="S",
        help=f"seconds of grace that the platform gave (default: as the reports say, else {DEFAULT_GRACE:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Read the reports, draw them, write the file. Problems with single reports go to stderr, and do not fail it."""
    if not args.dir.is_dir():
        return _fail(f"{args.dir}: not a folder; give the one that AUTOTEARDOWN_REPORT_DIR names")
    try:
        stops, problems = reports.read(args.dir)
    except OSError as error:
        return _fail(f"{args.dir}: {error.strerror}")
    for problem in problems:
        _say(problem)
    if not stops:
        return _fail(
            f"{args.dir}: no reports; ranks write them there when AUTOTEARDOWN_REPORT_DIR names the folder"
            if not problems
            else f"{args.dir}: none of the reports can be read"
        )
    if args.format == "perfetto":
        text = perfetto.trace(stops, args.grace)
    elif args.format == "svg":
        text = picture.svg([(*each, _grace(each[1], args.grace)) for each in _with_headings(stops)])
    else:
        text = html(stops, problems, args.grace, reports.plain(str(args.dir)))
    target = args.output or DEFAULT_FILE[args.format]
    if target == "-":
        # UTF-8, as the page declares, whatever the locale.
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        return 0
    try:
        _write(Path(target), text)
    except OSError as error:
        return _fail(f"{target}: {error.strerror}")
    for heading, stop in _with_headings(stops):
        sys.stdout.write(f"{heading}: {summary.sentence(stop)}\n{stop.summary(_grace(stop, args.grace))}\n")
    sys.stdout.write(f"wrote {reports.plain(target)}\n")
    return 0


def html(stops: list[Stop], problems: list[str], grace: float | None, source: str) -> str:
    """The HTML page for these stops."""
    parts = [
        "<h1>Teardown timeline</h1>",
        f'<p class="soft">{page.esc(source)}: {_count(sum(len(s.ranks) for s in stops), "report")}, '
        f"{_count(len(stops), 'stop')}</p>",
        page.notice("What is missing", problems),
    ]
    for heading, stop in _with_headings(stops):
        limit = _grace(stop, grace)
        known = grace is not None or stop.grace is not None
        parts += [
            f"<section><h2>{page.esc(heading)}</h2>",
            f'<p class="story">{page.esc(summary.sentence(stop))}</p>',
            f'<p class="summary soft">{page.esc(stop.summary(limit))}.'
            + ("" if known else ' <span class="soft">The grace period is assumed; --grace sets it.</span>')
            + "</p>",
            picture.key(stop),
            f'<div class="scroll">{drawing.draw(stop, limit)}</div>',
            _table(stop),
            "</section>",
        ]
    return page.document("Teardown timeline", "\n".join(parts))


def _with_headings(stops: list[Stop]) -> list[tuple[str, Stop]]:
    return [(_heading(stop, number, len(stops)), stop) for number, stop in enumerate(stops, 1)]


def _heading(stop: Stop, number: int, count: int) -> str:
    began = datetime.fromtimestamp(stop.began, tz=timezone.utc) if stop.began else None
    return " \N{MIDDLE DOT} ".join(
        filter(
            None,
            [
                f"Stop {number} of {count}" if count > 1 else "Stop",
                f"job {stop.ranks[0].job}" if stop.ranks[0].job else "",
                stop.ranks[0].program,
                f"world of {stop.world_size}" if stop.world_size is not None else "",
                f"{began:%Y-%m-%d %H:%M:%S} UTC" if began else "",
            ],
        )
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _table(stop: Stop) -> str:
    """The reports as an HTML table: for screen readers, the browser's search, and complete stacks."""
    head = ["rank", "host", "pid", "cause", "outcome", "out after", "stopped at step", "phases"]
    if any(rank.stuck and rank.wedged for rank in stop.ranks):
        head.append("stacks")
    state = " open" if len(stop.ranks) <= 16 else ""
    return (
        f"<details{state}><summary>The reports as text</summary>"
        + page.table(head, (_cells(rank)[: len(head)] for lane in summary.lanes(stop) for rank in lane.ranks))
        + "</details>"
    )


def _cells(rank: Rank) -> list[str]:
    phases = ", ".join(
        f"{p.name} {seconds(p.end - p.start) if p.end is not None else 'unfinished'}"
        + (f" ({p.outcome}{': ' + p.detail if p.detail else ''})" if p.outcome != "ok" else "")
        for p in rank.phases
        if p.outcome != "skipped"
    )
    cause = rank.signal or rank.cause if rank.cause == "signal" else rank.cause
    stuck = (
        f"<details><summary>show</summary><pre>{page.esc(rank.stuck)}</pre></details>"
        if rank.stuck and rank.wedged
        else ""
    )
    plain = [
        str(rank.rank if rank.rank is not None else "?"),
        rank.host,
        str(rank.pid),
        cause + (" (first)" if rank.is_origin else ""),
        verdict(rank),
        seconds(rank.lasted),
        str(rank.stopped_at if rank.stopped_at is not None else ""),
    ]
    return [page.esc(cell) for cell in plain] + [f'<div class="wrap">{page.esc(phases)}</div>', stuck]


def _grace(stop: Stop, given: float | None) -> float:
    return given or stop.grace or DEFAULT_GRACE


def _write(path: Path, text: str) -> None:
    """Write the file atomically, so that a browser never reads half a page."""
    if path.exists() and not path.is_file():  # /dev/stdout must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= reports.LONGEST:  # also refuses NaN
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0, {reports.LONGEST:g} at most"
        )
    return value


def _say(line: str) -> None:
    sys.stderr.write(f"autoteardown timeline: {line}\n")


def _fail(line: str) -> int:
    _say(reports.plain(line))
    return 1
