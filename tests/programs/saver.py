"""A training script whose ranks save each by itself, without agreeing with their peers.

`saver.py STYLE [SECONDS]`. Every rank all-reduces its gradient in each step, as DDP does;
from the third on, an iteration takes SECONDS. STYLE:

flag        a SIGTERM handler sets a flag; the loop looks at it after each step, saves and leaves with 42
broadcast   the same with a broadcast inside the handler (Lightning)
exits       the handler raises SystemExit(42), and the program saves in `finally`
inside      the handler itself saves, and leaves with 42
logs        the handler only says that it was called (submitit)
raises      the handler raises ValueError, which the loop does not expect
asyncio     `loop.add_signal_handler`; the training runs in a coroutine
uvloop      the same on uvloop
trio        `trio.open_signal_receiver`; the training runs in a task beside the one that listens
X-apart     for each of these three: the loop, with the handler, on the main thread, the training on another
thread      the handler on the main thread, the training on another
poll        no handler: the loop asks `autoteardown.stop_requested()`
places      as poll, asked at two places of each iteration
off-main    as poll, on a thread
no-step     as poll, without an optimizer
deaf-poll   asks, and does not mind the answer
slow-save   as flag; the save takes 4 s
collective  as flag; every rank contributes to what rank 0 saves
allreduced  what people write by hand without the agent: the flag is all-reduced in each step
none        none of all this
mixed       as flag on even ranks, none on the others

A checkpoint is `saved/RANK.pt` with the number of the iteration, and `saved RANK N` on stdout.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import autoteardown

style = sys.argv[1]
LOOP = next((loop for loop in ("asyncio", "uvloop", "trio") if style.startswith(loop)), None)
APART = style.endswith("-apart")
pause = float([*sys.argv, "0.005"][2])
flag = threading.Event()
done = 0
weight = torch.nn.Parameter(torch.zeros(8))
optimizer = torch.optim.SGD([weight], lr=1.0)


def save():
    """The whole state of this rank."""
    total = weight.detach().clone()
    if style == "collective":
        dist.all_reduce(total)
    if style == "slow-save":
        print("saving", flush=True)
        time.sleep(4)
    Path("saved").mkdir(exist_ok=True)
    rank = dist.get_rank()
    torch.save({"step": done, "weight": total}, f"saved/{rank}.pt")
    print(f"saved {rank} {done}", flush=True)


def save_and_exit():
    """Leave as this application does."""
    save()
    dist.destroy_process_group()
    if threading.current_thread() is threading.main_thread() and LOOP != "trio":  # which makes a group of it
        sys.exit(42)
    os._exit(42)


def handler(signum, frame):
    """The application's own."""
    print(f"handler at {done}", flush=True)
    if style == "broadcast":
        dist.broadcast(torch.ones(1), 0)
    elif style == "exits":
        raise SystemExit(42)
    elif style == "inside":
        save_and_exit()
    elif style == "raises":
        raise ValueError("the handler has failed")
    elif style == "logs":
        return
    flag.set()


def iterate():
    """One iteration."""
    global done
    if style == "no-step":
        dist.all_reduce(torch.ones(1))
    else:
        weight.grad = -torch.ones(8)
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()
        optimizer.step()
    done += 1
    print(f"step {done}", flush=True)  # in one piece: torchrun's workers share an unbuffered stdout
    if style == "places" and autoteardown.stop_requested():
        save_and_exit()
    time.sleep(pause if done >= 3 else 0.005)


def wants_to_stop():
    """Whether the loop is to end here."""
    if style in ("poll", "places", "off-main", "no-step"):
        return autoteardown.stop_requested()
    if style == "deaf-poll":
        autoteardown.stop_requested()
        return False
    if style == "allreduced":
        stopping = torch.tensor([float(flag.is_set())])
        dist.all_reduce(stopping)
        return bool(stopping)
    return flag.is_set()


def train():
    """Until it is told to stop."""
    while True:
        iterate()
        if wants_to_stop():
            save_and_exit()


async def train_on_a_loop():
    """The same in a coroutine, whose event loop has the handler."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, handler, signal.SIGTERM, None)
    if APART:
        await asyncio.to_thread(train)
    while True:
        iterate()
        await asyncio.sleep(0)
        if flag.is_set():
            save_and_exit()


async def train_with_trio():
    """The same with trio."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, signals)
            if APART:
                await trio.to_thread.run_sync(train)
            while True:
                iterate()
                await trio.sleep(0.02)  # trio takes its tasks in random order: time for all of them
                if flag.is_set():
                    save_and_exit()


async def listen(signals):
    """Trio's way of having a handler."""
    async for signum in signals:
        handler(signum, None)


def has_handler(rank):
    """Whether this rank installs the Python handler."""
    if style == "mixed":
        return rank % 2 == 0
    return LOOP is None and style not in ("poll", "places", "off-main", "no-step", "deaf-poll", "none")


def main():
    """Whatever was asked for."""
    dist.init_process_group("gloo")
    if has_handler(dist.get_rank()):
        signal.signal(signal.SIGTERM, handler)
    if style in ("thread", "off-main"):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    elif LOOP == "asyncio":
        asyncio.run(train_on_a_loop())
    elif LOOP == "uvloop":
        import uvloop

        uvloop.run(train_on_a_loop())
    elif LOOP == "trio":
        import trio

        trio.run(train_with_trio)
    elif style == "exits":
        try:
            train()
        finally:
            save()
            dist.destroy_process_group()
    else:
        train()


if __name__ == "__main__":
    main()
