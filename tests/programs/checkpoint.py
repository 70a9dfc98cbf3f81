"""A training script that saves. `checkpoint.py HOW [SECONDS]`, into the folder `saved`. HOW:

every     `torch.save` after every step, plainly, by rank 0
path      one `torch.save` to a path, of a tensor whose pickling takes SECONDS
file      the same into an open file
protect   one file written by hand within `autoteardown.protect()`, in SECONDS
nested    as `protect`, within another `protect`
dcp       one `torch.distributed.checkpoint.save` that takes SECONDS
async     one `torch.distributed.checkpoint.async_save` that takes SECONDS, while training goes on
process   the same in a process of DCP's own, which has a process group, and so is a rank
thread    as `path`, on a thread of its own, while training goes on

Prints `saving` when it is in the middle of a save, and `saved` when that is done.
"""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import autoteardown

with contextlib.suppress(ImportError):  # torch 2.6
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

how, seconds = sys.argv[1], float([*sys.argv, "1"][2])
folder = Path("saved")


def take_time():
    """The slow part of a save: in Python, where a rank can be parked at any bytecode."""
    print("saving", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)


class Slow:
    """An object that takes its time to be pickled."""

    def __reduce__(self):
        take_time()
        return str, ("whole",)


class SlowWriter(FileSystemWriter):
    """A storage that takes its time to finish."""

    def write_data(self, plan, planner):
        """Write, slowly."""
        take_time()
        return super().write_data(plan, planner)


def by_hand():
    """A checkpoint in a format of the program's own."""
    with (folder / "by_hand").open("w") as file:
        file.write("half, ")
        file.flush()
        take_time()
        file.write("whole")


def save(model):
    """Save once, slowly."""
    content = {"model": model.state_dict(), "slow": Slow()}
    if how in ("path", "thread"):
        torch.save(content, folder / "model.pt")
    elif how == "file":
        with (folder / "model.pt").open("wb") as file:
            torch.save(content, file)
    elif how in ("protect", "nested"):
        with autoteardown.protect() if how == "nested" else contextlib.nullcontext():
            with autoteardown.protect():
                by_hand()
            if how == "nested":
                (folder / "by_hand").write_text("half")
                take_time()
                (folder / "by_hand").write_text("half, whole")
    elif how == "dcp":
        dcp.save({"model": model.state_dict()}, storage_writer=SlowWriter(folder / "dcp"))
    elif how in ("async", "process"):
        own = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS} if how == "process" else {}
        writer = SlowWriter(folder / "dcp")
        future = dcp.async_save({"model": model.state_dict()}, storage_writer=writer, **own)
        future.add_done_callback(lambda _: print("saved", flush=True))
        return
    print("saved", flush=True)


def main():
    """Train and save."""
    dist.init_process_group("cpu:gloo" if how in ("async", "process") else "gloo")
    folder.mkdir(exist_ok=True)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0
    while True:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
            dist.all_reduce(parameter.grad)
        optimizer.step()
        step += 1
        print("step", step, flush=True)
        if how == "every":
            if dist.get_rank() == 0:
                torch.save({"model": model.state_dict(), "step": step}, folder / f"{step % 4}.pt")
        elif step == 2 and (dist.get_rank() == 0 or how in ("dcp", "async", "process")):
            if how == "thread":
                threading.Thread(target=save, args=[model], daemon=True).start()
            else:
                save(model)
        time.sleep(0.002)


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    main()
