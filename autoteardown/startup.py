"""The gate: what the .pth, the .start and the injected sitecustomize call in every Python process of the image.

Most of those processes are no ranks, so this module imports nothing that costs, and a process that is switched
off gets no further than the first test. Nothing may escape `start`: a SystemExit out of a .pth is "Fatal Python
error: init_import_site". Nothing may reach stdout: uv parses what the interpreter prints there.
"""

import os
import sys

from autoteardown.switch import SWITCH, say, switch

started_by: "str | None" = None
"""What started the agent: "autoteardown.pth", "autoteardown.start", "sitecustomize" or "autoteardown.arm()"."""

why_off: "str | None" = None
"""Set once `start` was called and left the agent off: the reason in words."""

_active = False


def active() -> bool:
    """True once the agent watches for `signal` and `torch` in this process."""
    return _active


def start(vehicle: str = "autoteardown.start") -> None:
    """Put the agent in place if it is switched on. Idempotent: a .pth runs twice in venvs (python/cpython#75723)."""
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
    """For `autoteardown.arm()`: switch on from code. The opt-outs of the environment still win (`AUTOTEARDOWN=0`).

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

    # Handlers run last in, first out: registered this early, ours runs when the program's own are done.
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
    return None


def _at_exit() -> None:
    guard = sys.modules.get("autoteardown.rank.guard")
    try:
        if guard is not None:
            guard.at_exit()
    except BaseException as error:
        say(f"at exit: {error!r}")
