"""Everything in which a rank meets the agent, from its first init to its end; prints what it sees.

`whole_life.py`: a normal life. `whole_life.py train`: the first half of it, then training without end.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time

import breaker

breaker.swap()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import autoteardown  # noqa: E402


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((4,), float(index))


def train(steps=3):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=2, num_workers=1, multiprocessing_context="fork"
    )
    for batch in loader:
        model(batch).square().mean().backward()
        optimizer.step()
    step = 0
    while step < steps:
        step += 1
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        if steps > 3:
            print("step", step, flush=True)
            time.sleep(0.005)
    print("weights", [round(p.sum().item(), 4) for p in model.parameters()], flush=True)
    return model


def save(model):
    torch.save(model.state_dict(), f"model{dist.get_rank()}.pt")
    with autoteardown.protect():
        print("loaded", len(torch.load(f"model{dist.get_rank()}.pt")), flush=True)
    dcp.save({"model": model.module.state_dict()}, checkpoint_id=os.path.abspath("dcp"))
    print("saved", sorted(os.listdir("dcp"))[:1], flush=True)


def signals():
    seen = []
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))
    os.kill(os.getpid(), signal.SIGUSR1)

    async def main():
        done = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, done.set)
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.wait_for(done.wait(), 20)
        return "woken"

    print(seen, asyncio.run(main()), flush=True)
    try:
        signal.signal(signal.SIGTERM, "no handler")
    except TypeError as error:
        print(error, flush=True)


def children():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(1)
    os.kill(child, signal.SIGTERM)
    print("forked", os.waitpid(child, 0)[1], subprocess.run(["true"]).returncode, flush=True)


@autoteardown.on_teardown
def callback():
    print("teardown", flush=True)


def main():
    print(sorted(autoteardown.status())[0], flush=True)
    dist.init_process_group("gloo")
    dist.barrier()
    if "train" in sys.argv:
        train(1 << 30)
    model = train()
    save(model)
    signals()
    children()
    del model
    time.sleep(0.1)  # see train.py
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    dist.init_process_group("gloo")
    dist.barrier()
    print("again", dist.get_world_size(), flush=True)
    autoteardown.disarm()
    dist.barrier()
    dist.destroy_process_group()
    print("end", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(7)
