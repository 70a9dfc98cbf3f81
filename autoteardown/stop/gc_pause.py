"""Pauses garbage collection in a teardown: it would run finalizers of the program on the agent's threads."""

from __future__ import annotations

import gc
import os

_paused = False


def pause() -> None:
    """Pause collections in this process."""
    global _paused
    if gc.isenabled():
        gc.disable()
        _paused = True


def resume() -> None:
    """Resume them, if the agent has paused them."""
    global _paused
    if _paused:
        gc.enable()
        _paused = False


os.register_at_fork(after_in_child=resume)  # a forked child collects as usual
