"""Collects during a stop what its report needs: stacks, the stuck collective, who was signalled first."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Optional

from autoteardown.stop import exit_status, report
from autoteardown.stop.control import RankControl
from autoteardown.stop.deadline import Deadline
from autoteardown.stop.outcome import Outcome, signal_name
from autoteardown.stop.protocol import Stop
from autoteardown.thread_stacks import PACKAGE


class StopRecord:
    """The record of one stop of one rank.

    Args:
        control: the armed rank.
        cause: `signal`, `peer` or `lost`.
        signum: the eviction signal, if this rank got one.
        origin: rank, host and pid of the rank that was signalled first.
        deadline: of this stop.
    """

    def __init__(
        self,
        control: RankControl,
        cause: str,
        signum: Optional[int],
        origin: dict[str, Any],
        deadline: Deadline,
    ) -> None:
        self._control = control
        self.cause = cause
        self.signum = signum
        self.origin = origin
        self._deadline = deadline
        self._received_at = datetime.now(timezone.utc).isoformat()
        self._stuck: list[dict[str, Any]] = []
        self.own_exit: Optional[tuple[Optional[int]]] = None
        """Set once the application ends the process by itself: its code, None if unknown."""
        self._collective: Optional[dict[str, Any]] = None  # the collective that does not end
        self._failed_before_abort: Optional[bool] = None

    @property
    def exit_code(self) -> int:
        """What the settings promise, whichever way the process ends; not 0 if the program has failed."""
        return self._control.settings.exit_code_for(self.signum) or int(self._program_failed)

    @property
    def _program_failed(self) -> bool:
        return exit_status.failed() if self._failed_before_abort is None else self._failed_before_abort

    def abort_begins(self) -> None:
        """Count no later error as the program's own.

        An aborted collective returns as if it had succeeded, with what its buffers happened to hold, and torch or the
        program raises because of that: "DDP expects same model across all ranks".
        """
        self._failed_before_abort = self._program_failed

    @property
    def replaces_success(self) -> bool:
        """Whether the code is set, so that it also replaces the program's own 0: a half-trained job is not done."""
        return self._control.settings.exit_code_is_set(self.signum)

    @property
    def yields(self) -> float:
        """Seconds that an application with a handler of its own has."""
        return self._control.settings.yield_within(self._deadline.hard)

    @property
    def longer(self) -> bool:
        """Whether the deadline is that of the machine: the peers have as much time."""
        return self._deadline.longer

    @property
    def _grace(self) -> float:
        deadline = self._deadline
        return round(deadline.hard + 1.0, 2) if deadline.changed else self._control.settings.grace

    def opening(self, application_owns: bool) -> str:
        """Why this rank stops, in words; `application_owns`: the application may end by itself."""
        rank = self.origin.get("rank")
        if self.cause == "peer":
            return f"a peer is being evicted: rank {rank} on {self.origin.get('host')}"
        if self.cause == "lost":
            return f"rank {rank} is lost, and a peer has waited AUTOTEARDOWN_LOST seconds for it"
        name = signal_name(self.signum) if self.signum else "?"
        if application_owns and self.yields:
            return f"{name}: the application ends by itself, and has {round(self.yields, 1):g}s"
        return f"{name}: tearing down, hard deadline at {round(self._deadline.hard, 1):g}s"

    def take_stacks(self, when: str) -> None:
        """Record the stacks of the program's threads."""
        for entry in report.stacks():
            if not entry["frames"][-1].startswith(PACKAGE):
                self._stuck.append({"when": when, **entry})

    def find_collective(self) -> None:
        """Record which collective does not end. May block."""
        self._collective = self._collective or self._control.stuck_collective()

    def outcome(self, stop: Optional[Stop], application_owns: bool, now: float, final: bool) -> Outcome:
        """What the stop has come to.

        Args:
            stop: the protocol's state; None: it has not begun.
            application_owns: see `opening`.
            now: seconds since the signal.
            final: the process ends now.
        """
        phases = [phase.as_dict() for phase in stop.phases] if stop is not None else []
        if phases and (phases[-1]["end"] is None or (final and phases[-1]["name"] == "exit")):
            last = phases[-1]
            if last["end"] is None:
                last["outcome"] = "timeout" if stop is not None and stop.forced else "ok"
            last["end"] = now  # the program's own exit was part of this phase
        return Outcome(
            identity=self._control.identity(),
            opening=self.opening(application_owns),
            cause=self.cause,
            signum=self.signum,
            origin=self.origin,
            received_at=self._received_at,
            grace=self._grace,
            phases=phases,
            steps=stop.steps if stop is not None else None,
            stuck=list(self._stuck),
            collective=self._collective,
            outcome=stop.outcome if stop is not None else "partial" if self.own_exit else "forced",
            why=stop.reason if stop is not None else "the process ended before the stop could begin",
            lost_callback=stop.lost_callback if stop is not None else "",
            failed=self.cause == "lost" or self._program_failed,
            ended_by="application" if self.own_exit else "agent",
            exit_code=self.own_exit[0] if self.own_exit else self.exit_code,
            seconds=now,
        )
