"""Hugging Face Trainer, unchanged: with `AUTOTEARDOWN_CHECKPOINT=on` it saves at an eviction.

    AUTOTEARDOWN_CHECKPOINT=on torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py --output /data/run

Nothing in here knows of evictions. Evict any rank (SIGTERM): a usual checkpoint of the same step is in the output
folder. Started again, it goes on there.
"""

import argparse
import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1 << 14

    def __getitem__(self, index: int) -> dict:
        words = torch.randint(0, 16, (8,), generator=torch.Generator().manual_seed(index)).sort().values
        return {"input_ids": words, "labels": words}


class Tell(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            loss = float(logs["loss"])
            print(f"rank {os.environ['RANK']} step {state.global_step} loss {loss:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="run")
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        log_on_each_node=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Words(), callbacks=[Tell()])
    last = get_last_checkpoint(options.output) if os.path.isdir(options.output) else None
    trainer.train(resume_from_checkpoint=last)
    print("trained", flush=True)


if __name__ == "__main__":
    main()
