"""Which of a program's threads is the one that trains, and the event loop that it may wait in."""

from __future__ import annotations

import sys
from typing import Any, Optional

from autoteardown import thread_stacks


class TrainingThread:
    """Of one process: the thread that steps, and until one has, the one that called init."""

    def __init__(self) -> None:
        self.ident: Optional[int] = None
        self.loop: Any = None
        """The event loop that ran on it when it called init, if any."""

    def set_from_init(self, ident: int) -> None:
        """On that thread, which is the calling one."""
        self.ident, self.loop = ident, _running_loop()

    def find(self, begun: bool) -> None:
        """Without an iteration to tell (it has not `begun`), the thread that waits in a collective is the one.

        The threads of a pool take turns (Ray's threaded actors), and init may be called on one, the training function
        on another (Ray Train).
        """
        if not begun or not thread_stacks.alive(self.ident):
            waiting = thread_stacks.in_collective()
            if waiting and self.ident not in waiting:
                self.ident = waiting[0]

    def is_known(self, begun: bool) -> bool:
        """Whether it is there, and does train: that another thread has stopped says nothing of it then.

        The main thread of a Ray actor has nothing to do, and parks at once.
        """
        if self.ident is None or not thread_stacks.alive(self.ident):
            return False
        return begun or thread_stacks.place(self.ident) == "peers"

    def candidates(self) -> list[int]:
        """Those that may train.

        Nobody waits for the threads of a pool that come after the training thread's end, but they keep a Ray actor from
        its exit.
        """
        return (
            [self.ident]
            if self.ident is not None and thread_stacks.alive(self.ident)
            else thread_stacks.foreign()
        )

    def wake_loop(self) -> None:
        """An event loop with nothing to do waits in C (Ray's async actors do): have it come to a bytecode."""
        try:
            self.loop.call_soon_threadsafe(_nothing)
        except (AttributeError, RuntimeError):  # none, or closed
            pass


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio.get_running_loop() if asyncio is not None else None
    except (AttributeError, RuntimeError):  # still being imported, or no loop on this thread
        return None


def _nothing() -> None:
    pass
