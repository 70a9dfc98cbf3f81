"""Draws one stop as SVG: one lane for each rank, one bar for each phase."""

from __future__ import annotations

from dataclasses import dataclass

from autoteardown.timeline.page import PHASES, esc
from autoteardown.timeline.stops import Phase, Stop, seconds, verdict, words
from autoteardown.timeline.summary import Lane, lanes

WIDTH, LEFT, RIGHT, TOP = 1180, 196, 190, 40
X0, X1 = LEFT, WIDTH - RIGHT
HEIGHT = 26.0  # of a lane, in pixels
WIDEST = 6.6  # width of a letter, in pixels


@dataclass(frozen=True)
class Axis:
    """Converts seconds to pixels. The axis is broken before the end of the grace period if that is far to the right."""

    span: float
    right: float
    limit: float
    broken: bool

    def x(self, when: float) -> float:
        """The pixel of a moment."""
        return X0 + (self.right - X0) * min(max(when, 0.0), self.span) / self.span


def axis(lasted: float, grace: float) -> Axis:
    """The axis: to scale up to the end of the grace period if the bars then get half the width, else broken."""
    lasted = max(lasted, 0.01)
    if grace <= 2 * lasted:
        span = max(lasted, grace) * 1.02
        return Axis(span, X1, X0 + (X1 - X0) * grace / span, broken=False)
    return Axis(lasted * 1.04, X1 - 60, X1 - 12, broken=True)


def size(stop: Stop) -> float:
    """The height of the drawing, in pixels."""
    return TOP + HEIGHT * len(lanes(stop)) + 14


def draw(stop: Stop, grace: float, top: float = 0) -> str:
    """The SVG of a stop; `top` is its offset inside another SVG."""
    rows = lanes(stop)
    whole = size(stop)
    bottom = whole - 14
    scale = axis(stop.lasted, grace)
    box = f'width="{WIDTH}" height="{_n(whole)}" viewBox="0 0 {WIDTH} {_n(whole)}"'
    return "".join(
        [
            f'<svg y="{_n(top)}" {box} role="img" aria-label="{esc(stop.summary(grace))}">',
            _bands(len(rows)),
            _grid(scale, bottom),
            *(_lane(stop, row, TOP + i * HEIGHT, scale) for i, row in enumerate(rows)),
            _marks(stop, scale, grace, bottom),
            "</svg>",
        ]
    )


def _lane(stop: Stop, row: Lane, y: float, scale: Axis) -> str:
    middle = y + HEIGHT / 2
    hit = f'<rect class="hit" x="0" y="{_n(y)}" width="{WIDTH}" height="{_n(HEIGHT)}"/>'
    rank = row.shown
    if rank is None:
        box = f'x="{X0}" y="{_n(y + HEIGHT * 0.3)}" width="{X1 - X0}" height="{_n(HEIGHT * 0.4)}"'
        texts = text(8, middle, row.name, "soft") + text(X1 + 10, middle, "no report", "bad")
        title = f"<title>{esc(f'{row.numbers}: no report')}</title>"
        return f'<g class="lane" tabindex="0">{hit}{title}<rect class="gone" {box}/>{texts}</g>'
    title = words(stop, rank)
    if len(row.ranks) > 1:
        title = f"{row.numbers} ({row.where}), all alike. The slowest of them is shown:\n{title}"
    parts = [hit, f"<title>{esc(title)}</title>"]
    begin = stop.offset(rank)
    # The shortest last, so that none hides another if phases overlap.
    for phase in sorted(rank.phases, key=lambda p: p.start - (p.end if p.end is not None else 1e9)):
        parts.append(_bar(phase, begin, y, HEIGHT, scale))
    parts.append(mark(rank.cause, scale.x(begin), middle, 9.0))
    parts.append(text(8, middle, row.name, "origin" if any(each.is_origin for each in row.ranks) else ""))
    parts.append(text(80, middle, _short(row.where, 16), "soft"))
    parts.append(text(X1 + 10, middle, verdict(rank), "" if rank.clean else "bad"))
    # Lanes that are not clean can be reached with the keyboard.
    focus = "" if rank.clean else ' tabindex="0"'
    return f'<g class="lane" data-outcome="{esc(rank.outcome)}"{focus}>{"".join(parts)}</g>'


def _bar(phase: Phase, begin: float, y: float, height: float, scale: Axis) -> str:
    pad = 4
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
    for caption in (label, phase.name):
        if tall >= 11 and width >= WIDEST * len(caption) + 8 and not shape:
            if len(parts) > 1:  # a halo separates the letters from the hatching
                parts.append(text(left + 5, y + height / 2, caption, f"{kind} in", 'stroke-width="4"'))
            else:
                parts.append(text(left + 5, y + height / 2, caption, "in"))
            break
    return "".join(parts)


def colour(name: str) -> str:
    """The CSS class of a phase; "other" for phases of later versions."""
    return name if name in PHASES["light"] else "other"


def mark(cause: str, x: float, y: float, size: float) -> str:
    """The mark of a stop's cause: a filled arrow head (signal), a hollow circle (peer), a cross (lost peer).

    Its right end is the moment.
    """
    half = size / 2
    if cause == "lost":
        cross = f"M{_n(x - size)} {_n(y - half)}l{_n(size)} {_n(size)}m0 {_n(-size)}l{_n(-size)} {_n(size)}"
        return f'<path class="lost" stroke-width="2" d="{cross}"/>'
    if cause == "signal":
        return f'<path class="signal" d="M{_n(x)} {_n(y)}l{_n(-size)} {_n(-half)}v{_n(size)}z"/>'
    width = 1.5 if size > 5 else 0.8
    where = f'cx="{_n(x - half - 1)}" cy="{_n(y)}" r="{_n(half - 0.5)}"'
    return f'<circle class="peer" stroke-width="{width}" {where}/>'


def _bands(count: int) -> str:
    """Every other lane shaded."""
    return "".join(
        f'<rect class="band" x="0" y="{_n(TOP + i * HEIGHT)}" width="{WIDTH}" height="{_n(HEIGHT)}"/>'
        for i in range(0, count, 2)
    )


def _grid(scale: Axis, bottom: float) -> str:
    step = next(s for s in _nice() if scale.span / s <= 8)
    parts = []
    for i in range(int(scale.span / step) + 1):
        x = scale.x(i * step)
        parts.append(f'<line class="rule" x1="{_n(x)}" x2="{_n(x)}" y1="{TOP - 4}" y2="{_n(bottom)}"/>')
        if abs(x - scale.limit) > 22 and (x < scale.right - 20 or not scale.broken):
            parts.append(text(x, TOP - 11, _tick(i * step, scale.span), "soft", 'text-anchor="middle"'))
    if scale.broken:
        x = (scale.right + scale.limit) / 2
        parts.append(f'<path class="mark" fill="none" d="M{_n(x - 5)} {TOP}l4 -9m2 9l4 -9"/>')
    return "".join(parts)


def _marks(stop: Stop, scale: Axis, grace: float, bottom: float) -> str:
    last, limit = scale.x(stop.lasted), scale.limit
    exit_text, grace_text = f"last exit {seconds(stop.lasted)}", f"grace period ends: {grace:g} s"
    # The label of the first mark is on its left, that of the last on its right, so that they never overlap.
    overrun = limit < last
    return (
        f'<line class="mark" x1="{X0}" x2="{X0}" y1="{TOP - 6}" y2="{_n(bottom + 4)}"/>'
        + text(X0 - 5, 10, "first signal", "", 'text-anchor="end"')
        + f'<line class="mark" stroke-dasharray="4 3" x1="{_n(last)}" x2="{_n(last)}" y1="{TOP - 6}" '
        f'y2="{_n(bottom + 4)}"/>'
        + _beside(last, exit_text, left=not overrun)
        + f'<line class="limit" stroke-width="2" x1="{_n(limit)}" x2="{_n(limit)}" y1="4" '
        f'y2="{_n(bottom + 4)}"/>' + _beside(limit, grace_text, "bad", left=overrun)
    )


def _beside(x: float, label: str, kind: str = "", left: bool = False) -> str:
    """The label of a mark, above the lanes; on its right if there is no room on its left."""
    if left and x - X0 > WIDEST * len(label):
        return text(x - 5, 10, label, kind, 'text-anchor="end"')
    return text(x + 5, 10, label, kind)


def text(x: float, y: float, line: str, kind: str = "", more: str = "") -> str:
    """One line of text with a CSS class and further attributes."""
    return f'<text x="{_n(x)}" y="{_n(y + 4)}" class="{kind}" {more}>{esc(line)}</text>'


def _short(name: str, limit: int) -> str:
    """The name, cut in the middle: the hosts of a job differ in their last characters."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{name[-(limit // 2) :]}"


def _tick(value: float, span: float) -> str:
    return f"{value * 1000:g} ms" if span < 1 else f"{value:g} s"


def _nice() -> list[float]:
    return [float(f"{m}e{e}") for e in range(-3, 6) for m in (1, 2, 5)]


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
