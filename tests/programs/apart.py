"""Training on a thread beside the main one, for programs that are about what the main thread does."""

import threading
import time

import torch


def train(after, begun):
    """Step for ever."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    while True:
        optimizer.step()
        if not begun.is_set():
            begun.set()
            time.sleep(after)
        time.sleep(0.01)


def begin(after=0):
    """Have it go on while the program lasts; the second step comes so many seconds after the first."""
    begun = threading.Event()
    threading.Thread(target=train, args=[after, begun], daemon=True).start()
    begun.wait()
