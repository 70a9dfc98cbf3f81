"""Polls a source, and drains this node's ranks at a notice: carries out what `decisions.py` decides."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Optional

from autoteardown.cloud_notice import http
from autoteardown.cloud_notice.decisions import Decisions, Step, for_ranks
from autoteardown.cloud_notice.source import Source
from autoteardown.node import drain

Say = Callable[..., None]
"""Called with the name of a state, a line for people, and fields."""

_LONGEST_PAUSE = 60.0
_LATE_RANKS = 1.0  # seconds between two looks for ranks that have started after the notice


class Watcher:
    """Watches one source.

    Args:
        source: where notices appear.
        decisions: what to do about them.
        runtime_dir: folder of the registry.
        signum: the signal for ranks whose entries do not name one.
        grace: seconds for the drain where the end of the machine is not known.
        interval: seconds between two readings.
        say: tells of each state.
        drained: called after each drain, with the step, the seconds that the ranks had, and the results.
    """

    def __init__(
        self,
        source: Source,
        decisions: Decisions,
        runtime_dir: str,
        signum: int,
        grace: float,
        interval: float,
        say: Say,
        drained: Callable[[Step, Optional[float], list[drain.Drained]], None],
        acknowledge: bool = False,
    ) -> None:
        self.selection: drain.Selection = drain.Selection()
        self.clean = True
        self.stopping = threading.Event()
        self.busy = threading.Lock()  # held during a drain
        self._source, self._decisions, self._say, self._drained = source, decisions, say, drained
        self._runtime_dir, self._signum, self._grace = runtime_dir, signum, grace
        self._interval, self._acknowledge = interval, acknowledge
        self._failures = 0
        self._problems: set[str] = set()

    def run(self, once: bool) -> None:
        """Watch until told to stop; with `once`, until the first notice has been acted on."""
        self._say("watching", f"watching {self._source.place} for a notice")
        while not self.stopping.is_set():
            steps, waited = self._look()
            for step in steps:
                self._take(step)
            if self._decisions.drained:
                if once:
                    return
                self._drain_late_ranks()
            self.stopping.wait(0.0 if waited else self._pause())

    def _look(self) -> tuple[list[Step], bool]:
        asked = time.monotonic()
        wake = self._decisions.wake(asked)
        try:
            notice, waited = self._source.read(self._interval if wake is None else min(wake, self._interval))
        except http.Unavailable as error:
            self._failures += 1
            if self._failures == 1:
                text = f"{self._source.place} gives no usable answer: {error}; trying again"
                self._say("unavailable", text, error=str(error))
            return self._decisions.tick(time.monotonic()), False
        if self._failures:
            self._say("answers", f"{self._source.place} answers again")
        self._failures = 0
        return self._decisions.read(notice, asked, time.monotonic()), waited

    def _pause(self) -> float:
        pause: float = self._interval * 2.0 ** min(self._failures, 6)
        if self._failures:
            pause = max(self._interval, min(pause, _LONGEST_PAUSE))
        wake = self._decisions.wake(time.monotonic())
        if self._decisions.drained:
            pause = min(pause, _LATE_RANKS)
        return pause if wake is None else min(pause, wake)

    def _take(self, step: Step) -> None:
        left = "at a time that is not known" if step.left is None else f"in {step.left:.0f} s"
        seconds = None if step.left is None else round(step.left, 1)
        if step.do in ("notice", "changed"):
            again = " earlier than announced" if step.do == "changed" else ""
            self._say(
                step.do, f"notice: {step.notice.text} {left}{again}", notice=step.notice.text, seconds=seconds
            )
        elif step.do == "withdrawn":
            self._say("withdrawn", f"the notice is withdrawn: {step.notice.text}", notice=step.notice.text)
        else:
            self._drain(step)

    def _drain(self, step: Step, late: bool = False) -> None:
        seconds = for_ranks(step.left)
        with self.busy:
            ranks, _ = drain.drain(
                self._runtime_dir,
                self._signum,
                self._grace + drain.MARGIN if seconds is None else seconds,
                self._problem,
                self.selection,
                longer=seconds is not None,
            )
            for rank in ranks:
                self._say("rank", rank.line(), **_fields(rank))
            clean = sum(rank.clean for rank in ranks)
            self.clean = self.clean and clean == len(ranks)
            if ranks:
                self._say(
                    "drained", f"drained: {clean} of {len(ranks)} left cleanly", ranks=len(ranks), clean=clean
                )
            elif not late:
                self._say("drained", "drained: no armed rank to signal", ranks=0, clean=0)
            if ranks or not late:
                self._drained(step, seconds, ranks)
        if self._acknowledge and not late:
            try:
                self._source.acknowledge(step.notice.key)
                self._say("acknowledged", "the event is acknowledged")
            except http.Unavailable as error:
                self._say("unavailable", f"the event is not acknowledged: {error}", error=str(error))

    def _drain_late_ranks(self) -> None:
        """Ranks that have started after the notice: a launcher restarts them, or a scheduler does not know yet."""
        notice, end = self._decisions.notice, self._decisions.end
        if notice is not None and drain.would_signal(self._runtime_dir, self.selection):
            self._drain(
                Step("drain", notice, None if end is None else max(0.0, end - time.monotonic())), late=True
            )

    def _problem(self, line: str) -> None:
        self.clean = False
        if line not in self._problems:
            self._problems.add(line)
            self._say("problem", line)


def _fields(rank: drain.Drained) -> dict[str, Any]:
    record = rank.record
    return {
        "pid": record.pid,
        "job": record.job,
        "rank": record.rank,
        "outcome": rank.outcome,
        "exit_code": rank.exit_code,
    }
