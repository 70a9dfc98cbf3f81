"""Decides what torchrun does in an eviction: how long it waits, which signals its workers get, what it returns.

1. `PContext.close` ends the workers: signal, wait, SIGKILL. It waits as long as `AUTOTEARDOWN_GRACE` says where that is
   longer than torch's own 30 s. A `--shutdown-timeout` on the command line (torch 2.13) is obeyed.
2. `PContext.start` installs `_terminate_process_handler`, which raises SignalException out of whatever torchrun does;
   that ends in `close`, with the same signal. The signals of `AUTOTEARDOWN_SIGNALS` get this handler, too.
3. torchrun's handler raises at every signal. A second one out of `close` begins the wait again, a third one ends
   torchrun and leaves the workers behind. So while the workers are being stopped, a signal that comes within two
   seconds is the same eviction (SLURM sends TERM, CONT, TERM), and a later one is passed on without an exception.
4. A signal that comes while the workers are being started waits until torchrun knows them, or they would stay behind.
5. A restart that follows an eviction raises `max_restarts` by one. The number of restarts that are left then stays the
   same, and the number of the attempt still grows: rendezvous keys and log folders carry it.
6. The agent does not know which process has signalled a worker: it may be the program itself, in each attempt. So at
   most five restarts an hour are free. A job that evicts itself for ever runs out of restarts, as without the agent.
"""

from __future__ import annotations

import math
import os
import signal
from types import ModuleType
from typing import Any, Callable, Optional

from autoteardown.fail_open import fail_open
from autoteardown.launchers.evidence import Evidence
from autoteardown.launchers.outcome import Outcome, leave_with
from autoteardown.settings import SAME_EVICTION
from autoteardown.unpatched import monotonic, on_main_thread

TORCHS_OWN = 30
"""Seconds between the signal and SIGKILL, in every version of torch."""

FREE_RESTARTS, HOUR = 5, 3600.0
"""How many restarts after evictions use up none of `--max-restarts`, in so many seconds."""


class RealTimeSignal(int):
    """A real-time signal with the attribute `name`, which torchrun reads; `signal.Signals` has no name for it."""

    @property
    def name(self) -> str:
        """The name in torchrun's log lines."""
        return str(int(self))


class Launcher:
    """The state of torchrun in this process: its workers, and the signals that it got."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.outcome = Outcome("torchrun")
        self.evidence = Evidence(self.outcome.settings.runtime_dir)
        self.explicit_timeout = False
        self.starting = False
        self.pending: Optional[int] = None  # came while the workers were being started
        self.signalled: Optional[float] = None  # when the first signal came
        self.context: Any = None  # the PContext that is being closed because of it
        self.evicted = False  # whether all workers that have failed last were evicted
        self._free_restarts: list[float] = []  # when they were

    # -- signals ------------------------------------------------------------------------------------------------------

    def handle(self, signum: int, raise_: Callable[[], object]) -> None:
        """Handle an eviction signal on the main thread. `raise_` raises torch's SignalException."""
        if self.starting:
            self.pending = self.pending or signum
            return
        now = monotonic()
        if self.signalled is not None and now - self.signalled < SAME_EVICTION:
            return
        if self.context is not None:
            self._pass_on(signum)
            return
        self.signalled = now
        raise_()

    def _pass_on(self, signum: int) -> None:
        for worker in _workers(self.context).values():
            if _code(worker) is None:
                try:
                    # As torch does: workers that are programs have a process group each.
                    (os.killpg if hasattr(worker, "args") else os.kill)(worker.pid, signum)
                except OSError:
                    pass

    @fail_open
    def before_start(self, module: ModuleType) -> None:
        """Prepare for workers that are about to be started, maybe again."""
        self.signalled = self.pending = self.context = None
        self.evidence.gather()
        if on_main_thread():
            for signum in self.outcome.settings.signals:
                if signal.getsignal(signum) is signal.SIG_DFL:
                    signal.signal(signum, module._terminate_process_handler)

    @fail_open
    def after_start(self, context: Any) -> None:
        """Remember the workers that have been started."""
        self.evidence.expect(context.pids().values())

    # -- the end of the workers ---------------------------------------------------------------------------------------

    @fail_open
    def patience(self, asked: float) -> Optional[int]:
        """Seconds that `close` should wait; None: what its caller asked for."""
        if asked != TORCHS_OWN or self.explicit_timeout:
            return None
        return max(TORCHS_OWN, math.ceil(self.outcome.settings.grace))

    @fail_open
    def closing(self, context: Any) -> None:
        """Note that `close` begins; if a signal caused it, the next signal is passed on to the workers."""
        if self.signalled is not None:
            self.context = context

    @fail_open
    def closed(self, context: Any, error: Any) -> None:
        """Set the exit code and print the line when `close` has ended, if `error` is torchrun's SignalException."""
        if self.signalled is None or not hasattr(error, "sigval"):
            return
        codes = {rank: _code(worker) for rank, worker in _workers(context).items()}
        code, text = self.outcome.of_signal(int(error.sigval), codes)
        self.outcome.say(text)
        self.evidence.close()
        leave_with(code, error, self.outcome.settings.signals)

    @fail_open
    def ended(self, failures: Any) -> None:
        """Note whether the workers that have ended were evicted.

        Either all ended by themselves, or some failed and torchrun stopped the others.
        """
        self.evicted = self._were_evicted(failures)
        self.evidence.close()

    def _were_evicted(self, failures: Any) -> bool:
        """Whether an eviction explains all these failures."""
        codes = [(failure.pid, failure.exitcode) for failure in failures.values()]
        evicted = [code for pid, code in codes if self.evidence.evicted(pid, code)]
        # A process that is no rank, or not yet: it died of the signal with which torchrun stopped it.
        died = [code for _, code in codes if code == -signal.SIGTERM]
        return bool(evicted) and len(evicted) + len(died) == len(codes)

    @fail_open
    def gives_up(self, error: Any) -> None:
        """Set the exit code before this ChildFailedError is raised: workers have failed, and no restart is left."""
        if self.evicted:
            code, text = self.outcome.of_workers([each.exitcode for each in error.failures.values()])
            self.outcome.say(text)
            leave_with(code, error, self.outcome.settings.signals)

    @fail_open
    def before_restart(self, agent: Any, group: Any) -> None:
        """Give the restart back if the workers were evicted: torchrun has counted it already."""
        evicted, self.evicted = self.evicted, False
        if not evicted or group.state.name != "FAILED":
            return
        cost = f"; one was used up, after {FREE_RESTARTS} evictions within an hour"
        if self._is_free(monotonic()):
            group.spec.max_restarts += 1
            agent._remaining_restarts += 1
            cost = ""
        left = agent._remaining_restarts
        self.outcome.say(f"its workers were evicted: they are started again, {left} restarts are left{cost}")

    def _is_free(self, now: float) -> bool:
        self._free_restarts = [time for time in self._free_restarts if now - time < HOUR]
        if len(self._free_restarts) >= FREE_RESTARTS:
            return False
        self._free_restarts.append(now)
        return True


def _workers(context: Any) -> dict[int, Any]:
    """The processes of a PContext by local rank: `Popen` objects, or those of multiprocessing."""
    handlers = getattr(context, "subprocess_handlers", None)
    if handlers is not None:
        return {rank: handler.proc for rank, handler in handlers.items()}
    return dict(enumerate(getattr(getattr(context, "_pc", None), "processes", ())))


def _code(worker: Any) -> Optional[int]:
    code: Optional[int] = worker.poll() if hasattr(worker, "poll") else worker.exitcode
    return code
