"""What became of a job, and what is wrong with it."""

from __future__ import annotations

import json
import signal
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoteardown.drills.scenario import PROTECTIONS, SCENARIOS
from autoteardown.timeline import reports
from autoteardown.timeline.stops import Stop, ranges, seconds

WHOLE, CUT, NO_CHECKPOINT = "whole", "cut", "none"


@dataclass
class RankOutcome:
    """One rank.

    Attributes:
        code: exit code; minus the signal that ended it; None: not known.
        seconds: from the first signal to its end; None: it had to be ended with the drill.
        right: the codes that it may have left with.
        signalled: the platform (the drill) sent it SIGTERM, itself or through its launcher.
        lost: the drill killed it as part of the scenario.
        withdrew: it ended by itself: through a handler of its own, or because its work was done.
        sigkilled: it had SIGTERM, and was still there when the grace period ended.
        hanging: it had no signal, and was still there when the grace period ended.
        step: the last optimizer step that it completed.
    """

    rank: int | None
    pid: int | None
    code: int | None = None
    seconds: float | None = None
    right: set[int] = field(default_factory=set)
    signalled: bool = False
    lost: bool = False
    withdrew: bool = False
    sigkilled: bool = False
    hanging: bool = False
    step: int | None = None

    @property
    def name(self) -> str:
        """How a person calls it."""
        return f"rank {self.rank}" if self.rank is not None else f"pid {self.pid}"

    @property
    def ending(self) -> str:
        """Its exit code, or the name of the signal that ended it."""
        if self.lost:
            return "lost"
        if self.code is None and self.sigkilled:  # by the drill, which is not its parent
            return "SIGKILL"
        if self.code is None:
            return "hangs" if self.hanging else "own" if self.withdrew else "unknown"
        try:
            return signal.Signals(-self.code).name if self.code < 0 else str(self.code)
        except ValueError:
            return str(self.code)

    @property
    def fate(self) -> str:
        """What became of it, without its exit code."""
        if self.lost:
            return "lost"
        if self.code is not None or self.sigkilled:
            return "ended" if self.code is not None and self.code >= 0 else f"died of {self.ending}"
        return "hangs" if self.hanging else "ended by itself" if self.withdrew else "died"

    @property
    def problem(self) -> str | None:
        """What is wrong with the way in which it ended, as something to say of one rank or of several."""
        if self.lost or self.withdrew:
            return None
        if self.sigkilled:
            return "still there when the grace period ended, and SIGKILLed"
        if self.hanging:
            return "left hanging: still there when the grace period ended"
        if self.code in self.right:
            return None
        if self.code is None:
            return "ended without a teardown; the exit code is not known"
        if self.code < 0:
            return f"died of {self.ending}, without a teardown"
        return f"ended with exit {self.code} where {' or '.join(map(str, sorted(self.right)))} is right"


@dataclass
class Outcome:
    """One job in one scenario under one protection."""

    scenario: str
    protection: str
    grace: float
    ranks: list[RankOutcome]
    backend: str | None = None
    launcher_code: int | None = None
    checkpoint: str | None = None  # WHOLE, CUT or NO_CHECKPOINT; None: the scenario comes before the first
    compares_steps: bool = False
    kept: int | None = None  # the step of the last checkpoint
    reports: list[dict[str, Any]] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # what the agent said
    problems: list[str] = field(default_factory=list)  # beyond those of single ranks

    @property
    def label(self) -> str:
        """The protection, in words."""
        return PROTECTIONS[self.protection]

    @property
    def title(self) -> str:
        """The scenario, in words."""
        return SCENARIOS[self.scenario].title

    @property
    def last_exit(self) -> float | None:
        """Seconds from the first signal to the end of the last rank; None: somebody never left."""
        ends = [rank.seconds for rank in self.ranks if not rank.lost]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None

    @property
    def peers(self) -> list[RankOutcome]:
        """The ranks that had no signal of the drill's: what an eviction should not take with it for minutes."""
        return [rank for rank in self.ranks if not rank.signalled and not rank.lost]

    @property
    def peers_freed(self) -> float | None:
        """Seconds from the first signal until the last of the peers was free; None: never, or there are none."""
        ends = [rank.seconds for rank in self.peers]
        if not ends or any(rank.hanging for rank in self.peers):
            return None
        return max((end for end in ends if end is not None), default=None)

    @property
    def hanging(self) -> int:
        """How many ranks were left hanging."""
        return sum(rank.hanging for rank in self.ranks)

    @property
    def sigkilled(self) -> int:
        """How many ranks were SIGKILLed at the end of the grace period."""
        return sum(rank.sigkilled for rank in self.ranks)

    @property
    def steps(self) -> list[int]:
        """The last steps of the ranks, where they are to be compared."""
        return (
            [r.step for r in self.ranks if r.step is not None and not r.lost] if self.compares_steps else []
        )

    @property
    def same_step(self) -> bool | None:
        """Whether all stopped at the same step; None: there is nothing to compare."""
        return len(set(self.steps)) == 1 if self.steps else None

    @property
    def steps_lost(self) -> int | None:
        """How many steps a job that is started again has to do once more; None: there is nothing to compare."""
        if not self.steps or self.kept is None or self.checkpoint != WHOLE:
            return None
        return max(self.steps) - self.kept

    @property
    def wrong(self) -> list[str]:
        """Everything that is wrong, a line each."""
        found = list(self.problems)
        for text in dict.fromkeys(rank.problem for rank in self.ranks):
            if text is not None:
                numbers = [rank.rank for rank in self.ranks if rank.problem == text]
                found.append(f"{ranges([n for n in numbers if n is not None])} {text}")
        if self.checkpoint == CUT:
            found.append("the last checkpoint was cut in half")
        if self.same_step is False:
            found.append(f"the ranks stopped at different steps: {', '.join(map(str, self.steps))}")
        return found

    @property
    def clean(self) -> bool:
        """Every rank out in time, with the right code, nothing lost."""
        return not self.wrong

    def summary(self) -> str:
        """In one line."""
        if not self.clean:
            return "not clean: " + "; ".join(self.wrong)
        where = f", all at step {self.steps[0]}" if len(self.steps) > 1 else ""
        return f"clean: all out {seconds(self.last_exit or 0.0)} after the signal{where}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "scenario": self.scenario,
            "title": self.title,
            "protection": self.protection,
            "backend": self.backend,
            "clean": self.clean,
            "problems": self.wrong,
            "seconds": self.last_exit,
            "peers_freed": self.peers_freed,
            "hanging": self.hanging,
            "sigkilled": self.sigkilled,
            "checkpoint": self.checkpoint,
            "same_step": self.same_step,
            "steps_lost": self.steps_lost,
            "launcher_exit_code": self.launcher_code,
            "ranks": [
                {
                    "rank": rank.rank,
                    "pid": rank.pid,
                    "exit_code": rank.code,
                    "seconds": rank.seconds,
                    "signalled": rank.signalled,
                    "sigkilled": rank.sigkilled,
                    "hanging": rank.hanging,
                    "lost": rank.lost,
                    "step": rank.step,
                }
                for rank in self.ranks
            ],
            "reports": self.reports,
        }

    def read_reports(self, folder: Path, expected: Iterable[RankOutcome]) -> None:
        """Take up what the agent has reported; whoever is expected to have left a report must have told the truth."""
        self.stops, unreadable = reports.read(folder)
        for path in sorted(folder.glob("*.json")):
            try:
                self.reports.append(json.loads(path.read_bytes()))
            except (OSError, ValueError):
                pass  # named by `reports.read`
        told = {report.pid: report.exit_code for stop in self.stops for report in stop.ranks}
        for rank in expected:
            if rank.pid not in told:
                self.problems.append(f"{rank.name} left no report")
            elif rank.code is not None and told[rank.pid] != rank.code:
                self.problems.append(f"{rank.name} reported exit {told[rank.pid]}, and left with {rank.code}")
        self.problems += [line for line in unreadable if "left out" in line]


def look_at_checkpoint(path: Path) -> str:
    """Whether a file that `torch.save` wrote is all there. No torch: it is a zip archive, its directory comes last."""
    if not path.exists():
        return NO_CHECKPOINT
    try:
        with zipfile.ZipFile(path) as archive:
            return WHOLE if archive.testzip() is None else CUT
    except (zipfile.BadZipFile, EOFError, OSError):
        return CUT
