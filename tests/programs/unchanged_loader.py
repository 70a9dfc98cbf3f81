"""Ends of DataLoader workers. `unchanged_loader.py HOW`: prints what the program sees of them.

HOW  persistent   the program ends with live persistent workers
     terminated   the program terminates its own workers, and waits for them
     stuck        a worker hangs in C with the GIL held, and is terminated
     abandoned    as stuck, and the rank's process group is killed
"""

import ctypes
import multiprocessing
import os
import sys
import time

import torch
import torch.distributed as dist

how = sys.argv[1]
stuck = os.pipe()


class Data(torch.utils.data.Dataset):
    """Numbers."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, index):
        if index == 7 and how in ("stuck", "abandoned"):
            print("stuck", os.getpid(), flush=True)
            os.write(stuck[1], b"!")
            ctypes.PyDLL(None).sleep(3600)
        return torch.tensor([index])


def main():
    """Train a little."""
    global batches
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loader = torch.utils.data.DataLoader(
        Data(), num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    if how == "terminated":
        for worker in multiprocessing.active_children():
            worker.terminate()
        for worker in multiprocessing.active_children():
            worker.join()
            print("worker ended with", worker.exitcode, flush=True)
    if how in ("stuck", "abandoned"):
        os.read(stuck[0], 1)
    if how == "stuck":
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join(20)
            print("worker ended with", worker.exitcode, flush=True)
        os._exit(7)
    if how == "abandoned":
        print("waiting", flush=True)
        time.sleep(3600)
    dist.destroy_process_group()
    print("end", flush=True)


if __name__ == "__main__":
    main()
