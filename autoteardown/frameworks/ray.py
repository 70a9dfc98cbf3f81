"""Ray: decides how a rank in an actor or a driver can exit, given what Ray itself does with signals and exits."""

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
# Ray Train's thread for the training function reports every exception that leaves it, also a SystemExit, as an error of
# the program. Then the stop would not count as a preemption, and the retry would not be free.
_TRAINING_IS_CALLED_IN = "/ray/train/v2/_internal/execution/worker_group/thread_runner.py"
_MAIN_LOOP = "/ray/_private/worker.py"
_WORKER = 1  # `ray.WORKER_MODE`


def _is_ray() -> bool:
    return "ray._raylet" in sys.modules


def cancel_abort() -> None:
    """Cancel the alarm by which Ray's C++ handler for SIGTERM would abort a driver (exit code 134) after 3 s.

    Abseil's failure signal handler sets it with `alarm(3)` (ray-project/ray#64830), and calls Python's handler only
    afterwards. So the alarm is set before any Python code sees the signal. An application that uses alarms has a Python
    handler for SIGALRM; then nothing is cancelled.
    """
    if _is_ray() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.alarm(0)


def exit_code_in_method(code: int) -> int:
    """The code of the SystemExit that ends a worker's method.

    Ray takes SystemExit(0) from a method for an intended exit, and does not restart the actor. An actor that is idle,
    async or stuck cannot exit that way. So no actor does, or it would depend on luck which actors are restarted. The
    process itself exits with `code`.
    """
    return 143 if code == 0 and _is_worker() else code


def _is_worker() -> bool:
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    return getattr(worker, "mode", None) == _WORKER


def _outside_method() -> bool:
    """Whether the main thread of a worker runs Ray's own code, and no task's.

    A SystemExit that is raised in Ray's own part of a call is lost there, and fails a check in C++: SIGABRT. Ray
    catches only Exceptions there (ray-project/ray#57247).
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
    """Whether a function in this file, when Ray's C++ layer calls it, is a task or calls an actor's method.

    That layer also calls functions of Ray itself and of the standard library: contextlib's for a context manager.
    """
    if file.endswith((_METHODS_ARE_CALLED_IN, _TRACED_TASKS_ARE_CALLED_IN)):
        return True
    rays_own = os.path.join(os.path.dirname(sys.modules["ray"].__file__ or ""), "")
    installed = "-packages" in file  # in a folder below the standard library, but not part of it
    return not file.startswith((PACKAGE, rays_own, "<frozen ")) and (
        installed or not file.startswith(_STANDARD_LIBRARY)
    )


def waits_for_method(inside: Callable[[str], list[int]], loop: Any, parked: Iterable[int] = ()) -> bool:
    """Whether a SystemExit would not end the process properly, so that the process has to exit without one.

    Ray waits for an actor's methods that still run, and does not expect a SystemExit everywhere. Methods on the main
    thread and on parked threads end by themselves.

    Args:
        inside: returns the threads that are inside a function of a file.
        loop: the event loop of the thread that called init, if it has one: the actor is async then.
        parked: identifiers of the parked threads.
    """
    asyncio = sys.modules.get("asyncio")
    if not _is_ray():
        return False
    if inside(_TRAINING_IS_CALLED_IN) or _outside_method():
        return True
    # The methods of threaded actors and of concurrency groups run on threads of a pool.
    if set(inside(_METHODS_ARE_CALLED_IN)).difference(parked, [unpatched.main_ident()]):
        return True
    if loop is None or asyncio is None:
        return False
    try:
        return any(not task.done() for each in _loops(loop) for task in asyncio.all_tasks(each))
    except RuntimeError:  # another thread has added or removed a task meanwhile
        return True


def _loops(loop: Any) -> list[Any]:
    """The event loops of an async actor: this one, or all running loops if each concurrency group has its own."""
    # Not threading.enumerate(): it takes a lock that the main thread may hold.
    names = [thread.name for thread in list(threading._active.values())]  # type: ignore[attr-defined]
    if sum(name.startswith("AsyncIO Thread: ") for name in names) < 2:
        return [loop]
    # Neither Ray nor asyncio lists the loops. Compared by type, because isinstance() would run the code of proxies.
    kind = sys.modules["asyncio"].AbstractEventLoop
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and each.is_running()]
