"""Polls the state of a rank that sends no events, and turns changes into events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoteardown import native_calls
from autoteardown.stop.control import RankControl


class Poller:
    """Polls during one stop, on the driver's thread.

    Args:
        control: the armed rank.
    """

    def __init__(self, control: RankControl) -> None:
        self._control = control
        self._shown: dict[str, bool] = {"saving": False, "stalled": False}
        self._progress: Any = None
        self._unknown = False

    def reset(self) -> None:
        """The training thread was let go, or is to stop: whether it is stalled is decided anew."""
        self._shown["stalled"] = False

    def changes(self, stopping: bool, draining: bool, now: float) -> Iterator[tuple[str, Any]]:
        """What has changed, as events of the protocol.

        Args:
            stopping: the agent ends this process.
            draining: the stop waits for devices: their progress counts from now on.
            now: seconds since the signal.
        """
        shown = native_calls.call(lambda: self._control.snapshot(stopping))
        if shown.ended:
            yield "ended", None
        for what in self._shown:
            value = getattr(shown, what)
            if value != self._shown[what]:
                self._shown[what] = value
                yield what, value
        if draining and shown.progress is None and not self._unknown:
            self._unknown = True
            yield "progress_unknown", None
        elif draining and shown.progress is not None and shown.progress != self._progress:
            first, self._progress = self._progress is None, shown.progress
            if not first:
                yield "progress", now
