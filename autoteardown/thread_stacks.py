"""The program's threads, as their Python frames show them: which waits in a collective, which still runs.

Read with `sys._current_frames`, which takes no lock that a frozen thread may hold.
"""

from __future__ import annotations

import os
import sys
import threading
from types import CodeType, FrameType
from typing import Any, Optional

from autoteardown import unpatched

PACKAGE = os.path.join(os.path.dirname(__file__), "")
"""Where the agent's own code lies."""

_REPLACEMENTS = os.path.join(PACKAGE, "signals", "replacements.py")


def main_ident() -> Optional[int]:
    """The main thread's number."""
    return unpatched.main_ident()


def alive(ident: Optional[int]) -> bool:
    """Whether a thread still runs Python code. The main thread's frames outlive it: it waits in its shutdown."""
    if ident is None or ident == main_ident():
        return threading.main_thread().is_alive()
    frame = sys._current_frames().get(ident)
    return frame is not None and not ours(frame)


def native_id(ident: Optional[int]) -> int:
    """The kernel's number for a thread; 0 if Python did not start it."""
    if ident == main_ident():
        return os.getpid()
    return getattr(threading._active.get(ident), "native_id", None) or 0  # type: ignore[attr-defined]


def in_collective() -> list[int]:
    """The threads that are in a call of `torch.distributed`'s."""
    return inside("torch/distributed/distributed_c10d.py")


def inside(path: str, function: str = "") -> list[int]:
    """The threads that are in a call of a function (of that one, if it is named) of the file whose path ends so."""
    found = []
    for ident, top in sys._current_frames().items():
        frame: Any = top
        while frame is not None:
            if frame.f_code.co_filename.endswith(path) and function in ("", frame.f_code.co_name):
                found.append(ident)
                break
            frame = frame.f_back
    return found


_PEERS = (
    "torch/distributed/distributed_c10d.py",
    "torch/autograd/graph.py",  # where backward waits for what DDP and FSDP have launched
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/distributed_c10d_functional.py",
    "torch/distributed/fsdp/",
    "torch/nn/parallel/distributed.py",
    "torch/distributed/pipelining/",
)
# What compiles, not what runs the compiled code: other files of the compiler's are on the stack of every step.
_SLOW = (
    "torch/utils/data/",
    "torch/utils/cpp_extension.py",
    "torch/_dynamo/convert_frame.py",
    "torch/_inductor/graph.py",
    "torch/_inductor/async_compile.py",
    "torch/_inductor/codecache.py",
    "torch/_inductor/select_algorithm.py",
    "torch/_inductor/runtime/benchmarking.py",
    "triton/compiler/",
    "triton/testing.py",
)


def position(ident: Optional[int]) -> Optional[tuple[int, int]]:
    """Where that thread stands: does not change as long as it executes no bytecode."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    return None if frame is None else (id(frame), frame.f_lasti)


def place(ident: Optional[int]) -> str:
    """What that thread is likely to wait for: "peers"; "work", of which nobody knows how long it takes; else ""."""
    frame: Any = sys._current_frames().get(ident) if ident is not None else None
    # The innermost call tells: a loader may wait for its peers, a backward pass may compile.
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in _SLOW):
            return "work"
        if any(part in name for part in _PEERS):
            return "peers"
        frame = frame.f_back
    return ""


_FINALIZERS = frozenset(
    {"__del__", "__exit__", "__aexit__", "_run_finalizers", "_exit_function", "_shutdown"}
)


def in_finalizer() -> bool:
    """Whether this thread is in code that runs as something ends."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _FINALIZERS:
            return True
        frame = frame.f_back
    return False


def in_signal_replacement() -> bool:
    """In a signal handler of ours: whether it interrupts one of the stand-ins for functions of the `signal` module."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_code.co_filename == _REPLACEMENTS:
            return True
        frame = frame.f_back
    return False


def in_exit_callback() -> bool:
    """On the main thread: whether it runs exit callbacks. Before them it waits for the program's other threads."""
    return not threading.main_thread().is_alive() and _first(sys._getframe()).co_name != "_shutdown"


def foreign() -> list[int]:
    """The threads that run Python code but were not started by it: the pool of a C++ runtime, as in Ray's actors."""
    main = main_ident()
    return [
        ident
        for ident, frame in sys._current_frames().items()
        if ident != main and not ours(frame) and _first(frame).co_name != "_bootstrap"
    ]


def of_program() -> list[int]:
    """The program's threads, but for the main thread."""
    main = main_ident()
    return [ident for ident, frame in sys._current_frames().items() if ident != main and not ours(frame)]


def ours(frame: FrameType) -> bool:
    """Whether that thread is one of the agent's: it may well bear the number of a thread that has ended."""
    return _first(frame).co_filename.startswith(PACKAGE)


def _first(frame: FrameType) -> CodeType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code
