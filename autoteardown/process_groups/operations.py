"""Destroys and aborts process groups, whatever torch's version and the backend.

Every difference between versions and backends is in this module, in `devices.py` and in `collectives.py`; the rest
of the agent calls them through this one. Differences are tested for, not looked up by version
(tests/unit/torch_shapes.json lists them): `ProcessGroup.abort` (2.7 and later), the abort of its NCCL backend (2.6),
the `_shutdown` of that backend, which is an abort (2.4 and 2.5).
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, NamedTuple

from autoteardown.process_groups.collectives import (
    comparable_numbers,
    evidence,
    launch_counters,
    progress,
    sequence_numbers,
    stuck_collective,
)
from autoteardown.process_groups.devices import (
    Problem,
    accelerators,
    current_devices,
    devices_of,
    drain,
    line,
    unwaitable,
)

__all__ = [
    "World",
    "abort",
    "accelerators",
    "can_abort",
    "comparable_numbers",
    "current_devices",
    "destroy",
    "devices_of",
    "drain",
    "evidence",
    "groups",
    "launch_counters",
    "progress",
    "sequence_numbers",
    "stuck_collective",
    "table",
    "unwaitable",
    "world",
]

from autoteardown import spare_threads, unpatched
from autoteardown.process_groups import after_release, custom_groups

# Backends whose abort does nothing: a blocked operation stays blocked until the peer's socket closes.
_WITHOUT_ABORT = frozenset({"gloo", "mpi", "ucc", "fake"})

_CUSTOM = 1.0  # seconds for groups whose other members do not exit with this rank

_kept: list[Any] = []


class World(NamedTuple):
    """The default process group as this rank sees it. If there is none, the first group that was made without init."""

    rank: int
    size: int
    backend: str
    store: Any
    alone: str = ""  # why its ranks are not told of each other's evictions


def _c10d() -> Any:
    return sys.modules["torch.distributed.distributed_c10d"]


def world() -> World | None:
    """The process group that this rank is guarded for; None if there is none."""
    c10d = _c10d()
    if not c10d.is_initialized():
        for group in list(c10d._world.pg_names) if custom_groups.any_left() else []:
            backend = str(c10d._world.pg_map[group][0])
            return World(group.rank(), group.size(), backend, None, custom_groups.ALONE)
        return None
    try:
        store = c10d._get_default_store()
    except Exception:  # MPI has no store
        store = None
    return World(c10d.get_rank(), c10d.get_world_size(), str(c10d.get_backend()), store)


def table() -> dict[Any, str]:
    """torch's own table of the process groups, with their names."""
    names: dict[Any, str] = _c10d()._world.pg_names
    return names


def groups() -> list[Any]:
    """Every process group, those made without `init_process_group` included, in the order in which torch shuts them
    down.
    """
    c10d = _c10d()
    names = dict(c10d._world.pg_names)  # a copy: the program may be making groups
    return sorted(names, key=lambda group: str(names[group]), reverse=True)


def can_abort() -> bool:
    """Whether some group of this process has communicators that an abort releases."""
    return any(_abort_of(group) is not None for group in groups())


def _abort_of(group: Any) -> Callable[[], object] | None:
    c10d = _c10d()
    try:
        configured = str(c10d._world.pg_backend_config[group])
    except Exception:
        configured = ""
    # "cpu:gloo,cuda:nccl", or "gloo"
    parts = [part.rpartition(":") for part in configured.split(",") if part]
    kinds = [kind for kind, _, backend in parts if backend.lower() not in _WITHOUT_ABORT]
    if parts and not kinds:
        return None
    abort: Callable[[], object] | None = getattr(group, "abort", None)
    if abort is not None:
        return abort
    # Not through `_abort_process_group` or `destroy_process_group`: for the default group, those abort every group in
    # turn, and they edit the tables that the other groups' aborts read at the same moment.
    for kind in (*filter(None, kinds), "cuda"):
        backend = _backend_of(group, kind)
        abort = getattr(backend, "abort", None) or getattr(backend, "_shutdown", None)
        if abort is not None:
            break
    return abort


def _backend_of(group: Any, kind: str) -> Any:
    try:
        return group._get_backend(sys.modules["torch"].device(kind))
    except Exception:  # no backend for that device
        return None


def abort(done: Callable[[Problem], object], after: float = 0.0) -> None:
    """Abort every process group, each on a thread of its own, all at once.

    One after the other can deadlock (pytorch/pytorch#119797), and a parent's abort does not release the groups that
    were split off it (NVIDIA-NeMo/RL#3591).

    Args:
        done: called once, when the last abort has returned, with what went wrong or None. May never be called.
        after: seconds from now; the threads are there by then.
    """
    at = unpatched.monotonic() + after
    after_release.released = True
    aborts = [function for function in map(_abort_of, groups()) if function is not None]
    problems: list[str] = []
    pending = list(range(len(aborts)))

    def run(function: Callable[[], object]) -> None:
        try:
            unpatched.sleep(max(0.0, at - unpatched.monotonic()))
            function()
        except BaseException as error:
            problems.append(line(error))
        if pending.pop() == 0:  # only the last one to return
            done("; ".join(problems) or None)

    if not aborts:
        done(None)
    for function in aborts:
        if not spare_threads.start(functools.partial(run, function)):
            run(function)


def destroy(real: Callable[[], object]) -> Problem:
    """Release the default process group and all others. May never return: call it on a thread of its own.

    Args:
        real: torch's own `destroy_process_group`.

    Returns:
        What went wrong, in one line, or None.
    """
    c10d = _c10d()
    custom = [group for group in groups() if custom_groups.known(group) or not c10d.is_initialized()]
    if not custom and not c10d.is_initialized():
        return None  # the program has destroyed it already
    # Keep a reference: the last one to a gloo group must not go away while the program unwinds. The destructor can
    # deadlock, with the GIL held.
    _kept.extend(groups())
    try:
        after_release.release(_c10d())
    except Exception:  # an unknown torch: the program gets torch's own errors
        pass
    for group in custom:
        c10d._world.pg_names.pop(group, None)  # torch's destroy shuts down all groups in this table
    problem = None
    if c10d.is_initialized():
        try:
            real()
        except Exception as error:
            problem = line(error)
    _shut_down(custom)
    return problem


def _shut_down(custom: list[Any]) -> None:
    """Release groups whose other members run on. A backend may wait for those: then the process's exit releases the
    group.
    """
    over: list[object] = []

    def run(group: Any) -> None:
        try:
            getattr(group, "shutdown", lambda: _c10d()._shutdown_backend(group))()
        except BaseException:  # not part of this stop: the other members are not told
            pass
        over.append(group)

    for group in custom:
        if not spare_threads.start(functools.partial(run, group)):
            over.append(group)  # left to the exit
    until = unpatched.monotonic() + _CUSTOM
    while len(over) < len(custom) and unpatched.monotonic() < until:
        unpatched.sleep(0.01)
