"""DDP that saves at an eviction: one line in the loop asks whether a stop is requested.

    torchrun --standalone --nproc-per-node 2 examples/ddp_stop_requested.py --checkpoint /data/state.pt

Evict any rank (SIGTERM): all ranks leave the loop after the same step, rank 0 saves. Started again, it goes on there.
Without the agent `stop_requested()` is False.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import autoteardown


def batch_of(step: int, rank: int) -> torch.Tensor:
    """Stands in for a data loader that can be put to any place."""
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1000 * step + rank))


def save(state: dict, path: str) -> None:
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="state.pt")
    parser.add_argument("--steps", type=int, default=1_000_000)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    if os.path.exists(options.checkpoint):
        state = torch.load(options.checkpoint)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    while step < options.steps:
        batch = batch_of(step, rank)
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        print(f"rank {rank} step {step} loss {loss.item():.6f}", flush=True)
        if autoteardown.stop_requested():
            if rank == 0:
                state = {
                    "model": model.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                save(state, options.checkpoint)
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
