"""Notes which children a process of the rank terminates itself, and kills those that do not end of it.

1. A child that outlives the eviction signal cannot see who has sent a signal: Python-level handlers are not told. So
   `os.kill`, through which multiprocessing, torch and psutil terminate processes, notes it before the signal is sent.
2. A child that is stuck in C never runs its handler. Without the agent, the default action, or torch's handler in C,
   would end it; here SIGKILL does, a second later.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Optional

from autoteardown.children.eviction_page import ENDS_WITH_RANK, SIGNALS_ARE_ITS_OWN, EvictionPage
from autoteardown.fail_open import fail_open
from autoteardown.node import procfs
from autoteardown.signals.replacements import Builtin
from autoteardown.unpatched import monotonic, sleep, start_new_thread

_PATIENCE = 1.0  # seconds from the signal to SIGKILL
_TICK = 0.02

_real = os.kill
_page: Optional[EvictionPage] = None
_signals: frozenset[int] = frozenset()


def watch(page: EvictionPage, signals: frozenset[int]) -> None:
    """Note from now on which children of the page this process terminates."""
    global _page, _signals
    _page, _signals = page, signals
    if os.kill is _real:
        os.kill = sys.modules["posix"].kill = Builtin(_real, _kill)  # type: ignore[attr-defined, assignment]


def _kill(*args: Any, **kwargs: Any) -> None:
    started = _note(args)
    _real(*args, **kwargs)
    if started is not None:
        _kill_later(args[0], started)


@fail_open
def _note(args: Any) -> Optional[int]:
    """The start time of the child that is terminated; None for all else."""
    if _page is None or len(args) != 2 or type(args[0]) is not int or args[1] not in _signals:
        return None
    pid: int = args[0]
    if _page.state(pid) == SIGNALS_ARE_ITS_OWN or pid == os.getpid():
        return None
    started = procfs.start_time(pid)
    if started is not None:
        _page.set_terminated(pid, True)
    return started


@fail_open
def _kill_later(pid: int, started: int) -> None:
    try:
        start_new_thread(_wait_and_kill, (pid, started))
    except RuntimeError:  # no thread is available
        _wait_and_kill(pid, started)


@fail_open
def _wait_and_kill(pid: int, started: int) -> None:
    deadline = monotonic() + _PATIENCE
    while procfs.start_time(pid) == started:
        if _page is None or _page.state(pid) == SIGNALS_ARE_ITS_OWN:
            return
        if monotonic() > deadline:
            _real(pid, signal.SIGKILL)
            return
        sleep(_TICK)


def end_children(patience: float) -> None:
    """End the children that are to end with this rank, before it ends: they remove what they leave behind otherwise.

    In a stop, when the program needs them no more.

    Args:
        patience: how many seconds they have. The kernel kills them when the rank has ended.
    """
    page = _page
    if page is None:
        return
    left = []
    for pid in procfs.descendants(os.getpid()):
        if page.state(pid) == ENDS_WITH_RANK:
            started = procfs.start_time(pid)
            if started is not None:
                page.set_terminated(pid, True)
                _real(pid, signal.SIGTERM)
                left.append((pid, started))
    deadline = monotonic() + patience
    while any(procfs.start_time(pid) == started for pid, started in left) and monotonic() < deadline:
        sleep(_TICK)
