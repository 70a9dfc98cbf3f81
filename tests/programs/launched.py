"""A rank under a launcher, which trains for ever. `launched.py WHAT [SECONDS]`. WHAT:

saves     an `on_teardown` callback writes the file `saved-R`, which takes SECONDS
plain     no callback
fails     rank 0 raises when the file `go` is there
leaves    rank 0 exits with 143 of its own accord when the file `go` is there
loops     signals itself after five steps, in each attempt
exits     its own handler of SIGTERM calls sys.exit(SECONDS)
raises    its own handler of SIGTERM raises, and nothing catches that
restarts  as `saves`; the attempt with the number in the file `last`, if it is there, trains five steps and ends

Prints `attempt A rank R pid P` once all ranks have met.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import autoteardown

what, seconds = sys.argv[1], float([*sys.argv, 0][2] if len(sys.argv) > 2 else 0)
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
dist.init_process_group("gloo")
rank = dist.get_rank()


def save():
    time.sleep(seconds)
    Path(f"saved-{rank}").write_text(str(attempt))


def handle(signum, frame):
    if what == "exits":
        sys.exit(int(seconds))
    raise RuntimeError("a mistake of the handler's")


def main():
    if what in ("saves", "restarts"):
        autoteardown.on_teardown(save)
    if what in ("exits", "raises"):
        signal.signal(signal.SIGTERM, handle)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dist.barrier()
    # In one write: several processes print here.
    os.write(1, f"attempt {attempt} rank {rank} pid {os.getpid()}\n".encode())
    last = Path("last")
    step = 0
    while not (what == "restarts" and step == 5 and last.exists() and last.read_text() == str(attempt)):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        time.sleep(0.005)
        step = min(step + 1, 5)
        if what == "loops" and step == 5:
            signal.raise_signal(signal.SIGTERM)
        if what == "fails" and rank == 0 and Path("go").exists():
            raise ValueError("a mistake of the program's")
        if what == "leaves" and rank == 0 and Path("go").exists():
            os._exit(143)
    os.write(1, f"attempt {attempt} rank {rank} trained\n".encode())


main()
time.sleep(0.1)  # see train.py
dist.destroy_process_group()
