"""A rank that does everything that a training process does, in an order that its seed decides.

`chaos.py FOLDER ACTIVITY SEED`. Prints `going` when it is in the activity; never ends by itself, but for a handler of
its own. What it does is in `FOLDER/trail<rank>`: an iteration, a save, and `stopped` once the agent has stopped it.
"""

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref

import pid_limit
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

folder, activity, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
# All ranks must choose alike; only what is local to one may differ.
shared = random.Random(seed)
rank = int(os.environ["RANK"])
logging.basicConfig(filename=os.path.join(folder, f"log{rank}"), level=logging.DEBUG)


mine = random.Random(seed * 7 + rank)
trail = os.open(os.path.join(folder, f"trail{rank}"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
iteration = 0
stop_wanted = False
OWN_CODE = 3


def note(what):
    os.write(trail, f"{what}\n".encode())


def stopped():
    """`AUTOTEARDOWN_ON_TEARDOWN`: from here on there is nothing more to note."""
    note("stopped")


def say_going():
    os.write(1, b"going\n")


def iterate(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    count()


def count():
    global iteration
    iteration += 1
    note(f"step {iteration}")


def step(model, optimizer):
    iterate(model, optimizer)


def marked():
    """A state in which every element tells whose iteration it is of."""
    return torch.full((1 << 16,), float(iteration))


def slow(model, optimizer):
    """An iteration of seconds, and not on every rank at once."""
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    time.sleep(mine.choice((0.0, 0.7, 1.5)))
    optimizer.step()
    count()


def save(model, optimizer):
    path = os.path.join(folder, f"checkpoint{rank}")
    torch.save({"model": model.state_dict(), "padding": marked()}, path)
    note("saved")


def save_pieces(model, optimizer):
    """One checkpoint that is three files."""
    for piece in ("model", "optimizer", "scheduler"):
        path = os.path.join(folder, f"pieces{rank}-{piece}")
        torch.save({"padding": marked()}, path + ".tmp")
        os.replace(path + ".tmp", path)
        note("saved")


def save_shards(model, optimizer):
    """One checkpoint that is all ranks', over the last one."""
    dcp.save({f"part{rank}": marked()}, checkpoint_id=os.path.join(folder, "shards"))
    note("saved")


def uneven(model, optimizer):
    """The last rank steps once more than the others: a pipeline's embedding, a second optimizer."""
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    if rank == dist.get_world_size() - 1:
        second.step()
    count()


def adversarial(model, optimizer):
    """A GAN: D twice, then G."""
    iterate(model, second, second, optimizer)


class Late:
    """Takes its time in the end."""

    def __del__(self):
        for _ in range(20):
            time.sleep(0.0005)


def late(reference):
    for _ in range(20):
        time.sleep(0.0005)


def swallow(model, optimizer):
    """Catches whatever ends it, at a place of its own choice each time."""
    where = mine.randrange(6)
    try:
        try:
            step(model, optimizer)
        except BaseException:
            if where == 0:
                raise
        if where == 1:
            Late()
        elif where == 2:
            thing = threading.Event()
            reference = weakref.ref(thing, late)
            del thing
            assert reference() is None
        elif where == 3:
            for _ in range(5):
                fork(model, optimizer)
        elif where == 4:
            save(model, optimizer)
    except BaseException:
        if where == 5:
            time.sleep(0.001)


def flag(model, optimizer):
    """A loop with a handler of its own, as the books have it: it saves, and leaves with its own code."""
    step(model, optimizer)
    if stop_wanted:
        save(model, optimizer)
        note(f"own {iteration}")
        dist.destroy_process_group()
        sys.exit(OWN_CODE)


def poll(model, optimizer):
    import autoteardown

    step(model, optimizer)
    if autoteardown.stop_requested():
        save(model, optimizer)
        note(f"own {iteration}")
        dist.destroy_process_group()
        sys.exit(OWN_CODE)


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
    "pieces": [step, save_pieces],
    "shards": [step, save_shards],
    "slow": [slow],
    "limited": [step, save],
    "uneven": [uneven],
    "adversarial": [adversarial, save],
    "swallow": [swallow],
    "flag": [flag],
    "poll": [poll],
    "everything": [step, save, reduce, idle, collect, log, fork, spawn, thread, big_import],
}


def want_stop(signum, frame):
    global stop_wanted
    stop_wanted = True


def main():
    global second
    if activity == "flag":
        signal.signal(signal.SIGTERM, want_stop)
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
    second = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    if activity == "adversarial":
        second = torch.optim.SGD(model.parameters(), lr=0.01)
    if activity == "poll":
        poll(model, optimizer)  # that a program polls is known from its first poll on
    if activity == "slow":
        for _ in range(3):
            slow(model, optimizer)  # how long iterations take is known from the second on
    if activity == "limited" and pid_limit.hierarchy() is not None:
        step(model, optimizer)  # autograd's threads
        os.environ["LIMIT"] = f"cgroup:{mine.randrange(3)}"
        pid_limit.limit()
    say_going()
    while True:
        shared.choice(ACTIVITIES[activity])(model, optimizer)


if __name__ == "__main__":
    main()
