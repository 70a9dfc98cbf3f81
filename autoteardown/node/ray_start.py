"""`ray start --block` drains its node's ranks on SIGTERM, before anything of Ray's own happens.

On Kubernetes that process gets the pod's SIGTERM and the actors never do: raylet SIGKILLs them. Ray's handler
(`ray/_private/node.py`, `Node._register_shutdown_hooks`) marks the node as draining, leaves the actors running for
up to `RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S` = 30 s, then kills every process and exits with 1. All of it still
happens, after the ranks are gone.

The handler is set with `signal.signal`, late, once; so in this one process, which is never a rank, a stand-in for
that function puts the drain in front of whatever handler SIGTERM gets. Rejected: wrapping Ray's method, which is
private; the wake-up fd, which would drain beside Ray's handler and not before it.
"""

from __future__ import annotations

import functools
import os

from autoteardown import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType, ModuleType
    from typing import Any

    Handler = Callable[[int, FrameType | None], Any]

_MODULES = ("ray.scripts.scripts",)
_WITH_VALUE = ("--logging-level", "--logging-format")  # options of `ray` itself, before the command


def is_ray_start(argv: Sequence[str] | None = None) -> bool:
    """Whether this process, or one with that command line, is `ray start`."""
    words = program.command_line() if argv is None else list(argv)
    kind, name = program.parse(words)
    if not ((kind == "script" and os.path.basename(name) == "ray") or (kind == "-m" and name in _MODULES)):
        return False
    start = next(place for place, word in enumerate(words) if place and word.endswith(name))
    rest = iter(words[start + 1 :])
    for word in rest:
        if not word.startswith("-"):
            return word == "start"
        if word in _WITH_VALUE:
            next(rest, None)
    return False


class DrainFirst:
    """A handler that drains the node, then does what the handler it stands for does."""

    def __init__(self, handler: Handler) -> None:
        """Stand for `handler`."""
        self.handler = handler
        self._draining = False

    def __call__(self, signum: int, frame: FrameType | None) -> object:
        """Handle the signal. One that comes while the node is being drained is dropped, as Ray drops it later."""
        if self._draining:
            return None
        self._draining = True
        try:
            drain_node()
        finally:
            self._draining = False
        return self.handler(signum, frame)


def install(module: ModuleType) -> None:
    """Put the drain in front of every handler that SIGTERM gets from now on. Idempotent."""
    real_signal, real_getsignal = module.signal, module.getsignal

    @functools.wraps(real_signal)
    def signal(signalnum: Any, handler: Any) -> Any:
        if signalnum == module.SIGTERM and callable(handler) and not isinstance(handler, DrainFirst):
            handler = DrainFirst(handler)
        return _real(real_signal(signalnum, handler))

    @functools.wraps(real_getsignal)
    def getsignal(signalnum: Any) -> Any:
        return _real(real_getsignal(signalnum))

    module.signal, module.getsignal = signal, getsignal  # type: ignore[attr-defined]


def drain_node() -> None:
    """Drain, and say on stderr what became of each rank. Never raises; silent when there is none."""
    try:
        from autoteardown import settings
        from autoteardown.node import drain, registry

        found, _ = settings.load(os.environ)
        say = _say if found.log != "quiet" else lambda text: None
        waiting = len(registry.read(found.runtime_dir, say))
        if not waiting:
            return
        say(f"SIGTERM: draining {waiting} rank(s) of this node")
        # Half of the second that every rank keeps free at the end of its grace period.
        ranks, _ = drain.drain(found.runtime_dir, found.signals[0], found.hard + 0.5)
        for rank in ranks:
            say(rank.line())
        clean = sum(rank.clean for rank in ranks)
        say(f"{clean} of {len(ranks)} left cleanly; Ray's own shutdown goes on")
    except Exception as error:
        _say(f"the node was not drained: {error!r}")


def _say(text: str) -> None:
    from autoteardown import stderr

    stderr.say(f"autoteardown: ray start: {text}")  # dropped rather than waited for, if the pipe is full


def _real(handler: Any) -> Any:
    return handler.handler if isinstance(handler, DrainFirst) else handler
