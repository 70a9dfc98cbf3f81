"""Two Ray actors that train, one device each; prints `training RANK PID` at step 20 of each, and `over` at the end.

The actors have the environment of this process.
"""

import os
import time

import ray

SIZE = 2


@ray.remote(num_cpus=0)
class Board:
    """Where each rank is."""

    def __init__(self):
        self.pids = {}

    def add(self, rank, pid):
        self.pids[rank] = pid

    def all(self):
        return self.pids


@ray.remote(num_cpus=1)
class Trainer:
    """A rank."""

    def train(self, rank, board):
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=SIZE, device_id=device)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 16).to(device))
        optimizer = torch.optim.AdamW(model.parameters())
        batch, step = torch.randn(8, 16).to(device), 0
        while True:
            torch.cuda._sleep(20_000_000)  # 20 ms
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 20:
                ray.get(board.add.remote(rank, os.getpid()))
            if step % 10 == 0:
                torch.cuda.synchronize()


def main():
    """Start them, and wait for their end."""
    ray.init(num_cpus=SIZE, include_dashboard=False, log_to_driver=False)
    board = Board.remote()
    actors = [Trainer.remote() for _ in range(SIZE)]
    running = [actor.train.remote(rank, board) for rank, actor in enumerate(actors)]
    while len(pids := ray.get(board.all.remote())) < SIZE:
        for failed in ray.wait(running, timeout=0.2)[0]:
            ray.get(failed)
    for rank, pid in pids.items():
        print("training", rank, pid, flush=True)
    ray.wait(running, num_returns=SIZE, timeout=60)
    print("over", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
