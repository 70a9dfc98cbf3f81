"""Calls the application's signal handler on the main thread at the agreed iteration, while the training thread waits.

1. If the main thread is not the training thread, the handler has to return before the next iteration begins:
   otherwise a slower rank sees the handler's flag one iteration later than its peers.
2. An event loop calls its handlers itself, some turns after the signal.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from autoteardown.fail_open import report_failure
from autoteardown.unpatched import monotonic

_COMING = 5.0  # seconds that the training thread waits for the main thread to run bytecode
_HANDLING = 1.0  # seconds for the handler, which may itself wait for the training thread (`thread.join()`)
# turns of an event loop, after which its callback has run and a task that waits for the callback has resumed
_TURNS = 8


class HandlerDelivery:
    """One call of the handler, for one eviction.

    Args:
        wake: called when the training thread need not wait any longer.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.raised: Optional[BaseException] = None
        """What the handler has raised: the application's, which the agent must not catch."""
        self._wake = wake
        self._calls: list[Callable[[], object]] = []
        self._until = 0.0

    def put(self, handler: Callable[[], object]) -> None:
        """Set what is called."""
        self._until = monotonic() + _COMING
        self._calls.append(handler)

    @property
    def awaited(self) -> bool:
        """Whether the training thread has to wait."""
        return monotonic() < self._until

    def call(self) -> None:
        """On the main thread: call the handler, unless it has been called."""
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
    """Call `function` when the event loop of this thread has made that many turns; at once if none runs."""
    call_soon = _running_loop()

    def turn() -> None:
        nonlocal turns
        turns -= 1
        try:
            if call_soon is not None and turns >= 0:
                call_soon(turn)
                return
        except RuntimeError:  # the loop has ended
            pass
        function()

    turn()


def _running_loop() -> Any:
    """A function that has the running event loop call another in its next turn, safe in a signal handler; None: no loop
    runs here.
    """
    asyncio: Any = sys.modules.get("asyncio")
    trio: Any = sys.modules.get("trio.lowlevel")
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except (AttributeError, RuntimeError):  # asyncio is not imported yet, or no loop runs on this thread
        pass
    try:
        return trio.current_trio_token().run_sync_soon
    except (AttributeError, RuntimeError):
        return None
