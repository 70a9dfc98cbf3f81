"""A training script whose `on_teardown` callback saves. `on_teardown.py HOW`, into the folder `saved`. HOW:

torch     `torch.save` on each rank
fsdp      `dcp.save` of an FSDP2 model and its optimizer, with `get_state_dict`
async     `dcp.async_save` of it; the future is not waited for
fails     raises
hangs     never returns
named     no callback is registered: `AUTOTEARDOWN_ON_TEARDOWN` names `save`
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import autoteardown

how = [*sys.argv, "torch"][1]
folder = Path("saved")
step = 0
model = optimizer = None


def make(sharded=True):
    """Model and optimizer, the same on each rank."""
    global model, optimizer
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def one_step(number):
    """A step that depends on its number only."""
    generator = torch.Generator().manual_seed(number)
    batch = torch.randn(8, 16, generator=generator)
    optimizer.zero_grad()
    loss = (model(batch) - batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def save():
    """What the callback does."""
    done = autoteardown.status()["steps"]
    print(f"callback {dist.get_rank()} {done}", flush=True)
    if how == "fails":
        raise OSError(28, "No space left on device")
    if how == "hangs":
        time.sleep(3600)
    folder.mkdir(exist_ok=True)
    if how in ("fsdp", "async"):
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": state, "step": torch.tensor(done)}
        (dcp.async_save if how == "async" else dcp.save)(content, checkpoint_id=folder / "dcp")
    else:
        torch.save({"model": model.state_dict(), "step": done}, folder / f"{dist.get_rank()}.pt")
    print("saved", flush=True)


def main():
    """Train for ever."""
    global step
    sharded = how in ("fsdp", "async")
    dist.init_process_group("cpu:gloo")
    make(sharded)
    if how != "named":
        autoteardown.on_teardown(save)
    while True:
        one_step(step)
        dist.barrier()
        step += 1
        print("step", step, flush=True)


def compare():
    """Whether what was saved is what an uninterrupted run has after as many steps; then whether it goes on so."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    make()
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": torch.tensor(0)}
    dcp.load(content, checkpoint_id=folder / "dcp")
    done = int(content["step"])
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    resumed = [one_step(number).item() for number in range(done, done + 3)]
    make()
    uninterrupted = [one_step(number).item() for number in range(done + 3)]
    torch.testing.assert_close(resumed, uninterrupted[done:], rtol=1e-4, atol=1e-6)
    print("as uninterrupted", done, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    compare() if how == "compare" else main()
