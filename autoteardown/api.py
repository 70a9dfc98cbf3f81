"""The public Python API. It is optional: ranks are guarded without any call of it."""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from autoteardown import startup
from autoteardown.fail_open import fail_open


def status() -> dict[str, Any]:
    """Return what the agent is doing in this process.

    Returns:
        `active` (the agent is on in this process), `state` (`off`, `idle`, `armed`, `stopping`), and for an armed rank
        `rank`, `world_size`, `backend`, `connected` (whether its peers would be notified of an eviction now), `alone`
        (why they would not, in words), `steps`, the iterations counted so far, and `exit_code` and `peer_exit_code`,
        the codes with which this rank exits after its own signal, or after a peer's.
    """
    return _status() or {"active": False, "state": "off", "reason": "the agent has failed"}


@fail_open
def _status() -> dict[str, Any]:
    from autoteardown.training import gate

    if not startup.active():
        return {"active": False, "state": "off", "reason": startup.why_off or "AUTOTEARDOWN is not set"}
    guard = _guard()
    if guard is None or not guard.listener.armed:
        return {"active": True, "state": "idle"}
    stopping = guard.teardown is not None
    return {
        "active": True,
        "state": "stopping" if stopping else "armed",
        "rank": guard.identity.rank,
        "world_size": guard.identity.world_size,
        "backend": guard.identity.backend,
        "connected": guard.channel is not None and guard.channel.connected,
        "alone": guard.alone if guard.identity.world_size != 1 else "",
        "steps": gate.gate.count,
        "exit_code": guard.settings.exit_code_for(guard.settings.signals[0]),
        "peer_exit_code": guard.settings.peer_exit_code,
    }


def arm() -> bool:
    """Switch the agent on from code, with or without the environment variable, before or after torch is imported.

    A process group that exists already is guarded from now on.

    Returns:
        Whether the agent is active now.
    """
    return bool(_arm())


@fail_open
def _arm() -> bool:
    if not startup.activate():
        return False
    from autoteardown.process_groups import custom_groups
    from autoteardown.rank import torch_hooks

    torch_hooks.disarmed = False
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None and (c10d.is_initialized() or custom_groups.any_left()):
        torch_hooks.adopt()
    return True


@fail_open
def disarm() -> None:
    """Stop guarding this process for good: remove the handlers, threads and registry entry."""
    if not startup.active():
        return
    from autoteardown.rank import torch_hooks

    torch_hooks.disarmed = True
    guard = _guard()
    if guard is not None:
        guard.after_destroy()


class protect:
    """Context manager: this thread is not stopped inside the block while time is left. For saves without `torch.save`.

    >>> with autoteardown.protect():
    ...     write_checkpoint()
    """

    _gate: Any = None

    @fail_open
    def __enter__(self) -> None:
        """Begin the block; if a stop is in progress, the thread stops here."""
        from autoteardown.training import gate

        gate.gate.enter_save()
        self._gate = gate.gate

    @fail_open
    def __exit__(self, *exc_info: object) -> None:
        """End the block; if a stop has begun inside, the thread stops here."""
        if self._gate is not None:
            self._gate.leave_save()


def stop_requested() -> bool:
    """Return whether this program should save and exit by itself, because a rank of its group is being evicted.

    Call it once in each iteration, on every rank, at the same place. Then every rank gets True at the same call, and
    the process group still works: the program may save collectively. A call costs about 0.1 us. It returns False if
    there is no eviction, and if the agent is off. In a program that calls this, each call counts as an iteration, with
    or without optimizers.
    """
    poll = _poll
    if poll is None:
        if not startup._active:
            return False
        poll = _find_poll()
    return poll()


_poll: Optional[Callable[[], bool]] = None


def _find_poll() -> Callable[[], bool]:
    global _poll
    gate = sys.modules.get("autoteardown.training.gate")
    if gate is None:
        return bool
    found: Callable[[], bool] = gate.poll
    _poll = found
    return found


def on_teardown(callback: Callable[[], object]) -> Callable[[], object]:
    """Register a callback without arguments that a teardown calls after the drain; usable as a decorator.

    1. It runs on every rank, on one of the agent's threads. The training thread is stopped, the devices are idle and
       the process group still works, so the callback may save, also collectively.
    2. It sees the state after the optimizer's step of the agreed iteration. The loop's own counters and its scheduler
       have not advanced yet; `status()["steps"]` has.
    3. Its time is what the grace period leaves: `AUTOTEARDOWN_GRACE - 1` less 6 s, if the stop itself is quick.
    4. An exception that it raises is logged, and the teardown continues.

    Raises:
        TypeError: the callback is not callable.
    """
    if not callable(callback):
        raise TypeError(f"on_teardown() takes a callable, not {callback!r}")
    _register(callback)
    return callback


@fail_open
def _register(callback: Callable[[], object]) -> None:
    if startup.active():
        from autoteardown.checkpoints import callbacks

        callbacks.registered.append(callback)


def _guard() -> Any:
    module = sys.modules.get("autoteardown.rank.guard")
    return module.guard if module is not None else None
