"""A simulated accelerator with NCCL's semantics, for ranks on a machine without any.

`install()` makes it torch's accelerator: the device "simulated", the module `torch.simulated`, the communication
backend "simulated". Its tensors are computed by threads of the device, in the order of their streams, while the host
runs ahead; its collectives wait on the device for all ranks; nothing of it holds the GIL. It faults as NVLink does when
a peer's memory goes away under a running kernel, and says so in the journal, a file that all ranks append to.

Environment (all with the prefix `SIMULATED_`):
    JOURNAL         path of the journal; its lines are "<time.monotonic()> <pid> <what happened>"
    QUEUE           launches that a stream holds before the host waits (1024)
    LINK            `nvlink`: memory of a peer that goes away under a running kernel is a fault; `net`: the kernel waits
    REMOTE_ERRORS   `1`: the watchdog ends a process whose peer has died
    TAIL_MS         how much longer this rank's collectives run than the others'
    ABORT_MS        what an abort takes after its kernels have ended and before it frees memory (20)
    VERBOSE         `1`: the journal has the start of each collective's kernel
    BLOCKING_WAIT   `1`: `Work.wait` blocks the host
"""

import contextlib
import importlib.util
import json
import sys
import types

extension = None


def install(waitable=True):
    """Load it into this process (it must have been built) and make it torch's accelerator.

    Args:
        waitable: False leaves torch without anything to wait with: a vendor's module may lack it.
    """
    global extension
    import torch
    import torch.distributed as dist

    from . import build

    spec = importlib.util.spec_from_file_location(build.NAME, build.build())
    extension = importlib.util.module_from_spec(spec)
    torch.utils.rename_privateuse1_backend("simulated")
    spec.loader.exec_module(extension)
    torch._register_device_module("simulated", _module(torch, waitable))
    if not waitable:
        del torch.accelerator.synchronize
    # Where torch keeps the flight recorders of its own backends, and in their format.
    torch._C._distributed_c10d._dump_simulated_trace_json = _dump_trace
    dist.Backend.register_backend("simulated", extension.create, extended_api=True, devices=["simulated"])
    return sys.modules["torch.simulated"]


def _dump_trace(includeCollectives=True, onlyActive=False):
    """The flight recorder: an entry for each of the last collectives, and each group's counters."""
    status = {
        str(number): {"last_enqueued_collective": str(launched), "last_completed_collective": str(ended)}
        for number, (launched, ended) in enumerate(extension.counters())
    }
    trace = {"version": "2.10", "pg_status": status}
    if includeCollectives:
        trace["entries"] = [
            {
                "pg_id": number,
                "process_group": [name, ""],
                "profiling_name": f"simulated:{op.lower()}",
                "collective_seq_id": seq,
                "is_p2p": False,
                "retired": False,
                "state": state,
            }
            for number, name, op, seq, state in extension.records()
            if state != "completed" or not onlyActive
        ]
    return json.dumps(trace).encode()


def split_group(ranks):
    """`torch.distributed.split_group` into one group; it finds no options at a backend that Python did not define."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import Backend

    return dist.split_group(split_ranks=[ranks], pg_options=Backend.Options("simulated"))


def _module(torch, waitable):
    module = types.ModuleType("torch.simulated")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module._is_in_bad_fork = lambda: False
    module._lazy_init = extension.initialize
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.empty_cache = lambda: None
    module.memory_allocated = module.max_memory_allocated = lambda device=None: 0
    module.device = contextlib.nullcontext
    module.Event = lambda **options: torch.Event(device="simulated", **options)
    module.Stream = lambda device=None, priority=0, **options: torch.Stream(device="simulated", **options)
    module.current_stream = lambda device=None: torch.accelerator.current_stream("simulated")
    module.set_stream = torch.accelerator.set_stream
    module.stream = _stream
    module.graph = Graph
    module.compute = extension.compute
    if waitable:
        module.is_initialized = extension.is_initialized
        module.synchronize = lambda device=None: extension.synchronize()
    return module


@contextlib.contextmanager
def _stream(stream):
    import torch

    before = torch.accelerator.current_stream("simulated")
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


class Graph:
    """Records what is launched in its `with` block; `replay` launches it."""

    def __enter__(self):
        extension.begin_capture()
        return self

    def __exit__(self, *error):
        self._number = extension.end_capture()

    def replay(self):
        extension.replay(self._number)


class Device:
    """One job's accelerators as its test sees them: the settings for its ranks, and what they journalled."""

    def __init__(self, folder):
        self.path = folder / "journal"
        self.expected = []  # faults that the test has provoked

    def settings(self, **settings):
        """The environment of a rank: `link="net"` is SIMULATED_LINK=net."""
        named = {f"SIMULATED_{name.upper()}": value for name, value in settings.items()}
        return {"SIMULATED_JOURNAL": str(self.path), **named}

    @property
    def journal(self):
        """What happened, in order: time (of `time.monotonic`), pid, text."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        parts = [line.split(" ", 2) for line in lines]
        return sorted((float(time), int(pid), text) for time, pid, text in parts)

    def times_of(self, text, pid=None):
        """The times at which something that contains `text` happened (in that process)."""
        return [time for time, by, what in self.journal if text in what and pid in (None, by)]

    @property
    def faults(self):
        return [(pid, text) for _, pid, text in self.journal if text.startswith("FAULT")]

    def transcript(self):
        """The journal, for a failure message."""
        return "\n".join(f"{time:.3f} {pid} {text}" for time, pid, text in self.journal)
