"""submitit's SLURM executor: a checkpointable job of two tasks, requeued at SIGUSR2. Prints the job's number."""

import os
import time

import submitit
import torch
import torch.distributed as dist


class Training(submitit.helpers.Checkpointable):
    def __init__(self):
        self.step = 0

    def __call__(self):
        rank = submitit.JobEnvironment().global_rank
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        dist.init_process_group("gloo")
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        print(f"rank {rank} begins at {self.step}", flush=True)
        while True:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            self.step += 1
            print(f"rank {rank} pid {os.getpid()} step {self.step}", flush=True)
            time.sleep(0.1)


executor = submitit.SlurmExecutor("submitit")
executor.update_parameters(nodes=1, ntasks_per_node=2, time=5, signal_delay_s=60)
print(executor.submit(Training()).job_id)
