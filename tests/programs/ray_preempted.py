"""Ray Train that knows of preemption, as in its docs. `ray_preempted.py ADDRESS FOLDER MAX_FAILURES`

It trains until it hears that a node is being preempted, saves a checkpoint, and trains on until it is stopped. The next
attempt begins with that checkpoint, or from the beginning, and takes three steps.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import ray
import ray.train.torch
import torch
import torch.distributed as dist


def train(config):
    """The training function."""
    folder, rank = config["folder"], dist.get_rank()
    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step, last, saved = 0, sys.maxsize, False
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as path:
            step = int(Path(path, "step").read_text())
        last = step + 3
        Path(folder, f"resumed-{rank}").write_text(str(step))
    elif Path(folder, f"stepping-{rank}").exists():
        last = 3
    while step < last:
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        step += 1
        time.sleep(0.1)
        if step == 3:
            Path(folder, f"node-{rank}").write_text(ray.get_runtime_context().get_node_id())
            Path(folder, f"stepping-{rank}").write_text(str(os.getpid()))
        info = ray.train.get_preemption_info()
        if info is not None and not saved:
            saved = True
            with tempfile.TemporaryDirectory() as path:
                if rank == 0:
                    Path(path, "step").write_text(str(step))
                    own = ray.train.Checkpoint.from_directory(path)
                ray.train.report({"step": step}, checkpoint=own if rank == 0 else None)
            Path(folder, f"saved-{rank}").write_text(f"{step} {info.preempted_node_ids}")


os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
address, folder, max_failures = sys.argv[1:]
ray.init(address, log_to_driver=True)
trainer = ray.train.torch.TorchTrainer(
    train,
    train_loop_config={"folder": folder},
    scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0, "slot": 1}),
    run_config=ray.train.RunConfig(
        storage_path=f"{folder}/storage",
        failure_config=ray.train.FailureConfig(max_failures=int(max_failures)),
    ),
)
try:
    trainer.fit()
    print("fit returned", flush=True)
except Exception as error:
    print("fit raised", type(error).__name__, flush=True)
