"""PyTorch Lightning: DDP on two CPUs, a checkpoint when it is interrupted. `fw_lightning.py FOLDER [after]`

after: fits for three steps and then lives on with its process group, as a script that goes on to evaluate does.
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
        time.sleep(0.02)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_batch_end(self, *args):
        print(f"rank {self.global_rank} pid {os.getpid()} step {self.global_step}", flush=True)


folder, after = sys.argv[1], "after" in sys.argv
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_steps=3 if after else -1,
    callbacks=[ModelCheckpoint(dirpath=folder, filename="interrupted", save_on_exception=True)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=folder,
)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(1 << 16, 4), batch_size=4))
print(f"rank {trainer.global_rank} fitted", flush=True)
if after:
    time.sleep(3600)
