"""What a program is writing, and whether it is one checkpoint: more than a call of `torch.save` (F20).

A thread writes a checkpoint as long as

- it is in a save that we see (`torch.save`, `torch.distributed.checkpoint`) or in `autoteardown.protect()`;
- such a save has ended a moment ago: the next file may follow, or the rename of a temporary one;
- it is inside a function that says in its name that it saves (`save_state`, `_save_checkpoint`, `save_file`): that
  covers files which nobody sees being written, and everything between two of them. A function in which the thread has
  joined a group or stepped (`train_and_save`) is none.

It ends at the latest at the end of the iteration: there, the thread is stopped anyway.
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

_MOMENT = 0.5  # seconds after a save in which another may follow it, at least
_LONGEST_MOMENT = 5.0
_LOOK = 0.02  # seconds between two looks at saves in the background
_SAVER = re.compile(
    r"(^|_)save(_|[A-Z]|$)|Save($|_|[A-Z])"
    r"|(write|dump|store|export|make|create|take|commit|finalize|persist|push|upload)_?(checkpoint|ckpt|snapshot)"
)
_NO_SAVER = re.compile(r"save_for_backward|should|to_save|register|hook")


class SavesInProgress:
    """What the threads of one process are saving."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}
        """How deep each thread is in saves that we see."""
        self._began: dict[int, float] = {}
        self._moment: dict[int, float] = {}  # until when another save may follow
        self._background = 0
        self._writers = WriterProcesses()
        self._more_than_saves: set[CodeType] = set()

    def does_more(self) -> None:
        """The calling thread joins a group or steps: what it is in does more than save (`train_and_save`)."""
        self._more_than_saves.update(frame.f_code for frame in _in_savers(sys._getframe()))

    def enter(self, ident: int) -> None:
        """A save begins on that thread."""
        if ident not in self.open:
            self._began[ident] = monotonic()
        self.open[ident] = self.open.get(ident, 0) + 1

    def leave(self, ident: int) -> None:
        """And ends."""
        depth = self.open.get(ident, 0) - 1
        if depth > 0:
            self.open[ident] = depth
            return
        self.open.pop(ident, None)
        now = monotonic()
        took = now - self._began.get(ident, now)
        self._moment[ident] = now + min(_LONGEST_MOMENT, max(_MOMENT, took))

    @contextmanager
    def on_this_thread(self) -> Iterator[None]:
        """Whatever this thread does, it is saving."""
        ident = get_ident()
        self.enter(ident)
        try:
            yield
        finally:
            self.leave(ident)

    def in_background(self, future: Any) -> None:
        """A save goes on until `future` is done."""
        self._background += 1
        future.add_done_callback(self._background_over)

    def _background_over(self, future: Any) -> None:
        self._background -= 1

    def wait_for_background(self) -> None:
        """Until none goes on there: on a thread that may take its time."""
        while self._background > 0:
            sleep(_LOOK)

    def shields(self, ident: int) -> bool:
        """Whether that thread writes a checkpoint."""
        if ident in self.open or monotonic() < self._moment.get(ident, 0.0):
            return True
        frames = _in_savers(sys._current_frames().get(ident))
        return any(frame.f_code not in self._more_than_saves for frame in frames)

    def going_on(self, idents: Iterable[int]) -> bool:
        """Whether anything is being saved, on one of those threads or out of sight of them."""
        if self.open or self._background > 0:
            return True
        return any(self.shields(ident) for ident in idents) or self._writers.any()


def _in_savers(frame: Optional[FrameType]) -> Iterator[FrameType]:
    """From that frame on outwards, the functions that say in their name that they save."""
    while frame is not None:
        code = frame.f_code
        says_so = _SAVER.search(code.co_name) and not _NO_SAVER.search(code.co_name)
        if says_so and not code.co_filename.startswith(thread_stacks.PACKAGE):
            yield frame
        frame = frame.f_back
