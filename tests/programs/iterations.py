"""Training loops that step their optimizers as real ones do. `iterations.py KIND`; on eviction `record` prints how
often each optimizer has stepped, and a checksum of the parameters, which DDP keeps equal on all ranks.

one, two      one optimizer; two, one after the other
gan, critic   D and G in turn, each with its own backward; D five times for each G
inside        one optimizer a parameter, inside backward
zero          ZeroRedundancyOptimizer
closure       LBFGS
scaler        GradScaler, every third step skipped
accumulate    a step every third backward
freezes       two optimizers, one of which stops stepping
skips         as one; rank 0 has left one step out, long ago
late          as one; rank 0 is armed late
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as Ddp

kind = sys.argv[1]
steps = {}
counted = []


def record():
    """AUTOTEARDOWN_ON_TEARDOWN."""
    total = sum(float(p.detach().double().sum()) for p in parameters)
    print("record", sorted(steps.items()), f"{total:.12f}", flush=True)


def step(name, optimizer, closure=None):
    """One step, counted before it is over: there the stop may be."""
    steps[name] = steps.get(name, 0) + 1
    optimizer.step(*([closure] if closure else []))


if kind == "late" and os.environ["RANK"] == "0":
    from autoteardown.training import optimizer_hooks

    hooks = optimizer_hooks.OptimizerHooks
    optimizer_hooks.OptimizerHooks = lambda now_and_then: None
dist.init_process_group("gloo")
torch.manual_seed(0)
net, other = (Ddp(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))) for _ in range(2))
parameters = [*net.parameters(), *other.parameters()]
first, second = (torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9) for model in (net, other))
if kind == "closure":
    first = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=2)
if kind == "zero":
    from torch.distributed.optim import ZeroRedundancyOptimizer

    first = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.001)
if kind == "inside":
    one_each = {p: torch.optim.SGD([p], lr=0.001) for p in net.parameters()}

    def at_gradient(p):
        one_each[p].step()
        p.grad = None
        steps[id(p)] = steps.get(id(p), 0) + 1

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(at_gradient)
    print("inside", len(one_each), flush=True)
scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaler")


def loss_of(model):
    return model(torch.randn(4, 8)).square().mean()


def backward(model):
    model.zero_grad()
    loss_of(model).backward()


def closure():
    first.zero_grad()
    loss = loss_of(net)
    loss.backward()
    return loss


for iteration in range(10**6):
    time.sleep(0.01)
    if kind in ("gan", "critic"):
        for _ in range(5 if kind == "critic" else 1):
            backward(net)
            step("D", first)
        backward(other)
        step("G", second)
    elif kind == "closure":
        step("first", first, closure)
    elif kind == "scaler":
        first.zero_grad()
        loss = loss_of(net) * (float("inf") if iteration % 3 == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(first)
        scaler.update()
    elif kind == "accumulate":
        for _ in range(3):
            loss_of(net).backward()
        step("first", first)
        first.zero_grad()
    elif kind == "inside":
        loss_of(net).backward()
    elif kind == "two" or (kind == "freezes" and iteration < 15):
        net.zero_grad()
        other.zero_grad()
        (loss_of(net) + loss_of(other)).backward()
        step("first", first)
        step("second", second)
    else:
        backward(net)
        if kind == "skips" and iteration == 5 and dist.get_rank() == 0:
            with torch.no_grad():  # by hand: what the optimizer would have done
                for p in net.parameters():
                    state = first.state[p]
                    state["momentum_buffer"].mul_(0.9).add_(p.grad)
                    p.sub_(state["momentum_buffer"], alpha=0.001)
            steps["first"] += 1
        else:
            step("first", first)
    if kind == "late" and iteration == 20 and dist.get_rank() == 0:
        hooks(lambda: None)
    print("iteration", iteration, flush=True)
