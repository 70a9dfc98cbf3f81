"""Hooks the frameworks that save a checkpoint at an eviction, as they are imported (`AUTOTEARDOWN_CHECKPOINT=on`)."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any, Callable

from autoteardown import settings
from autoteardown.checkpoints import callbacks
from autoteardown.fail_open import fail_open
from autoteardown.frameworks import accelerate, lightning, transformers
from autoteardown.rank.partial_imports import when_imported
from autoteardown.switch import say
from autoteardown.training import gate

not_placed: dict[str, str] = {}
"""The modules whose hook could not be placed, and the error of each."""


def register() -> None:
    """Register the hooks, if the setting is on."""
    if settings.load(os.environ)[0].checkpoint:
        for name, patch in HOOKS.items():
            when_imported(name, fail_open(functools.partial(_place, name, patch)))


def _place(name: str, patch: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Place one hook. If that fails, no eviction of this rank counts as clean: its checkpoint is not saved."""
    try:
        patch(module)
    except Exception as error:
        problem = not_placed[name] = repr(error)
        say(f"AUTOTEARDOWN_CHECKPOINT saves nothing: {name} cannot be hooked: {problem}")

        def saves_nothing() -> None:
            raise RuntimeError(f"AUTOTEARDOWN_CHECKPOINT: {name} cannot be hooked: {problem}")

        callbacks.registered.append(saves_nothing)


def _patch_transformers(module: ModuleType) -> None:
    transformers.patch(module, gate.poll, _exit_code)


def _patch_accelerate(module: ModuleType) -> None:
    accelerate.patch(module, callbacks.registered.append, lambda: transformers.in_use)


def _exit_code() -> int:
    from autoteardown.rank import guard

    teardown: Any = guard.guard.teardown if guard.guard is not None else None
    return teardown.exit_code if teardown is not None else 0


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer": _patch_transformers,
    "lightning.pytorch.loops.training_epoch_loop": lightning.patch,
    "pytorch_lightning.loops.training_epoch_loop": lightning.patch,
    "lightning.pytorch.trainer.connectors.checkpoint_connector": lightning.patch_resume,
    "pytorch_lightning.trainer.connectors.checkpoint_connector": lightning.patch_resume,
    "accelerate.accelerator": _patch_accelerate,
}
"""What is done to each module when it has been imported."""
