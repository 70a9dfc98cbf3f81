"""Drives the stop of one rank: carries out what the protocol decides, and feeds the results back to it.

1. The driver's thread only waits, decides and starts things. Whatever may block (torch, a disk, callbacks of the
   program) runs on a thread of its own and reports through a queue. So the driver is on time whatever is stuck, and
   a second thread ends the process at the hard deadline even if the driver has a bug.
2. Threads are started with `_thread`: `threading.Thread.start` takes a lock that the frozen main thread may hold.
"""

from __future__ import annotations

import _queue
import os
from typing import Any, Callable, NoReturn, Optional

from autoteardown import exit_callbacks, native_calls, spare_threads
from autoteardown.fail_open import fail_open
from autoteardown.stop import exit_status, final_report, gc_pause, protocol, types
from autoteardown.stop.actions import ActionRunner
from autoteardown.stop.control import RankControl
from autoteardown.stop.deadline import Deadline
from autoteardown.stop.outcome import Outcome
from autoteardown.stop.polling import Poller
from autoteardown.stop.posix_timer import HardDeadlineTimer
from autoteardown.stop.record import StopRecord
from autoteardown.unpatched import allocate_lock, sleep

_POLL = 0.02  # seconds between two polls of what sends no event
_FLUSH = 0.2  # seconds for the last posts to reach the hub
_CHILDREN = 0.3  # seconds for the DataLoader workers to end by themselves
_LAST_WORDS = 0.4  # seconds for report and termination log, before the process ends without them
_LONG_LAST_WORDS = 2.0  # the same, if time is left
# Seconds after which the agent checks whether a program that was asked to exit is exiting, or has caught the exit.
_SWALLOWS = 0.5
_BEFORE_DEADLINE = _LAST_WORDS + 0.1  # seconds before the hard deadline by which the protocol is done
_ASKED = 1.0  # seconds after which a reader of the log asks what a stop waits for
_FOR_EVER = 3600.0  # seconds; longer than the process still has


class Teardown:
    """The stop of this rank, from its signal (or a peer's) to the end of the process.

    Args:
        control: the armed rank.
        cause: `signal`, `peer` or `lost`.
        signum: the eviction signal, if this rank got one.
        origin: rank, host and pid of the rank that was signalled first, and how many seconds it has `left`.
        timer: the hard deadline of this process; may be running already.
    """

    def __init__(
        self,
        control: RankControl,
        cause: str,
        signum: Optional[int],
        origin: dict[str, Any],
        timer: HardDeadlineTimer,
    ) -> None:
        self.control = control
        self._deadline = Deadline(control.settings.hard, timer)
        self._record = StopRecord(control, cause, signum, _without_time(origin), self._deadline)
        self._actions = ActionRunner(control, self._record, self.say)
        self.committed = False  # the agent ends the process, not the application
        self.leaving = False  # the program has been asked to exit with SystemExit
        self.stop: Optional[protocol.Stop] = None
        self._notice = origin
        self._signals = int(signum is not None)  # how many eviction signals this rank has got
        self._application_owns = False
        self._finishing = allocate_lock()
        self._poller = Poller(control)
        self._told = 0  # phases that the log has the end of
        self._waited_in = ""  # the state of which the log says what it waits for
        self._left_at = 0.0

    def begun_by(self, origin: dict[str, Any]) -> None:
        """Set which rank was signalled first."""
        self._record.origin = _without_time(origin)

    # -- the two threads ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the driver and the deadline thread. If no thread is available, drive on this one."""
        self._deadline.arm(self.exit_code)
        exit_status.watch()
        spare_threads.start(self._at_deadline)  # without it, the timer ends the process at the deadline
        if not spare_threads.start(self._drive):
            self._drive()

    def _at_deadline(self) -> None:
        try:
            self._deadline.wait()
            if self.stop is not None:
                self.stop.forced = True
            self.say("hard deadline: ending the process")
        finally:
            self._finish(patience=0.05)

    def _drive(self) -> None:
        try:
            self._follow_drains()
            facts = native_calls.call(lambda: self.control.facts(self._record.cause))
            self._application_owns = facts.application_owns
            stop = self.stop = protocol.Stop(self._limits(facts), facts)
            self._open()
            if self._record.cause == "peer" or "left" in self._notice:
                self._take(stop, "notice", self._notice)
            self._take(stop, "begin", None)
            while stop.state != "done":
                self._look(stop)
                try:
                    event, value = self.control.events.get(True, max(0.0, min(_POLL, stop.wake - self.now)))
                except _queue.Empty:
                    event, value = "tick", None
                self._take(stop, event, value)
        except native_calls.InterpreterExiting:  # the application has ended the process by itself
            sleep(_FOR_EVER)
        except BaseException as error:  # a bug of the agent's may cost the teardown, not the exit code
            problem = f"internal error: {type(error).__name__}: {error}"
            if self.stop is not None:
                self.stop.why = problem
            self.say(problem)
            self._let_the_program_end()
        finally:
            self._finish()

    def _let_the_program_end(self) -> None:
        """After a bug of the agent's: a program that ends by itself, and a checkpoint, keep the time that they had."""
        if self.control.application_owns and not self.committed:
            self.control.deliver()
            sleep(_FOR_EVER)
        while self.control.saving and self.now < self._deadline.hard - _BEFORE_DEADLINE:
            sleep(_POLL)

    def _follow_drains(self) -> None:
        if self._notice.get("longer") and self._record.cause == "peer" and not self._deadline.changed:
            self._deadline.give(self._notice["left"] + _BEFORE_DEADLINE)
            self._deadline.arm(self.exit_code)
        if not self._signals:
            return
        before, usual = self._deadline.hard, self.control.settings.hard
        signals = 0
        while signals != self._signals:  # another one may come meanwhile, and finds `longer` not yet set
            signals = self._signals
            self._deadline.follow_drains(self.control.times_left, signals, usual, self.exit_code)
        if self.stop is not None and self._deadline.hard < before:
            self.control.events.put(("less_time", self._limits_now()))
            if self._deadline.hard < before - 1:
                self.say(f"hard deadline moved forward to {self._deadline.hard:.1f}s")

    @property
    def now(self) -> float:
        """Seconds since the signal."""
        return self._deadline.now

    def _take(self, stop: protocol.Stop, event: str, value: Any) -> None:
        for action in stop.on(event, value, self.now):
            self._commit(stop)
            if action.do == "leave":
                self._leave(action.value)
            elif action.do != "die":  # the driver ends the process with its own end
                if action.do in ("park", "deliver"):
                    self._poller.reset()
                self._actions.carry_out(action)
        self._commit(stop)
        for phase in stop.phases[self._told :]:
            if phase.end is None:
                break
            self._told += 1
            detail = f": {phase.detail}" if phase.detail else ""
            text = f"{phase.name} {phase.outcome} ({phase.end - phase.start:.2f}s){detail}"
            self.say(text, event=phase.name, outcome=phase.outcome)

    def _look(self, stop: protocol.Stop) -> None:
        """Poll for changes that send no event."""
        for event, value in self._poller.changes(self.committed, stop.state == "drain", self.now):
            if event == "ended" and (
                event in stop.received or (self._application_owns and not self.committed)
            ):
                continue
            if event == "saving" and not value and stop.state == "park":
                self.control.park()  # park the thread that was left running to finish its save
            self._take(stop, event, value)
        if stop.state != self._waited_in and stop.phases and self.now > stop.phases[-1].start + _ASKED:
            self._waited_in = stop.state
            if stop.waits_for:
                self.say(stop.waits_for)
        if self.leaving and self.now > self._left_at + _SWALLOWS:
            self._left_at = self.now
            self.control.interrupt_main_thread()

    def _commit(self, stop: protocol.Stop) -> None:
        committed = stop.state not in ("new", "yield")
        if committed == self.committed:
            return
        self.committed = committed
        if committed:
            # The process is sure to end (the hard deadline is set), and with the agent's exit code instead of a
            # watchdog's. An application that ends by itself may need its own abort.
            if not self._application_owns:
                self.control.hold_off_watchdog()
            # A collection would run finalizers of the program on the agent's threads, and those take locks.
            gc_pause.pause()
            self.control.mark(state="stopping")
        else:
            gc_pause.resume()
            self.control.mark(state="yielding")

    def _limits(self, facts: types.Facts) -> types.Limits:
        hard, yields = self._limits_now()
        fitted = self.control.settings.timeouts_within(self._deadline.hard) if self._deadline.longer else {}
        s = self.control.settings
        return types.Limits(
            hard=hard,
            yield_=yields,
            step=fitted.get("STEP", s.step_timeout),
            drain=fitted.get("DRAIN", s.drain_timeout),
            destroy=fitted.get("DESTROY", s.destroy_timeout),
            abort=fitted.get("ABORT", s.abort_timeout),
            exit=fitted.get("EXIT", s.exit_timeout),
            auto=s.step_auto,
            saves=facts.callbacks or facts.application_owns,
        )

    def _limits_now(self) -> tuple[float, float]:
        """When the protocol must be done, and until when the application may have its time."""
        return self._deadline.hard - _BEFORE_DEADLINE, self._record.yields

    def _open(self) -> None:
        self.control.log.first(self._record.opening(self._application_owns), self.now)
        self._actions.start(None, lambda: self._record.take_stacks("at the signal"))
        if self.control.alone:
            self.say(f"peers are not told: {self.control.alone}")

    # -- the end --------------------------------------------------------------------------------------------------

    def _leave(self, soft: bool) -> None:
        self.control.flush(_FLUSH)
        self.control.end_children(min(_CHILDREN, max(0.0, self._deadline.hard - _LONG_LAST_WORDS - self.now)))
        if not soft:
            return
        # From here on the program's own code decides how the process ends: it may call os._exit, or free what cannot be
        # freed. So the report is written first, and the hard deadline is moved forward.
        final_report.write(self.outcome(), self.control, _LAST_WORDS, final=False)
        latest = self.now + self.control.settings.exit_timeout + _LONG_LAST_WORDS + _LAST_WORDS
        self._deadline.arm(self.exit_code, latest)
        if self.control.exit_is_blocked_by_framework():
            self._finish()
        self.leaving, self._left_at = True, self.now
        self.control.leave(self.exit_code)

    @property
    def exit_code(self) -> int:
        """What the process exits with, whichever way it ends."""
        return self._record.exit_code

    def another_signal(self) -> None:
        """An eviction signal has arrived during this stop: if it is the platform's own, its time counts."""
        self._signals += 1
        if self._deadline.longer:
            self._actions.start(None, self._follow_drains)

    def also_signalled(self, signum: int, sure: bool = False) -> None:
        """This rank's own signal came after a peer's notice: the rank counts as signalled all the same.

        Not if a peer has left by then: launchers send SIGTERM to the other ranks when one has exited.

        Args:
            signum: the signal.
            sure: the signal has reached the application's own handler.
        """
        stop = self.stop
        if stop is not None and not sure and any(phase.name == "yield" for phase in stop.phases):
            return  # the application may have sent it to itself, as uvicorn does after its shutdown
        if self._record.signum is None and (stop is None or "departed" not in stop.received):
            self._record.signum = signum
            self._deadline.arm(self.exit_code)
            self._signals = max(1, self._signals)
            self._actions.start(None, self._follow_drains)

    def ended(self) -> None:
        """On the main thread, in the last atexit callback: the program is over."""
        exit_callbacks.run_earlier()
        self._finish()

    def application_ends(self) -> None:
        """On the main thread, in the last atexit callback: the application ends the process, and not the agent.

        Written here, since the interpreter's own exit may be slow. Returns if the process keeps its own exit code.
        """
        code = exit_status.status()
        replaces = code == 0 and self._record.replaces_success
        self._record.own_exit = (self.exit_code if replaces else code,)
        if self._finishing.acquire(False):
            outcome = self.outcome(final=True)
            self.say(outcome.summary(), event="done", outcome=outcome.outcome)
            final_report.write(outcome, self.control, _LONG_LAST_WORDS, final=True)
            if replaces:
                exit_callbacks.run_earlier()
                end(lambda: self.exit_code)
            self._finishing.release()

    def _finish(self, patience: Optional[float] = None) -> None:
        """End the process. The first caller does it; all others wait for the end, except the deadline."""
        if not self._finishing.acquire(False) and patience is None:
            sleep(_FOR_EVER)
        try:
            if patience is None:
                left = self._deadline.hard - _LAST_WORDS - self.now
                patience = max(_LAST_WORDS, min(_LONG_LAST_WORDS, left))
            outcome = self.outcome(final=True)
            final_report.write(outcome, self.control, patience, final=True)
            if (
                self.stop is not None
                and (self.stop.wedged or self.stop.blocked)
                and self.now < self._deadline.hard - _LONG_LAST_WORDS
            ):
                final_report.write_evidence(outcome, self.control, _LAST_WORDS)
            self.say(outcome.summary(), event="done", outcome=outcome.outcome)
        finally:
            end(lambda: self.exit_code)

    def outcome(self, final: bool = False) -> Outcome:
        """What this stop has come to so far."""
        return self._record.outcome(self.stop, self._application_owns, self.now, final)

    @fail_open
    def say(self, text: str, event: str = "message", outcome: Optional[str] = None) -> None:
        """Write one line to stderr."""
        self.control.log.line(text, self.now, event=event, outcome=outcome)


def _without_time(origin: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in origin.items() if key not in ("left", "longer")}


def end(code: Callable[[], int]) -> NoReturn:
    """End the process now, even if `code` fails."""
    try:
        os._exit(code())
    finally:
        os._exit(1)
