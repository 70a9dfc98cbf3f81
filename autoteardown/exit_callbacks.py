"""Runs `atexit` callbacks that were registered before the agent's, because the agent's callback ends the process.

1. Exit callbacks run last in, first out. Most are registered after start-up, so the agent's callback usually runs last.
2. It does not run last if a .pth file that comes earlier in the alphabet has registered one (coverage's
   `a1_coverage.pth` saves its data at exit), or if the program starts the agent in code.
3. `atexit` cannot list its callbacks, but `atexit.unregister` compares each of them with its argument.
"""

from __future__ import annotations

import atexit
from typing import Callable, Optional

_agent_callback: Optional[Callable[[], object]] = None
_oldest_first = True


class _Probe:
    """An argument for `unregister`: equal to the agent's callback and to those registered after it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.last: object = None
        self._reached = False  # whether the agent's callback has been compared

    def __eq__(self, callback: object) -> bool:
        self.last, before = callback, self._reached
        self._reached |= callback is _agent_callback
        return _agent_callback is not None and (self._reached if _oldest_first else not before)


def remember(callback: Callable[[], object]) -> None:
    """Note the agent's callback; call this just after registering it, if others were registered before."""
    global _agent_callback, _oldest_first
    probe = _Probe()
    atexit.unregister(probe)  # type: ignore[arg-type]
    _agent_callback, _oldest_first = callback, probe.last is callback  # newest first from Python 3.14


def run_earlier() -> None:
    """In the agent's callback: run those that would come after it, and do not repeat those that have run."""
    if _agent_callback is not None:
        atexit.unregister(_Probe())  # type: ignore[arg-type]
        atexit._run_exitfuncs()
