"""A whole training with a framework, for AUTOTEARDOWN_CHECKPOINT=on. `fw_moments.py FRAMEWORK FOLDER [STEPS]`

trainer     Hugging Face Trainer
trl         TRL's SFTTrainer
lightning   PyTorch Lightning
accelerate  Accelerate, with a loop of its own

Trains STEPS (40) steps, evaluates after each 12th, saves after each 7th; resumes from the last checkpoint in FOLDER if
there is one. Says `starting` and waits a moment, `rank R step N loss L` in each step, `evaluating` at each step of
an evaluation, and `over` at the end. Nothing in here knows of evictions.
"""

import os
import sys
import time

import torch

framework, folder = sys.argv[1:3]
STEPS = int([*sys.argv, "40"][3])
EVALUATE, SAVE = 12, 7


def tell(text):
    """In one write."""
    os.write(1, f"{text}\n".encode())


def start_up():
    """What a program does before its first step."""
    tell("starting")
    time.sleep(2.0)


def evaluate_a_batch():
    """A while."""
    tell("evaluating")
    time.sleep(0.2)


def words(index):
    """Something to learn."""
    return torch.randint(0, 16, (8,), generator=torch.Generator().manual_seed(index)).sort().values


def model():
    """The same one on all ranks."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def arguments(kind, **more):
    """Of the Trainer, or one that is built on it."""
    return kind(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=EVALUATE,
        save_strategy="steps",
        save_steps=SAVE,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )


def teller():
    """A callback that says what happens."""
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                tell(f"rank {os.environ['RANK']} step {state.global_step} loss {float(logs['loss']):.6f}")

        def on_prediction_step(self, args, state, control, **kwargs):
            evaluate_a_batch()

    return Tell()


def go(trainer):
    """As the documentation of the Trainer says."""
    from transformers.trainer_utils import get_last_checkpoint

    start_up()
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    trainer.train(resume_from_checkpoint=last)


def with_trainer():
    from transformers import Trainer, TrainingArguments

    def examples(count):
        return [{"input_ids": words(index), "labels": words(index)} for index in range(count)]

    go(
        Trainer(
            model(),
            arguments(TrainingArguments),
            train_dataset=examples(4096),
            eval_dataset=examples(64),
            callbacks=[teller()],
        )
    )


def with_trl():
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokens = Tokenizer(models.WordLevel({str(number): number for number in range(16)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="0", pad_token="0", unk_token="0")

    def examples(count):
        return Dataset.from_list([{"input_ids": words(index).tolist()} for index in range(count)])

    go(
        SFTTrainer(
            model(),
            arguments(SFTConfig, bf16=False, gradient_checkpointing=False, dataset_num_proc=None),
            train_dataset=examples(4096),
            eval_dataset=examples(64),
            processing_class=tokenizer,
            callbacks=[teller()],
        )
    )


class Batches:
    """A data loader that knows its place (`StatefulDataLoader`)."""

    def __init__(self):
        self.next = 0

    def __len__(self):
        return 1 << 16

    def __iter__(self):
        while self.next < len(self):
            self.next += 1
            yield torch.randn(4, 32, generator=torch.Generator().manual_seed(self.next))

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def layers():
    """The same on all ranks."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))


def with_lightning():
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = layers()

        def on_fit_start(self):
            start_up()

        def training_step(self, batch, index):
            loss = (self.layers(batch) - batch).square().mean()
            tell(f"rank {self.global_rank} step {self.global_step + 1} loss {loss.item():.6f}")
            return loss

        def validation_step(self, batch, index):
            evaluate_a_batch()
            self.log("validation", self.layers(batch).square().mean(), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        val_check_interval=EVALUATE,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(dirpath=folder, every_n_train_steps=SAVE, save_top_k=1, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluation = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4)
    trainer.fit(Model(), Batches(), evaluation, ckpt_path="last")


def with_accelerate():
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    net = layers()
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    start_up()
    step = 0
    found = os.path.join(folder, "checkpoints")
    if os.path.isdir(found) and os.listdir(found):
        accelerator.load_state()
        step = int(next(iter(optimizer.optimizer.state.values()))["step"])
        numbers = [int(name.rpartition("_")[2]) for name in os.listdir(found)]
        accelerator.project_configuration.iteration = max(numbers) + 1
    while step < STEPS:
        batch = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (net(batch) - batch).square().mean()
        accelerator.backward(loss)
        tell(f"rank {accelerator.process_index} step {step + 1} loss {loss.item():.6f}")
        optimizer.step()
        step += 1
        if step % EVALUATE == 0:
            for _ in range(8):
                evaluate_a_batch()
                accelerator.gather(torch.ones(1))
        if step % SAVE == 0:
            accelerator.save_state()
    accelerator.end_training()


if __name__ == "__main__":
    globals()[f"with_{framework}"]()
    tell("over")
