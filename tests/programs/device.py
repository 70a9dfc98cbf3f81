"""Ranks on the simulated accelerator. `device.py ROLE [OPTIONS]`; prints `ready` when it is there.

idle      stay in a Python loop
train     train with DDP, the host ahead of the device; prints `step K`
spin      this rank's device is busy with a kernel of its own for an hour
stuck     wait on the device for a collective that the ranks in --absent do not join
flight    destroy the group with such a collective in flight
alone     a kernel of --ms, then idle: no collective at all
capture   stop in the capture of a graph
replay    replay a captured step for ever
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

import simulated_accelerator
import torch
import torch.distributed as dist

import autoteardown

parser = argparse.ArgumentParser()
parser.add_argument("role")
parser.add_argument("--ms", type=float, default=20, help="what a step takes on the device")
parser.add_argument("--ahead", type=int, default=10, help="steps that the host may be ahead of the device")
parser.add_argument("--kind", default="ddp", choices=["ddp", "fsdp2"])
parser.add_argument("--absent", default="", help="ranks that stop launching, separated by commas")
parser.add_argument("--from", dest="since", type=int, default=5, help="the step from which they do")
parser.add_argument("--wait", type=int, default=0, help="synchronise after every so many steps")
parser.add_argument(
    "--pause", type=float, default=0, help="seconds of Python before a rank of `stuck` launches"
)
parser.add_argument(
    "--groups", action="store_true", help="a second group, and one split off, that work in each step"
)
parser.add_argument("--timeout", type=float, default=1800, help="the group's, in seconds")
parser.add_argument(
    "--late", type=int, default=0, help="optimizer steps that this rank leaves out before it trains on"
)
parser.add_argument(
    "--loop", action="store_true", help="a rank of `stuck` does not wait for what it has launched"
)
parser.add_argument("--unwaitable", action="store_true")
options = parser.parse_args()
rank = int(os.environ["RANK"])
absent = rank in [int(each) for each in options.absent.split(",") if each]
device = simulated_accelerator.install(waitable=not options.unwaitable)
extension = simulated_accelerator.extension


@autoteardown.on_teardown
def look():
    """On the way out, after the drain: what is still to be done."""
    print("pending", extension.pending(), flush=True)


def say(*words):
    """One line, at once."""
    print(*words, flush=True)


def loop():
    """For ever, in Python."""
    while True:
        time.sleep(0.01)


def model_of(kind):
    """Something to train."""
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(
        "simulated"
    )
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(layers)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("simulated", (dist.get_world_size(),))
    for layer in (layers[0], layers[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(layers, mesh=mesh)


def train(groups):
    """For ever, too."""
    torch.manual_seed(0)
    model = model_of(options.kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    marks, step = [], 0
    while True:
        if absent and step == options.since:
            say("absent")
            loop()
        device.compute(options.ms)
        loss = model(torch.randn(8, 16).to("simulated")).square().mean()
        loss.backward()
        for group in groups:
            dist.all_reduce(torch.ones(16, device="simulated"), group=group)
        if step >= options.late:
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        marks.append(torch.Event(device="simulated"))
        marks[-1].record()
        say("step", step)
        if options.wait and step % options.wait == 0:
            say("waiting", step)
            extension.synchronize()
        while len(marks) > options.ahead:
            if marks[0].query():
                marks.pop(0)
            else:
                time.sleep(0.001)


def graph(ones):
    """A step that is captured once, and replayed."""
    captured = device.graph()
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
            extension.synchronize()
            say("replayed", replays)


def main():
    """Play the role."""
    timeout = datetime.timedelta(seconds=options.timeout)
    dist.init_process_group("simulated", device_id=torch.device("simulated:0"), timeout=timeout)
    ones = torch.ones(16, device="simulated")
    dist.all_reduce(ones)
    everybody = list(range(dist.get_world_size()))
    groups = []
    if options.groups:
        groups = [dist.new_group(everybody), simulated_accelerator.split_group(everybody)]
    for group in groups:
        dist.all_reduce(ones, group=group)
    extension.synchronize()
    say("ready")
    if options.role == "train":
        train(groups)
    if options.role in ("capture", "replay"):
        graph(ones)
    if options.role == "alone" or (options.role == "spin" and not absent):
        device.compute(options.ms if options.role == "alone" else 3.6e6)
        say("launched")
    if options.role in ("stuck", "flight") and not absent:
        time.sleep(options.pause)
        for group in groups or [None]:
            dist.all_reduce(ones, group=group)
        say("waiting")
        if options.loop:
            loop()
        if options.role == "flight":
            dist.destroy_process_group()
        extension.synchronize()
        say("garbage")
    loop()


if __name__ == "__main__":
    main()
