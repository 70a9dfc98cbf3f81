"""One teardown: carries out what the protocol decides, and tells it what came of it.

The driver thread only waits, decides and starts things. Whatever may block (torch, the store, a disk, callbacks of the
program) runs on a thread of its own and reports through a queue, so the driver is on time whatever is stuck, and a
second thread ends the process at the hard deadline even if the driver is wrong.

Threads are started with `_thread`: `threading.Thread.start` takes a lock that the frozen main thread may hold.
"""

from __future__ import annotations

import _queue
import _thread
import gc
import os
import signal
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Optional

from autoteardown import exits
from autoteardown.boundary import guarded
from autoteardown.channel.poster import Poster
from autoteardown.frameworks import ray as ray_rank
from autoteardown.rank import backends, threads, training
from autoteardown.stop import lastwords, protocol, report, terms
from autoteardown.stop.fuse import Fuse

if TYPE_CHECKING:
    from autoteardown.rank.guard import Guard

_POLL = 0.02  # seconds between looks at what sends no event: a thread that has ended, a save that is over
# Seconds within which ranks are signalled together; a launcher that reacts to an exit comes later.
_TOGETHER = 1.0
_FLUSH = 0.2  # seconds for the last posts to get to the board
_LAST_WORDS = 0.4  # seconds for report and termination log, before the process is ended without them
_LONG_LAST_WORDS = 2.0  # the same where there is time


class Teardown:
    """From the signal (or a peer's) to the end of the process.

    Args:
        guard: the armed rank.
        cause: `signal` or `peer`.
        signum: the eviction signal, if this rank got one.
        origin: rank, host and pid of the rank that was signalled first, and how much time it has `left`.
        yields: the application's own handler has its time first.
    """

    def __init__(
        self, guard: Guard, cause: str, signum: Optional[int], origin: dict[str, Any], yields: bool
    ) -> None:
        self.guard = guard
        self.cause = cause
        self.signum = signum
        self.notice = origin
        self.origin = {key: value for key, value in origin.items() if key != "left"}
        self.started = time.monotonic()
        self.received_at = datetime.now(timezone.utc).isoformat()
        self.committed = not yields  # from here on the agent ends the process
        self.leaving = False  # the main thread is asked to leave with SystemExit
        self.stuck: list[dict[str, Any]] = []
        self._yields = yields
        self._poster: Optional[Poster] = None
        self._finishing = _thread.allocate_lock()
        self._saving = self._stopping = False
        self._told = 0
        self._fuse = Fuse()
        self.stop: Optional[protocol.Stop] = None

    # -- the two threads ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the threads; on a thread that has nothing else to do, as it is the fallback."""
        self._light_fuse(self.guard.settings.hard)
        try:
            _thread.start_new_thread(self._deadline, ())
            _thread.start_new_thread(self._drive, ())
        except RuntimeError:  # no thread to be had
            self._drive()

    def _deadline(self) -> None:
        try:
            time.sleep(max(0.0, self.guard.settings.hard - 0.1 - self.now))
            if self.stop is not None:
                self.stop.forced = True
            self.say("hard deadline: ending the process")
        finally:
            self._finish(patience=0.05)

    def _drive(self) -> None:
        try:
            stop = self.stop = protocol.Stop(self._limits(), self._facts())
            self.say(self.opening(), stacks="at the signal")
            if self.guard.board is None and (self.guard.world_size or 1) > 1 and self.guard.joined:
                self.say(f"peers are not told: {self.guard.no_board}")
            if self.cause == "peer":
                self._take(stop, "notice", self.notice)
            self._take(stop, "begin", None)
            while stop.state != "done":
                self._look(stop)
                try:
                    event, value = self.guard.events.get(True, max(0.0, min(_POLL, stop.wake - self.now)))
                except _queue.Empty:
                    event, value = "tick", None
                if event == "parked" and value != self.guard.gate.thread:
                    continue  # the main thread; it is the training thread that counts
                self._take(stop, event, value)
        except BaseException as error:  # ours: it may cost the teardown, not the exit code
            self.say(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._finish()

    @property
    def now(self) -> float:
        """Seconds since the signal."""
        return time.monotonic() - self.started

    def _take(self, stop: protocol.Stop, event: str, value: Any) -> None:
        for action in stop.on(event, value, self.now):
            if action.do not in ("callbacks", "stacks"):
                self._commit(stop)
            getattr(self, f"_do_{action.do}")(action.value)
        for phase in stop.phases[self._told :]:
            if phase.end is None:
                break
            self._told += 1
            detail = f": {phase.detail}" if phase.detail else ""
            self.say(f"{phase.name} {phase.outcome} ({phase.end - phase.start:.2f}s){detail}")

    def _look(self, stop: protocol.Stop) -> None:
        """Notice what sends no event."""
        gate = self.guard.gate
        if self.committed and "ended" not in stop.heard and not threads.alive(gate.thread):
            self._take(stop, "ended", None)
        if gate.saving != self._saving:
            self._saving = gate.saving
            self._take(stop, "saving", self._saving)

    def _commit(self, stop: protocol.Stop) -> None:
        if stop.state == "yield" or self._stopping:
            return
        self.committed = self._stopping = True
        # A collection would run finalizers of the program on our threads, and those take locks.
        gc.disable()
        self.guard.entry_update(state="stopping")

    def _limits(self) -> terms.Limits:
        s = self.guard.settings
        return terms.Limits(
            hard=s.hard - _LAST_WORDS - 0.1,
            yield_=s.yield_seconds if self._yields else 0.0,
            step=s.step_timeout,
            drain=s.drain_timeout,
            destroy=s.destroy_timeout,
            abort=s.abort_timeout,
            exit=s.exit_timeout,
        )

    def _facts(self) -> terms.Facts:
        guard = self.guard
        board = guard.board
        if board is not None:
            self._poster = Poster(board, lambda problem: guard.events.put(("lost", problem)))
        return terms.Facts(
            cause=self.cause,
            world=guard.world_size or 1,
            joined=guard.joined,
            board=board is not None,
            accelerator=bool(backends.accelerators()),
            can_abort=guard.joined and backends.can_abort(),
            hosts_store=board is not None and board.is_host,
            step=guard.settings.stop_at == "step",
        )

    def opening(self) -> str:
        """Why this is happening, in words."""
        if self.cause == "peer":
            return f"a peer is being evicted: rank {self.origin.get('rank')} on {self.origin.get('host')}"
        name = signal.Signals(self.signum).name if self.signum else "?"
        if self._yields:
            return f"{name}: the application's own handler has {self.guard.settings.yield_seconds:g}s"
        return f"{name}: tearing down, hard deadline at {self.guard.settings.hard:g}s"

    # -- what the protocol asks for -----------------------------------------------------------------------------

    def _do_tell(self, left: float) -> None:
        self._post("tell", {**self.origin, "left": left})

    def _do_answer(self, value: tuple[Optional[int], bool]) -> None:
        self._post("answer", *value)

    def _do_plan_now(self, _: Any) -> None:
        self._post("plan_now")

    def _do_arrived(self, _: Any) -> None:
        self._post("arrived")

    def _do_halt(self, _: Any) -> None:
        self._post("halt")

    def _do_quiet(self, clean: bool) -> None:
        self._post("quiet", clean)

    def _do_left(self, _: Any) -> None:
        self._post("left")

    def _post(self, method: str, *args: Any) -> None:
        if self._poster is not None:
            self._poster.post(method, *args)

    def _do_hold(self, _: Any) -> None:
        gate = self.guard.gate
        gate.holding = True  # first the flag, then the count: see Gate
        self.guard.events.put(("steps", gate.steps(self.guard.settings.step_timeout)))

    def _do_stop_at(self, step: int) -> None:
        self.guard.gate.let_run_to(step)

    def _do_park(self, _: Any) -> None:
        gate = self.guard.gate
        gate.close()
        self.guard.tap.on_main(self.guard.stop_main)
        for thread in gate.to_park():
            if thread != threading.main_thread().ident:
                training.park_thread(thread)
                gate.wake_loop()

    def _do_drain(self, _: Any) -> None:
        self.guard.entry_update(state="parked")
        self._work("drained", backends.drain)

    def _do_callbacks(self, budget: float) -> None:
        self._work("called", lambda: self.guard.run_callbacks(self.say))

    def _do_destroy(self, _: Any) -> None:
        self._work("destroyed", lambda: backends.destroy(self.guard.real_destroy))

    def _do_abort(self, _: Any) -> None:
        backends.abort(lambda problem: self.guard.events.put(("aborted", problem)))

    def _do_stacks(self, phase: str) -> None:
        self._work(None, lambda: self._take_stacks(f"{phase} timed out"))

    def _do_leave(self, soft: bool) -> None:
        if self._poster is not None:
            self._poster.flush(_FLUSH)
        if not soft:
            return
        # From here on the program's own code decides how the process ends: it may call os._exit, or free what cannot
        # be freed. So the report is written before, and the fuse made shorter.
        lastwords.write(self, _LAST_WORDS, final=False)
        self._light_fuse(self.now + self.guard.settings.exit_timeout + _LONG_LAST_WORDS + _LAST_WORDS)
        if ray_rank.waits_for_method(self.guard.gate.loop, self.guard.gate.parked):
            self._finish()
        self.leaving = True
        gate = self.guard.gate
        gate.open_exit(self.exit_code)
        if threading.main_thread().ident not in gate.parked:
            self.guard.tap.on_main(self.guard.stop_main)

    def _do_die(self, _: Any) -> None:
        pass  # the driver ends, and with it the process

    def _work(self, event: Optional[str], function: Callable[[], Any]) -> None:
        """Run something that may never return."""

        def run() -> None:
            try:
                problem = function()
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            if event is not None:
                self.guard.events.put((event, problem))

        _thread.start_new_thread(run, ())

    # -- the end ------------------------------------------------------------------------------------------------

    @property
    def exit_code(self) -> int:
        """The contract's, whichever way the process ends."""
        return self.guard.settings.exit_code_for(self.signum)

    def also_signalled(self, signum: int) -> None:
        """A peer's notice was faster than this rank's own signal: it still is a rank that got the signal."""
        stop = self.stop
        over = stop is not None and stop.state in ("destroy", "exit", "leaving", "done")
        if self.signum is None and not over and self.now < _TOGETHER:
            self.signum = signum
            self._light_fuse(self.guard.settings.hard)

    def _light_fuse(self, at: float) -> None:
        self._fuse.light(min(at, self.guard.settings.hard) - 0.02 - self.now, self.exit_code)

    def ended(self) -> None:
        """On the main thread, last of all atexit callbacks: the program is over, on our request or by itself."""
        if not self.leaving:
            # A daemon thread that trains can still get to its step; if it has ended, too, `_look` notices.
            if self.guard.gate.thread in (None, _thread.get_ident()):
                self.guard.events.put(("ended", None))
            self.guard.gate.wait_for_exit()
        exits.run_earlier()
        self._finish()

    def _finish(self, patience: Optional[float] = None) -> None:
        """End the process. Whoever comes first does it; the others wait for the end, but for the deadline."""
        if not self._finishing.acquire(False) and patience is None:
            time.sleep(3600)
        try:
            if patience is None:
                left = self.guard.settings.hard - _LAST_WORDS - self.now
                patience = max(_LAST_WORDS, min(_LONG_LAST_WORDS, left))
            lastwords.write(self, patience, final=True)
            self.say(lastwords.summary(self))
        finally:
            end(lambda: self.exit_code)

    def _take_stacks(self, when: str) -> None:
        for entry in report.stacks():
            if not entry["frames"][-1].startswith(threads.PACKAGE):
                self.stuck.append({"when": when, **entry})

    @guarded
    def say(self, text: str, stacks: str = "") -> None:
        """One line on stderr; `stacks` also takes those of the threads, and says when that was."""
        self.guard.log.line(text, self.now)
        if stacks:
            self._work(None, lambda: self._take_stacks(stacks))


def end(code: Callable[[], int]) -> NoReturn:
    """End the process now, whatever comes of asking for the code."""
    try:
        os._exit(code())
    finally:
        os._exit(1)
