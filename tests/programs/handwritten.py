"""The SIGTERM handler that training scripts carry: drain, destroy, exit, each step guarded. The tests' control."""

import runpy
import signal
import sys
import traceback


def handler(signum, frame):
    """Leave the group on the way out."""
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


def install():
    """Install it, as a script does at its top."""
    signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":  # handwritten.py SCRIPT [ARG]...
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
