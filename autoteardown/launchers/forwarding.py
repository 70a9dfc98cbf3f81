"""Has launchers that start one process and wait for it pass eviction signals on, and return the right exit code.

1. `accelerate launch` with one process and `deepspeed` on one node have no handler for SIGTERM. Without this module
   they die of it and leave the rank behind; as PID 1 of a container they do not even notice.
2. The handlers are there while the launcher's own function runs. It waits in `subprocess.Popen.wait`, which goes on
   after a handler has returned.
3. The launcher's module gets a stand-in for `subprocess`, whose `Popen` records the process.
4. `deepspeed.launcher.launch` stops its ranks one after the other, and waits 30 s for each. With the
   agent it waits as long as `AUTOTEARDOWN_GRACE` says if that is longer. It handles SIGTERM only, so it gets SIGTERM.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from types import ModuleType
from typing import Any, Callable, Optional

from autoteardown import program
from autoteardown.fail_open import fail_open
from autoteardown.launchers.outcome import Outcome, leave_with
from autoteardown.unpatched import on_main_thread

_DEEPSPEEDS_OWN = 30  # seconds between the signal and SIGKILL
_DEEPSPEEDS_CODE = 1  # what `deepspeed.launcher.launch` returns after a signal, whatever its ranks return


class _Subprocess:
    """The module `subprocess`, and a list of the processes that were started through it."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.started: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Popen(self, *args: Any, **kwargs: Any) -> Any:
        """Start a process as `subprocess.Popen` does, and record it."""
        process = self._real.Popen(*args, **kwargs)
        self.started.append(process)
        return process


class _Forwarding:
    """Passes signals on while a launcher waits for its process.

    Args:
        name: the launcher's name in its lines.
        module: the launcher's module.
        only: the one signal that the process understands; None: it gets each as itself.
        returns: what the process returns after a signal, beside what ranks do.
    """

    def __init__(self, name: str, module: Any, only: Optional[int], returns: Optional[int]) -> None:
        self.outcome = Outcome(name)
        self.signalled: Optional[int] = None
        self._module, self._only, self._returns = module, only, returns
        self._subprocess = _Subprocess(module.subprocess)
        self._handlers: dict[int, Any] = {}

    @fail_open
    def begin(self) -> None:
        """Install handlers where there are none."""
        if not on_main_thread():
            return
        self._module.subprocess = self._subprocess
        for signum in self.outcome.settings.signals:
            if signal.getsignal(signum) is signal.SIG_DFL:
                self._handlers[signum] = signal.signal(signum, self._handle)

    def _handle(self, signum: int, _: Any) -> None:
        self.signalled = self.signalled or signum
        for process in self._subprocess.started:
            if process.returncode is None:
                try:
                    os.kill(process.pid, self._only or signum)
                except OSError:
                    pass

    @fail_open
    def end(self, error: Optional[BaseException] = None) -> Optional[int]:
        """Undo the hooks. `error` ended the launcher. Returns the exit code, None if no signal came."""
        self._module.subprocess = self._subprocess._real
        for signum, handler in self._handlers.items():
            # The launcher is about to exit: one more signal would only change its exit code.
            signal.signal(signum, handler if self.signalled is None else signal.SIG_IGN)
        if self.signalled is None:
            return None
        own = 0 if error is None else 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            own = error.code
        codes = {rank: process.poll() for rank, process in enumerate(self._subprocess.started)}
        code, text = self.outcome.of_signal(self.signalled, codes, own, self._returns)
        self.outcome.say(text)
        return code


def register() -> None:
    """Hook the launchers as they are imported."""
    import wrapt

    wrapt.register_post_import_hook(fail_open(_patch_accelerate), "accelerate.commands.launch")
    wrapt.register_post_import_hook(fail_open(_patch_deepspeed), "deepspeed.launcher.runner")
    run = program.parse(program.command_line())
    if run == ("-m", "deepspeed.launcher.launch"):
        wrapt.register_post_import_hook(fail_open(_patch_psutil), "psutil")
    if run == (
        "-m",
        "accelerate.commands.launch",
    ):  # is imported as `__main__`, and parses its arguments first
        wrapt.register_post_import_hook(fail_open(_patch_parser), "accelerate.commands.utils")


def _patch_accelerate(module: ModuleType) -> None:
    _wrap(module, "simple_launcher", "accelerate launch", None, None)


def _patch_parser(module: Any) -> None:
    parser = module.CustomArgumentParser
    real = parser.parse_args

    @functools.wraps(real)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        parser.parse_args = real
        fail_open(_patch_accelerate)(sys.modules["__main__"])
        return real(*args, **kwargs)

    parser.parse_args = parse_args


def _patch_deepspeed(module: ModuleType) -> None:
    _wrap(module, "main", "deepspeed", signal.SIGTERM, _DEEPSPEEDS_CODE)


def _wrap(module: Any, function: str, name: str, only: Optional[int], returns: Optional[int]) -> None:
    real: Callable[..., Any] = getattr(module, function)

    @functools.wraps(real)
    def launch(*args: Any, **kwargs: Any) -> Any:
        forwarding = _begin(name, module, only, returns)
        if forwarding is None:
            return real(*args, **kwargs)
        try:
            result = real(*args, **kwargs)
        except BaseException as error:
            code = forwarding.end(error)
            if code is None:
                raise
            if isinstance(error, SystemExit):
                raise SystemExit(code) from None
            leave_with(code, error, forwarding.outcome.settings.signals)
            raise
        code = forwarding.end()
        if code:
            raise SystemExit(code)
        return result

    setattr(module, function, launch)


@fail_open
def _begin(name: str, module: Any, only: Optional[int], returns: Optional[int]) -> _Forwarding:
    forwarding = _Forwarding(name, module, only, returns)
    forwarding.begin()
    return forwarding


def _patch_psutil(module: Any) -> None:
    real, grace = module.wait_procs, Outcome("deepspeed").settings.grace

    @functools.wraps(real)
    def wait_procs(procs: Any, timeout: Optional[float] = None, callback: Any = None) -> Any:
        if timeout == _DEEPSPEEDS_OWN:
            timeout = max(timeout, grace)
        return real(procs, timeout, callback)

    module.wait_procs = wait_procs
