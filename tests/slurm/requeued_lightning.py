"""Lightning under SLURM, two nodes with a rank each: its own auto-requeue at SIGUSR1."""

import os
import time

import lightning
import torch


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def on_train_start(self):
        print(f"rank {self.global_rank} begins at {self.global_step}", flush=True)

    def training_step(self, batch, index):
        print(f"rank {self.global_rank} pid {os.getpid()} step {self.global_step}", flush=True)
        time.sleep(0.5)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1,
    num_nodes=2,
    strategy="ddp",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=os.getcwd(),
)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(1 << 16, 4), batch_size=4))
