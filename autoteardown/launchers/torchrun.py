"""Hooks torch's elastic agent, so that torchrun gives its workers their grace period and returns the right exit code.

1. torchrun is a Python process that imports torch, so the agent runs in it. Without these hooks it kills its workers
   30 s after the signal, dies of a signal that it does not know (SIGUSR1) and leaves them behind, prints a traceback,
   and returns 1 (pytorch/pytorch#68258, #119856).
2. The names that are hooked are the same in torch 2.4 to 2.14: `PContext.start`, `wait` and `close`,
   `_terminate_process_handler`, `ChildFailedError`, `SimpleElasticAgent._restart_workers`, `LaunchConfig`.
3. The hooks only call `elastic_agent.py`, which decides. Every hook fails open: torchrun then does what it does without
   the agent.
4. A traceback that torchrun prints for a failed worker shows no frame of the agent.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from types import ModuleType
from typing import Any, Callable, Optional

from autoteardown.fail_open import fail_open
from autoteardown.launchers.elastic_agent import TORCHS_OWN, Launcher, RealTimeSignal
from autoteardown.unpatched import on_main_thread

_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_ELASTIC = "torch.distributed.elastic"

_launcher: Optional[Launcher] = None


@fail_open
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
        wrapt.register_post_import_hook(fail_open(patch), name)


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
            raise module.SignalException(text, sigval=RealTimeSignal(signum))

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
            asked = args[1] if len(args) > 1 else kwargs.get("timeout", TORCHS_OWN)
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
