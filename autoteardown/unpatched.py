"""The interpreter's own threads, locks, sockets, polling and clocks, unaffected by gevent's or eventlet's patches.

1. A program may replace these (`gevent.monkey.patch_all()`, eventlet). Then a thread of the agent would be a greenlet,
   which runs only when the program waits, and a wait of the agent would wait for the program.
2. So this module takes them once, before a program can replace them, and the rest of the agent uses only these.
"""

import _thread
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as socket
    from _socket import socketpair as socketpair
    from collections.abc import Callable
    from select import epoll as epoll
    from select import poll as poll
    from types import ModuleType


def _original(module: "ModuleType") -> "ModuleType":
    """The module, or a fresh copy if the program has patched it already (`autoteardown.arm()` after a patch)."""
    if "gevent.monkey" not in sys.modules and "eventlet.patcher" not in sys.modules:
        return module
    from importlib import util

    spec = module.__spec__
    if spec is None or spec.loader is None:
        return module
    copy = util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


_clock, _threads = _original(time), _original(_thread)

builtin_function = type(len)
start_new_thread = _threads.start_new_thread
allocate_lock: "Callable[[], _thread.LockType]" = _threads.allocate_lock
get_ident: "Callable[[], int]" = _threads.get_ident
monotonic: "Callable[[], float]" = _clock.monotonic
sleep: "Callable[[float], None]" = _clock.sleep


def __getattr__(name: str) -> object:
    # Imported when first used, by armed ranks: every process that imports `signal` imports this module.
    value: object
    if name in ("socket", "socketpair"):
        import _socket  # gevent and eventlet do not patch this module

        value = getattr(_socket, name)
    elif name in ("poll", "epoll"):
        import select

        value = getattr(_original(select), name, None)  # epoll exists on Linux only
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def on_main_thread() -> bool:
    """Whether the caller runs on the process's first thread (or the one that was forked), which handles signals."""
    return _thread.get_native_id() == os.getpid()


_main = get_ident() if on_main_thread() else 0


def main_ident() -> int:
    """The main thread's identifier. Under gevent, `threading.main_thread().ident` is that of a greenlet."""
    if not _main:
        import threading

        return threading.main_thread().ident or 0
    return _main


def _after_fork_in_child() -> None:
    global _main
    _main = get_ident()


os.register_at_fork(after_in_child=_after_fork_in_child)
