"""Waits in `init_process_group` for a rank that never comes."""

import torch.distributed as dist

print("joining", flush=True)
dist.init_process_group("gloo")
