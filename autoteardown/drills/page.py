"""`drill --html`: what the terminal shows, and a drawing of it, as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from autoteardown.drills import table
from autoteardown.drills.outcome import Outcome, RankOutcome
from autoteardown.timeline import lanes, page, picture
from autoteardown.timeline.stops import Phase, Rank, Stop


def html(outcomes: Sequence[Outcome], introduction: str) -> str:
    """The whole page."""
    parts = [
        "<h1>Fire drill</h1>",
        f'<p class="story">{page.esc(table.headline(outcomes))}</p>',
        f'<p class="soft">{page.esc(introduction)}</p>',
        page.table(table.HEAD, ([_cell(cell) for cell in row] for row in table.rows(outcomes))),
        f'<p class="soft">{page.esc(" ".join(table.LEGEND))}</p>',
    ]
    for name, run in groupby(outcomes, key=lambda outcome: outcome.scenario):
        group = list(run)
        stop, told = stop_of(group)
        parts += [f"<section><h2>{page.esc(name)}: {page.esc(group[0].title)}</h2>"]
        for outcome in group:
            kind = "" if outcome.clean else ' class="bad"'
            parts.append(f"<p{kind}><b>{page.esc(outcome.label)}</b> {page.esc(outcome.summary())}</p>")
        if stop.ranks:
            parts += [picture.key(told), f'<div class="scroll">{lanes.draw(stop, group[0].grace)}</div>']
        for outcome in group:
            if outcome.log:
                log = page.esc("\n".join(outcome.log))
                parts.append(f"<details><summary>What the agent said</summary><pre>{log}</pre></details>")
        parts.append("</section>")
    return page.document("Fire drill", "\n".join(parts))


def stop_of(outcomes: Sequence[Outcome]) -> tuple[Stop, Stop]:
    """All ranks of one scenario as one stop, a lane each, and those of them alone that the agent has reported.

    The protection stands where the host would.
    """
    everyone, reported = [], []
    for outcome in outcomes:
        told = {report.pid: report for stop in outcome.stops for report in stop.ranks}
        for rank in outcome.ranks:
            everyone.append(_drawn(outcome, rank, told.get(rank.pid)))
            if rank.pid in told:
                reported.append(everyone[-1])
    return Stop(everyone), Stop(reported)


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
        # It says nothing of itself: all that is known is how long it was there.
        drawn.outcome = rank.fate
        drawn.phases = [Phase("alive", 0.0, rank.seconds, "ok", "no handler or agent has reported")]
        return drawn
    drawn.phases, drawn.outcome, drawn.stuck = report.phases, report.outcome, report.stuck
    drawn.at_signal, drawn.stopped_at = report.at_signal, report.stopped_at
    return drawn


def _cell(cell: table.Cell) -> str:
    return f'<span class="bad">{page.esc(cell.text)}</span>' if cell.bad else page.esc(cell.text)
