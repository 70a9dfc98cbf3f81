"""Accelerate, with AUTOTEARDOWN_CHECKPOINT=on. `fw_accelerate_save.py FOLDER [load]`: prints a loss after each step."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

folder, load = sys.argv[1], "load" in sys.argv
accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=folder))
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
if load:
    accelerator.load_state(f"{folder}/autoteardown-checkpoint")
    steps = {int(state["step"]) for state in optimizer.optimizer.state.values()}
    accelerator.wait_for_everyone()
    print(f"loaded {steps} {float(accelerator.unwrap_model(model).weight.sum()):.6f}", flush=True)
else:
    step = 0
    while True:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        accelerator.backward((model(batch) - batch).square().mean())
        optimizer.step()
        step += 1
        print(f"rank {accelerator.process_index} step {step}", flush=True)
