"""Makes the table that compares the outcomes of a drill, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import AGENT
from autoteardown.timeline.stops import seconds

# The table fits in 80 columns with the longest values. So the column says "no", and not "not clean".
HEAD = ("scenario", "protection", "clean", "peers", "gone", "KILL", "steps", "lost", "exit codes")
LEGEND = (
    "Peers: how long until the ranks without a signal were free; gone: all of them.",
    "KILL: how many were SIGKILLed at the end of the grace period. Steps: where they",
    "stopped; one number is right. Lost: steps since the last checkpoint. Exit codes",
    "by rank; TERM or KILL: ended by that signal.",
)


class Cell(NamedTuple):
    """The text of a cell, and whether it shows a problem."""

    text: str
    bad: bool = False


def rows(outcomes: Iterable[Outcome]) -> list[list[Cell]]:
    """One row for each outcome; only the first of a scenario has its name."""
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


def headline(outcomes: Sequence[Outcome]) -> str:
    """The result in one or two sentences, which begin with the first scenario in which another protection failed."""
    agents = [outcome for outcome in outcomes if outcome.protection == AGENT]
    bad = [outcome for outcome in agents if not outcome.clean]
    if not agents:
        return ""
    result = "With the agent, everything came out clean." if not bad else (
        f"With the agent, {len(bad)} of {len(agents)} scenarios did not come out clean."
    )  # fmt: skip
    for outcome in outcomes:
        guarded = next((each for each in agents if each.scenario == outcome.scenario and each.clean), None)
        if guarded is None or outcome.protection == AGENT or not outcome.hanging:
            continue
        count = outcome.hanging
        peers = "a peer was" if count == 1 else f"{count} peers were"
        freed = guarded.peers_freed
        after = f"free after {seconds(freed)}" if freed is not None else "free in time"
        return (
            f"{outcome.scenario}: with {outcome.label} {peers} still running when the {outcome.grace:g} s of grace "
            f"were over; with the agent, {'it was' if count == 1 else 'they were'} {after}. {result}"
        )
    return result


def _cells(outcome: Outcome) -> list[Cell]:
    if not outcome.ranks:
        return [Cell(outcome.label), Cell("-", True), *[Cell("-")] * (len(HEAD) - 3)]
    wrong = any(rank.problem for rank in outcome.ranks)
    lasted, freed = outcome.last_exit, outcome.peers_freed
    steps = sorted(set(outcome.steps))
    return [
        Cell(outcome.label),
        Cell("yes" if outcome.clean else "no", not outcome.clean),
        Cell("-" if not outcome.peers else "never" if freed is None else seconds(freed), outcome.hanging > 0),
        Cell("never" if lasted is None else seconds(lasted), lasted is None or lasted > outcome.grace),
        Cell(str(outcome.sigkilled), outcome.sigkilled > 0),
        Cell("-" if not steps else str(steps[0]) if len(steps) == 1 else "differ", len(steps) > 1),
        Cell("-" if outcome.steps_lost is None else str(outcome.steps_lost)),
        Cell(_codes(outcome), wrong),
    ]


def _codes(outcome: Outcome) -> str:
    """Exit codes as `0, 143`; with many ranks as `0, 143 (x7)`."""
    endings = [rank.ending.replace("SIG", "") for rank in outcome.ranks]
    if len(endings) <= 2:
        return ", ".join(endings)
    runs = [(ending, len(list(run))) for ending, run in groupby(endings)]
    return ", ".join(f"{ending} (x{count})" if count > 1 else ending for ending, count in runs)
