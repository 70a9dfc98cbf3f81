"""The handler that training scripts carry: drain, destroy, exit 0, each step guarded. The drill's control."""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType


def on_signal(signum: int, frame: FrameType | None) -> None:
    """Drain the device, leave the process group, exit."""
    import torch
    import torch.distributed as dist

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        traceback.print_exc()
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
    sys.exit(0)


def install() -> None:
    """Install it, as a script does at its top."""
    signal.signal(signal.SIGTERM, on_signal)
