"""Posts to the notice board, on a thread of their own: each may block for as long as the store likes."""

from __future__ import annotations

import _queue
import _thread
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from autoteardown.channel.board import Board

_FLUSH = "flush"


class Poster:
    """Posts in the order of the calls.

    Args:
        board: where to.
        lost: called on the poster's thread, with the reason, when a post has failed.
    """

    def __init__(self, board: Board, lost: Callable[[str], object]) -> None:
        self._board = board
        self._lost = lost
        self._posts: _queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = _queue.SimpleQueue()
        self._flushed = _thread.allocate_lock()
        _thread.start_new_thread(self._run, ())

    def post(self, method: str, *args: Any) -> None:
        """Have this method of the board called; never waits."""
        self._posts.put((method, args))

    def flush(self, patience: float) -> None:
        """Wait until what was posted so far is on the board, at most `patience` seconds."""
        self._flushed.acquire(False)
        self.post(_FLUSH)
        self._flushed.acquire(timeout=patience)

    def _run(self) -> None:
        while True:
            method, args = self._posts.get()
            if method == _FLUSH:
                self._flushed.release()
                continue
            try:
                getattr(self._board, method)(*args)
            except BaseException as error:
                self._lost(f"{type(error).__name__}: {error}")
