"""The training job of a drill: trains an MLP on scikit-learn's digits with DDP, and saves checkpoints on rank 0.

It is a usual script (see `examples/train_ddp.py`) with two additions: it brings itself into the state that the scenario
needs, and it writes what it does to `<folder>/rank-<n>`, which the drill reads.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

LIFETIME = 900.0  # seconds after which the job ends by itself
STEP_SECONDS = 0.01  # the least time of a step: a drill is no benchmark, and needs the processors itself
CHECKPOINT_STEPS = 20
DISK_BYTES_PER_SECOND = 200_000  # saving 80 kB takes 0.4 s, as large checkpoints on network storage do


class Notes:
    """Writes lines for the drill to read."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, what: str, value: object = "") -> None:
        """Write one line."""
        os.write(self._file, f"{what} {value}\n".encode())


class SlowDisk(io.FileIO):
    """A file on slow storage."""

    def write(self, data: Any) -> int:
        """Write after a delay in proportion to the size."""
        time.sleep(memoryview(data).nbytes / DISK_BYTES_PER_SECOND)
        return super().write(data)


def digits() -> TensorDataset:
    """1,797 images of handwritten digits, from the file that `sklearn.datasets.load_digits` reads.

    Importing scikit-learn itself would take two more seconds in each rank.
    """
    sklearn = find_spec("sklearn")
    assert sklearn is not None and sklearn.submodule_search_locations
    with gzip.open(Path(sklearn.submodule_search_locations[0], "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return TensorDataset(torch.from_numpy(table[:, :-1]) / 16, torch.from_numpy(table[:, -1]).long())


def batches(world: int, rank: int) -> Iterator[Any]:
    """Endless shuffled batches of this rank's share of the data."""
    data = digits()
    sampler: Any = DistributedSampler(data, world, rank)
    loader: Any = DataLoader(data, batch_size=64, sampler=sampler)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def get_stuck(note: Notes, rank: int, device: Any) -> None:
    """Wait on rank 0 in a collective that the other ranks never join."""
    note("waiting" if rank == 0 else "elsewhere")
    if rank == 0:
        dist.all_reduce(torch.ones(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()
    end = time.monotonic() + LIFETIME
    while time.monotonic() < end:
        time.sleep(STEP_SECONDS)


def train(scenario: str, folder: Path) -> None:
    """Train until the process is stopped, at most `LIFETIME`."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    note = Notes(folder / f"rank-{rank}")
    note("started", os.getpid())
    on_gpu = dist.is_nccl_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if scenario == "init":  # one rank more than torchrun starts, as if its node never came up
        os.environ["WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) + 1)
    note("joining", "nccl" if on_gpu else "gloo")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=LIFETIME))

    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    model = DistributedDataParallel(torch.nn.Sequential(*layers).to(device))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = itertools.count(1)
    done = 0

    def stepped(*_: object) -> None:
        nonlocal done
        done = next(steps)
        note("step", done)

    def save() -> None:
        note("saving", done)
        with SlowDisk(folder / "checkpoint.pt", "w") as file:
            torch.save({"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        note("saved", done)

    if scenario == "save" and rank == 0:
        import autoteardown

        autoteardown.on_teardown(save)
    # In the optimizer's own hook, so that a rank that is stopped right after a step has written it before.
    optimizer.register_step_post_hook(stepped)
    end = time.monotonic() + LIFETIME
    for step, (images, labels) in enumerate(batches(dist.get_world_size(), rank), 1):
        loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECKPOINT_STEPS == 0 and rank == 0:
            save()
        if scenario == "stuck" and step == CHECKPOINT_STEPS:
            get_stuck(note, rank, device)
        if time.monotonic() > end:
            break
        time.sleep(STEP_SECONDS)
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hand-written", action="store_true", help="install the handler of `handwritten.py`")
    options = parser.parse_args()
    if options.hand_written:
        from autoteardown.drills import handwritten

        handwritten.install()
    train(options.scenario, options.folder)


if __name__ == "__main__":
    main()
