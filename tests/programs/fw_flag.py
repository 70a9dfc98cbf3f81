"""Megatron-LM's way: a handler that sets a flag, an all_gather of the flags each iteration, a save, exit 0.

As in megatron/training/dist_signal_handler.py and training.py. `fw_flag.py FOLDER`; once there is a file
`stuck`, rank 1 never comes to the next all_gather.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel


class DistributedSignalHandler:
    def __init__(self, sig=signal.SIGTERM):
        self.sig = sig

    def signals_received(self):
        mine = torch.tensor([self._signal_received], dtype=torch.int32)
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return [bool(each.item()) for each in everyone]

    def __enter__(self):
        self._signal_received = False
        self.original_handler = signal.getsignal(self.sig)

        def handler(signum, frame):
            self._signal_received = True

        signal.signal(self.sig, handler)
        return self

    def __exit__(self, *error):
        signal.signal(self.sig, self.original_handler)


dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
with DistributedSignalHandler() as handler:
    while not any(handler.signals_received()):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        step += 1
        print(f"rank {rank} pid {os.getpid()} step {step}", flush=True)
        time.sleep(0.02)
        while os.path.exists("stuck") and rank == 1:
            time.sleep(0.1)
    print("exiting program after receiving SIGTERM", flush=True)
    dcp.save({"model": model.state_dict(), "step": step}, checkpoint_id=sys.argv[1])
dist.barrier()
dist.destroy_process_group()
sys.exit(0)
