"""Accelerate: calls `save_state` at an eviction, with `AUTOTEARDOWN_CHECKPOINT=on`.

1. The training loop is the program's own, so this is an `on_teardown` callback: it runs when every rank has stopped
   after the agreed iteration.
2. With `automatic_checkpoint_naming`, the checkpoint is the next of the numbered ones. Without, it is the folder
   `autoteardown-checkpoint` in the project's folder, or in the current one.
3. The checkpoint gets its name when it is complete.
"""

from __future__ import annotations

import functools
import os
import shutil
import weakref
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NAME = "autoteardown-checkpoint"


def patch(
    module: ModuleType, on_teardown: Callable[[Callable[[], object]], object], skip: Callable[[], bool]
) -> None:
    """Hook `accelerate.accelerator`.

    Args:
        module: the module, just imported.
        on_teardown: registers a callback.
        skip: whether another integration saves: the Trainer has an accelerator, too.
    """
    made: list[weakref.ref[Any]] = []
    accelerator = module.Accelerator
    real_init = accelerator.__init__

    @functools.wraps(real_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        real_init(self, *args, **kwargs)
        if not made:
            on_teardown(save)
        made.append(weakref.ref(self))

    def save() -> None:
        for reference in made:
            one = reference()
            if one is not None and one._models and not skip():
                _save(one)

    accelerator.__init__ = __init__


def _save(accelerator: Any) -> None:
    project = accelerator.project_configuration
    folder = project.project_dir or "."
    # Not among the numbered checkpoints, because `load_state` takes the last of them.
    unfinished = os.path.join(folder, _NAME + ".unfinished")
    if accelerator.is_local_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by an earlier stop that could not complete it
    accelerator.wait_for_everyone()
    numbered, project.automatic_checkpoint_naming = project.automatic_checkpoint_naming, False
    try:
        accelerator.save_state(unfinished)
    finally:
        project.automatic_checkpoint_naming = numbered
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process and os.path.isdir(unfinished):
        final = _next(os.path.join(folder, "checkpoints")) if numbered else os.path.join(folder, _NAME)
        if os.path.isdir(final):
            os.rename(final, final + ".old")
        os.rename(unfinished, final)
        shutil.rmtree(final + ".old", ignore_errors=True)


def _next(checkpoints: str) -> str:
    """The numbered path after the last one."""
    os.makedirs(checkpoints, exist_ok=True)
    names = [name.rpartition("_")[2] for name in os.listdir(checkpoints)]
    number = max((int(name) + 1 for name in names if name.isdecimal()), default=0)
    return os.path.join(checkpoints, f"checkpoint_{number}")
