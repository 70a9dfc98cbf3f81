"""Tells from Python stack frames what the program's threads are doing: which waits in a collective, which has ended.

The frames are read with `sys._current_frames`, which takes no lock that a frozen thread may hold.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any, Optional

from autoteardown import unpatched

PACKAGE = os.path.join(os.path.dirname(__file__), "")
"""The folder of the agent's own code."""

_REPLACEMENTS = os.path.join(PACKAGE, "signals", "replacements.py")


def main_ident() -> Optional[int]:
    """The main thread's identifier."""
    return unpatched.main_ident()


def alive(ident: Optional[int]) -> bool:
    """Whether a thread of the program still runs.

    The main thread's frames do not tell: it waits in the interpreter's shutdown, and its frames exist there, too.
    """
    if ident is None or ident == main_ident():
        return threading.main_thread().is_alive()
    frame = sys._current_frames().get(ident)
    return frame is not None and not _is_agents(frame)


def native_id(ident: Optional[int]) -> int:
    """The kernel's thread id; 0 if Python did not start the thread."""
    if ident == main_ident():
        return os.getpid()
    return getattr(threading._active.get(ident), "native_id", None) or 0  # type: ignore[attr-defined]


def in_collective() -> list[int]:
    """The program's threads that are inside a call of `torch.distributed`; the agent's own destroy is inside, too."""
    program = {main_ident(), *of_program()}
    return [ident for ident in inside("torch/distributed/distributed_c10d.py") if ident in program]


_COMPUTES = (
    "torch/nn/modules/module.py",
    "torch/nn/parallel/",
    "torch/_tensor.py",
    "torch/autograd/",
    "torch/distributed/fsdp/",
    "torch/distributed/pipelining/",
    "torch/distributed/tensor/",
)


def in_model() -> list[int]:
    """The program's threads that construct, run or differentiate a model."""
    program = {main_ident(), *of_program()}
    return [
        ident
        for ident, top in sys._current_frames().items()
        if ident in program
        and any(part in frame.f_code.co_filename for frame in _calls(top) for part in _COMPUTES)
    ]


def inside(path: str, function: str = "") -> list[int]:
    """The threads that are inside a call of a function (of this name, if given) in a file whose path ends with this."""
    return [
        ident
        for ident, top in sys._current_frames().items()
        if any(
            frame.f_code.co_filename.endswith(path) and function in ("", frame.f_code.co_name)
            for frame in _calls(top)
        )
    ]


def _calls(frame: Optional[FrameType]) -> Iterator[FrameType]:
    """The frames of a thread, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


_PEERS = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/utils.py",  # what DDP and FSDP exchange when they are constructed
    "torch/autograd/graph.py",  # backward waits here for the collectives of DDP and FSDP
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/distributed_c10d_functional.py",
    "torch/distributed/fsdp/",
    "torch/nn/parallel/distributed.py",
    "torch/distributed/pipelining/",
)
# The files of the compilers that compile, not those that run compiled code: the latter are on the stack of every step.
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
    """A thread's innermost frame and instruction: they do not change while the thread executes no bytecode."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    return None if frame is None else (id(frame), frame.f_lasti)


def place(ident: Optional[int]) -> str:
    """What a thread is likely to wait for: "peers"; "work" (loading, compiling) of unknown length; "" if neither."""
    frame: Any = sys._current_frames().get(ident) if ident is not None else None
    # The innermost call decides: a loader may wait for its peers, and a backward pass may compile.
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in _SLOW):
            return "work"
        if any(part in name for part in _PEERS):
            return "peers"
        frame = frame.f_back
    return ""


def is_in_collective(traceback: Optional[TracebackType]) -> bool:
    """Whether an exception comes out of a collective, as where a peer has exited."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and any(part in traceback.tb_frame.f_code.co_filename for part in _PEERS)


_FINALIZERS = frozenset(
    {"__del__", "__exit__", "__aexit__", "_run_finalizers", "_exit_function", "_shutdown"}
)


def in_finalizer() -> bool:
    """Whether the calling thread is inside a finalizer or a context manager's exit."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _FINALIZERS:
            return True
        frame = frame.f_back
    return False


def in_signal_replacement() -> bool:
    """In a signal handler of the agent: whether it has interrupted a replacement of a `signal` function."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_code.co_filename == _REPLACEMENTS:
            return True
        frame = frame.f_back
    return False


def in_greenlet() -> bool:
    """Whether the calling thread runs another greenlet than its first."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and greenlet.getcurrent().parent is not None


def in_exit_callback() -> bool:
    """On the main thread: whether it runs exit callbacks, and does not still wait for the program's other threads."""
    return not threading.main_thread().is_alive() and _outermost(sys._getframe()).co_name != "_shutdown"


def foreign() -> list[int]:
    """The threads that run Python code and were started by C++: the pool of a runtime, as in Ray's actors."""
    main = main_ident()
    return [
        ident
        for ident, frame in sys._current_frames().items()
        if ident != main and not _is_agents(frame) and _outermost(frame).co_name != "_bootstrap"
    ]


def of_program() -> list[int]:
    """The program's threads, without the main thread."""
    main = main_ident()
    return [
        ident for ident, frame in sys._current_frames().items() if ident != main and not _is_agents(frame)
    ]


def _is_agents(frame: FrameType) -> bool:
    """Whether the thread is one of the agent's, which may have the identifier of a program's thread that has ended."""
    return _outermost(frame).co_filename.startswith(PACKAGE)


def _outermost(frame: FrameType) -> CodeType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code
