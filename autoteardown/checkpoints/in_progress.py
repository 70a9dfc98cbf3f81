"""Knows which threads are writing a checkpoint, which is more than one call of `torch.save`.

A thread counts as writing one while

- it is in a save that the agent hooks (`torch.save`, `torch.distributed.checkpoint`) or in `autoteardown.protect()`;
- such a save has just ended: the next file may follow, or a temporary file may be renamed;
- it is in a function whose name says that it saves (`save_state`, `_save_checkpoint`, `save_file`). That covers
  files written by other means, and the time between two files. A function in which the thread has also joined a
  group or stepped (`train_and_save`) does not count.

A checkpoint counts as complete when the iteration ends, at the latest: the gate stops the thread there in any case.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Optional

from autoteardown import thread_stacks
from autoteardown.checkpoints.writer_processes import WriterProcesses
from autoteardown.unpatched import get_ident, monotonic, sleep

_MOMENT = 5.0  # seconds after a save in which the next file may follow
_LOOK = 0.02  # seconds between two checks of background saves
_SAVER = re.compile(
    r"(^|_)save(_|[A-Z]|$)|Save($|_|[A-Z])"
    r"|(write|dump|store|export|make|create|take|commit|finalize|persist|push|upload)_?(checkpoint|ckpt|snapshot)"
)
_NO_SAVER = re.compile(r"save_for_backward|should|to_save|register|hook")


class SavesInProgress:
    """The saves that are in progress in this process."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}
        """By thread: how many hooked saves it is in, one inside the other."""
        self._moment: dict[int, float] = {}  # until when the next save may follow
        self._background = 0
        self._writers = WriterProcesses()
        self._more_than_saves: set[CodeType] = set()

    def does_more(self) -> None:
        """Record that the calling thread joins a group or steps: its functions do more than save (`train_and_save`)."""
        self._more_than_saves.update(frame.f_code for frame in _in_savers(sys._getframe()))

    def enter(self, ident: int) -> None:
        """Record that a save begins on that thread."""
        self.open[ident] = self.open.get(ident, 0) + 1

    def leave(self, ident: int) -> None:
        """Record that a save ends on that thread."""
        depth = self.open.get(ident, 0) - 1
        if depth > 0:
            self.open[ident] = depth
            return
        self.open.pop(ident, None)
        self._moment[ident] = monotonic() + _MOMENT

    @contextmanager
    def on_this_thread(self) -> Iterator[None]:
        """Count everything that this thread does inside the block as a save, and nothing after it."""
        ident = get_ident()
        self.enter(ident)
        try:
            yield
        finally:
            self.leave(ident)
            self._moment.pop(ident, None)  # the thread may end now, and another get its identifier

    def in_background(self, future: Any) -> None:
        """Record a save that continues in the background until `future` is done."""
        self._background += 1
        future.add_done_callback(self._background_over)

    @property
    def continues(self) -> bool:
        """Whether a save continues in the background, on a thread that is not known."""
        return self._background > 0

    def _background_over(self, future: Any) -> None:
        self._background -= 1

    def wait_for_background(self) -> None:
        """Wait until no save continues in the background. Unbounded: call it on a thread of its own."""
        while self._background > 0:
            sleep(_LOOK)

    def shields(self, ident: int) -> bool:
        """Whether that thread is writing a checkpoint."""
        if ident in self.open or monotonic() < self._moment.get(ident, 0.0):
            return True
        frames = _in_savers(sys._current_frames().get(ident))
        return any(frame.f_code not in self._more_than_saves for frame in frames)

    def going_on(self, idents: Iterable[int]) -> bool:
        """Whether anything is being saved: on one of these threads, in the background, or by another process."""
        if self.open or self._background > 0:
            return True
        return any(self.shields(ident) for ident in idents) or self._writers.any()


def _in_savers(frame: Optional[FrameType]) -> Iterator[FrameType]:
    """The frames, from this one outwards, of functions whose name says that they save."""
    while frame is not None:
        code = frame.f_code
        says_so = _SAVER.search(code.co_name) and not _NO_SAVER.search(code.co_name)
        if says_so and not code.co_filename.startswith(thread_stacks.PACKAGE):
            yield frame
        frame = frame.f_back
