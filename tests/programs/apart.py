"""Training on a thread beside the main one, for programs that are about what the main thread does."""

import threading
import time

import torch


def train():
    """Step for ever."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    while True:
        optimizer.step()
        time.sleep(0.01)


def begin():
    """Have it go on while the program lasts."""
    threading.Thread(target=train, daemon=True).start()
