"""A training script with a SIGTERM handler of its own. `handlers.py STYLE WHEN [WHERE]`

STYLE  flag       sets a flag; the loop looks at it, saves and exits with 42
       hangs      never returns
       deaf       sets a flag that nobody looks at
       exits      saves and exits with 42 by itself
       exit-only  raises SystemExit(1) and does nothing else
       collective as flag, with a broadcast inside the handler (Lightning), and another step before the save
       twice      as flag, and complains when it is called a second time
       chains     as flag, and calls the handler that it found, if that can be called
       raises     raises KeyboardInterrupt, which the loop turns into a save and exit 42
WHEN   before, after (init), early (before torch is imported)
WHERE  main, thread: where init is called and the loop runs
"""

import os
import signal
import sys
import threading
import time

style, when, where = [*sys.argv[1:], "main"][:3]
stop = threading.Event()
seen = []
found = None


def save_and_exit():
    """Leave as this application does."""
    print("saved with a group" if dist.is_initialized() else "saved without a group", flush=True)
    dist.destroy_process_group()
    print("left by itself", flush=True)
    if threading.current_thread() is threading.main_thread():
        sys.exit(42)
    os._exit(42)


def handler(signum, frame):
    """The application's own."""
    print("handler", signum, flush=True)
    if style == "hangs":
        while True:
            time.sleep(0.1)
    if style == "exit-only":
        raise SystemExit(1)
    if style == "exits":
        save_and_exit()
    if style == "raises":
        raise KeyboardInterrupt
    if style == "collective":
        dist.broadcast(torch.ones(1), 0)
    if style == "chains" and callable(found):
        found(signum, frame)
    seen.append(signum)
    if style == "twice" and len(seen) > 1:
        print("called twice", flush=True)
    stop.set()


def install():
    """Put it in."""
    global found
    found = signal.signal(signal.SIGTERM, handler)
    print("found", found, "in force", signal.getsignal(signal.SIGTERM) is handler, flush=True)


def train():
    """A loop that looks at the flag."""
    dist.init_process_group("gloo")
    if when == "after":
        install()
    print("in force", signal.getsignal(signal.SIGTERM) is handler, flush=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step = 0
    while True:
        stopping = torch.tensor([float(stop.is_set())])
        dist.all_reduce(stopping)
        if stopping and style != "deaf":
            time.sleep(0.3)  # a save takes time
            optimizer.step()
            save_and_exit()
        weight.grad = torch.ones(1)
        dist.all_reduce(weight.grad)
        optimizer.step()
        step += 1
        print("step", step, flush=True)
        time.sleep(0.005)


if when == "early":
    install()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

if when == "before":
    install()
if where == "thread":
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
else:
    try:
        train()
    except KeyboardInterrupt:
        save_and_exit()
