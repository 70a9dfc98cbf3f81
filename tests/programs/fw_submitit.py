"""submitit's local executor: a checkpointable job of two tasks. `fw_submitit.py FOLDER`"""

import os
import sys

import submitit
import torch
import torch.distributed as dist


class Training(submitit.helpers.Checkpointable):
    """What is pickled and shipped: it refers to `init_process_group`."""

    def __init__(self, folder):
        self.folder = folder
        self.step = 0

    def __call__(self):
        rank = submitit.JobEnvironment().global_rank
        dist.init_process_group(
            "gloo", init_method=f"file://{self.folder}/rendezvous{self.step}", rank=rank, world_size=2
        )
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        print(f"rank {rank} begins at {self.step}", flush=True)
        while True:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            self.step += 1
            print(f"rank {rank} pid {os.getpid()} step {self.step}", flush=True)

    def checkpoint(self):
        print("checkpointed", self.step, flush=True)
        return super().checkpoint()


executor = submitit.LocalExecutor(sys.argv[1])
executor.update_parameters(tasks_per_node=2, timeout_min=10)
job = executor.submit(Training(sys.argv[1]))
print("controller pid", job.job_id, flush=True)
print("ended:", type(job.exception()).__name__, flush=True)
