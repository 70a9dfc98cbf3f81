"""What goes with the lanes: the key to their colours and marks, and a picture file of its own."""

from __future__ import annotations

from autoteardown.timeline import lanes, page, story
from autoteardown.timeline.stops import Stop

_BOX = '<rect class="{}" width="14" height="12"/>'


def key(stop: Stop) -> str:
    """What the colours and marks of a stop's lanes mean, as an HTML list."""
    items = "".join(
        f'<li><svg width="14" height="12" aria-hidden="true">{sign}</svg>{page.esc(text)}</li>'
        for sign, text in _signs(stop)
    )
    return f'<ul class="key">{items}</ul>'


def svg(stops: list[tuple[str, Stop, float]]) -> str:
    """Stops below each other as one SVG file, each with its heading and its grace period."""
    y, parts = 10.0, []
    for heading, stop, grace in stops:
        parts.append(lanes.say(8, y + 6, heading, "heading"))
        parts.append(lanes.say(8, y + 24, stop.summary(grace), "soft"))
        x = 8.0
        for sign, text in _signs(stop):
            parts.append(f'<svg x="{x:.0f}" y="{y + 42:.0f}" width="14" height="12">{sign}</svg>')
            parts.append(lanes.say(x + 19, y + 48, text))
            x += 40 + 6.2 * len(text)
        parts.append(lanes.draw(stop, grace, y + 66))
        y += 66 + lanes.size(stop) + 24
    return page.picture(lanes.WIDTH, y - 14, "".join(parts))


def _signs(stop: Stop) -> list[tuple[str, str]]:
    """The signs that the drawing of a stop uses, in boxes of 14 by 12, and their meaning."""
    phases = [phase for rank in stop.ranks for phase in rank.phases]
    kinds = {lanes.colour(phase.name) for phase in phases}
    signs = [(_BOX.format(f"p-{kind}"), kind) for kind in page.PHASES["light"] if kind in kinds]
    for outcome, text in (("timeout", "timed out"), ("error", "failed")):
        if any(phase.outcome == outcome for phase in phases):
            signs.append((_BOX.format("p-other") + _BOX.format(outcome), text))
    signs.append((lanes.mark("signal", 11, 6, 10), "got the signal"))
    if any(rank.cause == "peer" for rank in stop.ranks):
        signs.append((lanes.mark("peer", 11, 6, 10), "stopped because a peer did"))
    if any(rank.cause == "lost" for rank in stop.ranks):
        signs.append((lanes.mark("lost", 12, 6, 9), "stopped because a peer vanished"))
    if any(lane.missing for lane in story.lanes(stop)):
        signs.append((_BOX.format("gone"), "no report"))
    return signs
