"""Ranks on an accelerator: `device.py ROLE [OPTIONS]`; prints `ready` when it is there.

idle      stay in a Python loop
train     train, the host ahead of the device; prints `step K`
stuck     wait on the device for a collective that the ranks in --absent do not join
flight    destroy the group with such a collective in flight
spin      a device that is busy with a kernel of the program's own for an hour
capture   stop in the capture of a graph
replay    replay a captured step for ever
pipeline  send to the next rank and receive from the one before, for ever
none      gloo, and no device at all

The accelerator is the simulated one, or the first NVIDIA GPU (`--device cuda`), which all ranks share.
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import autoteardown

parser = argparse.ArgumentParser()
parser.add_argument("role")
parser.add_argument("--device", default="simulated", choices=["simulated", "cuda"])
parser.add_argument("--ms", type=float, default=20, help="what a step takes on the device")
parser.add_argument("--ahead", type=int, default=10, help="steps that the host may be ahead of the device")
parser.add_argument("--kind", default="ddp", choices=["ddp", "fsdp2"])
parser.add_argument("--absent", default="", help="ranks that stop launching, separated by commas")
parser.add_argument("--from", dest="since", type=int, default=5, help="the step from which they do")
parser.add_argument("--wait", type=int, default=0, help="synchronise after every so many steps")
parser.add_argument(
    "--backward", action="store_true", help="a step spends its time in backward; says when it begins"
)
parser.add_argument(
    "--loop", action="store_true", help="a rank of `stuck` does not wait for what it has launched"
)
parser.add_argument(
    "--groups", action="store_true", help="a second group, and one split off, that work in each step"
)
parser.add_argument("--timeout", type=float, default=1800, help="the group's, in seconds")
parser.add_argument(
    "--late", type=int, default=0, help="optimizer steps that this rank leaves out before it trains on"
)
parser.add_argument("--lazy", action="store_true", help="the group is not bound to its device")
parser.add_argument("--backend", default="")
parser.add_argument("--unwaitable", action="store_true")
options = parser.parse_args()
rank = int(os.environ["RANK"])
absent = rank in [int(each) for each in options.absent.split(",") if each]


class Simulated:
    """tests/simulated_accelerator."""

    name = backend = "simulated"

    def __init__(self):
        sys.path.insert(1, str(Path(__file__).parents[1]))
        import simulated_accelerator

        self._module = simulated_accelerator
        self._device = simulated_accelerator.install(waitable=not options.unwaitable)
        self.compute = self._device.compute
        self.synchronize = simulated_accelerator.extension.synchronize
        self.split = simulated_accelerator.split_group
        self.capture = self._device.graph

    def unused(self):
        """Whether nobody has initialised the device."""
        return not self._module.extension.is_initialized()

    def describe(self):
        """What there is to be seen on the way out."""
        return f"pending {self._module.extension.pending()}"


class Cuda:
    """The first GPU."""

    name, backend = "cuda", "nccl"

    def __init__(self):
        # NCCL refuses two ranks of one host on one GPU, and tells hosts apart by this: they then talk over the loopback
        # network (NVIDIA/nccl, src/init.cc).
        settings = {
            "HOSTID": f"rank{rank}",
            "NET": "Socket",
            "SOCKET_IFNAME": "lo",
            "IB_DISABLE": "1",
            "MAX_CTAS": "2",
        }
        for name, value in {**settings, "NVLS_ENABLE": "0", "RAS_ENABLE": "0"}.items():
            os.environ.setdefault(f"NCCL_{name}", value)
        self.synchronize = torch.cuda.synchronize

    def compute(self, milliseconds):
        """A kernel of that length, about, at the clocks that data centre GPUs have."""
        cycles = milliseconds * 1.5e6
        while cycles > 0:
            torch.cuda._sleep(int(min(cycles, 1 << 30)))
            cycles -= 1 << 30

    def split(self, ranks):
        """A group with a communicator split off the default one's."""
        return dist.split_group(split_ranks=[ranks])

    def capture(self):
        """A graph."""
        return CapturedCuda()

    def unused(self):
        """torch's own flag says what torch has done, and not what there is."""
        return not torch._C._cuda_hasPrimaryContext(0)

    def describe(self):
        """As above."""
        return f"free {torch.cuda.mem_get_info()[0] // 2**20}" if torch.cuda.is_initialized() else "unused"


class CapturedCuda:
    """torch.cuda.graph, with `replay` on it."""

    def __enter__(self):
        self._graph = torch.cuda.CUDAGraph()
        self._context = torch.cuda.graph(self._graph)
        self._context.__enter__()
        self.replay = self._graph.replay
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)


device = {"simulated": Simulated, "cuda": Cuda}[options.device]()


def say(*words):
    """One line, at once."""
    print(*words, flush=True)


@autoteardown.on_teardown
def look():
    """On the way out, after the drain."""
    say(device.describe())
    say("unused", device.unused())


def loop():
    """For ever, in Python."""
    while True:
        time.sleep(0.01)


class Slow(torch.autograd.Function):
    """Takes its time in backward."""

    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, gradient):
        say("backward")
        device.compute(options.ms)
        return gradient.clone()


def model_of(kind):
    """Something to train."""
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(
        device.name
    )
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(layers)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.name, (dist.get_world_size(),))
    for layer in (layers[0], layers[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(layers, mesh=mesh)


def train(groups):
    """For ever, too."""
    torch.manual_seed(0)
    model = model_of(options.kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    # On the device already: a copy from pageable memory would have the host wait for its device in each step.
    inputs = torch.randn(8, 16).to(device.name)
    marks, step = [], 0
    while True:
        if absent and step == options.since:
            say("absent")
            loop()
        out = model(inputs)
        if options.backward:
            out = Slow.apply(out)
        else:
            device.compute(options.ms)
        out.square().mean().backward()
        for group in groups:
            dist.all_reduce(torch.ones(16, device=device.name), group=group)
        if step >= options.late:
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        marks.append(torch.Event(device=device.name))
        marks[-1].record()
        say("step", step)
        if options.wait and step % options.wait == 0:
            say("waiting", step)
            device.synchronize()
        while marks and marks[0].query():
            marks.pop(0)
        say("ahead", len(marks))
        while len(marks) > options.ahead:
            if marks[0].query():
                marks.pop(0)
            else:
                time.sleep(0.001)


def graph(ones):
    """A step that is captured once, and replayed."""
    captured = device.capture()
    with captured:
        device.compute(options.ms)
        dist.all_reduce(ones)
        if options.role == "capture":
            say("capturing")
            loop()
    say("replaying")
    replays = 0
    while True:
        captured.replay()
        replays += 1
        if replays % 10 == 0:
            device.synchronize()
            say("replayed", replays)


def pipeline(ones):
    """Between single peers there are communicators of their own."""
    size, turns = dist.get_world_size(), 0
    received = torch.empty_like(ones)
    while True:
        operations = [
            dist.P2POp(dist.isend, ones, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        turns += 1
        if turns % 10 == 0:
            device.synchronize()
            say("turns", turns)


def stuck(groups, ones):
    """What never completes."""
    for group in groups or [None]:
        dist.all_reduce(ones, group=group)
    say("waiting")
    if options.loop:
        loop()
    if options.role == "flight":
        dist.destroy_process_group()
    device.synchronize()
    say("garbage")


def main():
    """Play the role."""
    timeout = datetime.timedelta(seconds=options.timeout)
    if options.role == "none":
        dist.init_process_group("gloo")
        say("ready")
        loop()
    if options.device == "cuda":
        torch.cuda.set_device(0)
    bound = None if options.lazy else torch.device(device.name, 0)
    say("joining")
    dist.init_process_group(options.backend or device.backend, device_id=bound, timeout=timeout)
    ones = torch.ones(16, device=device.name)
    dist.all_reduce(ones)
    if "gloo" in options.backend:
        dist.all_reduce(torch.ones(4))
    everybody = list(range(dist.get_world_size()))
    groups = []
    if options.groups:
        groups = [dist.new_group(everybody), device.split(everybody)]
    for group in groups:
        dist.all_reduce(ones, group=group)
    device.synchronize()
    say("ready")
    if options.role == "train":
        train(groups)
    if options.role in ("capture", "replay"):
        graph(ones)
    if options.role == "pipeline":
        pipeline(ones)
    if options.role == "spin" and not absent:
        device.compute(3.6e6 if options.device == "simulated" else 120e3)
        say("launched")
    if options.role in ("stuck", "flight") and not absent:
        stuck(groups, ones)
    loop()


if __name__ == "__main__":
    main()
