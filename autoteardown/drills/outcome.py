"""The outcome of a drilled job: how each rank ended, what is wrong with that, and the checkpoint."""

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
    """How one rank ended.

    Attributes:
        code: exit code, or minus the signal that ended the rank; None: unknown.
        seconds: from the first signal to the rank's end; None: it ran until the drill ended it.
        right: the exit codes that are right.
        signalled: the drill sent the rank SIGTERM, itself or through its launcher.
        lost: the drill killed the rank as part of the scenario.
        withdrew: the rank ended by itself: through its own handler, or because its work was done.
        sigkilled: the rank got SIGTERM, and still ran when the grace period ended.
        hanging: the rank got no signal, and still ran when the grace period ended.
        step: the last optimizer step that the rank completed.
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
        """The rank's name for a reader."""
        return f"rank {self.rank}" if self.rank is not None else f"pid {self.pid}"

    @property
    def ending(self) -> str:
        """Its exit code, or the name of the signal that ended it."""
        if self.lost:
            return "lost"
        if (
            self.code is None and self.sigkilled
        ):  # by the drill, which is not the parent, so the code is unknown
            return "SIGKILL"
        if self.code is None:
            return "hangs" if self.hanging else "own" if self.withdrew else "unknown"
        try:
            return signal.Signals(-self.code).name if self.code < 0 else str(self.code)
        except ValueError:
            return str(self.code)

    @property
    def fate(self) -> str:
        """How the rank ended, without its exit code."""
        if self.lost:
            return "lost"
        if self.code is not None or self.sigkilled:
            return "ended" if self.code is not None and self.code >= 0 else f"died of {self.ending}"
        return "hangs" if self.hanging else "ended by itself" if self.withdrew else "died"

    @property
    def problem(self) -> str | None:
        """What is wrong with the rank's end, as a predicate for one or several ranks; None if nothing."""
        if self.lost or self.withdrew:
            return None
        if self.sigkilled:
            return "still ran when the grace period ended, and was SIGKILLed"
        if self.hanging:
            return "left hanging: still ran when the grace period ended"
        if self.code in self.right:
            return None
        if self.code is None:
            return "ended without a teardown; the exit code is not known"
        if self.code < 0:
            return f"died of {self.ending}, without a teardown"
        return f"ended with exit {self.code} where {' or '.join(map(str, sorted(self.right)))} is right"


@dataclass
class Outcome:
    """The outcome of one job: one scenario with one protection."""

    scenario: str
    protection: str
    grace: float
    ranks: list[RankOutcome]
    backend: str | None = None
    launcher_code: int | None = None
    checkpoint: str | None = None  # WHOLE, CUT or NO_CHECKPOINT; None: the scenario has no training
    compares_steps: bool = False
    kept: int | None = None  # the step of the last checkpoint
    reports: list[dict[str, Any]] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # the agent's log lines
    problems: list[str] = field(default_factory=list)  # besides those of single ranks

    @property
    def label(self) -> str:
        """The protection's name for a reader."""
        return PROTECTIONS[self.protection]

    @property
    def title(self) -> str:
        """The scenario's description."""
        return SCENARIOS[self.scenario].title

    @property
    def last_exit(self) -> float | None:
        """Seconds from the first signal to the end of the last rank; None if a rank did not end by itself."""
        ends = [rank.seconds for rank in self.ranks if not rank.lost]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None

    @property
    def peers(self) -> list[RankOutcome]:
        """The ranks that the drill did not signal; the eviction of another rank should not block them for minutes."""
        return [rank for rank in self.ranks if not rank.signalled and not rank.lost]

    @property
    def peers_freed(self) -> float | None:
        """Seconds from the first signal until the last peer had exited; None: never, or there are no peers."""
        ends = [rank.seconds for rank in self.peers]
        if not ends or any(rank.hanging for rank in self.peers):
            return None
        return max((end for end in ends if end is not None), default=None)

    @property
    def hanging(self) -> int:
        """The number of ranks that were left hanging."""
        return sum(rank.hanging for rank in self.ranks)

    @property
    def sigkilled(self) -> int:
        """The number of ranks that were SIGKILLed at the end of the grace period."""
        return sum(rank.sigkilled for rank in self.ranks)

    @property
    def steps(self) -> list[int]:
        """The last steps of the ranks, if they are to be compared; else empty."""
        return (
            [r.step for r in self.ranks if r.step is not None and not r.lost] if self.compares_steps else []
        )

    @property
    def same_step(self) -> bool | None:
        """Whether all ranks stopped at the same step; None if there is nothing to compare."""
        return len(set(self.steps)) == 1 if self.steps else None

    @property
    def steps_lost(self) -> int | None:
        """The number of steps that a restarted job has to repeat; None if it is unknown."""
        if not self.steps or self.kept is None or self.checkpoint != WHOLE:
            return None
        return max(self.steps) - self.kept

    @property
    def wrong(self) -> list[str]:
        """One line for each problem."""
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
        """Whether every rank exited in time with the right code, and nothing was lost."""
        return not self.wrong

    def summary(self) -> str:
        """The outcome as one line."""
        if not self.clean:
            return "not clean: " + "; ".join(self.wrong)
        where = f", all at step {self.steps[0]}" if len(self.steps) > 1 else ""
        return f"clean: all out {seconds(self.last_exit or 0.0)} after the signal{where}"

    def as_dict(self) -> dict[str, Any]:
        """The outcome in the output of `--json`."""
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
        """Read the agent's reports, and check those of the expected ranks against the real exit codes.

        Args:
            folder: of the reports.
            expected: the ranks that must have left a report.
        """
        self.stops, unreadable = reports.read(folder)
        for path in sorted(folder.glob("*.json")):
            try:
                self.reports.append(json.loads(path.read_bytes()))
            except (OSError, ValueError):
                pass  # named by `reports.read`
        codes = {report.pid: report.exit_code for stop in self.stops for report in stop.ranks}
        for rank in expected:
            if rank.pid not in codes:
                self.problems.append(f"{rank.name} left no report")
            elif rank.code is not None and codes[rank.pid] != rank.code:
                self.problems.append(
                    f"{rank.name} reported exit {codes[rank.pid]}, and left with {rank.code}"
                )
        self.problems += [line for line in unreadable if "left out" in line]


def check_checkpoint(path: Path) -> str:
    """Whether a file by `torch.save` is complete.

    It is a zip archive with its directory at the end, so torch is not needed to check it.
    """
    if not path.exists():
        return NO_CHECKPOINT
    try:
        with zipfile.ZipFile(path) as archive:
            return WHOLE if archive.testzip() is None else CUT
    except (zipfile.BadZipFile, EOFError, OSError):
        return CUT
