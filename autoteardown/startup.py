"""Starts the agent: the .pth, the .start and the injected sitecustomize call this in every Python process of the image.

1. Most of these processes are no ranks. So this module imports nothing that costs time, and returns at the first check
   in a process that is switched off.
2. No exception may leave `start`: a SystemExit in a .pth is "Fatal Python error: init_import_site".
3. Nothing may be written to stdout: uv parses what the interpreter prints there.
"""

import os
import sys

from autoteardown.switch import SWITCH, say, switch

started_by: "str | None" = None
"""What started the agent: "autoteardown.pth", "autoteardown.start", "sitecustomize" or "autoteardown.arm()"."""

why_off: "str | None" = None
"""The reason why `start` has left the agent off; None before the call, and if the agent is on."""

_active = False


def active() -> bool:
    """Whether the agent's import hooks are installed in this process."""
    return _active


def start(vehicle: str = "autoteardown.start") -> None:
    """Install the agent if it is switched on. Idempotent: a .pth runs twice in venvs (python/cpython#75723)."""
    global started_by, why_off
    if started_by is not None:
        return
    started_by = vehicle
    try:
        on, problem = switch(os.environ)
        if problem is not None:
            say(problem)
        why_off = problem or (None if on else "switched off")
        if on:
            _start()
    except BaseException as error:
        why_off = f"start-up failed: {error!r}"
        say(f"{why_off}; this process is not guarded")


def activate() -> bool:
    """Switch the agent on from code, for `autoteardown.arm()`. An opt-out in the environment wins (`AUTOTEARDOWN=0`).

    Returns:
        Whether the agent is active now.
    """
    global started_by
    if not _active and not os.environ.get(SWITCH, "").strip():
        started_by = "autoteardown.arm()"
        _start()
    return _active


def _start() -> None:
    global _active, why_off
    why_off = _unsupported()
    if why_off is not None:
        say(f"{why_off}: off")
        return
    patterns = os.environ.get("AUTOTEARDOWN_SKIP")
    if patterns:
        from autoteardown import program

        match = program.skipped(patterns)
        if match is not None:
            why_off = f"AUTOTEARDOWN_SKIP matches {match}"
            return
    import atexit

    from autoteardown import import_hooks

    # Callbacks run last in, first out. This one is registered this early so that it runs after the program's own.
    atexit.register(_at_exit)
    if atexit._ncallbacks() > 1:
        from autoteardown import exit_callbacks

        exit_callbacks.remember(_at_exit)
    import_hooks.install()
    _active = True


def _unsupported() -> "str | None":
    import _signal  # the C half of `signal`, loaded in every interpreter

    if not hasattr(os, "fork") or not hasattr(_signal, "set_wakeup_fd"):
        return "this platform has no fork or no signal wake-up fd"
    # Two threads write and read a count and a flag in turn, without a lock: that is in order under the GIL only.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "this Python runs without the GIL, which the agent needs (PYTHON_GIL=1)"
    return None


def _at_exit() -> None:
    try:
        for name in ("autoteardown.children.child_signals", "autoteardown.rank.guard"):
            module = sys.modules.get(name)
            if module is not None:
                module.at_exit()
    except BaseException as error:
        say(f"at exit: {error!r}")
