"""Finds the accelerators that this process uses, and waits until they are idle.

Every vendor's module is asked the same questions, and what it lacks is done without: `torch.<name>` for the known
names, the PrivateUse1 backend that a vendor has renamed, and what `torch.accelerator` (2.6 and later) offers. No
question initializes a device; `torch.cuda.is_available()` might, so it is not asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, Optional

Problem = Optional[str]

_KNOWN = ("cuda", "xpu", "npu", "hpu", "mlu", "musa", "mtia")
# torch_xla records work lazily, and decides itself when the device gets it.
_UNSUPPORTED = "xla"

# Devices whose synchronization has failed: name, and why. Filled by `drain`.
_refused: dict[str, str] = {}


def accelerators() -> list[str]:
    """The devices that this process uses, by torch's names, those included that cannot be waited for."""
    torch = sys.modules.get("torch")
    bound = None
    found = []
    for name in _names(torch):
        initialized = getattr(getattr(torch, name, None), "is_initialized", None)
        try:
            if initialized is not None:
                used = bool(initialized())
            else:
                bound = bound_devices() if bound is None else bound
                used = name in bound
        except Exception:
            continue
        if used:
            found.append(name)
    return found


def unwaitable() -> list[str]:
    """The devices in use that cannot be shown to be idle, each with the reason. Call it after `drain`."""
    torch = sys.modules.get("torch")
    found = [
        f"{name}: torch has nothing to wait for it with"
        for name in accelerators()
        if _synchronize(torch, name) is None and name not in _refused
    ]
    return found + [f"{name}: {why}" for name, why in list(_refused.items())]


def drain() -> Problem:
    """Wait until every device that this process uses is idle. Has no time-out: call it on a thread of its own.

    Returns:
        What went wrong, or None. A device that could not be waited for is not reported here: see `unwaitable`.
    """
    torch = sys.modules["torch"]
    problems = []
    for name in accelerators():
        synchronize = _synchronize(torch, name)
        if synchronize is None:
            continue
        for device in _in_use(torch, name):
            try:
                synchronize(device)
            except Exception as error:
                text = line(error)
                if (
                    "captur" in text
                ):  # it raises on each thread while any captures a graph; the device may be healthy
                    _refused[name] = "a graph is being captured"
                else:
                    problems.append(f"{name}: {text}")
    return "; ".join(problems) or None


def current_devices() -> dict[str, int]:
    """The current device of this thread, for each kind that is in use."""
    torch = sys.modules.get("torch")
    found = {}
    for name in accelerators():
        try:
            found[name] = int(getattr(torch, name).current_device())
        except Exception:  # not every kind has a current device
            continue
    return found


@contextmanager
def devices_of(current: dict[str, int]) -> Iterator[None]:
    """Make these the current devices of this thread of the agent's: by default each is the first of its kind."""
    torch = sys.modules.get("torch")
    for name, index in current.items():
        try:
            getattr(torch, name).set_device(index)
        except Exception:
            continue
    yield


def bound_devices() -> dict[str, set[Optional[int]]]:
    """The devices that the process groups are bound to, or have launched collectives on."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    found: dict[str, set[Optional[int]]] = {}
    if c10d is None:
        return found
    for group, config in list(dict(c10d._world.pg_backend_config).items()):
        bound = getattr(group, "bound_device_id", None)
        if bound is not None:
            found.setdefault(str(bound.type), set()).add(bound.index)
        for part in str(config).split(","):
            device, _, backend = part.partition(":")
            # A backend may be configured for every kind of device. One that has launched something is in use.
            if (
                backend
                and device not in ("cpu", *found)
                and (device == _UNSUPPORTED or launches(group, device))
            ):
                found.setdefault(device, set())
    return found


def launches(group: Any, device: str) -> Optional[int]:
    """How many collectives a group has launched on one kind of device; None if unknown."""
    count = launch_counter(group, device)
    return None if count is None else int(count())


def launch_counter(group: Any, device: str) -> Optional[Callable[[], int]]:
    """A function that returns this number; None if it is unknown."""
    try:
        count: Callable[[], int] = group._get_backend(
            sys.modules["torch"].device(device)
        )._get_sequence_number_for_group
        count()
    except Exception:  # no such backend, or it does not count
        return None
    return count


def line(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _names(torch: Any) -> list[str]:
    names = [*_KNOWN, _UNSUPPORTED]
    for ask in (lambda: torch._C._get_privateuse1_backend_name(), lambda: _current(torch)):
        try:
            name = ask()
        except Exception:
            continue
        if name and name not in names and name not in ("cpu", "privateuseone"):
            names.append(name)
    return names


def _current(torch: Any) -> Optional[str]:
    """The kind of device that `torch.accelerator` stands for."""
    device = torch.accelerator.current_accelerator()
    return None if device is None else str(device.type)


def _synchronize(torch: Any, name: str) -> Optional[Callable[[Optional[int]], object]]:
    own: Optional[Callable[[Optional[int]], object]] = getattr(
        getattr(torch, name, None), "synchronize", None
    )
    if own is not None:
        return own
    try:
        if _current(torch) != name:
            return None
        general = torch.accelerator.synchronize
    except Exception:
        return None
    return lambda device: general() if device is None else general(device)


def _in_use(torch: Any, name: str) -> list[Optional[int]]:
    # Synchronizing a device creates a context on it, which takes memory from its user. And the current device belongs
    # to a thread: on the agent's it is the first one, whichever the program uses.
    module = getattr(torch, name)
    has_context = getattr(torch._C, f"_{name}_hasPrimaryContext", None)
    allocated = getattr(module, "memory_allocated", None)
    found: set[Optional[int]] = set()
    try:
        indices = range(module.device_count())
        if has_context is not None:
            found = {index for index in indices if has_context(index)}
        elif len(indices) > 1:
            found = {index for index in bound_devices().get(name, ()) if index is not None}
            local_rank = os.environ.get("LOCAL_RANK", "")
            if local_rank.isdigit() and int(local_rank) in indices:
                found.add(int(local_rank))
            if allocated is not None:
                found |= {index for index in indices if allocated(index)}
    except Exception:
        pass
    return sorted(found, key=lambda index: -1 if index is None else index) or [None]
