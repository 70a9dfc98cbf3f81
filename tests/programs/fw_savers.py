"""A training script whose rank 0 saves after its second step, once, with a real package. `fw_savers.py HOW`:

safetensors  `save_file`
ignite       `Checkpoint` with a `DiskSaver`, as a handler of the trainer's events
accelerate   `save_state`, on all ranks
megatron     Megatron-core's asynchronous writer: a forked process that writes while training goes on
persistent   its other one: a process that stays, and waits for the next checkpoint

into the folder `saved`. `saving` is said before, `saved` after.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

how = sys.argv[1]
folder = Path("saved")
SIZE = 128  # the weight has 64 KiB


if how in ("megatron", "persistent"):  # it asks for a GPU, also in its own process; there may be none here
    torch.cuda.synchronize = lambda: None
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None


def tell(what):
    """In one write."""
    os.write(1, f"{what}\n".encode())


class Training:
    """A model that nothing but its step depends on."""

    def __init__(self):
        self.model = torch.nn.Linear(SIZE, SIZE, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.step = 0

    def iterate(self):
        """One of them."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.step += 1
        tell(f"step {self.step}")

    def run(self, save):
        """For ever."""
        while True:
            self.iterate()
            if self.step == 2 and dist.get_rank() == 0:
                tell("saving")
                save()
                tell("saved")


def with_safetensors(training):
    """One file."""
    from safetensors.torch import save_file

    training.run(lambda: save_file(training.model.state_dict(), folder / "model.safetensors"))


def with_ignite(training):
    """It renames what is whole."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    trainer = Engine(lambda engine, batch: training.iterate())
    content = {"model": training.model, "optimizer": training.optimizer, "trainer": trainer}
    checkpoint = Checkpoint(content, DiskSaver(folder, require_empty=False))  # of rank 0, as it says itself
    once = Events.ITERATION_COMPLETED(once=2)
    trainer.add_event_handler(once, lambda: tell("saving"))
    trainer.add_event_handler(once, checkpoint)
    trainer.add_event_handler(once, lambda: tell("saved"))
    trainer.run(range(1 << 20), max_epochs=1)


def with_accelerate(training):
    """Several files of several ranks."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(training.model, training.optimizer)
    step = 0
    while True:
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, SIZE)).square().mean())
        optimizer.step()
        step += 1
        tell(f"step {step}")
        if step == 2:
            tell("saving")
            accelerator.save_state(folder)
            tell("saved")


def write(content):
    """In the writer's process."""
    torch.save(content, folder / "model.tmp")
    os.replace(folder / "model.tmp", folder / "model.pt")


def with_persistent(training):
    """The writer outlives what it writes."""
    with_megatron(training, persistent=True)


def with_megatron(training, persistent=False):
    """The writer is not waited for by the program."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

    queue = AsyncCallsQueue(persistent)

    def save():
        content = training.model.state_dict()
        queue.schedule_async_request(AsyncRequest(write, (content,), []))

    training.run(save)


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    folder.mkdir(exist_ok=True)
    if how != "accelerate":
        dist.init_process_group("gloo")
    globals()[f"with_{how}"](Training())
