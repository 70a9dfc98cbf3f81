"""A program that uses torch's launcher as a library, on a function, and catches what it raises."""

import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def train():
    import torch
    import torch.distributed as dist

    import autoteardown

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    autoteardown.on_teardown(lambda: Path(f"saved-{rank}").write_text("0"))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dist.barrier()
    print(f"attempt 0 rank {rank} pid 0", flush=True)
    while True:
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        time.sleep(0.005)


if __name__ == "__main__":
    config = LaunchConfig(
        1, 1, 2, run_id="here", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="spawn"
    )
    try:
        elastic_launch(config, train)()
    except SignalException as error:
        print(f"caught {error.sigval.name}", flush=True)
        sys.exit(5)
