"""What a stop is handed by the rank that it stops: everything that it can do to it, and see of it.

The driver knows nothing else of the rank, so that the way of a stop can be read without the hooks, and tested without
torch.
"""

from __future__ import annotations

import _queue
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Protocol

if TYPE_CHECKING:
    from autoteardown.settings import Settings
    from autoteardown.stop.report import Log
    from autoteardown.stop.types import Facts

Problem = Optional[str]


class Snapshot(NamedTuple):
    """What a rank shows that sends no event."""

    saving: bool  # a checkpoint is being written
    stalled: bool  # its training thread waits without a sign of life
    ended: bool  # and that thread is no more
    progress: Any  # of its device: differs when it has advanced; None: nobody can tell


class RankControl(Protocol):
    """Methods named like the protocol's actions carry them out. None raises, and none waits but those that say so."""

    settings: Settings
    log: Log
    events: _queue.SimpleQueue[tuple[str, Any]]

    @property
    def alone(self) -> str:
        """Why the peers of this rank cannot be told, in words; empty if they can."""

    def facts(self, cause: str) -> Facts:
        """What is true of this rank now."""

    def identity(self) -> dict[str, Any]:
        """The first fields of the report."""

    def snapshot(self, stopping: bool) -> Snapshot:
        """What it shows now."""

    def mark(self, **fields: Any) -> None:
        """Tell the node's registry."""

    def unwaitable(self) -> str:
        """The devices in use that nobody can wait for, in words; empty if there are none."""

    def time_left(self) -> Optional[float]:
        """Seconds until whoever drains this node kills the process; None: nobody has said so. Reads a file or two."""

    def unregister(self, outcome: str, exit_code: int) -> None:
        """Leave the node's registry."""

    def post(self, kind: str, value: Any) -> None:
        """Say this to the council."""

    def flush(self, seconds: float) -> None:
        """Wait for what was posted, at most so long."""

    def steps(self) -> tuple[Optional[int], bool]:
        """How many iterations are over (None: it does not step), and whether there is no hope of another in time."""

    def hold(self) -> None:
        """Raise the hold flag."""

    def stop_at(self, count: int) -> None:
        """Let the training thread run to the end of that iteration."""

    def advance(self, until: dict[str, int]) -> None:
        """Let it run to the end of its next one."""

    def deliver(self) -> None:
        """Let the program run on, after its own handler has been called."""

    def park(self) -> None:
        """Stop its threads wherever they are."""

    def drain(self) -> Problem:
        """Wait for the devices. May never return."""

    def run_callbacks(self, say: Callable[[str], None]) -> Problem:
        """Call what `on_teardown` was given. May never return."""

    def destroy(self) -> Problem:
        """Release the process groups. May never return."""

    def abort(self, done: Callable[[Problem], object]) -> None:
        """Abort them; `done` is called when that is over, which it may never be."""

    def hold_off_watchdog(self) -> None:
        """From now on `abort()` on another thread does not end the process: the exit code stays the stop's."""

    def stuck_collective(self) -> Optional[dict[str, Any]]:
        """Which collective does not end: `group`, `seq`, `op`; None if there is none, or nobody can tell."""

    def evidence(self, path: str, collective: Optional[dict[str, Any]]) -> list[str]:
        """Write what the communicators recorded, for a post-mortem, to files that begin so. May never return."""

    def exit_is_blocked_by_framework(self) -> bool:
        """Whether a SystemExit would not end the process, because a framework waits for something that runs."""

    def leave(self, exit_code: int) -> None:
        """Have the program's threads leave with SystemExit."""

    def interrupt_main_thread(self) -> None:
        """Have the main thread look whether it is to stop, or should have left by now."""
