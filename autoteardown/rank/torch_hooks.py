"""Hooks torch: wraps the functions that create, destroy and save, as torch is imported.

1. The hook on `torch.distributed.distributed_c10d` runs before `torch.distributed` re-exports its names, so every
   importer gets the wrapper.
2. The wrappers are plain closures with `functools.wraps`, not `wrapt.FunctionWrapper`: that cannot be pickled or
   copied, and Ray and submitit ship code with cloudpickle.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any, Callable

from autoteardown.fail_open import fail_open
from autoteardown.process_groups import after_release, custom_groups
from autoteardown.switch import say
from autoteardown.unpatched import get_ident

_MARK = "_autoteardown_wrapped"


def register() -> None:
    """Hook torch's modules: now those that are imported already, the others as they are imported. Idempotent."""
    import signal

    import wrapt

    from autoteardown.signals import interception

    fail_open(interception.install(signal).prepare)()
    for name, patch in (
        ("torch.distributed.distributed_c10d", _patch_c10d),
        ("torch.serialization", _patch_serialization),
        ("torch.distributed.checkpoint.state_dict_saver", _patch_checkpoint),
        ("torch.utils.data._utils.signal_handling", _patch_workers),
        ("torch.distributed.elastic", _hook_torchrun),
        ("accelerate.commands", _hook_forwarding),
        ("deepspeed.launcher", _hook_forwarding),
    ):
        # A hook that raises would make `import torch` fail.
        wrapt.register_post_import_hook(fail_open(patch), name)
    if os.environ.get("AUTOTEARDOWN_CHECKPOINT"):
        from autoteardown.rank import framework_checkpoints

        framework_checkpoints.register()


def _patch(module: ModuleType, name: str, wrap: Callable[[Any], Any], *others: str) -> None:
    """Replace a function, also where it has been re-exported already (late installation)."""
    real = getattr(module, name, None)
    if real is None or hasattr(real, _MARK):
        return
    wrapper = functools.wraps(real)(wrap(real))
    setattr(wrapper, _MARK, True)
    # torch.compile leaves functions of torch.distributed alone, by their file; the wrapper must ask for that.
    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]
    setattr(module, name, wrapper)
    for other in others:
        copy = sys.modules.get(other)
        if copy is not None and getattr(copy, name, None) is real:
            setattr(copy, name, wrapper)


def _patch_c10d(module: ModuleType) -> None:
    if not hasattr(module, "init_process_group"):
        say("this torch has no torch.distributed: off")
        return
    _patch(module, "destroy_process_group", _wrap_destroy, "torch.distributed")
    _patch(module, "init_process_group", _wrap_init, "torch.distributed")
    _patch(module, "shrink_group", _wrap_shrink, "torch.distributed")
    _patch(module, "_new_process_group_helper", _wrap_helper)
    # Import here what an init needs: 8 ms are nothing in an import of torch, and something in an init.
    from autoteardown.rank import guard  # noqa: F401


def _wrap_init(real: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        _joining()
        ident = get_ident()
        _in_init.add(ident)
        try:
            result = real(*args, **kwargs)
        except BaseException:
            _not_joined()
            raise
        finally:
            _in_init.discard(ident)
        _joined()
        return result

    return init_process_group


def _wrap_helper(real: Callable[..., Any]) -> Callable[..., Any]:
    def _new_process_group_helper(*args: Any, **kwargs: Any) -> Any:
        custom = _is_custom(args, kwargs)
        if custom:
            _joining(custom=True)
        try:
            result = real(*args, **kwargs)
        except BaseException:
            if custom:
                _not_joined()
            raise
        if custom:
            _custom_made(result)
        return result

    return _new_process_group_helper


def _wrap_destroy(real: Callable[..., Any]) -> Callable[..., Any]:
    def destroy_process_group(*args: Any, **kwargs: Any) -> Any:
        if after_release.released:
            return None
        if not args and kwargs.get("group") is None:
            _leaves()
        try:
            return real(*args, **kwargs)
        finally:
            _not_joined()

    return destroy_process_group


def _wrap_shrink(real: Callable[..., Any]) -> Callable[..., Any]:
    def shrink_group(*args: Any, **kwargs: Any) -> Any:
        # torch destroys the old default group and registers the new one: in between there is none, but no rank leaves.
        ident = get_ident()
        _in_shrink.add(ident)
        try:
            return real(*args, **kwargs)
        finally:
            _in_shrink.discard(ident)
            _shrunk()

    return shrink_group


def _patch_serialization(module: ModuleType) -> None:
    _patch(module, "save", functools.partial(_wrap_save, False), "torch")


def _patch_checkpoint(module: ModuleType) -> None:
    for name in ("save", "save_state_dict", "async_save"):
        _patch(module, name, functools.partial(_wrap_save, True), "torch.distributed.checkpoint")


def _wrap_save(collective: bool, real: Callable[..., Any]) -> Callable[..., Any]:
    def save(*args: Any, **kwargs: Any) -> Any:
        gate = _enter_save(collective)
        try:
            result = real(*args, **kwargs)
            _save_returned(gate, result)
        finally:
            _leave_save(gate)
        return result

    return save


@fail_open
def _enter_save(collective: bool) -> Any:
    from autoteardown.training import gate

    gate.gate.enter_save(collective)
    return gate.gate


@fail_open
def _save_returned(gate: Any, result: Any) -> None:
    # dcp.async_save returns a future, or (2.9 and later, on request) an object with two.
    future = getattr(result, "upload_completion", result)
    if gate is not None and hasattr(future, "add_done_callback"):
        gate.saves.in_background(future)


@fail_open
def _leave_save(gate: Any) -> None:
    if gate is not None:
        gate.leave_save()


def _hook_torchrun(module: ModuleType) -> None:
    from autoteardown.launchers import torchrun

    torchrun.register()


def _hook_forwarding(module: ModuleType) -> None:
    from autoteardown.launchers import forwarding

    forwarding.register()


def _patch_workers(module: ModuleType) -> None:
    _patch(module, "_set_worker_signal_handlers", _wrap_worker_handlers)


def _wrap_worker_handlers(real: Callable[..., Any]) -> Callable[..., Any]:
    def _set_worker_signal_handlers(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        child_signals = sys.modules.get("autoteardown.children.child_signals")
        if child_signals is not None:  # this process is a child of an armed rank
            child_signals.become_worker()
        return result

    return _set_worker_signal_handlers


# -- what the wrapped init and destroy do -----------------------------------------------------------------------------


_in_init: set[int] = set()  # the threads that are in init_process_group
_in_shrink: set[int] = set()  # the threads that are in shrink_group


@fail_open
def _joining(custom: bool = False) -> None:
    from autoteardown.rank import guard

    c10d = sys.modules["torch.distributed.distributed_c10d"]
    if disarmed or c10d.is_initialized():
        return
    rank = guard.of_process(c10d.destroy_process_group.__wrapped__)
    if not (custom and rank.joined):
        rank.before_init()


@fail_open
def _is_custom(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return get_ident() not in _in_init and custom_groups.is_one(args, kwargs)


@fail_open
def _custom_made(result: Any) -> None:
    custom_groups.note(result)
    if not sys.modules["torch.distributed.distributed_c10d"].is_initialized():
        _joined()


@fail_open
def adopt() -> None:
    """Guard a process group that exists already."""
    from autoteardown.rank import guard

    c10d = sys.modules["torch.distributed.distributed_c10d"]
    rank = guard.of_process(c10d.destroy_process_group.__wrapped__)
    if not rank.joined:
        rank.before_init()
        rank.after_init()


@fail_open
def _joined() -> None:
    from autoteardown.rank import guard

    if guard.guard is not None:
        guard.guard.after_init()
        guard.guard.listener.reclaim()  # communication libraries set signal handlers


@fail_open
def _leaves() -> None:
    from autoteardown.rank import guard

    if guard.guard is not None:
        guard.guard.before_destroy()


@fail_open
def _not_joined() -> None:
    from autoteardown.rank import guard

    c10d = sys.modules["torch.distributed.distributed_c10d"]
    rank = guard.guard
    if rank is None or c10d.is_initialized() or get_ident() in _in_shrink:
        return
    if custom_groups.any_left() and rank.listener.armed:  # the remaining groups were made without an init
        rank.after_init()
    else:
        rank.after_destroy()


@fail_open
def _shrunk() -> None:
    from autoteardown.rank import guard

    if not sys.modules["torch.distributed.distributed_c10d"].is_initialized():  # it has failed half-way
        _not_joined()
    elif guard.guard is not None and guard.guard.joined:
        guard.guard.after_shrink()


disarmed = False
"""`autoteardown.disarm()` was called: later inits are not guarded either."""
