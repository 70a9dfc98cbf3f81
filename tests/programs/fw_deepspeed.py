"""DeepSpeed's engine on CPUs, ZeRO stage 1, started by its own launcher."""

import os

import deepspeed
import torch

# An op of its own that it would compile first, for minutes; killed meanwhile, it leaves a lock that the next waits for.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
engine, _, _, _ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1 << 30,
    },
)
step = 0
while True:
    loss = engine(torch.randn(4, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    step += 1
    print(f"rank {engine.global_rank} pid {os.getpid()} step {step}", flush=True)
