"""Lightning: writes a checkpoint at an eviction, with `AUTOTEARDOWN_CHECKPOINT=on`.

1. Lightning's own SIGTERM handler already runs on every rank after the same iteration, and ends the loop at the end of
   the batch. But it writes no checkpoint, unless a callback of the program does.
2. The checkpoint goes where Lightning puts that of an interrupted SLURM job (`hpc_ckpt_1.ckpt` in `default_root_dir`),
   and is written atomically. `trainer.fit(ckpt_path="last")` finds it there if it is the latest.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def patch(module: ModuleType) -> None:
    """Hook `lightning.pytorch.loops.training_epoch_loop`, or the same of `pytorch_lightning`."""
    loop, interrupted = module._TrainingEpochLoop, module.SIGTERMException
    real_advance_end = loop.on_advance_end

    @functools.wraps(real_advance_end)
    def on_advance_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return real_advance_end(self, *args, **kwargs)
        except interrupted:
            _save(self.trainer)
            raise

    loop.on_advance_end = on_advance_end


def patch_resume(module: ModuleType) -> None:
    """Hook `lightning.pytorch.trainer.connectors.checkpoint_connector`, or the same of `pytorch_lightning`."""
    connector = module._CheckpointConnector
    real_parse = connector._parse_ckpt_path

    @functools.wraps(real_parse)
    def _parse_ckpt_path(self: Any, state_fn: Any, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        found = real_parse(self, state_fn, ckpt_path, *args, **kwargs)
        return _latest(found, self._hpc_resume_path) if ckpt_path == "last" else found

    connector._parse_ckpt_path = _parse_ckpt_path


def _latest(found: Any, hpc: str | None) -> Any:
    if found is None or hpc is None or not (os.path.exists(found) and os.path.exists(hpc)):
        return found or hpc
    return max(found, hpc, key=os.path.getmtime)


def _save(trainer: Any) -> None:
    trainer.save_checkpoint(
        _agreed(trainer, trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
    )


def _agreed(trainer: Any, path: str) -> str:
    """The first rank's path on all ranks: another rank may choose the next number if the first has begun to write."""
    return str(trainer.strategy.broadcast(path))
