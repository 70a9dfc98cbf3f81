"""What an armed process has to see to when it forks: children are not ranks (F10)."""

from __future__ import annotations

import os
import signal
from typing import Any, Callable

from autoteardown import unpatched
from autoteardown.fail_open import fail_open


class ForkHooks:
    """Of one process.

    Args:
        signals: those that mean eviction.
        armed: whether this process is.
        in_child: called in each child; gives back what the child would have had without us.
    """

    def __init__(
        self,
        signals: frozenset[int],
        armed: Callable[[], bool],
        in_child: Callable[[], None],
    ) -> None:
        self._signals, self._armed = signals, armed
        self._masks: dict[int, set[Any]] = {}
        os.register_at_fork(
            before=fail_open(self._mask), after_in_parent=self._unmask, after_in_child=fail_open(in_child)
        )
        os.register_at_fork(after_in_child=self._unmask)  # whatever comes of the other

    def _mask(self) -> None:
        # A signal that reaches the child before `in_child` would be lost: CPython drops what is pending.
        if self._armed():
            self._masks[unpatched.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)

    def _unmask(self) -> None:
        mask = self._masks.pop(unpatched.get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
