"""A training script for signals as platforms send them. `as_sent.py STYLE SECONDS [chain]`

STYLE    flag      a handler sets a flag; the loop looks at it once an iteration, saves and ends normally
         polls     the loop asks `autoteardown.stop_requested()`, saves and ends normally
         callback  an `on_teardown` callback saves; it takes CALLBACK seconds, and fails on the rank that FAILS names
         raises    on a signal, the loop ends with an uncaught exception
SECONDS  of an iteration, on rank 0 between the gradients and the step: the other ranks get ahead by one iteration
chain    faulthandler has the signal, before or after init (CHAIN), and chains to what it has found

Each rank saves the number of its iterations to $SAVED/<rank>. LIMIT limits its threads (`pid_limit.py`).
"""

import faulthandler
import os
import signal
import sys
import time

import pid_limit
import torch
import torch.distributed as dist

import autoteardown

style, seconds = sys.argv[1], float(sys.argv[2])
stop = []
done = 0


def save():
    rank = dist.get_rank()
    time.sleep(float(os.environ.get("CALLBACK", "0")))
    if os.environ.get("FAILS") == str(rank):
        raise OSError("disk full")
    with open(f"{os.environ['SAVED']}/{rank}", "a") as file:
        print(done, file=file)


def chain(when):
    if os.environ.get("CHAIN") == when:
        faulthandler.register(signal.SIGTERM, chain=True)


if style in ("flag", "raises"):
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
if style == "callback":
    autoteardown.on_teardown(save)
chain("before")
dist.init_process_group("gloo")
chain("after")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
pid_limit.limit()
print("ready", flush=True)
for _ in range(10**6):
    model(torch.ones(2, 4)).sum().backward()
    time.sleep(seconds if dist.get_rank() == 0 else 0.01)
    optimizer.step()
    optimizer.zero_grad()
    done += 1
    if done in (2, 3, 10):
        print(f"iteration {done}", flush=True)
    if style == "raises" and stop:
        raise RuntimeError("the program's own")
    if style == "polls" and autoteardown.stop_requested():
        stop.append(0)
    if style in ("flag", "polls") and stop:
        print("signals", len(stop), flush=True)
        save()
        break
dist.destroy_process_group()
