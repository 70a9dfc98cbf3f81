"""The stop of one rank as a pure state machine: events and a clock in, actions out.

No I/O, no threads, no torch, no clock of its own: `teardown.py` does what the actions say and reports what came of
it, and `tests/simulation/test_simulation.py` runs thousands of these machines against one another.

The machine is level-triggered. An event only adds to what has been *heard*; then the machine moves as far as
everything heard so far allows. So a late, early or repeated message is never an error, and there is no order of
arrival to get wrong. Nothing times out but at a `tick`, which comes when nothing is left to hear: after a process was
frozen or starved, the answer that had been waiting counts, and not the time.

Times are seconds since this rank's own signal, or since it heard of a peer's.
"""

from __future__ import annotations

from math import inf
from typing import Any, Optional

from autoteardown.stop.terms import Action, Facts, Limits, Phase

# A rank that knows nothing of its peers, and no accelerator whose memory they could touch, gives them this long.
COURTESY = 1.0
# Ranks that are signalled together get their signals this far apart (1.1 s were seen on one node, ai2cm/ace#1398).
SKEW = 3.0
# A rank may need as long to connect to the board: c10d's server looks up the name of each client, one after the other,
# and a resolver takes 5 s to ask again.
CONNECTING = 10.0
_FROM_THE_BOARD = ("notice", "plan", "halt", "quiet", "gone")
# The part of the drain's time in which a rank whose thread is blocked finds out whether its device is idle.
LOOK = 0.2


class Stop:
    """One rank's way from the signal to its exit.

    Events for `on` (`value` in brackets): `begin`; `steps` (`(completed or None, cannot)`); from the board `notice`
    (origin, with what `tell` said as `left`; before `begin` if that is why this rank stops), `plan` (step or None),
    `halt`, `quiet` (clean), `gone`, `lost`; from the application `released` (it has put its handler away); from the
    training thread `stopped` (step), `parked`, `ended`; `saving` (bool); from the workers `drained`, `called`,
    `destroyed`, `aborted` (None, or what went wrong); `tick`, when `wake` has come and no event is waiting.
    """

    def __init__(self, limits: Limits, facts: Facts) -> None:
        self.limits = limits
        self.facts = facts
        self.state = "new"
        self.phases: list[Phase] = []
        self.heard: dict[str, Any] = {}
        self.wedged = False  # something does not end: to be aborted, or dropped with the process
        self.blocked = False  # the training thread cannot be asked to leave
        self.forced = False
        self.floor = limits.hard  # by then every rank that heard the notice has drained or aborted
        self.wake = limits.hard
        self._deadline = limits.hard
        self._clock = 0.0  # of the last tick
        self._agree_by = inf  # half-way between the notice and the end of the time for a step
        self._settled = 0.0  # until then peers may be on their way to the agreed step
        self._once: set[str] = set()
        self._out: list[Action] = []

    # -- what the report says ---------------------------------------------------------------------------------

    @property
    def outcome(self) -> str:
        """As it is in the report."""
        if self.forced:
            return "forced"
        return "aborted" if self.wedged else "clean"

    @property
    def steps(self) -> Optional[dict[str, Optional[int]]]:
        """As it is in the report; None if this rank does not step."""
        completed = self.heard.get("steps", (None, False))[0]
        if completed is None:
            return None
        return {
            "at_signal": completed,
            "agreed": self.heard.get("plan"),
            "stopped_at": self.heard.get("stopped"),
        }

    # -- the machine ------------------------------------------------------------------------------------------

    def on(self, event: str, value: Any, now: float) -> list[Action]:
        """Take one event in and return what is to be done, in order."""
        self._out = []
        if event == "tick":
            self._clock = now
        if event == "saving":
            self.heard["saving"] = value
            if self.state == "park" and not value:
                self._settled = max(self._settled, now)  # the thread has its time to park again
        else:
            if event == "halt" and event not in self.heard:
                self._settled = min(self._settled, now)
            self.heard.setdefault(event, value)
        if now >= self.limits.hard and self.state != "done":
            self._force(now)
        while self.state != "done" and getattr(self, "_in_" + self.state)(now):
            pass
        return self._out

    def _do(self, do: str, value: Any = None) -> None:
        self._out.append(Action(do, value))

    def _do_once(self, do: str, value: Any = None) -> None:
        if do not in self._once:
            self._once.add(do)
            self._do(do, value)

    def _post(self, do: str, value: Any = None) -> None:
        """To the board, if there is one."""
        if self.facts.board and "lost" not in self.heard:
            self._do_once(do, value)

    @property
    def _group(self) -> bool:
        """Peers exist and can be heard."""
        return self.facts.board and "lost" not in self.heard

    @property
    def _told(self) -> bool:
        """The group knows of the stop. In one that is a few seconds old this rank may still be connecting."""
        return "tell" not in self._once or any(event in self.heard for event in _FROM_THE_BOARD)

    @property
    def _due(self) -> bool:
        return self._clock >= self._deadline

    @property
    def _soft(self) -> bool:
        """The program can be asked to leave by itself."""
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
            self._do("stacks", phase.name)

    def _skip(self, name: str, now: float, why: str) -> None:
        self.phases.append(Phase(name, now))
        self._end("skipped", now, why)

    def _force(self, now: float) -> None:
        self.forced = self.state != "leaving"
        if self.phases and self.phases[-1].end is None:
            self._end("timeout", now, "hard deadline")
        self.state = "done"
        self._do("die")

    # -- states: each returns True when it has handed over to another --------------------------------------------

    def _in_new(self, now: float) -> bool:
        if "begin" not in self.heard:
            return False
        if self.limits.yield_ > now and self.facts.cause == "signal":
            return self._enter("yield", now, self.limits.yield_ - now)
        return self._enter_step(now)

    def _in_yield(self, now: float) -> bool:
        if "notice" in self.heard:
            # If its own time is about to end they were signalled together, and stop together.
            if self._deadline - now <= min(SKEW, self.limits.yield_ / 2) and "answer" not in self._once:
                self._end("ok", now, "the group stops")
                return self._enter_step(now)
            # The application has its time; the group need not wait for it.
            self._post("answer", (None, False))
        if "released" in self.heard:
            self._end("ok", now, "the application has put its handler away")
            return self._enter_step(now)
        if not self._due:
            return False
        self._end("timeout", now, "the application's handler did not end the process")
        return self._enter_step(now)

    def _enter_step(self, now: float) -> bool:
        if not self.facts.joined:
            # In rendezvous, or in a half-built world: nothing to drain, nobody to tell, a moment to park.
            self._settled = now
            self._do("park")
            return self._enter("park", now, 0.0)
        # The time that its own yield has taken, or that of the rank which tells, is not there any more.
        left = self.limits.hard - now
        if "notice" in self.heard:
            left = min(left, self.heard["notice"].get("left", left))
        elif self.facts.cause == "signal":
            self._post("tell", left)
        limits = self.limits = self.limits.within(left)
        self.floor = min(now + limits.step + limits.drain + limits.abort + SKEW, self._exit_by)
        if "answer" in self._once:
            self.phases.append(Phase("step", now))
            return self._step_over("skipped", now, "the group has not waited for this rank")
        self._do("hold")
        return self._enter("step", now, limits.step)

    def _in_step(self, now: float) -> bool:
        if "steps" not in self.heard:
            return self._step_over("error", now, "no answer") if self._due else False
        completed, cannot = self.heard["steps"]
        cannot = cannot or not self.facts.step
        self._post("answer", (completed, cannot))
        if not self.facts.board:
            self.heard.setdefault("plan", None if cannot or completed is None else completed + 1)
        if "stopped" in self.heard:
            return self._step_over("ok", now, f"stopped at step {self.heard['stopped']}")
        if "ended" in self.heard:
            if completed is not None:
                self._post("halt")
            return self._step_over("error", now, "the training thread has ended")
        if "halt" in self.heard:
            return self._step_over("skipped", now, "the group does not wait for a step")
        if "plan" in self.heard:
            return self._follow_plan(completed, now)
        if "lost" in self.heard:
            return self._step_over("error", now, "the board is gone")
        # A peer's answer is missing: it is dead or frozen. Half the time is left for a plan without it.
        if self._told:
            self._agree_by = min(self._agree_by, (now + self._deadline) / 2)
        if self._clock >= self._agree_by:
            self._post("plan_now")
        self.wake = self._deadline if self._clock >= self._agree_by else min(self._agree_by, self._deadline)
        return self._step_over("timeout", now, "no agreement") if self._due else False

    def _follow_plan(self, completed: Optional[int], now: float) -> bool:
        stop = self.heard["plan"]
        if stop is None:
            return self._step_over("skipped", now, "no step to wait for")
        self.wake = self._deadline
        # Also for a rank that has not stepped yet: it may be about to, and others need it to get there.
        self._do_once("stop_at", stop)
        # One that never steps may still be needed by those that do: it goes on until they are there (`halt`).
        if not self._due:
            return False
        self._post("halt")
        return self._step_over("timeout", now, f"step {stop} not reached")

    def _step_over(self, outcome: str, now: float, detail: str) -> bool:
        # Peers have until the end of this phase, or `halt`, to get to the agreed step: a device that waits until then
        # for their part of a collective is not stuck.
        expects = outcome == "ok" and self.facts.board and self.facts.world > 1 and "halt" not in self.heard
        self._settled = self._deadline if expects else now
        self._end(outcome, now, detail)
        self._do("park")
        return self._enter("park", now, 0.0)

    def _drain_until(self, kept: float) -> None:
        """Parking and draining have one budget, and no checkpoint is cut in half while time is left."""
        latest = self.limits.hard - self.limits.abort - self.limits.exit
        budget = self.limits.drain if self.facts.joined else min(self.limits.drain, COURTESY / 2)
        saving = self.state == "park" and self.heard.get("saving")
        self._until((latest if saving else min(latest, self._settled + budget)) - kept)

    def _in_park(self, now: float) -> bool:
        look = self.limits.drain * LOOK if self.facts.accelerator and self.facts.joined else 0.0
        self._drain_until(look)
        saving = self.heard.get("saving")
        if not saving and not self.heard.keys().isdisjoint(("parked", "stopped", "ended")):
            self._end("ok", now)
            if not self.facts.joined:
                return self._enter_exit(now)
            self._do("drain")
            return self._enter("drain", now, 0.0)
        if not self._due:
            return False
        self.blocked = True
        if not self.facts.joined:
            self._end("timeout", now, "blocked in init_process_group")
            return self._enter_exit(now)
        self._end(
            "timeout", now, "a save is still going on" if saving else "the training thread is blocked in C"
        )
        if not self.facts.accelerator:
            return self._enter_abort(now)
        # Blocked is not busy: to abort an idle rank frees what a peer's kernel may still poll (ai2cm/ace#1438).
        self._do("drain")
        return self._enter("drain", now, look)

    def _in_drain(self, now: float) -> bool:
        if not self.blocked:
            self._drain_until(0.0)
        if "drained" not in self.heard:
            if not self._due:
                return False
            self._end("timeout", now, "the device is busy with work that does not end")
            return self._enter_abort(now)
        problem = self.heard["drained"]
        self._end("error" if problem else "ok", now, problem or "")
        if problem:
            return self._enter_abort(now)
        if self.blocked:
            self.wedged = True
            self._skip("abort", now, "the device is idle: left to the exit")
            return self._abort_over(now, stopped=True)
        if "stopped" in self.heard and self.steps is not None and "halt" not in self.heard:
            # Not before: ranks that never step may have to launch their part of what this device was waiting for.
            self._post("arrived")
        self._do("callbacks", max(0.0, self.floor - now) / 2)
        self.phases.append(Phase("quiet", now))
        return self._enter("callbacks", now, max(0.0, self.floor - now) / 2, phase=False)

    def _in_callbacks(self, now: float) -> bool:
        if "called" not in self.heard and not self._due:
            return False
        self._post("quiet", True)
        return self._enter("quiet", now, 0.0, phase=False)

    def _in_quiet(self, now: float) -> bool:
        alone = self.facts.world == 1 or (not self.facts.board and not self.facts.accelerator)
        if alone:
            # Nobody to wait for, or (gloo) nobody who minds: its destroy is not collective.
            self._end("skipped", now, "no peers" if self.facts.world == 1 else "peers are not asked")
            return self._release(now, everyone=True)
        if "quiet" in self.heard:
            clean = bool(self.heard["quiet"])
            self._end("ok", now, "" if clean else "a peer was wedged")
            return self._release(now, everyone=clean)
        courtesy = max(self.phases[-1].start, self._settled) + COURTESY
        self._until(self.floor if self.facts.accelerator else min(self.floor, courtesy))
        if not self._due and (self._group or self.facts.accelerator):
            return False
        self._end("timeout" if self._group else "skipped", now, "not every rank has said that it is quiet")
        return self._release(now, everyone=False)

    def _release(self, now: float, everyone: bool) -> bool:
        if self.wedged:  # aborted already
            return self._enter_exit(now)
        if everyone:
            self._do("destroy")
            return self._enter("destroy", now, min(self.limits.destroy, self._exit_by - now))
        # Destroy would wait for peers that may never come, and an abort frees buffers which their kernels may
        # still poll (ai2cm/ace#1438): the exit releases it.
        self._skip("destroy", now, "left to the exit")
        return self._enter_exit(now)

    def _in_destroy(self, now: float) -> bool:
        if "destroyed" in self.heard:
            problem = self.heard["destroyed"]
            self._end("error" if problem else "ok", now, problem or "")
        elif self._due:
            self._end("timeout", now, "destroy_process_group does not return")
            self.wedged = True
        else:
            return False
        return self._enter_exit(now)

    def _enter_abort(self, now: float) -> bool:
        self.wedged = True
        if "halt" not in self.heard:
            self._post("halt")
        if self.facts.can_abort:
            self._do("abort")
            return self._enter("abort", now, self.limits.abort)
        self._skip("abort", now, "this backend has no abort: the exit closes its connections")
        return self._abort_over(now, stopped=not self.facts.accelerator)

    def _in_abort(self, now: float) -> bool:
        if "aborted" in self.heard:
            problem = self.heard["aborted"]
            self._end("error" if problem else "ok", now, problem or "")
            return self._abort_over(now, stopped=not problem)
        if not self._due:
            return False
        self._end("timeout", now, "the abort does not return")
        return self._abort_over(now, stopped=False)

    def _abort_over(self, now: float, stopped: bool) -> bool:
        if stopped:
            self._post("quiet", False)
        # Without an accelerator there is no memory that a peer's kernel could touch: the exit frees the peers.
        return self._enter("quiet", now, 0.0) if self.facts.accelerator else self._enter_exit(now)

    def _enter_exit(self, now: float) -> bool:
        self._post("left")
        left = self._exit_by - now
        if not self._told:
            return self._enter("exit", now, left)
        wait = self.limits.destroy if "quiet" in self.heard else max(COURTESY, CONNECTING - now)
        return self._enter("exit", now, min(wait, left))

    def _in_exit(self, now: float) -> bool:
        # Peers that lose the store's server go alone: its host leaves last. And nobody leaves who was not heard yet.
        waits = self._group and ("gone" not in self.heard if self.facts.hosts_store else not self._told)
        if self.heard.get("saving"):
            waits = True
            self._until(self._exit_by)
        if waits and not self._due:
            return False
        self._end("ok", now)
        self._do("leave", self._soft)
        return self._enter("leaving", now, self.limits.exit, phase=False)

    def _in_leaving(self, now: float) -> bool:
        if self._soft:
            if self.heard.get(
                "saving"
            ):  # Lightning saves on any exception, the one that it leaves with included
                self._until(now + self.limits.exit)
            if not self._due:
                return False
            self._end("timeout", now, "the program's own exit takes too long")
        self.state = "done"
        self._do("die")
        return True
