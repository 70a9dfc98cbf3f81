"""FSDP2 that saves at an eviction: a callback writes a sharded checkpoint, and the loop does not change.

    torchrun --standalone --nproc-per-node 2 examples/fsdp_on_teardown.py --checkpoint /data/state

Evict any rank (SIGTERM): all ranks stop after the same step, and the callback runs on all of them with the process
group alive. Started again, with as many ranks or others, it goes on there.
"""

import argparse
import os
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import autoteardown


def batch_of(step: int) -> torch.Tensor:
    """Stands in for a data loader that can be put to any place."""
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="state")
    parser.add_argument("--steps", type=int, default=1_000_000)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0

    def state_at(step: int) -> dict:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}

    if os.path.isdir(options.checkpoint):
        state = state_at(0)
        dcp.load(state, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = int(state["step"])

    @autoteardown.on_teardown
    def save() -> None:
        # Not the loop's own variable: the step is over, the loop has not gone on yet.
        step = first + autoteardown.status()["steps"]
        unfinished = options.checkpoint + ".unfinished"
        dcp.save(state_at(step), checkpoint_id=unfinished)
        if rank == 0:
            shutil.rmtree(options.checkpoint, ignore_errors=True)
            os.rename(unfinished, options.checkpoint)

    for step in range(first, options.steps):
        batch = batch_of(step)
        loss = (model(batch) - batch).square().mean()
        print(f"rank {rank} step {step + 1} loss {loss.item():.6f}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
