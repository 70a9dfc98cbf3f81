"""Hugging Face Trainer (and TRL): writes the Trainer's checkpoint at an eviction, with `AUTOTEARDOWN_CHECKPOINT=on`.

1. The hook at the end of each step calls `stop_requested()`, so every rank saves at the same step.
2. The Trainer writes its usual, resumable checkpoint. Until it is complete, it has a name that no run resumes from.
3. After that the program exits: the code after `trainer.train()` would take a half-trained model for the result.
"""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_UNFINISHED = "unfinished-checkpoint"
in_use = False
"""Whether a Trainer trains in this process; no other integration has to save then."""


def patch(module: ModuleType, stop_requested: Callable[[], bool], exit_code: Callable[[], int]) -> None:
    """Hook `transformers.trainer`.

    Args:
        module: the module, just imported.
        stop_requested: returns whether the program should save and exit, the same on all ranks.
        exit_code: returns the exit code of this rank.
    """
    trainer, handler = module.Trainer, module.CallbackHandler
    stopping = False

    real_step_end = handler.on_step_end

    @functools.wraps(real_step_end)
    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal stopping
        control = real_step_end(self, *args, **kwargs)
        if stop_requested():
            stopping = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    real_save = trainer._save_checkpoint

    @functools.wraps(real_save)
    def _save_checkpoint(self: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if not stopping:
            return real_save(self, model, trial, *args, **kwargs)
        with _unfinished(module) as final:
            result = real_save(self, model, trial, *args, **kwargs)
        self.accelerator.wait_for_everyone()
        folder, step = self._get_output_dir(trial), self.state.global_step
        written = os.path.join(folder, f"{_UNFINISHED}-{step}")
        if self.args.should_save and not os.path.exists(os.path.join(folder, f"{final}-{step}")):
            os.rename(written, os.path.join(folder, f"{final}-{step}"))
        self.accelerator.wait_for_everyone()
        return result

    real_train = trainer.train

    @functools.wraps(real_train)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        global in_use
        in_use = True
        result = real_train(self, *args, **kwargs)
        if stopping:
            raise SystemExit(exit_code())
        return result

    handler.on_step_end = on_step_end
    trainer._save_checkpoint = _save_checkpoint
    trainer.train = train


@contextmanager
def _unfinished(module: Any) -> Iterator[str]:
    """Inside the block, checkpoints get a name that `get_last_checkpoint` does not recognize; yields the usual name."""
    usual: str = module.PREFIX_CHECKPOINT_DIR
    module.PREFIX_CHECKPOINT_DIR = _UNFINISHED
    try:
        yield usual
    finally:
        module.PREFIX_CHECKPOINT_DIR = usual
