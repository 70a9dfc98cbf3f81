"""PyTorch Lightning, unchanged: with `AUTOTEARDOWN_CHECKPOINT=on` it saves at an eviction.

    AUTOTEARDOWN_CHECKPOINT=on torchrun --standalone --nproc-per-node 2 examples/lightning_fit.py --output /data/run

Nothing in here knows of evictions. Evict any rank (SIGTERM): the checkpoint is where Lightning puts that of an
interrupted SLURM job, `hpc_ckpt_1.ckpt`. Started again, it goes on there: `ckpt_path="last"` finds it.
"""

import argparse
from collections.abc import Iterator

import lightning
import torch


class Batches:
    """Stands in for a data loader that knows its place (`StatefulDataLoader`): Lightning keeps that too."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 1 << 16

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < len(self):
            self.next += 1
            yield torch.randn(4, 32, generator=torch.Generator().manual_seed(self.next))

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.layers(batch) - batch).square().mean()
        print(f"rank {self.global_rank} step {self.global_step + 1} loss {loss.item():.6f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="run")
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()

    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy="ddp",
        max_steps=options.steps,
        default_root_dir=options.output,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), Batches(), ckpt_path="last")
    print("fitted", flush=True)


if __name__ == "__main__":
    main()
