"""Decides the exit code of a launcher after an eviction, and has it print one line instead of a traceback.

1. A launcher that was signalled returns `AUTOTEARDOWN_EXIT_CODE`, and one whose workers were stopped with their peers
   `AUTOTEARDOWN_PEER_EXIT_CODE`, where these are set. A setting that is not set changes nothing: torchrun returns 1.
2. An eviction never hides a failed worker: the launcher returns 1 then, where it would return 0.
3. The launcher's own exception is raised all the same, for programs that use torch's launcher as a library and catch
   it. Only if nothing catches it, `sys.excepthook` ends the process with the code and without the traceback.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading

from autoteardown import settings, stderr
from autoteardown.stop.outcome import signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

_OWN = 1  # what launchers return for every failure of a worker


class Outcome:
    """The exit codes and log lines of one launcher, by its settings. `name` is the launcher's name in its lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings, _ = settings.load(os.environ)

    def of_signal(
        self, signum: int, workers: Mapping[int, int | None], own: int = _OWN, returns: int | None = None
    ) -> tuple[int, str]:
        """The exit code of a launcher that was signalled, and its line.

        Args:
            signum: the signal.
            workers: exit codes by local rank, as `subprocess` has them; None: it runs.
            own: what the launcher returns without the agent.
            returns: what a worker returns after a signal, beside what ranks return.
        """
        found = self.settings
        code = found.exit_code_for(signum) if found.exit_code_is_set(signum) else own
        usual = {0, returns, found.exit_code_for(signum), found.peer_exit_code, 128 + signum, -signum}
        others = [f"{rank} {_ended(each)}" for rank, each in sorted(workers.items()) if each not in usual]
        if others and code == 0:
            code = _OWN
        left = len(workers) - len(others)
        text = f"{signal_name(signum)}: {left} of {len(workers)} workers have left"
        if others:
            text += f", local rank {', local rank '.join(others)}"
        return code, f"{text}; exit {code}"

    def of_workers(self, codes: list[int]) -> tuple[int, str]:
        """The exit code of a launcher whose workers were evicted while it was not, and its line.

        Args:
            codes: what those of them returned that did not return 0.
        """
        found, code = self.settings, _OWN
        evicted = found.exit_code_for(found.signals[0])
        if evicted in codes and found.exit_code_is_set(found.signals[0]):
            code = evicted
        elif found.peer_exit_code in codes and found.exit_code_is_set(None):
            code = found.peer_exit_code
        return code, f"its workers were evicted ({', '.join(map(_ended, codes))}); exit {code}"

    def say(self, text: str) -> None:
        """Write one line to stderr; it is dropped if stderr blocks."""
        if self.settings.log_format == "json":
            from autoteardown.stop.report import Log

            log = Log(self.settings.log, socket.gethostname(), self.settings.job, "json")
            log.line(f"{self.name}: {text}", event="launcher")
        elif self.settings.log != "quiet":
            stderr.say(f"autoteardown: {self.name}: {text}")


def _ended(code: int | None) -> str:
    if code is None:
        return "still runs"
    return f"exited with {code}" if code >= 0 else f"was ended by {signal_name(-code)}"


def leave_with(code: int, error: BaseException, signals: Iterable[int] = ()) -> None:
    """If nothing catches `error`, the process ends with this code and prints no traceback.

    Args:
        code: the exit code.
        error: what is about to be raised.
        signals: are ignored from then on.
    """
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], value: BaseException, traceback: TracebackType | None
    ) -> object:
        if value is error:
            _exit(code, signals)
        return previous(kind, value, traceback)

    sys.excepthook = excepthook


def _exit(code: int, signals: Iterable[int]) -> None:
    # Not by a SystemExit. An interpreter that shuts down puts the default action of every signal back, and dies of one
    # that comes then. torchrun's also aborts now and then ("terminate called without an active exception"), as the
    # rendezvous is still open. Each of them would be another exit code.
    try:
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, as always
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)
