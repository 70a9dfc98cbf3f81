"""A Ray driver that is a rank itself. `ray_driver.py ADDRESS first|last` (when ray.init is called)"""

import sys

import ray
import torch
import torch.distributed as dist

address, order = sys.argv[1:]
if order == "first":
    ray.init(address, log_to_driver=False)
dist.init_process_group("gloo")
if order == "last":
    ray.init(address, log_to_driver=False)
dist.barrier()
print("ready", flush=True)
dist.all_reduce(torch.ones(1))  # which the other rank never joins
