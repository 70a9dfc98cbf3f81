"""The Python API. Optional: nothing in it has to be called for a rank to be guarded."""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional

from autoteardown import startup
from autoteardown.fail_open import fail_open


def status() -> dict[str, Any]:
    """What the agent is doing in this process.

    Returns:
        `active` (the switch is on here), `state` (`off`, `idle`, `armed`, `stopping`), and for an armed rank `rank`,
        `world_size`, `backend`, `connected` (whether its peers would be told of an eviction now), `alone` (why not, in
        words) `steps`, the iterations counted so far, and `exit_code` and `peer_exit_code`, with which
        this rank exits after its own signal, or after a peer's.
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
    """Switch the agent on from code, with or without the environment variable, before or after torch's import.

    A process group that exists already is guarded from here on.

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
    """Take the guard off this process, for good: handlers, threads and registry entry go."""
    if not startup.active():
        return
    from autoteardown.rank import torch_hooks

    torch_hooks.disarmed = True
    guard = _guard()
    if guard is not None:
        guard.after_destroy()


class protect:
    """Do not stop this thread inside this block while time is left. For saves that are not `torch.save`.

    >>> with autoteardown.protect():
    ...     write_checkpoint()
    """

    _gate: Any = None

    @fail_open
    def __enter__(self) -> None:
        """Begin the block; a thread that should have stopped by now stops here."""
        from autoteardown.training import gate

        gate.gate.enter_save()
        self._gate = gate.gate

    @fail_open
    def __exit__(self, *exc_info: object) -> None:
        """End it; a thread that should have stopped inside stops here."""
        if self._gate is not None:
            self._gate.leave_save()


def stop_requested() -> bool:
    """Whether this program is to save and leave by itself, after an eviction of any rank of its group.

    To be called once an iteration, on every rank, at the same place; then every rank gets True at the same call, and
    the group is alive: it may save collectively. Costs some 0.1 us. False while nothing happens, and where the
    agent is off. The calls are the iterations of a program that makes them, whether it has optimizers or not.
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
    """Have `callback` called, without arguments, in a teardown, after the drain; usable as a decorator.

    It runs on every rank, on a thread of the agent's, while the training thread is stopped, the devices are idle and
    the process group is alive: it may save, also collectively. It sees the state after the optimizer's step of the
    agreed iteration; what the loop itself counts, its scheduler included, has not moved (`status()["steps"]` has). Its
    time is what the grace period leaves: 6 s less than `AUTOTEARDOWN_GRACE - 1`, if the stop itself is quick. What it
    raises is logged and goes no further.

    Raises:
        TypeError: not callable.
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
