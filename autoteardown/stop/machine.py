"""Base of the protocol's state machine: events received, actions, the clock, and the phases of the report.

`protocol.py` and `release.py` have the states.
"""

from __future__ import annotations

from math import inf
from typing import Any, Optional

from autoteardown.stop.types import Action, Facts, Limits, Phase

_FROM_COORDINATOR = ("notice", "plan", "aligned", "halt", "quiet", "all_left")
# of these events, the last value counts
_LATEST = ("saving", "busy", "stalled", "progress", "stopped", "down")


class Machine:
    """A state machine whose states are the methods `_in_<state>` of its subclass."""

    def __init__(self, limits: Limits, facts: Facts) -> None:
        self.limits = limits
        self.facts = facts
        self.state = "new"
        self.phases: list[Phase] = []
        self.received: dict[str, Any] = {}
        self.wedged = False  # something does not end: abort it, or drop it with the process
        self.blocked = False  # the training thread cannot be asked to exit
        self.forced = False
        self.why = ""  # what keeps this stop from being clean
        self.lost_callback = (
            ""  # whose callback failed or was skipped: a checkpoint of the group is incomplete
        )
        self.floor = limits.hard  # by then every rank that got the notice has drained or aborted
        self.wake = limits.hard
        self._deadline = limits.hard
        self._clock = 0.0  # time of the last tick
        self._agree_by = inf  # half-way between the notice and the end of the time for a step
        self._down_at = inf
        self._settled = 0.0  # until then, peers may be on their way to the agreed iteration
        self._held = False  # the training thread may be waiting at the end of an iteration
        self._waits_for_save = False  # before the agreed iteration
        self._round = 0  # of the coordinator's last `advance`
        self._once: set[str] = set()
        self._latest: dict[str, bool] = {}
        self._out: list[Action] = []

    # -- what the report says ---------------------------------------------------------------------------------

    @property
    def outcome(self) -> str:
        """The `outcome` of the report."""
        if self.forced:
            return "forced"
        return "aborted" if self.wedged else "partial" if self.why or self.lost_callback else "clean"

    @property
    def reason(self) -> str:
        """Why the outcome is not `clean`, in words."""
        if self.outcome == "clean":
            return ""
        if self.lost_callback:
            return self.lost_callback + ("" if self.why in self.lost_callback else f"; {self.why}")
        return self.why or ("a phase timed out" if not self.forced else "the hard deadline")

    @property
    def steps(self) -> Optional[dict[str, Optional[int]]]:
        """The `steps` of the report; None if this rank does not step."""
        completed = self.received.get("steps", (None, False))[0]
        if completed is None:
            return None
        agreed = self.received.get("plan", {}).get("stop")
        return {"at_signal": completed, "agreed": agreed, "stopped_at": self.received.get("stopped")}

    @property
    def waits_for(self) -> str:
        """What this state waits for, and until when at the latest; empty where there is nothing to wait for."""
        agreed = self.received.get("plan", {}).get("stop")
        what = {
            "step": "the end of iteration " + str(agreed) if agreed else "the other ranks' answers",
            "park": "the end of a save" if self.received.get("saving") else "the training thread",
            "drain": "the devices",
            "callbacks": "the on_teardown callbacks",
            "quiet": "the other ranks",
            "destroy": "the release of the process groups",
            "abort": "the abort of the process groups",
            "exit": "the other ranks' exit",
            "leaving": "the program's exit",
        }.get(self.state)
        return f"waits for {what}, until {self._deadline:.1f}s at most" if what else ""

    # -- the machine ------------------------------------------------------------------------------------------

    def on(self, event: str, value: Any, now: float) -> list[Action]:
        """Take one event in, and return the actions that follow, in order."""
        self._out = []
        if event == "tick":
            self._clock = now
        elif event == "advance":
            self._advance(value)
        elif event == "fault":
            self._fault(value)
        elif event == "less_time":
            self._take_less_time(value, now)
        elif event == "callback_failed":
            self.lost_callback = self.lost_callback or f"rank {value['rank']}: {value['why']}"
        else:
            if not value and (event == "busy" or (event == "saving" and self.state == "park")):
                self._settled = max(self._settled, now)  # the thread gets its time to park again
            if event == "halt" and event not in self.received:
                self._settled = min(self._settled, now)
            if event == "down":
                self._down_at = min(self._down_at, now) if value else inf
            if event in _LATEST:
                self.received[event] = value
            self.received.setdefault(event, value)
        if now >= self.limits.hard and self.state != "done":
            self._force(now)
        while self.state != "done" and getattr(self, "_in_" + self.state)(now):
            pass
        return self._out

    def _take_less_time(self, limits: tuple[float, float], now: float) -> None:
        """The process has to end earlier than the limits say: a platform's own signal has come after a notice."""
        hard, yields = limits
        if hard >= self.limits.hard:
            return
        self.limits = self.limits._replace(hard=hard, yield_=yields).within(hard - now)
        self.floor = min(self.floor, self._exit_by)
        latest = {
            "step": now + self.limits.step,
            "yield": yields,
            "callbacks": hard - self.limits.abort - self.limits.exit,
        }
        self._until(min(self._deadline, latest.get(self.state, hard)))

    def _advance(self, more: dict[str, Any]) -> None:
        raise NotImplementedError

    def _emit(self, do: str, value: Any = None) -> None:
        self._out.append(Action(do, value))

    def _emit_once(self, do: str, value: Any = None) -> None:
        if do not in self._once:
            self._once.add(do)
            self._emit(do, value)

    def _post(self, do: str, value: Any = None) -> None:
        """Post to the coordinator, once, if there is a channel."""
        if self.facts.channel:
            self._emit_once(do, value)

    def _post_latest(self, what: str, value: bool, *more: Any) -> None:
        """Post the value whenever it has changed."""
        if value != self._latest.get(what, False):
            self._latest[what] = value
            if self.facts.channel:
                self._emit(what, (value, *more) if more else value)

    def _fault(self, why: str) -> None:
        self.why = self.why or why

    def _callback_skipped(self) -> None:
        if self.facts.callbacks:
            self._callback_failed("the on_teardown callback was skipped")

    def _callback_failed(self, why: str) -> None:
        """Every rank has to know: what the others have saved is a part of a checkpoint."""
        self._fault(why)  # first: what comes after it may follow from it
        self._post("callback_failed", why)
        if not self.facts.channel:
            self.lost_callback = self.lost_callback or why

    @property
    def _group(self) -> bool:
        """Whether there are peers, and the hub can be reached."""
        return self.facts.channel and not self.received.get("down")

    @property
    def _group_informed(self) -> bool:
        """Whether the group knows of the stop: in a new group, this rank may still be connecting."""
        return "tell" not in self._once or any(event in self.received for event in _FROM_COORDINATOR)

    @property
    def _timed_out(self) -> bool:
        return self._clock >= self._deadline

    @property
    def _can_exit_normally(self) -> bool:
        """Whether the program can be asked to exit by itself."""
        return not (self.wedged or self.blocked)

    @property
    def _exit_by(self) -> float:
        return self.limits.hard - self.limits.exit

    def _enter(self, state: str, now: float, limit: float, phase: bool = True) -> bool:
        self.state = state
        self._until(now + limit)
        if phase:
            self.phases.append(Phase(state, now))
        return True

    def _until(self, deadline: float) -> None:
        self._deadline = min(deadline, self.limits.hard)
        self.wake = self._deadline

    def _end(self, outcome: str, now: float, detail: str = "") -> None:
        phase = self.phases[-1]
        phase.end, phase.outcome, phase.detail = now, outcome, detail
        if outcome == "timeout":
            self._emit("stacks", phase.name)

    def _skip(self, name: str, now: float, why: str) -> None:
        self.phases.append(Phase(name, now))
        self._end("skipped", now, why)

    def _force(self, now: float) -> None:
        self.forced = self.state != "leaving"
        if self.phases and self.phases[-1].end is None:
            self._end("timeout", now, "hard deadline")
        self.state = "done"
        self._emit("die")
