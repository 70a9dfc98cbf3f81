"""Hugging Face Trainer, a tiny model made from its config. `fw_trainer.py FOLDER [jit]`

jit: its checkpoint on SIGTERM, 3 s later by each rank's own clock. It only works out if all ranks are at the same place
then, so the steps take 2 s. Once there is a file `stuck`, rank 1 never ends its step: a hung collective for rank 0.
"""

import os
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(f"rank {os.environ['RANK']} pid {os.getpid()} step {state.global_step}", flush=True)
        time.sleep(2.0 if args.enable_jit_checkpoint else 0.0)
        while os.path.exists("stuck") and os.environ["RANK"] == "1":
            time.sleep(0.1)


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 1 << 16

    def __getitem__(self, index):
        words = torch.arange(8) % 16
        return {"input_ids": words, "labels": words}


arguments = TrainingArguments(
    output_dir=sys.argv[1],
    use_cpu=True,
    per_device_train_batch_size=2,
    num_train_epochs=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    enable_jit_checkpoint="jit" in sys.argv,
)
model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
trainer = Trainer(model=model, args=arguments, train_dataset=Words(), callbacks=[Tell()])
trainer.train()
print(f"rank {os.environ['RANK']} trained", flush=True)
