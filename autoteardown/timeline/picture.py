"""Draws the legend of the drawing's colours and marks, and writes stops as one SVG file."""

from __future__ import annotations

from autoteardown.timeline import drawing, page, summary
from autoteardown.timeline.stops import Stop

_BOX = '<rect class="{}" width="14" height="12"/>'


def key(stop: Stop) -> str:
    """The legend of a stop's drawing, as an HTML list."""
    items = "".join(
        f'<li><svg width="14" height="12" aria-hidden="true">{sign}</svg>{page.esc(text)}</li>'
        for sign, text in _signs(stop)
    )
    return f'<ul class="key">{items}</ul>'


def svg(stops: list[tuple[str, Stop, float]]) -> str:
    """Several stops, one below the other, as one SVG file.

    Args:
        stops: heading, stop and grace period (seconds) of each.
    """
    y, parts = 10.0, []
    for heading, stop, grace in stops:
        parts.append(drawing.text(8, y + 6, heading, "heading"))
        parts.append(drawing.text(8, y + 24, stop.summary(grace), "soft"))
        x = 8.0
        for sign, text in _signs(stop):
            parts.append(f'<svg x="{x:.0f}" y="{y + 42:.0f}" width="14" height="12">{sign}</svg>')
            parts.append(drawing.text(x + 19, y + 48, text))
            x += 40 + 6.2 * len(text)
        parts.append(drawing.draw(stop, grace, y + 66))
        y += 66 + drawing.size(stop) + 24
    return page.picture(drawing.WIDTH, y - 14, "".join(parts))


def _signs(stop: Stop) -> list[tuple[str, str]]:
    """The signs that the drawing of a stop uses, each 14 by 12 pixels, with their meaning."""
    phases = [phase for rank in stop.ranks for phase in rank.phases]
    kinds = {drawing.colour(phase.name) for phase in phases}
    signs = [(_BOX.format(f"p-{kind}"), kind) for kind in page.PHASES["light"] if kind in kinds]
    for outcome, text in (("timeout", "timed out"), ("error", "failed")):
        if any(phase.outcome == outcome for phase in phases):
            signs.append((_BOX.format("p-other") + _BOX.format(outcome), text))
    signs.append((drawing.mark("signal", 11, 6, 10), "got the signal"))
    if any(rank.cause == "peer" for rank in stop.ranks):
        signs.append((drawing.mark("peer", 11, 6, 10), "stopped because a peer did"))
    if any(rank.cause == "lost" for rank in stop.ranks):
        signs.append((drawing.mark("lost", 12, 6, 9), "stopped because a peer vanished"))
    if any(lane.missing for lane in summary.lanes(stop)):
        signs.append((_BOX.format("gone"), "no report"))
    return signs
