"""The comparison as rows of words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from autoteardown.drills.outcome import CUT, Outcome
from autoteardown.timeline.stops import seconds

HEAD = (
    "scenario", "protection", "exit codes", "last exit", "hanging", "SIGKILLed", "checkpoint", "last step", "verdict",
)  # fmt: skip
LEGEND = (
    "Exit codes by rank, from rank 0 on; SIGTERM or SIGKILL: ended by it. Last exit: time since the first signal.",
    "Hanging: without a signal of its own, and still there at the end of the grace period.",
    "SIGKILLed: had the signal, and was still there. Last step: where the ranks stopped; one number is right.",
)


class Cell(NamedTuple):
    """What a cell says, and whether that is bad."""

    text: str
    bad: bool = False


def rows(outcomes: Iterable[Outcome]) -> list[list[Cell]]:
    """A row for each outcome; the name of a scenario only in its first."""
    found, last = [], ""
    for outcome in outcomes:
        name, last = ("" if outcome.scenario == last else outcome.scenario), outcome.scenario
        found.append([Cell(name), *_cells(outcome)])
    return found


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """The table as plain text."""
    table = [list(HEAD), *([cell.text for cell in row] for row in rows(outcomes))]
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]


def _cells(outcome: Outcome) -> list[Cell]:
    if not outcome.ranks:
        return [Cell(outcome.label), *[Cell("-")] * 6, Cell("no drill", True)]
    wrong = any(rank.problem for rank in outcome.ranks)
    lasted = outcome.last_exit
    steps = sorted(set(outcome.steps))
    return [
        Cell(outcome.label),
        Cell(_codes(outcome), wrong),
        Cell("never" if lasted is None else seconds(lasted), lasted is None or lasted > outcome.grace),
        Cell(str(outcome.hanging), outcome.hanging > 0),
        Cell(str(outcome.sigkilled), outcome.sigkilled > 0),
        Cell(outcome.checkpoint or "-", outcome.checkpoint == CUT),
        Cell(" / ".join(map(str, steps)) or "-", len(steps) > 1),
        Cell("clean" if outcome.clean else "not clean", not outcome.clean),
    ]


def _codes(outcome: Outcome) -> str:
    """`0, 143`; with many ranks `0, 143 (x7)`."""
    endings = [rank.ending for rank in outcome.ranks]
    if len(endings) <= 4:
        return ", ".join(endings)
    runs = [(ending, len(list(run))) for ending, run in groupby(endings)]
    return ", ".join(f"{ending} (x{count})" if count > 1 else ending for ending, count in runs)
