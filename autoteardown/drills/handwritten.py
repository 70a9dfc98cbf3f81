"""A SIGTERM handler as training scripts have it (drain, destroy, exit 0), which the drill compares the agent with."""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType


def on_signal(signum: int, frame: FrameType | None) -> None:
    """Drain the device, destroy the process group, exit with 0; each step catches its errors."""
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
    """Install the handler, as a script does at its top."""
    signal.signal(signal.SIGTERM, on_signal)
