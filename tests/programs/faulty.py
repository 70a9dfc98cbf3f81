"""Ranks on the faulty backend. `faulty.py ROLE [NEW_GROUP]`, and FAULTS (see `faults.py`). Roles:

train  all_reduce and step, for ever
idle   stay in a Python loop
stuck  wait for the device, in C++; compute with what it gave
"""

import sys
import time

import faults
import torch
import torch.distributed as dist

faults.install()
dist.init_process_group("faulty")
if "group" in sys.argv:
    group = dist.new_group(list(range(dist.get_world_size())))
dist.barrier()
role = sys.argv[1]
faults.say("ready", role)
if role == "idle":
    while True:
        time.sleep(0.01)
if role == "stuck":
    torch.cuda.synchronize()
    faults.say("garbage")
    sys.exit(1)
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=1.0)
step = 0
while True:
    weight.grad = torch.ones(1)
    dist.all_reduce(weight.grad)
    optimizer.step()
    step += 1
    faults.say("step", step)
    time.sleep(0.005)
