"""Finds the training thread of the program, and the event loop that it may wait in."""

from __future__ import annotations

import sys
from typing import Any, Optional

from autoteardown import thread_stacks


class TrainingThread:
    """The thread that steps; until one has, the thread that called init."""

    def __init__(self) -> None:
        self.ident: Optional[int] = None
        self.loop: Any = None
        """The event loop that ran on it when it called init, if any."""

    def set_from_init(self, ident: int) -> None:
        """Called on the thread that calls init."""
        self.ident, self.loop = ident, _running_loop()

    def find(self, begun: bool) -> None:
        """Before any iteration (`begun` is false), take the thread that waits in a collective, or else is in a model.

        The threads of a pool take turns (Ray's threaded actors), and init may be called on another thread than the
        training function (Ray Train).
        """
        if not begun or not thread_stacks.alive(self.ident):
            trains = thread_stacks.in_collective() or thread_stacks.in_model()
            if trains and self.ident not in trains:
                self.ident = trains[0]

    def is_known(self, begun: bool) -> bool:
        """Whether the thread is alive and trains, so that another thread's parking means nothing.

        The main thread of a Ray actor has nothing to do, and parks at once.
        """
        if self.ident is None or not thread_stacks.alive(self.ident):
            return False
        return begun or thread_stacks.place(self.ident) == "peers" or self.ident in thread_stacks.in_model()

    def candidates(self) -> list[int]:
        """The threads that may train.

        Threads of a pool that outlive the training thread are waited for by no one, but keep a Ray actor from its
        exit.
        """
        return (
            [self.ident]
            if self.ident is not None and thread_stacks.alive(self.ident)
            else thread_stacks.foreign()
        )

    def wake_loop(self) -> None:
        """Have the event loop run bytecode: with nothing to do, it waits in C (Ray's async actors do)."""
        try:
            self.loop.call_soon_threadsafe(_nothing)
        except (AttributeError, RuntimeError):  # no loop, or it is closed
            pass


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio.get_running_loop() if asyncio is not None else None
    except (AttributeError, RuntimeError):  # asyncio is still being imported, or no loop runs on this thread
        return None


def _nothing() -> None:
    pass
