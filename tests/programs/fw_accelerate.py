"""Accelerate: the training loop of its documentation."""

import os

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters())
loader = torch.utils.data.DataLoader(torch.randn(1 << 16, 4), batch_size=4)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for step, batch in enumerate(loader, 1):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    print(f"rank {accelerator.process_index} pid {os.getpid()} step {step}", flush=True)
accelerator.end_training()
