"""The application's own handler, called on the main thread at the agreed iteration, while the training waits for it.

A handler on the main thread beside training on another has to be over before the next iteration begins: else a rank
whose threads are slower sees its flag an iteration later than its peers. An event loop's is called by the loop, some
turns after the signal.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from autoteardown.fail_open import report_failure
from autoteardown.unpatched import monotonic

_COMING = 5.0  # seconds that the training thread waits for the main thread to come by
_HANDLING = 1.0  # and for the handler: it may in turn wait for the training thread (`thread.join()`)
_TURNS = 8  # of an event loop: by then it has called its callback, and a task that waits for that has seen it


class HandlerDelivery:
    """Of one eviction to one process.

    Args:
        wake: called when the training thread need not wait any longer.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.raised: Optional[BaseException] = None
        """What the handler has raised: the application's, and not ours to catch."""
        self._wake = wake
        self._calls: list[Callable[[], object]] = []
        self._until = 0.0

    def put(self, handler: Callable[[], object]) -> None:
        """To be called."""
        self._until = monotonic() + _COMING
        self._calls.append(handler)

    @property
    def awaited(self) -> bool:
        """Whether the training has to wait for it."""
        return monotonic() < self._until

    def call(self) -> None:
        """On the main thread: call it, unless that has been done."""
        try:
            handler = self._calls.pop()
        except IndexError:
            return
        self._until = monotonic() + _HANDLING
        try:
            handler()
        except BaseException as error:
            self.raised = error
            self._over()
            raise
        try:
            in_turns(self._over, _TURNS)
        except Exception as error:
            report_failure("to wait for an event loop", error)
            self._over()

    def _over(self) -> None:
        self._until = 0.0
        self._wake()


def in_turns(function: Callable[[], object], turns: int) -> None:
    """Call it when the event loop that runs on this thread has turned so often; at once, if none does."""
    call_soon = _running_loop()

    def turn() -> None:
        nonlocal turns
        turns -= 1
        try:
            if call_soon is not None and turns >= 0:
                call_soon(turn)
                return
        except RuntimeError:  # it has ended
            pass
        function()

    turn()


def _running_loop() -> Any:
    """What has it call a function in its next turn, from a signal handler or wherever; None: no loop runs here."""
    asyncio: Any = sys.modules.get("asyncio")
    trio: Any = sys.modules.get("trio.lowlevel")
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except (AttributeError, RuntimeError):  # not imported, or being so; or none on this thread
        pass
    try:
        return trio.current_trio_token().run_sync_soon
    except (AttributeError, RuntimeError):
        return None
