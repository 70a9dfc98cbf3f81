"""Decides once per eviction whether the application or the agent ends the process.

1. The application owns the eviction if its handler does more than exit. The agent then calls that handler on every
   rank after the same iteration, and acts only if a process is still there when the application's time is over.
2. The decision is made when the eviction is first noticed, by whichever thread notices it: the application may put
   its handler away at any moment after that, and all parts of the agent must act on the same answer.
"""

from __future__ import annotations

from autoteardown.rank.state import RankState


class EvictionOwner:
    """The decision for one process.

    Args:
        state: the armed rank.
    """

    def __init__(self, state: RankState) -> None:
        self._state = state
        self._decision: dict[str, bool] = {}  # `setdefault` is atomic: no lock that a frozen thread may hold

    def application_owns(self, signum: int) -> bool:
        """Whether the application ends the process by itself."""
        if "application" not in self._decision:
            state = self._state
            owns = state.settings.yield_seconds > 0 and state.interceptor.application_owns(signum)
            self._decision.setdefault("application", owns)
        return self._decision["application"]

    def is_deferred(self, signum: int) -> bool:
        """Whether the application's handler is called later, at the agreed iteration, and not when the signal comes.

        A handler that has been called there counts as deferred, too: Lightning's passes the signal on to the ranks
        that it has launched.
        """
        state = self._state
        return (
            state.settings.handlers == "together"
            and state.joined
            and state.channel is not None
            and self.application_owns(signum)
        )
