"""What Ray's own layers do to a process that is a rank, and what a teardown has to do about it."""

from __future__ import annotations

import gc
import signal
import sys
import threading

from autoteardown import primitives

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_METHODS_ARE_CALLED_IN = "/ray/_private/function_manager.py"


def _is_ray() -> bool:
    return "ray._raylet" in sys.modules


def call_abort_off() -> None:
    """In a driver, Ray's C++ handler for SIGTERM runs first and has the process aborted (exit code 134) 3 s later.

    By abseil's failure signal handler, through `alarm(3)` (ray-project/ray#64830): it hands on to Python's handler
    after that, so by the time that anybody hears of the signal, the alarm is set. An application that uses alarms has
    a Python handler for them.
    """
    if _is_ray() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.alarm(0)


def waits_for_method(inside: Callable[[str], list[int]], loop: Any, parked: Iterable[int] = ()) -> bool:
    """Whether a SystemExit would not end the process: Ray waits for the methods of an actor that still run.

    Those on the main thread and on parked threads leave by themselves.

    Args:
        inside: tells which threads are in a function of a file.
        loop: the event loop of the thread that called init, if it has one: then the actor is an async one.
        parked: identities of threads.
    """
    asyncio = sys.modules.get("asyncio")
    if not _is_ray():
        return False
    # Those of threaded actors and concurrency groups are on threads of a pool.
    if set(inside(_METHODS_ARE_CALLED_IN)).difference(parked, [primitives.main_ident()]):
        return True
    if loop is None or asyncio is None:
        return False
    try:
        return any(not task.done() for each in _loops(loop) for task in asyncio.all_tasks(each))
    except RuntimeError:  # tasks come and go on another thread
        return True


def _loops(loop: Any) -> list[Any]:
    """That loop; where every concurrency group has one, on a thread that Ray names so, all that run."""
    # Not threading.enumerate(): it takes a lock, which the main thread may hold.
    names = [thread.name for thread in list(threading._active.values())]  # type: ignore[attr-defined]
    if sum(name.startswith("AsyncIO Thread: ") for name in names) < 2:
        return [loop]
    # Neither Ray nor asyncio tells which loops there are. By type: isinstance() would wake proxies up.
    kind = sys.modules["asyncio"].AbstractEventLoop
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and each.is_running()]
