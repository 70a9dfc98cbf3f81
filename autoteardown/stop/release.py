"""The second half of the stop of one rank: from the parked training thread to the exit of the process.

Park, drain, callbacks, wait until every rank is quiet, destroy; or, if the device or a thread does not come to an end,
abort together with the other ranks. See `protocol.py` for the rules of the machine.
"""

from __future__ import annotations

from autoteardown.stop.machine import Machine
from autoteardown.stop.types import Phase

# Seconds that a rank gives its peers if it knows nothing of them and uses no accelerator whose memory they could touch.
COURTESY = 1.0
# Seconds between the signals of ranks that are signalled together (1.1 were seen on one node, ai2cm/ace#1398).
SKEW = 3.0
# The part of the time for an exit by which a rank whose kernels nothing ends leaves before the others: its kernels end
# with its process, and fault if a peer's memory goes first.
FIRST = 1 / 3
# Seconds that a rank of a new group may need to connect to the hub.
CONNECTING = 10.0
# The part of the drain's time in which a rank with a blocked thread finds out whether its device is idle.
LOOK = 0.2


class Release(Machine):
    """The states from `park` on."""

    @property
    def _look(self) -> float:
        return self.limits.drain * LOOK if self.facts.accelerator and self.facts.joined else 0.0

    def _save_until(self) -> float:
        """No checkpoint is cut while time is left."""
        return self.limits.hard - self.limits.abort - self.limits.exit

    def _drain_until(self, kept: float) -> None:
        """Parking and draining share one budget."""
        budget = self.limits.drain if self.facts.joined else min(self.limits.drain, COURTESY / 2)
        saving = self.state == "park" and self.received.get("saving")
        latest = self._save_until()
        self._until((latest if saving else min(latest, self._settled + budget)) - kept)

    def _in_park(self, now: float) -> bool:
        look = self._look
        self._drain_until(look)
        saving = self.received.get("saving")
        if not saving and not self.received.keys().isdisjoint(("parked", "stopped", "ended")):
            self._end("ok", now)
            if not self.facts.joined:
                return self._enter_exit(now)
            self._emit("drain")
            return self._enter("drain", now, 0.0)
        if not (self._timed_out or (self.received.get("stalled") and not saving and now >= self._settled)):
            return False
        self.blocked = True
        if not self.facts.joined:
            self._end("timeout", now, "blocked in init_process_group")
            self._fault("blocked in init_process_group")
            return self._enter_exit(now)
        self._end(
            "timeout", now, "a save is still going on" if saving else "the training thread is blocked in C"
        )
        self._callback_skipped()
        if not self.facts.accelerator:
            return self._enter_wedged(now)
        # Blocked is not busy: to abort an idle rank frees what a peer's kernel may still poll (ai2cm/ace#1438).
        self._emit("drain")
        return self._enter("drain", now, look)

    def _in_drain(self, now: float) -> bool:
        if not self.blocked:
            self._drain_until(0.0)
        elif "progress_unknown" in self.received:  # no counter tells a busy device from a stuck one
            self._until(min(self.phases[-1].start + self.limits.drain, self._save_until()))
        if "progress" in self.received:  # time without progress counts, not time
            self._until(
                min(max(self._deadline, self.received["progress"] + self.limits.drain), self._save_until())
            )
        if "drained" not in self.received:
            if not self._timed_out:
                return False
            self._end("timeout", now, "the device is busy with work that does not end")
            return self._enter_wedged(now)
        problem = self.received["drained"]
        self._end("error" if problem else "ok", now, problem or "")
        if problem:
            return self._enter_wedged(now)
        if self.blocked:
            self._fault("the training thread is blocked in C")
            self._skip("abort", now, "the device is idle: left to the exit")
            return self._abort_over(now, stopped=True)
        if "stopped" in self.received and self.steps is not None and "halt" not in self.received:
            # Not earlier: ranks that never step may have to launch their part of what this device was waiting for.
            self._post("arrived")
        budget = max(0.0, self._save_until() - now)
        if self.facts.callbacks:
            self._post_latest("saving", True)
        self._emit("callbacks", budget)
        self.phases.append(Phase("quiet", now))
        return self._enter("callbacks", now, budget, phase=False)

    def _in_callbacks(self, now: float) -> bool:
        if "called" not in self.received and not self._timed_out:
            if self.received.get("saving"):  # in the background: the save may need the other ranks
                self._post_latest("saving", True)
            return False
        problem = self.received.get("called", "an on_teardown callback did not return in time")
        if problem:
            self._callback_failed(problem)
        self._post_latest("saving", False)
        self._post("quiet", True)
        self._settled = max(self._settled, now)
        return self._enter("quiet", now, 0.0, phase=False)

    def _in_quiet(self, now: float) -> bool:
        alone = self.facts.world == 1 or (not self.facts.channel and not self.facts.accelerator)
        if alone:
            # No peers to wait for, or gloo, whose destroy is not collective.
            self._end("skipped", now, "no peers" if self.facts.world == 1 else "peers are not asked")
            return self._release(now, everyone=True)
        if self._released:  # later than the abort's time-out
            self._post("quiet", False)
        if "quiet" in self.received and not (self.facts.unwaitable or "unwaitable" in self.received):
            clean = bool(self.received["quiet"])
            self._end("ok", now, "" if clean else "a peer was wedged or lost")
            if not clean:
                self._fault("a peer was wedged or lost")
            return self._release(now, everyone=clean)
        if self.received.get("busy"):  # peers that are still saving may need this rank
            self._settled = max(self._settled, now)
            self._until(self._save_until())
        else:
            courtesy = max(self.phases[-1].start, self._settled) + (SKEW if self._group else COURTESY)
            # A callback may have taken longer than the floor: the peers get their time from its end.
            floor = min(max(self.floor, self._settled + SKEW), self._exit_by)
            floor -= self.limits.exit * FIRST if self._kernels_remain else 0.0
            self._until(floor if self.facts.accelerator else min(floor, courtesy))
        if not self._timed_out and (self._group or self.facts.accelerator):
            return False
        why = "not every rank has said that it is quiet"
        self._end("timeout" if self._group else "skipped", now, why)
        self._fault(why)
        return self._release(now, everyone=False)

    def _release(self, now: float, everyone: bool) -> bool:
        if self.wedged or self.blocked:  # aborted already, or left to the exit
            return self._enter_exit(now)
        if everyone:
            self._emit("destroy")
            return self._enter("destroy", now, min(self.limits.destroy, self._exit_by - now))
        # Destroy would wait for peers that may never come, and an abort frees buffers which their kernels may still
        # poll (ai2cm/ace#1438): the exit releases the group.
        self._skip("destroy", now, "left to the exit")
        return self._enter_exit(now)

    def _in_destroy(self, now: float) -> bool:
        if "destroyed" in self.received:
            problem = self.received["destroyed"]
            self._end("error" if problem else "ok", now, problem or "")
            if problem:
                self._fault(problem)
        elif self._timed_out:
            self._end("timeout", now, "destroy_process_group does not return")
            self._fault("destroy_process_group does not return")
            self.wedged = True
        else:
            return False
        return self._enter_exit(now)

    # -- wedged ranks abort together: the first of several aborts frees what the others' kernels still poll ------------

    def _enter_wedged(self, now: float) -> bool:
        self.wedged = True
        self._fault(self.phases[-1].detail)
        self._callback_skipped()
        if "halt" not in self.received:
            self._post("halt")
        if not self.facts.can_abort:
            self._skip("abort", now, "this backend has no abort: the exit closes its connections")
            return self._abort_over(now, stopped=not self.facts.accelerator)
        self._post("wedged")
        self.phases.append(Phase("abort", now))
        wait = min(SKEW, self._exit_by - self.limits.abort - now) if self._group else 0.0
        return self._enter("wedged", now, wait, phase=False)

    def _in_wedged(self, now: float) -> bool:
        if "drained" in self.received and not self.received["drained"]:
            # What the device was waiting for has come after all: it must not be aborted any more (ai2cm/ace#1438).
            self._end("skipped", now, "the device became idle")
            self.wedged = False
            return self._abort_over(now, stopped=True)
        if "abort" not in self.received and self._group and not self._timed_out:
            return False
        self._emit("abort", self.received.get("abort"))
        return self._enter("abort", now, self.limits.abort, phase=False)

    def _in_abort(self, now: float) -> bool:
        if "aborted" in self.received:
            problem = self.received["aborted"]
            self._end("error" if problem else "ok", now, problem or "")
            return self._abort_over(now, stopped=self._released)
        if not self._timed_out:
            return False
        self._end("timeout", now, "the abort does not return")
        return self._abort_over(now, stopped=False)

    @property
    def _released(self) -> bool:
        """Whether nothing of this rank runs on its device any more, after an abort.

        A device in error has ended its kernels, and refuses the abort as it refuses everything.
        """
        return "aborted" in self.received and ("drained" in self.received or not self.received["aborted"])

    @property
    def _kernels_remain(self) -> bool:
        """Whether this rank's kernels may still poll its peers' memory: there is no abort, or it does not return."""
        return self.facts.accelerator and self.wedged and not self._released

    def _abort_over(self, now: float, stopped: bool) -> bool:
        if stopped:
            self._post("quiet", False)
        # Without an accelerator there is no memory that a peer's kernel could touch: the exit frees the peers.
        return self._enter("quiet", now, 0.0) if self.facts.accelerator else self._enter_exit(now)

    # -- the way out ----------------------------------------------------------------------------------------------

    def _enter_exit(self, now: float) -> bool:
        self._post("left")
        left = self._exit_by - now
        if not self._group_informed:
            return self._enter("exit", now, left)
        wait = self.limits.destroy if "quiet" in self.received else max(COURTESY, CONNECTING - now)
        return self._enter("exit", now, min(wait, left))

    def _in_exit(self, now: float) -> bool:
        # Peers that lose the hub stop without it, so its process exits last, unless its kernels have to end first. And
        # no rank exits before the group knows of its stop.
        last = self.facts.hub and not self._kernels_remain
        waits = self._group and ("all_left" not in self.received if last else not self._group_informed)
        if self.received.get("saving"):
            waits = True
            self._until(self._exit_by)
        if self.blocked and not self.facts.accelerator and self.facts.joined:
            # gloo releases the thread when the peer that it waits for has exited; then the program can exit normally.
            if "parked" in self.received:
                self.blocked = self.wedged = False
            elif self._clock < self.phases[-1].start + COURTESY:
                self._until(min(self.phases[-1].start + COURTESY, self._exit_by))
                waits = True
        if waits and not self._timed_out:
            return False
        self._end("ok", now)
        self._emit("leave", self._can_exit_normally)
        return self._enter("leaving", now, self.limits.exit, phase=False)

    def _in_leaving(self, now: float) -> bool:
        if "swallowed" in self.received:
            self._fault("the program has caught the exit, and was stopped again")
        elif self._can_exit_normally:
            if self.received.get("saving"):
                # Lightning saves on any exception, the agent's SystemExit included.
                self._until(now + self.limits.exit)
            if not self._timed_out:
                return False
            self._end("timeout", now, "the program's own exit takes too long")
        self.state = "done"
        self._emit("die")
        return True
