"""What Ray's own layers do to a process that is a rank, and what a teardown has to do about it."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading

from autoteardown import unpatched
from autoteardown.thread_stacks import PACKAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")
_METHODS_ARE_CALLED_IN = "/ray/_private/function_manager.py"
_TRACED_TASKS_ARE_CALLED_IN = "/ray/util/tracing/tracing_helper.py"
# Ray Train's thread for the training function reports whatever comes out of it, a SystemExit too, as an error of the
# program's: then it would be no preemption, and the retry not free.
_TRAINING_IS_CALLED_IN = "/ray/train/v2/_internal/execution/worker_group/thread_runner.py"
_MAIN_LOOP = "/ray/_private/worker.py"
_WORKER = 1  # `ray.WORKER_MODE`


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


def exit_code_in_method(code: int) -> int:
    """With which code the SystemExit is raised that a worker's own method leaves with.

    0 out of a method is an intended exit to Ray, but only there: out of an idle actor, an async one or one that is
    stuck it cannot be had. So it is none anywhere, or what restarts actors would depend on luck. The process itself
    ends with `code`.
    """
    return 143 if code == 0 and _is_worker() else code


def _is_worker() -> bool:
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    return getattr(worker, "mode", None) == _WORKER


def _outside_method() -> bool:
    """Whether the main thread of a worker is in no task's code.

    A SystemExit that comes up in Ray's own part of a call is lost there, and fails a check in C++: SIGABRT. Of what
    comes up there Ray itself catches Exceptions only (ray-project/ray#57247).
    """
    if not _is_worker():
        return False
    frame: Any = sys._current_frames().get(unpatched.main_ident() or 0)
    above = None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "main_loop" and code.co_filename.endswith(_MAIN_LOOP):
            return above is None or not _is_task(above.f_code.co_filename)
        above, frame = frame, frame.f_back
    return False


def _is_task(file: str) -> bool:
    """Whether a function of that file, called by Ray's C++ layer, is a task or calls a method.

    That layer calls functions of Ray's own, too, and of the standard library: contextlib's for a context manager.
    """
    if file.endswith((_METHODS_ARE_CALLED_IN, _TRACED_TASKS_ARE_CALLED_IN)):
        return True
    its_own = os.path.join(os.path.dirname(sys.modules["ray"].__file__ or ""), "")
    installed = "-packages" in file  # below the standard library, and none of it
    return not file.startswith((PACKAGE, its_own, "<frozen ")) and (
        installed or not file.startswith(_STANDARD_LIBRARY)
    )


def waits_for_method(inside: Callable[[str], list[int]], loop: Any, parked: Iterable[int] = ()) -> bool:
    """Whether a SystemExit would not end the process as it should: then it ends without.

    Ray waits for the methods of an actor that still run, and does not expect it everywhere.

    Those on the main thread and on parked threads leave by themselves.

    Args:
        inside: tells which threads are in a function of a file.
        loop: the event loop of the thread that called init, if it has one: then the actor is an async one.
        parked: identities of threads.
    """
    asyncio = sys.modules.get("asyncio")
    if not _is_ray():
        return False
    if inside(_TRAINING_IS_CALLED_IN) or _outside_method():
        return True
    # Those of threaded actors and concurrency groups are on threads of a pool.
    if set(inside(_METHODS_ARE_CALLED_IN)).difference(parked, [unpatched.main_ident()]):
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
