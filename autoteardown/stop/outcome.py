"""The outcome of a stop as a value, and its forms: JSON report, summary line, termination log."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple, Optional

from autoteardown.node.entry import printable


class Outcome(NamedTuple):
    """One stop, as far as it has got."""

    identity: dict[str, Any]
    opening: str  # why it happens, in words
    cause: str
    signum: Optional[int]
    origin: dict[str, Any]
    received_at: str
    grace: float
    phases: list[dict[str, Any]]
    steps: Optional[dict[str, Optional[int]]]
    stuck: list[dict[str, Any]]
    collective: Optional[dict[str, Any]]  # which one did not end
    outcome: str
    why: str
    lost_callback: str  # which rank's callback failed or was skipped, and why
    ended_by: str  # "agent" or "application"
    failed: bool  # a failure is behind it: a peer has vanished, or the program has died of an exception
    exit_code: Optional[int]  # None: the application's own, and unknown
    seconds: float  # since the signal

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, schema 2."""
        optional = {"why": self.why or None, "collective": self.collective}
        return {
            **self.identity,
            "cause": self.cause,
            "signal": signal_name(self.signum) if self.signum else None,
            "origin": self.origin,
            "received_at": self.received_at,
            "grace": self.grace,
            "phases": self.phases,
            "steps": self.steps,
            "stuck": self.stuck,
            "outcome": self.outcome,
            **{key: value for key, value in optional.items() if value is not None},
            "ended_by": self.ended_by,
            "exit_code": self.exit_code,
        }

    def summary(self) -> str:
        """The last log line: `done: clean, stopped at step 1201, exit 0`."""
        why = f" ({self.why})" if self.why else ""
        stopped = self.steps["stopped_at"] if self.steps else None
        where = f"stopped at step {stopped}, " if stopped else ""
        code = "a code of its own" if self.exit_code is None else self.exit_code
        how = f"{self.outcome}{why}, {where}exit {code}"
        return (
            f"the application ended the process: {how}" if self.ended_by == "application" else f"done: {how}"
        )

    def text(self) -> str:
        """The text of the termination log, for a reader of `kubectl describe pod`."""
        place = f"rank {self.identity['rank']} of {self.identity['world_size']}"
        lost = f"; checkpoint incomplete: {self.lost_callback}" if self.lost_callback else ""
        lines = [f"autoteardown: {place}, {self.opening}{lost}"]
        for phase in self.phases:
            lines.append(
                f"+{phase['start']:.2f}s {phase['name']}: {phase['outcome']} {phase['detail']}".rstrip()
            )
        lines.append(f"+{self.seconds:.2f}s {self.summary()}")
        for entry in self.stuck[-4:]:
            lines.append(f"{entry['when']}, thread {entry['thread']}: " + " < ".join(entry["frames"][:6]))
        return "".join(f"{printable(line)}\n" for line in lines)


def signal_name(signum: int) -> str:
    """SIGTERM for 15; for a real-time signal the distance from the first one: SIGRTMIN+3."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"SIGRTMIN+{signum - signal.SIGRTMIN}" if signum > signal.SIGRTMIN else str(signum)
