"""Hooks the frameworks that save a checkpoint at an eviction, as they are imported (`AUTOTEARDOWN_CHECKPOINT=on`)."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from autoteardown import settings
from autoteardown.checkpoints import callbacks
from autoteardown.fail_open import fail_open
from autoteardown.frameworks import accelerate, lightning, transformers
from autoteardown.rank.partial_imports import when_imported
from autoteardown.training import gate


def register() -> None:
    """Register the hooks, if the setting is on."""
    if not settings.load(os.environ)[0].checkpoint:
        return
    for name, patch in (
        ("transformers.trainer", _patch_transformers),
        ("lightning.pytorch.loops.training_epoch_loop", lightning.patch),
        ("pytorch_lightning.loops.training_epoch_loop", lightning.patch),
        ("lightning.pytorch.trainer.connectors.checkpoint_connector", lightning.patch_resume),
        ("pytorch_lightning.trainer.connectors.checkpoint_connector", lightning.patch_resume),
        ("accelerate.accelerator", _patch_accelerate),
    ):
        when_imported(name, fail_open(patch))


def _patch_transformers(module: ModuleType) -> None:
    transformers.patch(module, gate.poll, _exit_code)


def _patch_accelerate(module: ModuleType) -> None:
    accelerate.patch(module, callbacks.registered.append, lambda: transformers.in_use)


def _exit_code() -> int:
    from autoteardown.rank import guard

    teardown: Any = guard.guard.teardown if guard.guard is not None else None
    return teardown.exit_code if teardown is not None else 0
