"""The stop of one rank as a pure state machine: events and a clock in, actions out.

1. No I/O, no threads, no torch, no clock of its own. `driver.py` carries out the actions and reports the results;
   `coordinator.py` is what the ranks decide together; `tests/simulation` runs thousands of these machines against
   one another.
2. The machine is level-triggered. An event only adds to what has been received; then the machine moves as far as
   everything received so far allows. So a late, early or repeated message is never an error, and there is no order
   of arrival to get wrong.
3. Time-outs happen at a `tick` only, which comes when no event is waiting: after a process was frozen or starved,
   the answer that had been waiting counts, and not the time.
4. Here are the states until the training thread has stopped; `release.py` has those from then on.

Times are seconds since this rank's own signal, or since it received a peer's notice.
"""

from __future__ import annotations

from math import inf
from typing import Any, Optional

from autoteardown.stop.release import SKEW, Release
from autoteardown.stop.types import Phase

RECONNECTING = 5.0  # seconds to wait for a connection that has dropped, or is not there yet
# Seconds that a rank which cannot be reached may run on, after the others have stopped at the agreed iteration.
STRAGGLER = 8.0
# Seconds for every rank's answer; one that is missing then is dead or frozen.
ANSWERS = 10.0
# The part of the application's time that a checkpoint in progress at the signal leaves to its handler.
KEPT = 0.25


class Stop(Release):
    """The stop of one rank, from the signal to the exit.

    Events for `on` (`value` in brackets):

    - `begin`; `steps` (`(completed or None, cannot)`); `tick`: `wake` has come and no event is waiting;
    - from the coordinator: `notice` (origin, with the seconds that `tell` gave as `left`; before `begin` if it is
      why this rank stops), `plan` (see coordinator), `advance`, `aligned`, `halt`, `busy` (whether any rank saves),
      `owners_done`, `abort`, `quiet` (whether clean), `departed`, `all_left`;
    - from the channel: `down` (why, or None);
    - from the application: `released` (it has removed its handler), `leaves` (it has destroyed its group, or ended),
      `exits` (it runs its last exit callbacks);
    - from the driver: `less_time` (when the process has to end, and until when the application may have its time);
    - from the training thread: `stopped` (iteration), `parked`, `ended`, `swallowed`; and about it: `saving`,
      `stalled` (bools), `progress` (when its device last made some), `progress_unknown` (no counter shows any);
    - from the agent's worker threads: `drained`, `unwaitable` (which devices), `called`, `destroyed`, `aborted`
      (None, or what went wrong), `fault` (what went wrong elsewhere).
    """

    def _advance(self, more: dict[str, Any]) -> None:
        """This rank waits for others, or they for it: one more iteration brings them together."""
        if self.state == "step" and "plan" in self.received and more["round"] > self._round:
            self._round = more["round"]
            self.received.pop("stopped", None)
            self.received.pop("stalled", None)
            self._once.discard("at")
            self._latest["stalled"] = False
            self._emit("advance", more["until"])
            self._emit("ready", self._round)

    # -- states: each returns True when it has handed over to another --------------------------------------------

    def _in_new(self, now: float) -> bool:
        if "begin" not in self.received:
            return False
        if self.facts.unwaitable:
            self._fault(f"this device cannot be waited for: {self.facts.unwaitable}")
        if self.facts.application_owns and self.facts.cause != "lost" and self.limits.yield_ > now:
            if not self.facts.together and self.facts.cause == "signal":
                return self._enter("yield", now, self.limits.yield_ - now)
            if self.facts.together and not (self.facts.joined and self.facts.channel):
                # no peers to act together with: it acts at once, as without the agent
                return self._enter_yield(now)
        return self._enter_step(now)

    def _enter_step(self, now: float) -> bool:
        if not self.facts.joined:
            # In rendezvous, or before init has returned: nothing to drain, no peers to tell, a moment to park.
            self._settled = now
            self._emit("park")
            return self._enter("park", now, 0.0)
        # Time that this rank's own yield has taken, or the yield of the rank that tells, is not left any more.
        left = self.limits.hard - now
        if "notice" in self.received:
            left = min(left, self.received["notice"].get("left", left))
        elif self.facts.cause == "signal" or self._abort_is_shared:
            self._post("tell", left)
        limits = self.limits = self.limits.within(left)
        self._set_floor(now)
        if self.facts.world > 1 and not self.facts.channel:
            self._fault("its peers were not told")
        if self.facts.cause == "lost":
            self._fault("a peer is lost")
            if self._abort_is_shared:
                self._post("answer", (None, True, False))
            self.phases.append(Phase("step", now))
            return self._step_over("skipped", now, "a peer is lost")
        if "answer" in self._once:
            self.phases.append(Phase("step", now))
            return self._step_over("skipped", now, "the group has not waited for this rank")
        self._held = True
        self._emit("hold")
        return self._enter("step", now, limits.step)

    @property
    def _abort_is_shared(self) -> bool:
        """A lost peer: with accelerators all ranks stop by one decision, as the first of several aborts frees what the
        others' kernels still poll. Without, a rank that is not blocked runs on: an elastic framework may heal it.
        """
        return self.facts.cause == "lost" and self.facts.accelerator

    def _set_floor(self, now: float) -> None:
        limits = self.limits
        self.floor = min(now + limits.step + limits.drain + limits.abort + SKEW, self._exit_by)

    def _lower_floor(self, now: float) -> None:
        """The ranks have stopped, or have been told to: none runs on for a whole iteration."""
        limits = self.limits
        self.floor = min(self.floor, now + min(limits.step, STRAGGLER) + limits.drain + limits.abort + SKEW)

    def _in_step(self, now: float) -> bool:
        if "steps" not in self.received:
            return self._step_over("error", now, "no answer") if self._timed_out else False
        completed, cannot = self.received["steps"]
        cannot = cannot or not self.facts.step
        self._post("answer", (completed, cannot, self.facts.application_owns and self.facts.together))
        if not self.facts.channel:
            stop = None if cannot or completed is None else max(completed + 1, 2)
            self.received.setdefault("plan", {"stop": stop, "owned": self.facts.application_owns, "why": ""})
        if "saving" in self.received:
            self._post_latest("saving", bool(self.received["saving"]))
        self._wait_for_saves(now)
        if "stopped" in self.received:
            self._post("at", (self.received["stopped"], self._round))
            if "aligned" in self.received or not self._group:
                return self._step_over("ok", now, f"stopped after iteration {self.received['stopped']}")
        if "ended" in self.received:
            if completed is None:
                return self._step_over("skipped", now, "the thread that called init has ended")
            self._post("halt")
            return self._step_over("error", now, "the training thread has ended")
        if "halt" in self.received:
            return self._step_over(
                "skipped", now, self.received["halt"] or "the group does not wait for a step"
            )
        if "plan" in self.received:
            return self._follow_plan(completed, now)
        if self._clock >= self._down_at + RECONNECTING:
            return self._step_over("error", now, f"the group cannot be reached: {self.received['down']}")
        # A peer's answer is missing: it is dead or frozen. Half of the time is left for a plan without it.
        if self._group_informed:
            self._agree_by = min(self._agree_by, (now + self._deadline) / 2, now + ANSWERS)
        if self._clock >= self._agree_by:
            self._post("plan_now")
        waits = self._agree_by if self._clock < self._agree_by else inf
        self.wake = min(self._deadline, waits, self._down_at + RECONNECTING)
        return self._step_over("timeout", now, "no agreement") if self._timed_out else False

    def _wait_for_saves(self, now: float) -> None:
        """A checkpoint is more important than the time for a step, which begins when the checkpoint is written."""
        usual, latest = self.phases[-1].start + self.limits.step, self._save_until() - 2 * self._look
        if self._ends_by_itself and self.limits.yield_ > 0:
            latest = min(latest, self.limits.yield_ * (1 - KEPT))
        if self.received.get("saving") or self.received.get("busy"):
            self._waits_for_save = True
            self._until(max(usual, latest))
        elif self._waits_for_save:
            self._waits_for_save = False
            self._until(max(usual, min(latest, now + self.limits.step)))

    def _follow_plan(self, completed: Optional[int], now: float) -> bool:
        plan = self.received["plan"]
        if plan["stop"] is None:
            return self._step_over("skipped", now, plan["why"] or "no iteration to wait for")
        self.wake = self._deadline
        # Also for a rank that has not stepped yet: it may be about to, and others need it to get there.
        self._emit_once("stop_at", plan["stop"])
        if "stopped" not in self.received:
            self._post_latest("stalled", bool(self.received.get("stalled")), self._round)
        # A rank that never steps may still be needed by those that do: it runs on until they have arrived (`halt`).
        if not self._timed_out:
            return False
        self._post("halt")
        what = f"iteration {plan['stop']} not reached"
        return self._step_over(
            "timeout", now, "no word from the others" if "stopped" in self.received else what
        )

    def _step_over(self, outcome: str, now: float, detail: str) -> bool:
        # Peers have until the end of this phase, or until `halt`, to reach the agreed iteration: a device that waits
        # until then for their part of a collective is not stuck.
        expects = outcome == "ok" and self._group and self.facts.world > 1 and "aligned" not in self.received
        self._settled = self._deadline if expects else now
        self._end(outcome, now, detail)
        self._lower_floor(now)
        if outcome != "ok" and self.steps is not None and not self.facts.step:
            self._fault("AUTOTEARDOWN_STOP_AT is now")
        elif (outcome != "ok" and self.steps is not None) or outcome in ("timeout", "error"):
            self._fault(detail)
        self.received.pop("stalled", None)  # a thread that waits for its peers may still be able to park
        if self._ends_by_itself:
            return self._enter_yield(now)
        self._emit("park")
        return self._enter("park", now, 0.0)

    @property
    def _ends_by_itself(self) -> bool:
        """Whether an application, on this rank or on another, ends by itself after the agreed iteration."""
        owned = self.facts.application_owns or bool(self.received.get("plan", {}).get("owned"))
        return owned and self.facts.together and self.facts.cause != "lost"

    def _enter_yield(self, now: float) -> bool:
        """The application ends by itself, on this rank or on another: every rank runs on until it has."""
        if self.limits.yield_ <= now or "owners_done" in self.received:
            if self.facts.application_owns and self.limits.yield_ > 0 and "owners_done" not in self.received:
                self._callback_failed("no time is left for the application's handler")
            self._emit("park")
            return self._enter("park", now, 0.0)
        self.received.pop("stopped", None)  # the thread runs on
        self._emit("deliver")
        return self._enter("yield", now, self.limits.yield_ - now)

    def _in_yield(self, now: float) -> bool:
        delivered = self.facts.together or self._held
        if not delivered and "notice" in self.received and "answer" not in self._once:
            # If the application's time is about to end, the ranks were signalled together, and stop together.
            if self._deadline - now <= min(SKEW, self.limits.yield_ / 2):
                self._end("ok", now, "the group stops")
                return self._enter_step(now)
            # The application keeps its time; the group need not wait for it.
            self._post("answer", (None, False, False))
        if "released" in self.received:
            self._end("ok", now, "the application has put its handler away")
        elif delivered and "owners_done" in self.received and "leaves" not in self.received:
            self._end("ok", now, "those that end by themselves have left")
        elif delivered and not self.facts.application_owns and self._clock >= self._down_at + RECONNECTING:
            self._end("ok", now, "the hub has left, so it is unknown who else has")
        elif "exits" in self.received:
            # The process exits with its own code; the hub stays a moment for the others.
            self.wake = self.limits.hard
            return False
        elif self._timed_out:
            self._end("timeout", now, "the application did not end the process in its time")
        else:
            self.wake = (
                self._deadline
                if self.facts.application_owns
                else min(self._deadline, self._down_at + RECONNECTING)
            )
            return False
        if not delivered:
            return self._enter_step(now)
        if self.facts.iterates or self.facts.world > 1:
            self._fault(self.phases[-1].detail)
        self._post("yield_expired")
        self.limits = self.limits.within(self.limits.hard - now)
        self._set_floor(now)
        self._settled = now
        self._emit("park")
        return self._enter("park", now, 0.0)
