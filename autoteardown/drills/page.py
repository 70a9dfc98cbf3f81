"""Writes the HTML page of `drill --html`: the terminal's table and a drawing of each scenario."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from autoteardown.drills import table
from autoteardown.drills.outcome import Outcome, RankOutcome
from autoteardown.timeline import drawing, page, picture
from autoteardown.timeline.stops import Phase, Rank, Stop


def html(outcomes: Sequence[Outcome], introduction: str) -> str:
    """The complete page."""
    parts = [
        "<h1>Fire drill</h1>",
        f'<p class="story">{page.esc(table.headline(outcomes))}</p>',
        f'<p class="soft">{page.esc(introduction)}</p>',
        page.table(table.HEAD, ([_cell(cell) for cell in row] for row in table.rows(outcomes))),
        f'<p class="soft">{page.esc(" ".join(table.LEGEND))}</p>',
    ]
    for name, run in groupby(outcomes, key=lambda outcome: outcome.scenario):
        group = list(run)
        stop, reported = stop_of(group)
        parts += [f"<section><h2>{page.esc(name)}: {page.esc(group[0].title)}</h2>"]
        for outcome in group:
            kind = "" if outcome.clean else ' class="bad"'
            parts.append(f"<p{kind}><b>{page.esc(outcome.label)}</b> {page.esc(outcome.summary())}</p>")
        if stop.ranks:
            parts += [
                picture.key(reported),
                f'<div class="scroll">{drawing.draw(stop, group[0].grace)}</div>',
            ]
        for outcome in group:
            if outcome.log:
                log = page.esc("\n".join(outcome.log))
                parts.append(f"<details><summary>What the agent said</summary><pre>{log}</pre></details>")
        parts.append("</section>")
    return page.document("Fire drill", "\n".join(parts))


def stop_of(outcomes: Sequence[Outcome]) -> tuple[Stop, Stop]:
    """All ranks of one scenario as one stop, and those of them that have left a report as another.

    The protection takes the place of the host.
    """
    ranks, reported = [], []
    for outcome in outcomes:
        known = {report.pid: report for stop in outcome.stops for report in stop.ranks}
        for rank in outcome.ranks:
            ranks.append(_drawn(outcome, rank, known.get(rank.pid)))
            if rank.pid in known:
                reported.append(ranks[-1])
    return Stop(ranks), Stop(reported)


def _drawn(outcome: Outcome, rank: RankOutcome, report: Rank | None) -> Rank:
    drawn = Rank(
        file="",
        host=outcome.label,
        pid=rank.pid,
        rank=rank.rank,
        cause="signal" if rank.signalled else "peer",
        signal="SIGTERM" if rank.signalled else "",
        stopped_at=rank.step,
        exit_code=rank.code,
    )
    if report is None:
        # The rank has left no report: only the time until its exit is known.
        drawn.outcome = rank.fate
        drawn.phases = [Phase("alive", 0.0, rank.seconds, "ok", "no handler or agent has reported")]
        return drawn
    drawn.phases, drawn.outcome, drawn.stuck = report.phases, report.outcome, report.stuck
    drawn.at_signal, drawn.stopped_at = report.at_signal, report.stopped_at
    return drawn


def _cell(cell: table.Cell) -> str:
    return f'<span class="bad">{page.esc(cell.text)}</span>' if cell.bad else page.esc(cell.text)
