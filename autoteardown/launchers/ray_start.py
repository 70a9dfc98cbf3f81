"""`ray start --block`: Ray reacts to SIGTERM at once, as without us; the node's ranks are out before Ray kills them.

On Kubernetes that process gets the pod's SIGTERM and the actors never do: raylet SIGKILLs them. Ray's handler
(`ray/_private/node.py`, `Node._register_shutdown_hooks`) tells the cluster that the node is being preempted and until
when, from which come `ray.train.get_preemption_info()`, the just-in-time checkpoint, `RayActorError.preempted` and
retries that are free. It leaves the actors running for up to `RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S` = 30 s, or until
nobody uses the node, then kills every process (`Node.kill_all_processes`) and exits with 1.

So beside that handler a thread waits with it. When the time that is left is what a teardown may need, it drains the
ranks that Ray would kill. The deadline that Ray tells is a little before that: Ray Train stops its workers by then. If
Ray is ready to kill earlier (the drain was rejected, is turned off, or raylet is gone), that waits for the drain.

The handler is set with `signal.signal`, late, once; so in this one process, which is never a rank, a stand-in for
that function wraps whatever handler SIGTERM gets. `kill_all_processes` is looked up when the signal comes: without it
the node is drained in time all the same. Rejected: to drain first, which is what this module once did. Ray Train then
saw ranks fail that nobody had told it were being preempted.
"""

from __future__ import annotations

import functools
import os
import sys

from autoteardown import program, unpatched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType, ModuleType
    from typing import Any

    from autoteardown.settings import Settings

    Handler = Callable[[int, FrameType | None], Any]

_MODULES = ("ray.scripts.scripts",)
_WITH_VALUE = ("--logging-level", "--logging-format")  # options of `ray` itself, before the command
_RAYS_OWN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_RAYS_DEFAULT = 30.0
_PODS = "TERMINATION_GRACE_PERIOD_SECONDS"
_MARGIN = 2.0  # seconds that a teardown may need beside the time for an iteration
# Seconds between the deadline that Ray is told and the drain. Ray Train looks every 2 s, and takes a worker that ends
# before that deadline for a failed one; at the deadline it stops its workers itself, and its retry is free.
_LEAD = 4.0
_LAST = 0.5  # half of the second that every rank keeps free at the end of its grace period


def command(argv: Sequence[str] | None = None) -> list[str]:
    """The command of `ray` that this process is, or one with that command line, and its arguments; else nothing."""
    words = program.command_line() if argv is None else list(argv)
    kind, name = program.parse(words)
    if not ((kind == "script" and os.path.basename(name) == "ray") or (kind == "-m" and name in _MODULES)):
        return []
    start = next(place for place, word in enumerate(words) if place and word.endswith(name))
    rest = words[start + 1 :]
    while rest:
        if not rest[0].startswith("-"):
            return rest
        rest = rest[2:] if rest[0] in _WITH_VALUE else rest[1:]
    return []


def serve(module: ModuleType) -> None:
    """Do what this process needs if it is a command of Ray's that ends a node. `module` is `signal`."""
    words = command()
    if words[:1] == ["start"]:
        install(module)
    elif words[:1] == ["stop"]:
        from autoteardown.launchers import ray_stop

        ray_stop.drain_first(words[1:])


class DrainBeside:
    """A handler that does what the handler it stands for does, and has the node drained meanwhile."""

    def __init__(self, handler: Handler) -> None:
        """Stand for `handler`."""
        self.handler = handler
        self._drain: NodeDrain | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> object:
        """Handle the signal; a second one is left to the handler alone."""
        if self._drain is None:
            try:
                self._drain = NodeDrain()
                self._drain.begin()
            except Exception as error:
                _say(f"the node is not drained: {error!r}")
        return self.handler(signum, frame)


class NodeDrain:
    """The drain of one node: begun by the signal, carried out when time is short or Ray is about to kill."""

    def __init__(self) -> None:
        from autoteardown import settings

        self._settings, _ = settings.load(os.environ)
        self._started = unpatched.monotonic()
        self._total, self._notice = times(self._settings, os.environ)
        self._told = 0.0  # the deadline that Ray was given by us
        self._hurry = unpatched.allocate_lock()
        self._over = unpatched.allocate_lock()
        self._hurry.acquire()
        self._over.acquire()

    def begin(self) -> None:
        """Start the thread, and have Ray wait for it before it kills. Silent on a node without ranks."""
        waiting = self._waiting()
        if not waiting:
            return
        when = f"in {self._notice:.0f}s at the latest" if self._notice else "now"
        self._say(f"SIGTERM: Ray drains this node; its {waiting} rank(s) are drained {when}")
        unpatched.start_new_thread(self._run, ())
        self._hold_back()
        self._tell_deadline()

    def _tell_deadline(self) -> None:
        """Have Ray tell the cluster a deadline that is true: that of the drain, not that of its own processes."""
        constants = sys.modules.get("ray._private.ray_constants")
        theirs, told = getattr(constants, _RAYS_OWN, None), self._notice - _LEAD
        if isinstance(theirs, (int, float)) and theirs > told >= 1:
            setattr(constants, _RAYS_OWN, told)
            self._told = told

    def _run(self) -> None:
        try:
            until = self._started + self._notice
            while unpatched.monotonic() < until and self._waiting():
                if self._hurry.acquire(timeout=min(0.2, max(0.0, until - unpatched.monotonic()))):
                    break
            self._drain()
        except Exception as error:
            _say(f"the node was not drained: {error!r}")
        finally:
            self._over.release()

    def _waiting(self) -> int:
        """How many ranks of the node are left."""
        from autoteardown.node import drain

        return len(drain.would_signal(self._settings.runtime_dir, _of_this_node(), self._say))

    def _drain(self) -> None:
        from autoteardown.node import drain

        found = self._settings
        left = max(0.0, self._left())
        ranks, _ = drain.drain(
            found.runtime_dir, found.signals[0], left, which=_of_this_node(), killed_after=True
        )
        for rank in ranks:
            self._say(rank.line())
        clean = sum(rank.clean for rank in ranks)
        how = f"{clean} of {len(ranks)} left cleanly" if ranks else "its ranks have left"
        self._say(f"{how}; Ray's own shutdown goes on")

    def _left(self) -> float:
        return self._started + self._total - _LAST - unpatched.monotonic()

    def _hold_back(self) -> None:
        node = getattr(sys.modules.get("ray._private.node"), "Node", None)
        real = getattr(node, "kill_all_processes", None)
        if node is None or real is None:
            return

        @functools.wraps(real)
        def kill_all_processes(*args: Any, **kwargs: Any) -> Any:
            self.finish()
            return real(*args, **kwargs)

        node.kill_all_processes = kill_all_processes

    def finish(self) -> None:
        """Drain now, and wait until that is over; at most while there is time."""
        early = unpatched.monotonic() < self._started + self._told - _LAST or not self._told
        if early and self._hurry.locked():
            self._hurry.release()
        if self._over.acquire(timeout=max(0.0, self._left()) + _LAST / 2):
            self._over.release()

    def _say(self, text: str) -> None:
        if self._settings.log != "quiet":
            _say(text)


def times(found: Settings, environ: Any) -> tuple[float, float]:
    """How long the node has from the signal on, and when its ranks are to be drained, in seconds.

    The least of what Ray, the pod and the ranks' own grace period give counts, less the longest wait for an iteration.
    """
    pods = _seconds(environ.get(_PODS), found.grace)
    total = min(found.grace, pods) if pods > 0 else found.grace
    patience = min(total, max(0.0, _seconds(environ.get(_RAYS_OWN), _RAYS_DEFAULT)))
    need = found.step_timeout + _MARGIN
    return total, max(0.0, patience - need)


def _seconds(text: str | None, otherwise: float) -> float:
    try:
        seconds = float(text or otherwise)
    except ValueError:
        return otherwise
    return seconds if abs(seconds) < 1e9 else otherwise  # NaN is not


def install(module: ModuleType) -> None:
    """Wrap every handler that SIGTERM gets from now on. Idempotent."""
    real_signal, real_getsignal = module.signal, module.getsignal

    @functools.wraps(real_signal)
    def signal(signalnum: Any, handler: Any) -> Any:
        if signalnum == module.SIGTERM and callable(handler) and not isinstance(handler, DrainBeside):
            handler = DrainBeside(handler)
        return _real(real_signal(signalnum, handler))

    @functools.wraps(real_getsignal)
    def getsignal(signalnum: Any) -> Any:
        return _real(real_getsignal(signalnum))

    module.signal, module.getsignal = signal, getsignal  # type: ignore[attr-defined]


def _of_this_node() -> Any:
    """Which ranks Ray's shutdown would end: as the main process of a container all, else the node's own.

    Several nodes may share a machine, and other jobs with them.
    """
    from autoteardown.node import drain, procfs

    class OfThisNode(drain.Selection):
        __slots__ = ()

        def matches(self, record: Any) -> bool:
            return super().matches(record) and own in procfs.ancestors(record.pid)

    own = os.getpid()
    return drain.Selection() if own == 1 or not procfs.is_ours() else OfThisNode()


def _say(text: str) -> None:
    from autoteardown import stderr

    stderr.say(f"autoteardown: ray start: {text}")  # dropped rather than waited for, if the pipe is full


def _real(handler: Any) -> Any:
    return handler.handler if isinstance(handler, DrainBeside) else handler
