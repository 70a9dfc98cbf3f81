"""A training script whose iterations need child processes, for signals that go to every process.

`everybody.py STYLE KIND`

STYLE  flag      a handler sets a flag; the loop looks at it once an iteration, saves and ends normally
       polls     the loop asks `autoteardown.stop_requested()`, saves and ends normally
       callback  an `on_teardown` callback saves
KIND   fork, spawn, forkserver  batches come from the two workers of a DataLoader
       pool                     so many processes of `multiprocessing` compute them
       writer                   from iteration 10 on, a forked process writes a checkpoint of two seconds

Each rank saves the number of its iterations to $SAVED/<rank>.
"""

import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import autoteardown

style, kind = sys.argv[1:]
stop = []
done = 0


class Batches(torch.utils.data.Dataset):
    """Slow ones."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, index):
        return batch(index)


def batch(index):
    time.sleep(0.05)
    return torch.ones(4)


def batches():
    if kind == "pool":
        with multiprocessing.get_context("fork").Pool(2) as pool:
            yield from pool.imap(batch, range(10**6))
    elif kind == "writer":
        yield from map(batch, range(10**6))
    else:
        yield from torch.utils.data.DataLoader(
            Batches(), num_workers=2, batch_size=2, multiprocessing_context=kind, persistent_workers=True
        )


def save():
    with open(f"{os.environ['SAVED']}/{dist.get_rank()}", "a") as file:
        print(done, file=file)


def write(rank):
    with open(f"{os.environ['SAVED']}/part", "w") as file:
        print("writing", flush=True)
        for _ in range(20):
            time.sleep(0.1)
            print(rank, file=file, flush=True)
    os.rename(file.name, f"{os.environ['SAVED']}/whole")


def main():
    global done
    if style == "flag":
        signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
    if style == "callback":
        autoteardown.on_teardown(save)
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for data in batches():
        model(data.reshape(-1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done == 10:
            if kind == "writer" and dist.get_rank() == 0:
                multiprocessing.get_context("fork").Process(target=write, args=[0]).start()
            print("iteration 10", flush=True)
        if style == "polls" and autoteardown.stop_requested():
            stop.append(0)
        if stop:
            save()
            break
    dist.destroy_process_group()
    print("end", flush=True)


if __name__ == "__main__":
    main()
