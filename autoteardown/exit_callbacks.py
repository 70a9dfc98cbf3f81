"""Exit callbacks that were registered before ours, and would run after it: but ours ends the process.

They run last in, first out. Most are registered after start-up, so ours comes last. Not so those of a .pth file that
comes before ours in the alphabet (coverage's, `a1_coverage.pth`, saves its data at exit), and everything of a program
that starts the agent in code. `atexit` cannot list what is registered, but `unregister` compares
each with its argument.
"""

from __future__ import annotations

import atexit
from typing import Callable, Optional

_ours: Optional[Callable[[], object]] = None
_oldest_first = True


class _Probe:
    """Sees every callback that it is compared with, and is equal to ours and to those registered after it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.last: object = None
        self._beyond_ours = False

    def __eq__(self, callback: object) -> bool:
        self.last, before = callback, self._beyond_ours
        self._beyond_ours |= callback is _ours
        return _ours is not None and (self._beyond_ours if _oldest_first else not before)


def remember(ours: Callable[[], object]) -> None:
    """Called just after ours has been registered, if it was not the first."""
    global _ours, _oldest_first
    probe = _Probe()
    atexit.unregister(probe)  # type: ignore[arg-type]
    _ours, _oldest_first = ours, probe.last is ours  # newest first from Python 3.14


def run_earlier() -> None:
    """In ours: run what would come after it, and not again what has come before it."""
    if _ours is not None:
        atexit.unregister(_Probe())  # type: ignore[arg-type]
        atexit._run_exitfuncs()
