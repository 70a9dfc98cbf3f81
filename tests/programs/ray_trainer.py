"""Ray Train, as in its docs. `ray_trainer.py ADDRESS FOLDER steps|stuck MAX_FAILURES`

The training function runs on a thread that is not the one on which Ray Train calls init. At the first attempt it steps
until it is stopped, or waits in a collective without ever having stepped; at the next it takes ten steps.
"""

import sys
import time
from pathlib import Path

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray_ranks import say


def train(config):
    """The training function."""
    folder, rank = config["folder"], dist.get_rank()
    again = Path(folder, f"training-{rank}").exists()
    say(folder, "again" if again else "training", rank)
    if config["what"] == "stuck" and not again:
        if rank == 0:
            dist.all_reduce(torch.ones(1))
        while True:
            time.sleep(0.01)
    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = 0
    while step < 10 or not again:
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        time.sleep(0.01)
        step += 1
        if step == 5 and not again:
            say(folder, "stepping", rank)
    say(folder, "trained", rank)


address, folder, what, max_failures = sys.argv[1:]
ray.init(address, log_to_driver=False)
trainer = ray.train.torch.TorchTrainer(
    train,
    train_loop_config={"folder": folder, "what": what},
    scaling_config=ray.train.ScalingConfig(num_workers=2),
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
