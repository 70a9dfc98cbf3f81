"""The interface between the driver of a stop and the rank that it stops: everything the driver can do or ask.

The driver knows nothing else of the rank, so a stop can be read without the hooks, and tested without torch.
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
    """The state of a rank that sends no events."""

    saving: bool  # a checkpoint is being written
    stalled: bool  # its training thread waits and makes no progress
    ended: bool  # its training thread has ended
    progress: Any  # of its device: differs when the device has advanced; None: unknown


class RankControl(Protocol):
    """Controls one rank. Methods named like the protocol's actions carry them out. None raises; none waits, except
    where stated.
    """

    settings: Settings
    log: Log
    events: _queue.SimpleQueue[tuple[str, Any]]

    @property
    def application_owns(self) -> bool:
        """Whether the application ends the process by itself: it has a handler of its own, or polls."""

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""

    @property
    def alone(self) -> str:
        """Why the peers of this rank cannot be told, in words; empty if they can."""

    def facts(self, cause: str) -> Facts:
        """What is true of this rank now."""

    def identity(self) -> dict[str, Any]:
        """The first fields of the report."""

    def snapshot(self, stopping: bool) -> Snapshot:
        """The rank's state now."""

    def mark(self, **fields: Any) -> None:
        """Update this rank's entry in the node's registry."""

    def unwaitable(self) -> str:
        """The devices in use that cannot be waited for, in words; empty if there are none."""

    def times_left(self) -> list[tuple[float, bool]]:
        """For each drain of this node: seconds until the kill, and whether the rank has all of them. Reads files."""

    def unregister(self, outcome: str, exit_code: Optional[int], **fields: Any) -> None:
        """Remove this rank's entry from the node's registry, or leave it there with this and these fields."""

    def post(self, kind: str, value: Any) -> None:
        """Post a message to the coordinator."""

    def end_children(self, seconds: float) -> None:
        """End the child processes that are to end with this rank, and wait for that, at most so many seconds."""

    def flush(self, seconds: float) -> None:
        """Wait until posted messages have been sent, at most so many seconds."""

    def steps(self) -> tuple[Optional[int], bool]:
        """Completed iterations (None: the rank does not step), and whether another is not expected in time."""

    def hold(self) -> None:
        """Set the hold flag."""

    def stop_at(self, count: int) -> None:
        """Let the training thread run to the end of that iteration."""

    def advance(self, until: dict[str, int]) -> None:
        """Let it run to the end of its next iteration that has reached these sequence numbers."""

    def deliver(self) -> None:
        """Let the program run on, after its own handler has been called."""

    def park(self) -> None:
        """Stop the program's threads wherever they are."""

    def drain(self) -> Problem:
        """Wait for the devices. May never return."""

    def run_callbacks(self, say: Callable[[str], None]) -> Problem:
        """Call the `on_teardown` callbacks. May never return."""

    def destroy(self) -> Problem:
        """Release the process groups. May never return."""

    def abort(self, done: Callable[[Problem], object], after: float) -> None:
        """Abort the process groups `after` so many seconds; `done` is called when that has ended, maybe never."""

    def hold_off_watchdog(self) -> None:
        """From now on `abort()` on another thread does not end the process: the exit code stays the stop's."""

    def stuck_collective(self) -> Optional[dict[str, Any]]:
        """The collective that does not end: `group`, `seq`, `op`; None if there is none, or it is unknown."""

    def evidence(self, path: str, collective: Optional[dict[str, Any]]) -> list[str]:
        """Write the flight recorders' entries to files whose names begin with `path`. May never return."""

    def exit_is_blocked_by_framework(self) -> bool:
        """Whether SystemExit would not end the process, because a framework waits for a method that still runs."""

    def leave(self, exit_code: int) -> None:
        """Have the program's threads exit with SystemExit."""

    def interrupt_main_thread(self) -> None:
        """Have the main thread check whether it must stop, or should have exited by now."""
