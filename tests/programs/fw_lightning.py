"""PyTorch Lightning: DDP on two CPUs, a checkpoint when it is interrupted. `fw_lightning.py FOLDER`

Its steps are long: Lightning broadcasts inside its handler, which only works out if all ranks are at the same place.
"""

import os
import sys
import time

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        print(f"rank {self.global_rank} pid {os.getpid()} step {self.global_step}", flush=True)
        time.sleep(1.0)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


folder = sys.argv[1]
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    callbacks=[ModelCheckpoint(dirpath=folder, filename="interrupted", save_on_exception=True)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=folder,
)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(1 << 16, 4), batch_size=4))
print(f"rank {trainer.global_rank} fitted", flush=True)
