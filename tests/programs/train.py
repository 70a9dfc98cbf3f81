"""A usual training script, without code for evictions.

Prints `rank R pid P step K` after every step, and `rank R done` at its end.
"""

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Noise(torch.utils.data.Dataset):
    """Samples made up on the spot."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, index):
        return torch.full((4,), float(index % 7))


def batches(options):
    """Endless batches, from a DataLoader with workers where they are asked for."""
    if not options.workers:
        while True:
            yield torch.randn(2, 4)
    loader = torch.utils.data.DataLoader(
        Noise(), batch_size=2, num_workers=options.workers, multiprocessing_context=options.context
    )
    yield from loader


def parameters(model):
    """Halves of a model, for two optimizers."""
    params = list(model.parameters())
    return params[:2], params[2:]


def main():
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="ddp")
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--sleep", type=float, default=0.005, help="what a step takes beside the optimizer")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--context", default="fork")
    parser.add_argument("--leave", action="store_true", help="end without destroying the group")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    if options.kind == "fsdp2":
        from fsdp import fully_shard

        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    if options.kind == "lbfgs":
        optimizers = [torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)]
    elif options.kind == "two":
        optimizers = [torch.optim.SGD(half, lr=0.01) for half in parameters(model)]
    else:
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01)]
    scaler = torch.amp.GradScaler("cpu", enabled=options.kind == "scaler")
    often = 3 if options.kind == "accumulate" else 1

    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    step = 0
    for number, batch in enumerate(batches(options)):
        time.sleep(options.sleep)
        if options.kind == "lbfgs":
            optimizers[0].step(closure)
        else:
            loss = model(batch).square().mean() / often
            if options.kind == "scaler" and step % 2:
                loss = loss * float("inf")  # every other step is skipped by the scaler
            scaler.scale(loss).backward()
            if (number + 1) % often:
                continue
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        step += 1
        sys.stdout.write(
            f"rank {rank} pid {os.getpid()} step {step}\n"
        )  # one write: ranks share a launcher's stdout
        sys.stdout.flush()
        if step == options.steps:
            break
    # A moment for gloo's threads to drop what they hold of Python: otherwise torch 2.13 deadlocks now and then when
    # the model, the last owner of the group, goes (its destructor joins those threads with the GIL held).
    time.sleep(0.1)
    if not options.leave:
        dist.destroy_process_group()
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main()
