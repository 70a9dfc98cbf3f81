"""Tells the child processes of a rank (DataLoader workers, checkpoint writers) when it is armed, and when evicted."""

from __future__ import annotations

from typing import Callable, Optional

from autoteardown.children import child_signals, termination
from autoteardown.children.eviction_page import EvictionPage
from autoteardown.fail_open import fail_open
from autoteardown.signals.interception import SignalInterceptor


class ChildProcesses:
    """The child processes of one rank.

    Args:
        interceptor: what stands between the application and the `signal` module.
        say: called with a line for the log.
    """

    def __init__(self, interceptor: SignalInterceptor, say: Callable[[str], object]) -> None:
        self._interceptor, self._say = interceptor, say
        self._page: Optional[EvictionPage] = None

    @fail_open
    def rank_is_armed(self) -> None:
        """From now on, a signal that comes to everybody does not end them before the rank has left."""
        if self._page is None:
            try:
                self._page = EvictionPage.create()
            except (OSError, AttributeError) as error:
                self._say(f"a signal to all processes ends this rank's children: {error}")
                return
        self._page.armed = True
        termination.watch(self._page, self._interceptor.signals)

    def rank_is_disarmed(self) -> None:
        """Their signals are as without the agent again."""
        if self._page is not None:
            self._page.armed = False

    def rank_is_evicted(self, grace: float) -> None:
        """An eviction signal has come, with a grace period of that many seconds."""
        if self._page is not None:
            self._page.evicted_for(grace)

    def attach(self) -> None:
        """In a process that this rank has forked."""
        if self._page is not None:
            self._page.close_writing_end()
            child_signals.attach(self._page, self._interceptor)
