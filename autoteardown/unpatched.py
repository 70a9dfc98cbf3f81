"""Threads, locks, sockets, polling and clocks as the interpreter made them.

Programs replace them (`gevent.monkey.patch_all()`, eventlet): then a thread of ours would be a greenlet, which runs
only when the program waits, and a wait of ours would wait for the program. So they are taken here, once, before a
program can have them replaced, and the rest of the agent takes them from here alone.
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
    """The module, or where the program was faster (`autoteardown.arm()` after a patch) what it was: a fresh copy."""
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
    # Only for those that are armed: every process that imports `signal` imports this.
    value: object
    if name in ("socket", "socketpair"):
        import _socket  # nobody patches that one

        value = getattr(_socket, name)
    elif name in ("poll", "epoll"):
        import select

        value = getattr(_original(select), name, None)  # epoll: Linux
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def on_main_thread() -> bool:
    """Whether this is the thread that the process began with, or was forked on: the one that Python's signals need."""
    return _thread.get_native_id() == os.getpid()


_main = get_ident() if on_main_thread() else 0


def main_ident() -> int:
    """The main thread's identity. gevent has `threading.main_thread().ident` name a greenlet."""
    if not _main:
        import threading

        return threading.main_thread().ident or 0
    return _main


def _after_fork_in_child() -> None:
    global _main
    _main = get_ident()


os.register_at_fork(after_in_child=_after_fork_in_child)
