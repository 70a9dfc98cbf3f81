"""The data model of a timeline: reports of ranks, grouped into the stops that one eviction each has caused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

DEFAULT_GRACE = 25.0
# The longest time between the signals of one stop's ranks, in seconds. A restarted pod often has the host name and the
# process ids of its predecessor, so even reports with the same origin can belong to different stops.
TOGETHER = 60.0
SAME_ORIGIN = 600.0
GLYPH = {
    "clean": "\N{CHECK MARK}",
    "partial": "\N{WHITE CIRCLE}",
    "aborted": "\N{BLACK UP-POINTING TRIANGLE}",
    "forced": "\N{BLACK SQUARE}",
}
NO_GLYPH = "\N{EN DASH}"  # for outcomes of later versions, and for ranks without a report


@dataclass(frozen=True)
class Phase:
    """One phase of a rank's stop, in seconds since that rank's own signal. `end` is None if it never finished."""

    name: str
    start: float
    end: float | None
    outcome: str
    detail: str


@dataclass
class Rank:
    """The report of one rank."""

    file: str
    host: str = "?"
    pid: int | None = None
    rank: int | None = None
    world_size: int | None = None
    program: str = ""
    cause: str = "?"
    signal: str = ""
    origin: tuple[int | None, str, int | None] | None = None
    received: float | None = None
    phases: list[Phase] = field(default_factory=list)
    at_signal: int | None = None
    stopped_at: int | None = None
    stuck: str = ""
    stuck_at: str = ""
    outcome: str = "?"
    why: str = ""
    job: str = ""
    exit_code: int | None = None
    grace: float | None = None

    @property
    def name(self) -> str:
        """The rank's name for a reader."""
        return f"rank {self.rank}" if self.rank is not None else f"pid {self.pid}"

    @property
    def lasted(self) -> float:
        """Seconds from this rank's signal to the end of its last phase."""
        return max(
            [p.end for p in self.phases if p.end is not None] + [p.start for p in self.phases], default=0.0
        )

    @property
    def clean(self) -> bool:
        """Whether the rank was drained and released, as it should be."""
        return self.outcome == "clean"

    @property
    def wedged(self) -> bool:
        """Whether the rank was delayed by a timeout, an error or worse, so that its stacks are of interest."""
        return not self.clean or any(p.outcome in ("timeout", "error") for p in self.phases)

    @property
    def is_origin(self) -> bool:
        """Whether this is the rank that was signalled first."""
        return self.origin is not None and self.origin[1:] == (self.host, self.pid)


@dataclass
class Stop:
    """The ranks that one eviction has stopped."""

    ranks: list[Rank] = field(default_factory=list)

    @cached_property
    def began(self) -> float:
        """When the first rank was signalled or notified, in seconds since the epoch. Ranks are added in that order."""
        return min((r.received for r in self.ranks if r.received is not None), default=0.0)

    def offset(self, rank: Rank) -> float:
        """Seconds from the first signal to this rank's. The clocks of different hosts are assumed to agree."""
        return 0.0 if rank.received is None else rank.received - self.began

    @property
    def lasted(self) -> float:
        """Seconds from the first signal to the last exit."""
        return max((self.offset(r) + r.lasted for r in self.ranks), default=0.0)

    @property
    def grace(self) -> float | None:
        """The shortest grace period that a report names, if any does."""
        return min((r.grace for r in self.ranks if r.grace is not None), default=None)

    @property
    def world_size(self) -> int | None:
        """The job's world size; a rank that was stopped in its rendezvous may not know it."""
        return next((r.world_size for r in self.ranks if r.world_size is not None), None)

    @property
    def missing(self) -> list[int]:
        """The ranks without a report."""
        have = {r.rank for r in self.ranks}
        return [n for n in range(self.world_size or 0) if n not in have]

    def summary(self, grace: float) -> str:
        """The stop in one sentence."""
        outcomes = Counter(r.outcome for r in self.ranks)
        codes = Counter("unknown" if r.exit_code is None else r.exit_code for r in self.ranks)
        count = len(self.ranks)
        parts = [
            f"{count} rank{'s' if count != 1 else ''}: "
            + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items(), key=_clean_first)),
            self.steps(),
            f"{seconds(self.lasted)} from the first signal to the last exit, of {grace:g} s grace",
            "exit codes " + ", ".join(f"{code} (x{n})" for code, n in sorted(codes.items(), key=str)),
        ]
        if self.missing:
            parts.append(f"no report from {ranges(self.missing)}")
        return "; ".join(parts)

    def steps(self) -> str:
        """Describe whether the ranks stopped after the same step."""
        where = Counter(r.stopped_at for r in self.ranks if r.stopped_at is not None)
        if not where:
            return "no step to stop at"
        if len(where) > 1:
            return "stopped at different steps: " + ", ".join(f"{s} (x{n})" for s, n in sorted(where.items()))
        step, agreed = next(iter(where.items()))
        all_of_them = "all" if agreed == len(self.ranks) else f"{agreed} of {len(self.ranks)}"
        return f"{all_of_them} stopped at step {step}"


def group(ranks: list[Rank]) -> list[Stop]:
    """Sort reports into stops, oldest first: a job that was restarted leaves several reports of the same rank.

    Reports that name the same origin belong together. The remaining groups (peers switched off, or not connected) are
    joined if they have the same job at the same time, and no rank twice.
    """
    ordered = sorted(
        ranks, key=lambda r: (r.received is None, r.received or 0.0, r.rank is None, r.rank or 0)
    )
    origins: list[Stop] = []
    for rank in ordered:
        new = Stop([rank])
        same = [s for s in origins if rank.origin and s.ranks[0].origin == rank.origin]
        if not _join(same, new, SAME_ORIGIN):
            origins.append(new)
    stops: list[Stop] = []
    for part in origins:
        if not _join(stops, part, TOGETHER):
            stops.append(part)
    for stop in stops:
        stop.ranks.sort(key=lambda r: (r.rank is None, r.rank or 0, r.host, r.pid or 0))
    return stops


def _join(stops: list[Stop], part: Stop, window: float) -> bool:
    """Add `part` to the latest stop that it can belong to; return whether there is one."""
    first = part.ranks[0]
    for stop in reversed(stops):
        worlds = {stop.world_size, part.world_size} - {None}
        taken = {r.rank for r in stop.ranks} - {None}
        if (
            stop.ranks[0].program == first.program
            and len({stop.ranks[0].job, first.job} - {""}) <= 1
            and len(worlds) <= 1
            and not taken & {r.rank for r in part.ranks}
            and (first.received is None or first.received - stop.began <= window)
        ):
            stop.ranks += part.ranks
            return True
    return False


def words(stop: Stop, rank: Rank) -> str:
    """Everything in a rank's report, as lines of text."""
    world = f" of {rank.world_size}" if rank.world_size is not None and rank.rank is not None else ""
    lines = [f"{rank.name}{world} on {rank.host}, pid {rank.pid}"]
    why = (
        f"got {rank.signal or 'the signal'}"
        if rank.cause == "signal"
        else f"stopped because of a {rank.cause}"
    )
    if rank.cause != "signal" and rank.origin is not None:
        why += f": rank {rank.origin[0]} on {rank.origin[1]}"
    lines.append(f"{why}, {seconds(stop.offset(rank))} after the first signal")
    steps = [
        f"step {rank.at_signal} at the signal" if rank.at_signal is not None else "",
        f"stopped at step {rank.stopped_at}" if rank.stopped_at is not None else "",
    ]
    out = f"out after {seconds(rank.lasted)}" if all(p.end is not None for p in rank.phases) else ""
    lines.append(", ".join(filter(None, [ending(rank), out, *steps])))
    if rank.why:
        lines.append(f"why: {rank.why}")
    for p in rank.phases:
        end = f"{p.end:.3f}" if p.end is not None else "..."
        lines.append(
            f"  {p.start:.3f}-{end} s  {p.name}  {p.outcome}" + (f"  {p.detail}" if p.detail else "")
        )
    if rank.stuck and rank.wedged:
        cut = rank.stuck[:2500] + ("\n... (the rest is in the table below)" if len(rank.stuck) > 2500 else "")
        lines.append(f"stacks:\n{cut}")
    return "\n".join(lines)


def ending(rank: Rank) -> str:
    """The outcome, with the exit code if it is known."""
    left = rank.exit_code is not None and rank.exit_code >= 0
    return f"{rank.outcome}, exit {rank.exit_code}" if left else rank.outcome


def verdict(rank: Rank) -> str:
    """The ending with a symbol, which needs no colour."""
    return f"{GLYPH.get(rank.outcome, NO_GLYPH)} {ending(rank)}"


def seconds(value: float) -> str:
    """A duration for a reader, as `328 ms` or `2.50 s`."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 99.995 else f"{value:.0f} s"


def ranges(numbers: list[int]) -> str:
    """Ranks as `rank 3` or `ranks 0-3, 7`, with at most a dozen ranges."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    more = f" and {len(words) - 12} more" if len(words) > 12 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} " + ", ".join(words[:12]) + more


def _clean_first(item: tuple[str, int]) -> tuple[int, str]:
    order = ("clean", "partial", "aborted", "forced")
    return (order.index(item[0]) if item[0] in order else len(order), item[0])
