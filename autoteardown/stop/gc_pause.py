"""Garbage collection in a teardown: off, for it would run finalizers of the program on threads of ours."""

from __future__ import annotations

import gc
import os

_paused = False


def pause() -> None:
    """No more collections in this process."""
    global _paused
    if gc.isenabled():
        gc.disable()
        _paused = True


def resume() -> None:
    """As before, if it was us."""
    global _paused
    if _paused:
        gc.enable()
        _paused = False


os.register_at_fork(after_in_child=resume)  # a child is a process like any other
