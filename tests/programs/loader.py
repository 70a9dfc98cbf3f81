"""A rank that trains from a DataLoader. `loader.py CONTEXT [WORKERS]`: prints `worker PID` once for each of them."""

import os
import sys
import time

import torch
import torch.distributed as dist


class Pids(torch.utils.data.Dataset):
    """Each sample is the pid of the worker that made it."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, index):
        time.sleep(0.005)
        return torch.tensor([os.getpid()])


def main():
    """Train."""
    context, workers = sys.argv[1], int([*sys.argv, "2"][2])
    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    loader = torch.utils.data.DataLoader(Pids(), num_workers=workers, multiprocessing_context=context)
    seen = set()
    step = 0
    for batch in loader:
        pid = int(batch)
        if pid not in seen:
            seen.add(pid)
            print("worker", pid, flush=True)
        if len(seen) == workers:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            step += 1
            print("step", step, flush=True)


if __name__ == "__main__":
    main()
