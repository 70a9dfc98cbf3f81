"""Carries out what the protocol asks of a rank. Nothing here waits: what may block runs on a thread of its own."""

from __future__ import annotations

from typing import Any, Callable, Optional

from autoteardown.stop.control import Hands
from autoteardown.stop.record import Account
from autoteardown.stop.types import Action
from autoteardown.unpatched import start_new_thread


class Orders:
    """For one stop.

    Args:
        hands: the armed rank.
        account: what is gathered for those who will ask.
        say: called with a line for the log.
    """

    def __init__(self, hands: Hands, account: Account, say: Callable[[str], None]) -> None:
        self._hands, self._account, self._say = hands, account, say

    def carry_out(self, action: Action) -> None:
        """Start it; what comes of it arrives as an event. An action without a method is a word to the other ranks."""
        do, value, hands = action.do, action.value, self._hands
        special = getattr(self, "_do_" + do, None)
        if special is not None:
            special(value)
        elif do in ("park", "deliver"):
            getattr(hands, do)()
        elif do in ("stop_at", "go_on"):
            getattr(hands, do)(value)
        else:
            hands.post(do, value)

    def _do_tell(self, left: float) -> None:
        self._hands.post("tell", {**self._account.origin, "left": left})

    def _do_hold(self, _: Any) -> None:
        self._hands.hold()  # first the flag, then the count: see Gate
        self._hands.events.put(("steps", self._hands.steps()))

    def _do_drain(self, _: Any) -> None:
        self._hands.mark(state="parked")
        self.start("drained", self._drain)

    def _drain(self) -> Any:
        problem = self._hands.drain()
        # Asked again: some turn out to be when they are waited for.
        unwaitable = self._hands.unwaitable()
        if unwaitable:
            self._hands.events.put(("unwaitable", unwaitable))
            self._hands.events.put(("fault", f"nobody can wait for this device: {unwaitable}"))
        return problem

    def _do_callbacks(self, budget: float) -> None:
        self.start("called", lambda: self._hands.call_back(self._say))

    def _do_destroy(self, _: Any) -> None:
        self.start("destroyed", self._hands.destroy)

    def _do_abort(self, _: Any) -> None:
        self._hands.abort(lambda problem: self._hands.events.put(("aborted", problem)))

    def _do_stacks(self, phase: str) -> None:
        self.start(None, lambda: self._account.take_stacks(f"{phase} timed out"))
        if phase in ("step", "park", "drain"):
            self.start(None, self._account.find_collective)

    def start(self, event: Optional[str], function: Callable[[], Any]) -> None:
        """Run something that may never return, and put what it returns, or its error, among the events."""

        def run() -> None:
            try:
                problem = function()
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            if event is not None:
                self._hands.events.put((event, problem))

        start_new_thread(run, ())
