"""A rank that does everything that a training process does, in an order that its seed decides.

`chaos.py FOLDER ACTIVITY SEED`. Prints `going` when it is in the activity; never ends by itself.
"""

import gc
import logging
import os
import random
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

folder, activity, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
# All ranks must choose alike; only what is local to one may differ.
shared = random.Random(seed)
rank = int(os.environ["RANK"])
logging.basicConfig(filename=os.path.join(folder, f"log{rank}"), level=logging.DEBUG)


def say_going():
    os.write(1, b"going\n")


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def save(model, optimizer):
    path = os.path.join(folder, f"checkpoint{rank}")
    torch.save({"model": model.state_dict(), "padding": torch.zeros(1 << 18)}, path)


def reduce(model, optimizer):
    dist.all_reduce(torch.ones(64))


def idle(model, optimizer):
    time.sleep(0.002 * shared.randrange(5))


def collect(model, optimizer):
    rings = [[] for _ in range(500)]
    for ring in rings:
        ring.append(ring)
    gc.collect()


def log(model, optimizer):
    for number in range(50):
        logging.debug("step %d", number)


def fork(model, optimizer):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def spawn(model, optimizer):
    subprocess.run(["true"], check=True)


def thread(model, optimizer):
    worker = threading.Thread(target=time.sleep, args=(0.001,))
    worker.start()
    worker.join()


def load(model, optimizer):
    data = torch.utils.data.TensorDataset(torch.randn(8, 8))
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=4, num_workers=1):
        model.module(batch)


def big_import(model, optimizer):
    for name in [name for name in sys.modules if name.startswith("xml.")]:
        del sys.modules[name]
    import xml.dom.minidom
    import xml.sax.handler  # noqa: F401


ACTIVITIES = {
    "idle": [idle],
    "step": [step],
    "all_reduce": [reduce, idle],
    "checkpoint": [step, save],
    "dataloader": [step, load],
    "forks": [step, fork, spawn],
    "threads": [step, thread],
    "gc": [step, collect],
    "logging": [step, log],
    "import": [step, big_import],
    "everything": [step, save, reduce, idle, collect, log, fork, spawn, thread, big_import],
}


def main():
    if activity == "rendezvous":
        say_going()
    dist.init_process_group("gloo")
    if activity == "stuck":
        say_going()
        if rank == 0:
            dist.all_reduce(torch.ones(1))
        while True:
            time.sleep(0.01)
    if activity == "reinit":
        say_going()
        for _ in range(1000):
            dist.all_reduce(torch.ones(1))
            dist.destroy_process_group()
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    say_going()
    while True:
        shared.choice(ACTIVITIES[activity])(model, optimizer)


if __name__ == "__main__":
    main()
