"""A process group and an accelerator with faults, injected where torch meets them.

`faulty` is a backend that works (gloo does it) until it is shut down or aborted. The accelerator is the part of
`torch.cuda` through which a process asks whether it has one and waits for it. What happens there goes to stdout
as `<event> <detail> <monotonic time>`, so that tests can count it and put it in order.

FAULTS, comma-separated:
  busy            the device is busy until an abort: a thread that synchronizes waits in C++, the GIL released
  slow            the device is busy for a second after the first synchronize
  drain-raises    synchronize raises
  destroy-hangs   shutdown never returns
  destroy-gil     shutdown never returns and holds the GIL: no Python code of this process ever runs again
  destroy-raises  shutdown raises
  abort-hangs     abort never returns
  abort-raises    abort raises
  abort-together  an abort returns once two groups are being aborted, as NCCL's may (pytorch/pytorch#119797)
"""

import ctypes
import os
import threading
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo
from torch.distributed import distributed_c10d as c10d

FAULTS = set(filter(None, os.environ.get("FAULTS", "").split(",")))
DEVICES = {0, 1}  # initialised, out of three

_idle = torch.futures.Future()  # waited for in C++, where no signal handler gets in
_lock = threading.Lock()
_both = threading.Barrier(2)


def say(event, detail="-"):
    """One line on stdout."""
    os.write(1, f"{event} {detail} {time.monotonic():.6f}\n".encode())


def never():
    """Block for ever in C, the GIL released."""
    torch.futures.Future().wait()


def synchronize(device=None):
    """Wait for the device, for as long as it takes."""
    number = 0 if device is None else torch.device(device).index if not isinstance(device, int) else device
    if number not in DEVICES:
        say("initialised", number)
    if "drain-raises" in FAULTS:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if "busy" in FAULTS:
        _idle.wait()
    if "slow" in FAULTS:
        time.sleep(1)
    say("drained", number)


class Faulty(dist.ProcessGroup):
    """Gloo, until its end."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = ProcessGroupGloo(store, rank, size, timeout)
        self._name = "faulty"

    def getBackendName(self):
        """As torch asks for it."""
        return "faulty"

    def allreduce(self, *args):
        """Gloo's."""
        return self._gloo.allreduce(*args)

    def broadcast(self, *args):
        """Gloo's."""
        return self._gloo.broadcast(*args)

    def allgather(self, *args):
        """Gloo's."""
        return self._gloo.allgather(*args)

    def barrier(self, *args, opts=None):
        """Gloo's."""
        return self._gloo.barrier(*args, *([opts] if opts else []))

    def shutdown(self):
        """What `destroy_process_group` calls."""
        say("destroy", self.size())
        if "destroy-raises" in FAULTS:
            raise RuntimeError("NCCL error: unhandled system error")
        if "destroy-gil" in FAULTS:
            ctypes.PyDLL(None).sleep(3600)
        if "destroy-hangs" in FAULTS:
            never()

    def abort(self):
        """Release the threads that wait for the device."""
        say("abort", self.size())
        if "abort-raises" in FAULTS:
            raise RuntimeError("NCCL error: remote process exited")
        if "abort-hangs" in FAULTS:
            never()
        if "abort-together" in FAULTS:
            _both.wait()
        with _lock:
            if not _idle.done():
                _idle.set_result(None)
        say("aborted", self.size())


def install(accelerator=True):
    """Register the backend and, unless told not to, put the accelerator in place."""
    dist.Backend.register_backend("faulty", Faulty, devices=["cpu"])
    if not hasattr(dist.ProcessGroup, "shutdown"):  # torch before 2.7 shuts NCCL's down, and no others
        shut_down = c10d._shutdown_backend
        c10d._shutdown_backend = lambda group: (
            group.shutdown() if isinstance(group, Faulty) else shut_down(group)
        )
    if accelerator:
        torch.cuda.is_initialized = lambda: True
        torch.cuda.device_count = lambda: 3
        torch.cuda.current_device = lambda: 0
        torch.cuda.synchronize = synchronize
        if hasattr(torch, "accelerator"):  # 2.6
            torch.accelerator.synchronize = synchronize
        torch._C._cuda_hasPrimaryContext = lambda device: device in DEVICES
