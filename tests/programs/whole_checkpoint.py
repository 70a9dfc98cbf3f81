"""A training script whose checkpoint is more than one `torch.save`. `whole_checkpoint.py HOW [SECONDS]`, into `saved`.

pair      two files written by hand, as safetensors' `save_file` does, in a function that is called `save_state`
rename    `torch.save` to a temporary name, SECONDS of checking, then the rename (ignite's DiskSaver)
bytes     `torch.save` into memory, then SECONDS for the file (Lightning)
five      five `torch.save`s in SECONDS, in the loop itself; an iteration takes 9 s
forked    a forked writer, no daemon, that takes SECONDS (Megatron-core); training goes on
late      a forked writer that computes for SECONDS before it has a file at all
worker    a process that is there from the start, and has two files to write only now; the second takes SECONDS
grandchild  a forked process that has another one write, and waits for it
slow      one file by hand on a disk that takes SECONDS, under a temporary name until it is whole

Rank 0 saves after the second step, once. `saving` is said when half of it is there, `saved` when all is.
"""

import io
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

how, seconds = sys.argv[1], float([*sys.argv, "1.5"][2])
folder = Path("saved")
big = {"weight": torch.zeros(64, 64)}


def write(path, half):
    """A file in two halves, and `half` to be done between them."""
    with path.open("w") as file:
        file.write("half, ")
        file.flush()
        half()
        file.write("whole")


def dawdle(rest=0.005):
    """What a disk does; or, without a rest, a compressor."""
    print("saving", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(rest)


def save_state():
    """As Accelerate's."""
    write(folder / "model", dawdle)
    time.sleep(0.3)
    write(folder / "optimizer", lambda: time.sleep(0.3))


def disk_saver():
    """As ignite's: nothing in its name says what it does."""
    torch.save(big, folder / "x.tmp")
    dawdle()
    (folder / "x.tmp").rename(folder / "x.pt")


def atomically():
    """As Lightning's."""
    buffer = io.BytesIO()
    torch.save(big, buffer)
    write(folder / "file", dawdle)


def write_slowly():
    """Whole, or not under its final name."""
    write(folder / "x.tmp", dawdle)
    (folder / "x.tmp").rename(folder / "file")


def save_checkpoint():
    """On a disk that is slow."""
    write_slowly()


def fork_writer():
    """Joined by nobody but the exit."""
    context = multiprocessing.get_context("fork")
    context.Process(target=write, args=[folder / "file", dawdle]).start()


def compute_and_write():
    """As one that compresses first."""
    dawdle(rest=0)
    write(folder / "file", lambda: time.sleep(0.3))


def fork_late_writer():
    """As `fork_writer`."""
    multiprocessing.get_context("fork").Process(target=compute_and_write).start()


def have_written():
    """Waits for its own child."""
    child = multiprocessing.get_context("fork").Process(target=write, args=[folder / "file", dawdle])
    child.start()
    child.join()


def fork_grandchild():
    """As Megatron-core does for several files."""
    multiprocessing.get_context("fork").Process(target=have_written).start()


def work(queue):
    """In the worker: writes when it is told to."""
    while queue.get():
        print("saving", flush=True)
        write(folder / "other", lambda: time.sleep(0.3))
        time.sleep(0.3)
        write(folder / "file", lambda: time.sleep(seconds))


def five_files():
    """One after the other."""
    for number in range(5):
        torch.save({**big, "number": number}, folder / f"{number}.pt")
        if number == 1:
            print("saving", flush=True)
        time.sleep(seconds / 5)


def main():
    """Train and save."""
    dist.init_process_group("gloo")
    folder.mkdir(exist_ok=True)
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    kinds = {"pair": save_state, "rename": disk_saver, "bytes": atomically, "five": five_files}
    kinds.update(forked=fork_writer, slow=save_checkpoint, late=fork_late_writer, grandchild=fork_grandchild)
    if how == "worker" and dist.get_rank() == 0:
        queue = multiprocessing.get_context("fork").SimpleQueue()
        multiprocessing.get_context("fork").Process(target=work, args=[queue]).start()
        kinds[how] = lambda: queue.put(True)
    step = 0
    while True:
        weight.grad = torch.ones(8)
        dist.all_reduce(weight.grad)
        optimizer.step()
        step += 1
        print("step", step, flush=True)
        if step == 2 and dist.get_rank() == 0:
            kinds[how]()
            print("saved", flush=True)
        time.sleep(9 if how == "five" and step >= 2 else 0.005)


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    main()
