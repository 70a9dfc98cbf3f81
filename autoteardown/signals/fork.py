"""Fork hooks of an armed process: a child is not a rank, and a signal that reaches it early is not lost.

A forked child inherits the wake-up fd and would write its own signals into its parent's pipe. So the child gets back
what it would have without the agent.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Callable

from autoteardown import unpatched
from autoteardown.fail_open import fail_open


class ForkHooks:
    """Registers the hooks of one process.

    Args:
        signals: the signals that mean eviction.
        armed: whether this process is armed.
        in_child: called in each child; restores what the child would have without the agent.
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
        os.register_at_fork(after_in_child=self._unmask)  # runs even if `in_child` fails

    def _mask(self) -> None:
        # CPython drops pending signals in a forked child, so one that comes before `in_child` would be lost.
        if self._armed():
            self._masks[unpatched.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)

    def _unmask(self) -> None:
        mask = self._masks.pop(unpatched.get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
