"""Ranks on torch's own ProcessGroupNCCL, one device each: `program.py ROLE [OPTIONS]`; prints `ready` when it is there.

idle      stay in a Python loop
train     train for --steps, or for ever; prints `step K`, and at the end leaves its losses and weights in --out
stuck     launch an all_reduce that the ranks in --absent do not join, and wait for it as --wait says
finish    launch --launches all_reduces that all ranks join, each after --ms of work, and wait as --wait says
blocked   wait in C++ for a key that nobody sets, with an idle device
broken    the devices of the ranks in --absent fail an assertion after --ms; all wait in a loop

Whatever comes back from a wait for a collective that never completes prints `garbage`.
"""

import argparse
import datetime
import importlib
import os
import threading
import time

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("role")
parser.add_argument("--absent", default="", help="ranks that join in nothing more, separated by commas")
parser.add_argument("--ahead", type=int, default=20, help="steps that the host may be ahead of the device")
parser.add_argument("--construct", action="store_true", help="wait in DDP's constructor")
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
parser.add_argument(
    "--good", type=int, default=0, help="all_reduces that all join, before the one that some do not"
)
parser.add_argument("--groups", type=int, default=0, help="further groups of all ranks")
parser.add_argument("--kind", default="ddp", choices=["ddp", "fsdp2"])
parser.add_argument("--launches", type=int, default=20)
parser.add_argument("--lazy", action="store_true", help="the group is not bound to its device")
parser.add_argument("--ms", type=float, default=20, help="what a step takes on the device")
parser.add_argument("--optimizer", default="sgd", choices=["sgd", "momentum", "adamw"])
parser.add_argument("--out", default="")
parser.add_argument("--steps", type=int, default=0)
parser.add_argument("--thread", action="store_true", help="not on the main thread, which waits for that one")
parser.add_argument(
    "--wait", default="synchronize", choices=["synchronize", "item", "work", "loop", "destroy"]
)
options = parser.parse_args()

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
absent = rank in [int(each) for each in options.absent.split(",") if each]
cuda = options.device == "cuda"
device = torch.device("cuda", rank) if cuda else torch.device("cpu")


def say(*words):
    """One line, at once."""
    print(*words, flush=True)


def loop():
    """For ever, in Python."""
    while True:
        time.sleep(0.01)


def compute(milliseconds):
    """Keep the device busy: its clock has a cycle a nanosecond."""
    if cuda:
        torch.cuda._sleep(int(milliseconds * 1e6))


def wait_for(work, tensor):
    """As --wait says; may never return."""
    say("waiting")
    if options.wait == "loop":
        loop()
    elif options.wait == "destroy":
        dist.destroy_process_group()
    elif options.wait == "item":
        tensor.sum().item()
    else:
        if options.wait == "work":
            work.wait()
        torch.cuda.synchronize()


def stuck(groups):
    """What never completes."""
    ones = torch.ones(16, device=device)
    for _ in range(options.good):
        compute(options.ms)
        dist.all_reduce(ones)
    if absent:
        say("absent")
        loop()
    if options.construct:
        importlib.import_module("torch._dynamo")  # as DDP's constructor does, which takes seconds
        say("waiting")
        model_of()
    for group in groups:
        work = dist.all_reduce(ones, group=group, async_op=options.wait == "work")
    wait_for(work, ones)
    say("garbage", ones[0].item())
    loop()


def finish():
    """A healthy program at its end, with its device behind."""
    ones = torch.ones(16, device=device)
    time.sleep(0.5)  # the watchdog has seen what came before
    for _ in range(options.launches):
        compute(options.ms)
        work = dist.all_reduce(ones, async_op=options.wait == "work")
    wait_for(work, ones)
    say("finished")
    loop()


def broken():
    """A device error that stays; torch's watchdog ends the process when it sees one."""
    if absent:
        zero = torch.zeros(1, device=device)
        compute(options.ms)
        torch._assert_async(zero)
    say("launched")
    loop()


def blocked():
    """No Python signal handler runs here."""
    say("waiting")
    dist.distributed_c10d._get_default_store().wait(["never"], datetime.timedelta(hours=1))


def model_of():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(device)
    if options.kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def train():
    """For --steps, or for ever; the inputs are on the device, so that the host gets ahead of it."""
    model = model_of()
    parameters = model.parameters()
    optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
        "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01),
    }[options.optimizer]()
    torch.manual_seed(1 + rank)
    inputs = torch.randn(8, 16).to(device)
    losses, marks, step = [], [], 0
    while not options.steps or step < options.steps:
        loss = model(inputs).square().mean()
        compute(options.ms)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        say("step", step)
        if cuda:
            marks.append(torch.cuda.Event())
            marks[-1].record()
            while marks and marks[0].query():
                marks.pop(0)
            say("ahead", len(marks))
            while len(marks) >= options.ahead:
                time.sleep(0.001)
                if marks[0].query():
                    marks.pop(0)
    weights = [each.detach().cpu() for each in model.parameters()]
    torch.save({"losses": [each.item() for each in losses], "weights": weights}, f"{options.out}-{rank}")
    say("trained")


def main():
    """Play the role."""
    if cuda:
        torch.cuda.set_device(device)
    bound = None if options.lazy or not cuda else device
    dist.init_process_group(
        "nccl" if cuda else "gloo", device_id=bound, timeout=datetime.timedelta(minutes=30)
    )
    groups = [None, *(dist.new_group(list(range(size))) for _ in range(options.groups))]
    for group in groups:
        dist.all_reduce(torch.ones(16, device=device), group=group)
    if cuda:
        torch.cuda.synchronize()
    say("ready")
    role = {
        "idle": loop,
        "train": train,
        "stuck": lambda: stuck(groups),
        "finish": finish,
        "blocked": blocked,
        "broken": broken,
    }
    if options.thread:
        thread = threading.Thread(target=role[options.role])
        thread.start()
        thread.join()
    else:
        role[options.role]()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
