"""Draws one stop as SVG: a lane a rank, a bar a phase."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Union

from autoteardown.timeline.page import PHASES, esc
from autoteardown.timeline.stops import GLYPH, Phase, Rank, Stop, seconds, verdict, words

WIDTH, LEFT, RIGHT, TOP = 1180, 196, 190, 40
X0, X1 = LEFT, WIDTH - RIGHT
TALL = 11  # a lane this high has room for its own words
WIDEST = 6.6  # of a letter

Row = Union[Rank, int]  # a report, or the number of a rank that left none


@dataclass(frozen=True)
class Axis:
    """Seconds to pixels. Broken before the end of the grace period where that is far off."""

    span: float
    right: float
    limit: float
    broken: bool

    def x(self, when: float) -> float:
        """Where a moment lies."""
        return X0 + (self.right - X0) * min(max(when, 0.0), self.span) / self.span


def axis(lasted: float, grace: float) -> Axis:
    """To scale up to the end of the grace period, where that leaves the bars half the width."""
    lasted = max(lasted, 0.01)
    if grace <= 2 * lasted:
        span = max(lasted, grace) * 1.02
        return Axis(span, X1, X0 + (X1 - X0) * grace / span, broken=False)
    return Axis(lasted * 1.04, X1 - 60, X1 - 12, broken=True)


def size(stop: Stop) -> tuple[float, float]:
    """How high a lane of this stop is, and how high the drawing."""
    count = len(rows(stop))
    lane = min(26.0, max(4.0, 1100 / count))
    return lane, TOP + lane * count + 14


def draw(stop: Stop, grace: float, top: float = 0) -> str:
    """The SVG of a stop; `top` is where it begins inside another one."""
    lanes = rows(stop)
    height, whole = size(stop)
    bottom = whole - 14
    scale = axis(stop.lasted, grace)
    box = f'width="{WIDTH}" height="{_n(whole)}" viewBox="0 0 {WIDTH} {_n(whole)}"'
    return "".join(
        [
            f'<svg y="{_n(top)}" {box} role="img" aria-label="{esc(stop.summary(grace))}">',
            _bands(lanes, height),
            _grid(scale, bottom),
            *(_lane(stop, row, TOP + i * height, height, scale) for i, row in enumerate(lanes)),
            "" if height >= TALL else _sparse_labels(lanes, height),
            _marks(stop, scale, grace, bottom),
            "</svg>",
        ]
    )


def rows(stop: Stop) -> list[Row]:
    """Ranks without a report get an empty lane, unless this folder holds only a small part of the job."""
    if not 0 < len(stop.missing) <= len(stop.ranks):
        return list(stop.ranks)
    unnumbered: list[Row] = [r for r in stop.ranks if r.rank is None]
    known: dict[int, Row] = {r.rank: r for r in stop.ranks if r.rank is not None}
    known.update({n: n for n in stop.missing})
    return [known[n] for n in sorted(known)] + unnumbered


def _lane(stop: Stop, row: Row, y: float, height: float, scale: Axis) -> str:
    middle, tall = y + height / 2, height >= TALL
    hit = f'<rect class="hit" x="0" y="{_n(y)}" width="{WIDTH}" height="{_n(height)}"/>'
    if isinstance(row, int):
        box = f'x="{X0}" y="{_n(y + height * 0.3)}" width="{X1 - X0}" height="{_n(height * 0.4)}"'
        parts = [f'<rect class="gone" {box}/>']
        if tall:
            parts += [say(8, middle, f"rank {row}", "soft"), say(X1 + 10, middle, "no report", "soft")]
        return f'<g class="lane">{hit}<title>{esc(f"rank {row}: no report")}</title>{"".join(parts)}</g>'
    parts = [hit, f"<title>{esc(words(stop, row))}</title>"]
    begin = stop.offset(row)
    # The shortest last: should phases overlap, none hides another.
    for phase in sorted(row.phases, key=lambda p: p.start - (p.end if p.end is not None else 1e9)):
        parts.append(_bar(phase, begin, y, height, scale))
    parts.append(mark(row.cause, scale.x(begin), middle, min(9.0, height - 0.5)))
    if tall:
        parts.append(say(8, middle, row.name, "origin" if row.is_origin else ""))
        parts.append(say(72, middle, _short(row.host, 17), "soft"))
        parts.append(say(X1 + 10, middle, verdict(row), "" if row.clean else "bad"))
    # The keyboard reaches what somebody looks for; five hundred stops for clean ranks would be in its way.
    focus = "" if row.clean else ' tabindex="0"'
    return f'<g class="lane" data-outcome="{esc(row.outcome)}"{focus}>{"".join(parts)}</g>'


def _bar(phase: Phase, begin: float, y: float, height: float, scale: Axis) -> str:
    pad = 4 if height >= 20 else 2 if height >= TALL else 0.5
    left = scale.x(begin + phase.start)
    right = scale.x(begin + phase.end) if phase.end is not None else scale.right
    width, tall = max(right - left, 1.5), height - 2 * pad
    kind = f"p-{colour(phase.name)}"
    box = f'x="{_n(left)}" y="{_n(y + pad)}" width="{_n(width)}" height="{_n(tall)}"'
    shape = " skipped" if phase.outcome == "skipped" else " open" if phase.end is None else ""
    parts = [f'<rect class="{kind}{shape}" stroke-width=".5" {box}/>']
    if phase.outcome in ("timeout", "error"):
        parts.append(f'<rect class="{phase.outcome}" {box}/>')
    label = phase.name if phase.outcome == "ok" else f"{phase.name} {phase.outcome}"
    for text in (label, phase.name):
        if tall >= 11 and width >= WIDEST * len(text) + 8 and not shape:
            if len(parts) > 1:  # a halo keeps the words apart from the hatching
                parts.append(say(left + 5, y + height / 2, text, f"{kind} in", 'stroke-width="4"'))
            else:
                parts.append(say(left + 5, y + height / 2, text, "in"))
            break
    return "".join(parts)


def colour(name: str) -> str:
    """The class of a phase; one for all that a later version may bring."""
    return name if name in PHASES["light"] else "other"


def mark(cause: str, x: float, y: float, size: float) -> str:
    """A filled arrow head for a signal, a hollow circle for the word of a peer; its tip is the moment."""
    half = size / 2
    if cause == "signal":
        return f'<path class="signal" d="M{_n(x)} {_n(y)}l{_n(-size)} {_n(-half)}v{_n(size)}z"/>'
    width = 1.5 if size > 5 else 0.8
    where = f'cx="{_n(x - half - 1)}" cy="{_n(y)}" r="{_n(half - 0.5)}"'
    return f'<circle class="peer" stroke-width="{width}" {where}/>'


def _bands(lanes: list[Row], height: float) -> str:
    """Every other lane shaded; every other host where lanes are thin."""
    parts, y = [], float(TOP)
    for i, (_, run) in enumerate(groupby(lanes, key=None if height >= TALL else _host)):
        tall = height * len(list(run))
        if i % 2 == 0:
            parts.append(f'<rect class="band" x="0" y="{_n(y)}" width="{WIDTH}" height="{_n(tall)}"/>')
        y += tall
    return "".join(parts)


def _grid(scale: Axis, bottom: float) -> str:
    step = next(s for s in _nice() if scale.span / s <= 8)
    parts = []
    for i in range(int(scale.span / step) + 1):
        x = scale.x(i * step)
        parts.append(f'<line class="rule" x1="{_n(x)}" x2="{_n(x)}" y1="{TOP - 4}" y2="{_n(bottom)}"/>')
        if abs(x - scale.limit) > 22 and (x < scale.right - 20 or not scale.broken):
            parts.append(say(x, TOP - 11, _tick(i * step, scale.span), "soft", 'text-anchor="middle"'))
    if scale.broken:
        x = (scale.right + scale.limit) / 2
        parts.append(f'<path class="mark" fill="none" d="M{_n(x - 5)} {TOP}l4 -9m2 9l4 -9"/>')
    return "".join(parts)


def _marks(stop: Stop, scale: Axis, grace: float, bottom: float) -> str:
    last, limit = scale.x(stop.lasted), scale.limit
    exit_text, grace_text = f"last exit {seconds(stop.lasted)}", f"grace period ends: {grace:g} s"
    # The words of what comes first to its left, of what comes last to its right: the two can be as close as they like.
    overrun = limit < last
    return (
        f'<line class="mark" x1="{X0}" x2="{X0}" y1="{TOP - 6}" y2="{_n(bottom + 4)}"/>'
        + say(X0 - 5, 10, "first signal", "", 'text-anchor="end"')
        + f'<line class="mark" stroke-dasharray="4 3" x1="{_n(last)}" x2="{_n(last)}" y1="{TOP - 6}" '
        f'y2="{_n(bottom + 4)}"/>'
        + _beside(last, exit_text, left=not overrun)
        + f'<line class="limit" stroke-width="2" x1="{_n(limit)}" x2="{_n(limit)}" y1="4" '
        f'y2="{_n(bottom + 4)}"/>' + _beside(limit, grace_text, "bad", left=overrun)
    )


def _beside(x: float, text: str, kind: str = "", left: bool = False) -> str:
    """The words of a mark, above the lanes; on its right where there is no room on its left."""
    if left and x - X0 > WIDEST * len(text):
        return say(x - 5, 10, text, kind, 'text-anchor="end"')
    return say(x + 5, 10, text, kind)


def _sparse_labels(lanes: list[Row], height: float) -> str:
    """Labels for runs of thin lanes: hosts on the left, outcomes on the right."""
    parts, y, free = [], float(TOP), 0.0
    for host, run in groupby(lanes, key=_host):
        group = list(run)
        middle = y + height * len(group) / 2
        if middle - free >= TALL:
            names = [str(r if isinstance(r, int) else r.rank) for r in (group[0], group[-1])]
            label = names[0] if len(group) == 1 else f"{names[0]}-{names[1]}"
            parts += [say(8, middle, label), say(72, middle, _short(host, 17), "soft")]
            free = middle
        y += height * len(group)
    y, free = float(TOP), 0.0
    for text, run in groupby(lanes, key=lambda r: "no report" if isinstance(r, int) else verdict(r)):
        group = list(run)
        tall, good = height * len(group), text.startswith(GLYPH["clean"])
        middle = y + tall / 2
        at = max(middle, free + TALL)
        # Clean ranks are told where there is room; one that is not is told beside its lane, or close to it.
        if at - middle <= (0 if good else 60) and (not good or tall >= TALL):
            many = f" (x{len(group)})" if len(group) > 1 else ""
            parts.append(f'<path class="rule" fill="none" d="M{X1} {_n(middle)}L{X1 + 8} {_n(at)}"/>')
            parts.append(say(X1 + 10, at, text + many, "" if good else "bad"))
            free = at
        y += tall
    return "".join(parts)


def _host(row: Row) -> str:
    return "no report" if isinstance(row, int) else row.host


def say(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    """One line of text of a class, with more attributes."""
    return f'<text x="{_n(x)}" y="{_n(y + 4)}" class="{kind}" {more}>{esc(text)}</text>'


def _short(text: str, limit: int) -> str:
    """Keeps both ends: hosts of a job differ in their last characters."""
    return (
        text
        if len(text) <= limit
        else f"{text[: limit // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{text[-(limit // 2) :]}"
    )


def _tick(value: float, span: float) -> str:
    return f"{value * 1000:g} ms" if span < 1 else f"{value:g} s"


def _nice() -> list[float]:
    return [float(f"{m}e{e}") for e in range(-3, 6) for m in (1, 2, 5)]


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
