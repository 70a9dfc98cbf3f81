"""Summarizes a stop: groups ranks with equal reports into lanes, and describes in sentences what happened."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from autoteardown.timeline.stops import Rank, Stop, ending, ranges, seconds

FEW = 12
"""Up to this number of ranks, each has its own lane."""
MOST_LANES = 40
_SEVERITY = {"forced": 0, "aborted": 1, "partial": 2, "clean": 4}
_SLOW = 1.0  # seconds by which a clean rank has to be later than most to be mentioned


@dataclass(frozen=True)
class Lane:
    """One row of the drawing: one rank, several ranks with equal reports, or the ranks without a report."""

    ranks: tuple[Rank, ...]
    missing: tuple[int, ...] = ()

    @property
    def shown(self) -> Rank | None:
        """The rank that is drawn: the slowest; None if there is no report."""
        return max(self.ranks, key=lambda rank: rank.lasted, default=None)

    @property
    def name(self) -> str:
        """The label at its left."""
        if self.missing:
            return f"rank {self.missing[0]}" if len(self.missing) == 1 else f"{len(self.missing)} ranks"
        return self.ranks[0].name if len(self.ranks) == 1 else f"{len(self.ranks)} ranks"

    @property
    def where(self) -> str:
        """The host, or the number of hosts."""
        hosts = {rank.host for rank in self.ranks}
        return next(iter(hosts)) if len(hosts) == 1 else f"{len(hosts)} hosts" if hosts else ""

    @property
    def numbers(self) -> str:
        """`ranks 0-300, 302-511`."""
        known = [rank.rank for rank in self.ranks if rank.rank is not None]
        return ranges(list(self.missing) or known) if self.missing or known else self.name


def lanes(stop: Stop) -> list[Lane]:
    """The lanes of a stop, the most severe outcomes first."""
    # Ranks without a report get a lane, unless this folder holds only a small part of the job.
    missing = tuple(stop.missing) if 0 < len(stop.missing) <= len(stop.ranks) else ()
    if len(stop.ranks) + len(missing) <= FEW:
        each = [Lane((rank,)) for rank in stop.ranks] + [Lane((), (number,)) for number in missing]
        return sorted(each, key=_order)
    found = _fold(stop, _likeness)
    if len(found) > MOST_LANES:
        found = _fold(stop, lambda rank: (rank.outcome, rank.is_origin))
    return sorted([*found, *([Lane((), missing)] if missing else [])], key=_order)


def _fold(stop: Stop, key: Callable[[Rank], Hashable]) -> list[Lane]:
    alike: dict[Hashable, list[Rank]] = {}
    for rank in stop.ranks:
        alike.setdefault(key(rank), []).append(rank)
    return [Lane(tuple(ranks)) for ranks in alike.values()]


def _likeness(rank: Rank) -> Hashable:
    """A key that is equal for ranks that a reader need not tell apart."""
    trouble = tuple(
        (p.name, p.outcome) for p in rank.phases if p.outcome in ("timeout", "error") or p.end is None
    )
    return rank.outcome, rank.cause, rank.is_origin, rank.exit_code, rank.stopped_at, trouble, rank.stuck_at


def _order(lane: Lane) -> tuple[int, bool, int, int]:
    if lane.missing:
        return (0, False, 0, lane.missing[0])
    first = lane.ranks[0]
    severity = min(_SEVERITY.get(rank.outcome, 3) for rank in lane.ranks)
    return (severity, not any(rank.is_origin for rank in lane.ranks), len(lane.ranks), first.rank or 0)


def sentence(stop: Stop) -> str:
    """Describe what happened, for a reader."""
    odd = sorted(
        (r for r in stop.ranks if not r.clean), key=lambda r: (_SEVERITY.get(r.outcome, 3), r.rank or 0)
    )
    clean = [rank for rank in stop.ranks if rank.clean]
    parts = [_beginning(stop)]
    if odd:
        parts += [_culprit(rank) for rank in odd[:3]]
        if len(odd) > 3:
            rest = [rank.rank for rank in odd[3:] if rank.rank is not None]
            parts.append(f"Nor did {len(odd) - 3} more end cleanly: {ranges(rest)}.")
    if 0 < len(stop.missing) <= len(stop.ranks):
        many = len(stop.missing) > 1
        which = ranges(stop.missing)
        what = "no reports: they were" if many else "no report: it was"
        parts.append(f"{which[0].upper()}{which[1:]} left {what} killed, or not armed.")
    if clean:
        parts.append(_clean(stop, clean, bool(odd or stop.missing)))
    return " ".join(parts)


def _beginning(stop: Stop) -> str:
    origin = next((rank for rank in stop.ranks if rank.is_origin), None)
    if origin is not None:
        return f"{_who(origin)} got {origin.signal or 'the signal'}."
    witness = next((rank for rank in stop.ranks if rank.origin is not None), None)
    if witness is None or witness.origin is None:
        return "No report names the rank that was stopped first."
    what = "vanished" if witness.cause == "lost" else "was evicted"
    return f"Rank {witness.origin[0]} on {witness.origin[1]} {what}."


def _culprit(rank: Rank) -> str:
    did = {
        "aborted": "could not be stopped, and was aborted",
        "forced": "was still stuck at the hard deadline, which ended it",
        "partial": "got out in time, but not cleanly",
    }.get(rank.outcome, f"ended as: {ending(rank)}")
    where = f"stuck in {rank.stuck_at}: it " if rank.stuck_at and rank.outcome != "partial" else ""
    why = f" ({rank.why})" if rank.why else ""
    late = f", {seconds(rank.lasted)} after its signal" if rank.phases else ""
    return f"{_who(rank)} {'was ' + where if where else ''}{did}{why}{late}."


def _clean(stop: Stop, clean: list[Rank], trouble: bool) -> str:
    ready = sorted(clean, key=_ready)
    slowest = ready[-1]
    most, last = _ready(ready[len(ready) // 2]), _ready(slowest)
    count = "It" if len(clean) == 1 else f"{'The other' if trouble else 'All'} {len(clean)} ranks"
    if len(clean) == 1 and trouble:
        count = _who(clean[0])
    where = {rank.stopped_at for rank in clean if rank.stopped_at is not None}
    step = f" after step {next(iter(where))}" if len(where) == 1 else ""
    text = f"{count} stopped{step} and left cleanly, ready to exit after {seconds(last)}"
    if trouble and stop.lasted > last + _SLOW:
        return f"{text}, and waited for the rest until {seconds(max(r.lasted for r in clean))}."
    if last > most + _SLOW and len(clean) > 2:
        return f"{text}: most after {seconds(most)}, then they waited for {_who(slowest).lower()}."
    return f"{text}; the last exited after {seconds(stop.lasted)}."


def _ready(rank: Rank) -> float:
    """When a rank had done its own part, in seconds after its signal; after that it waits for others."""
    return max(
        (p.end or p.start for p in rank.phases if p.name in ("yield", "step", "park", "drain", "abort")),
        default=0.0,
    )


def _who(rank: Rank) -> str:
    name = rank.name
    return f"{name[0].upper()}{name[1:]} on {rank.host}"
