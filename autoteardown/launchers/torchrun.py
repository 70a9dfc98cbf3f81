"""torchrun keeps the ranks' promise: it waits for them, passes eviction signals on, and returns the right exit code.

torchrun is a Python process that imports torch, so the agent runs in it. Without this module it kills its workers 30 s
after the signal, dies of a signal that it does not know (SIGUSR1) and leaves them behind, prints a traceback, and
returns 1 (pytorch/pytorch#68258, #119856). The names below are the same in torch 2.4 to 2.14.

1. `PContext.close` ends the workers: signal, wait, SIGKILL. It waits as long as `AUTOTEARDOWN_GRACE` says where that is
   longer than torch's own 30 s. A `--shutdown-timeout` (torch 2.13) that somebody has set is obeyed.
2. `PContext.start` installs `_terminate_process_handler`, which raises SignalException out of whatever torchrun does;
   that ends in `close`, with the same signal. The signals of `AUTOTEARDOWN_SIGNALS` get this handler, too.
3. torchrun's handler raises at every signal. A second one out of `close` begins the wait again, a third one ends
   torchrun and leaves the workers behind. So while the workers are being stopped, one that comes within two seconds is
   the same eviction (SLURM sends TERM, CONT, TERM), and a later one is passed on without an exception.
4. A signal that comes while the workers are being started waits until torchrun knows them, or they would stay behind.
5. A restart that follows an eviction raises `max_restarts` by one. The number of restarts that are left then stays the
   same, and that of the attempt still grows: rendezvous keys and log folders carry it.
6. Every step of this module fails open: torchrun then does what it does without the agent.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
from types import ModuleType
from typing import Any, Callable, Optional

from autoteardown.fail_open import guarded
from autoteardown.launchers.evidence import Evidence
from autoteardown.launchers.outcome import Outcome, leave_with
from autoteardown.unpatched import monotonic, on_main_thread

_TORCHS_OWN = 30  # seconds between the signal and SIGKILL, in every version
_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_SAME_EVICTION = 2.0  # seconds
_ELASTIC = "torch.distributed.elastic"


class _RealTimeSignal(int):
    """A signal that `signal.Signals` has no name for, as far as torchrun needs one."""

    @property
    def name(self) -> str:
        return str(int(self))


class Launcher:
    """The torchrun that this process is."""

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

    # -- signals ------------------------------------------------------------------------------------------------------

    def handle(self, signum: int, raise_: Callable[[], object]) -> None:
        """On the main thread: an eviction signal. `raise_` raises torch's SignalException."""
        if self.starting:
            self.pending = self.pending or signum
            return
        now = monotonic()
        if self.signalled is not None and now - self.signalled < _SAME_EVICTION:
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

    @guarded
    def before_start(self, module: ModuleType) -> None:
        """The workers are about to be started, maybe again."""
        self.signalled = self.pending = self.context = None
        self.evidence.gather()
        if on_main_thread():
            for signum in self.outcome.settings.signals:
                if signal.getsignal(signum) is signal.SIG_DFL:
                    signal.signal(signum, module._terminate_process_handler)

    @guarded
    def after_start(self, context: Any) -> None:
        """They run."""
        self.evidence.expect(context.pids().values())

    # -- the end of the workers ---------------------------------------------------------------------------------------

    @guarded
    def patience(self, asked: float) -> Optional[int]:
        """How long `close` is to wait, in seconds; None: as long as it was asked to."""
        if asked != _TORCHS_OWN or self.explicit_timeout:
            return None
        return max(_TORCHS_OWN, math.ceil(self.outcome.settings.grace))

    @guarded
    def closing(self, context: Any) -> None:
        """`close` begins; after an eviction signal, the next one is passed on."""
        if self.signalled is not None:
            self.context = context

    @guarded
    def closed(self, context: Any, error: Any) -> None:
        """`close` is over, while torchrun deals with this exception: its signal, if that was the reason."""
        if self.signalled is None or not hasattr(error, "sigval"):
            return
        codes = {rank: _code(worker) for rank, worker in _workers(context).items()}
        code, text = self.outcome.of_signal(int(error.sigval), codes)
        self.outcome.say(text)
        self.evidence.close()
        leave_with(code, error)

    @guarded
    def ended(self, failures: Any) -> None:
        """All workers have ended by themselves; or some have failed, and the others have been stopped for it."""
        self.evicted = self._were_evicted(failures)
        self.evidence.close()

    def _were_evicted(self, failures: Any) -> bool:
        """Whether nothing but an eviction is behind these failures."""
        codes = [(failure.pid, failure.exitcode) for failure in failures.values()]
        evicted = [code for pid, code in codes if self.evidence.evicted(pid, code)]
        # A process that is no rank, or not yet: it died of the signal with which torchrun stopped it.
        died = [code for _, code in codes if code == -signal.SIGTERM]
        return bool(evicted) and len(evicted) + len(died) == len(codes)

    @guarded
    def gives_up(self, error: Any) -> None:
        """This ChildFailedError is about to be raised: workers have failed, and no restart is left."""
        if self.evicted:
            code, text = self.outcome.of_workers([each.exitcode for each in error.failures.values()])
            self.outcome.say(text)
            leave_with(code, error)

    @guarded
    def before_restart(self, agent: Any, group: Any) -> None:
        """The workers are about to be stopped and started again; the restart has been paid for already."""
        evicted, self.evicted = self.evicted, False
        if evicted and group.state.name == "FAILED":
            group.spec.max_restarts += 1
            agent._remaining_restarts += 1
            left = agent._remaining_restarts
            self.outcome.say(f"its workers were evicted: they are started again, {left} restarts are left")


def _workers(context: Any) -> dict[int, Any]:
    """The processes of a PContext by local rank: `Popen` objects, or those of multiprocessing."""
    handlers = getattr(context, "subprocess_handlers", None)
    if handlers is not None:
        return {rank: handler.proc for rank, handler in handlers.items()}
    return dict(enumerate(getattr(getattr(context, "_pc", None), "processes", ())))


def _code(worker: Any) -> Optional[int]:
    code: Optional[int] = worker.poll() if hasattr(worker, "poll") else worker.exitcode
    return code


_launcher: Optional[Launcher] = None


@guarded
def _of_process() -> Launcher:
    global _launcher
    if _launcher is None or _launcher.pid != os.getpid():
        _launcher = Launcher()
    return _launcher


# -- the hooks --------------------------------------------------------------------------------------------------------


def register() -> None:
    """Hook torch's elastic agent as its modules are imported."""
    import wrapt

    for name, patch in (
        (f"{_ELASTIC}.multiprocessing.api", _patch_processes),
        (f"{_ELASTIC}.multiprocessing.errors", _patch_errors),
        (f"{_ELASTIC}.agent.server.api", _patch_agent),
        ("torch.distributed.launcher.api", _patch_launch),
    ):
        wrapt.register_post_import_hook(guarded(patch), name)


def _wrap(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    real = getattr(owner, name, None)
    if real is not None and not hasattr(real, "_autoteardown_wrapped"):
        wrapper = functools.wraps(real)(wrap(real))
        wrapper._autoteardown_wrapped = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)


def _patch_processes(module: ModuleType) -> None:
    _wrap(module, "_terminate_process_handler", functools.partial(_wrap_handler, module))
    _wrap(module.PContext, "start", functools.partial(_wrap_start, module))
    _wrap(module.PContext, "wait", _wrap_wait)
    _wrap(module.PContext, "close", _wrap_close)


def _patch_errors(module: ModuleType) -> None:
    _wrap(module.ChildFailedError, "__init__", _wrap_child_failed)


def _patch_agent(module: ModuleType) -> None:
    _wrap(module.SimpleElasticAgent, "_restart_workers", _wrap_restart)


def _patch_launch(module: ModuleType) -> None:
    _wrap(module.LaunchConfig, "__post_init__", _wrap_config)


def _wrap_handler(module: ModuleType, real: Callable[..., Any]) -> Callable[..., Any]:
    def _terminate_process_handler(signum: int, frame: Any) -> Any:
        launcher = _launcher
        if launcher is None or launcher.pid != os.getpid() or signum not in launcher.outcome.settings.signals:
            return real(signum, frame)

        def raise_() -> None:
            if signum in tuple(signal.Signals):
                real(signum, frame)
            text = f"Process {os.getpid()} got signal: {signum}"
            raise module.SignalException(text, sigval=_RealTimeSignal(signum))

        return launcher.handle(signum, raise_)

    return _terminate_process_handler


def _wrap_start(module: ModuleType, real: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        launcher = _of_process()
        if launcher is None:
            return real(self, *args, **kwargs)
        launcher.before_start(module)
        launcher.starting = on_main_thread()
        try:
            result = real(self, *args, **kwargs)
        finally:
            launcher.starting = False
        launcher.after_start(self)
        return result

    return start


def _wrap_wait(real: Callable[..., Any]) -> Callable[..., Any]:
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        launcher = _of_process()
        pending = launcher.pending if launcher is not None else None
        if launcher is not None and pending is not None:
            launcher.pending = None
            handler = sys.modules[f"{_ELASTIC}.multiprocessing.api"]._terminate_process_handler
            handler(pending, None)
        result = real(self, *args, **kwargs)
        if launcher is not None and result is not None:
            launcher.ended(result.failures)
        return result

    return wait


def _wrap_close(real: Callable[..., Any]) -> Callable[..., Any]:
    def close(self: Any, *args: Any, **kwargs: Any) -> Any:
        launcher = _of_process()
        if launcher is not None:
            launcher.closing(self)
            asked = args[1] if len(args) > 1 else kwargs.get("timeout", _TORCHS_OWN)
            patience = launcher.patience(asked)
            if patience is not None:
                args, kwargs = args[:1], {**kwargs, "timeout": patience}
        result = real(self, *args, **kwargs)
        if launcher is not None:
            launcher.closed(self, sys.exc_info()[1])
        return result

    return close


def _wrap_child_failed(real: Callable[..., Any]) -> Callable[..., Any]:
    # Not around what raises it: a frame of this module would be in every traceback of torchrun's.
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if _launcher is not None:
            _launcher.gives_up(self)

    return __init__


def _wrap_restart(real: Callable[..., Any]) -> Callable[..., Any]:
    def _restart_workers(self: Any, worker_group: Any) -> Any:
        if _launcher is not None:
            _launcher.before_restart(self, worker_group)
        return real(self, worker_group)

    return _restart_workers


def _wrap_config(real: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: Any) -> Any:
        asked = getattr(self, "shutdown_timeout", None) is not None or _TIMEOUT_VARIABLE in os.environ
        result = real(self)
        launcher = _of_process()
        if launcher is not None:
            launcher.explicit_timeout = asked and hasattr(self, "shutdown_timeout")
        return result

    return __post_init__
