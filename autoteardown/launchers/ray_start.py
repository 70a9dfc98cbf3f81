"""Drains a node's ranks when `ray start --block` gets SIGTERM, before Ray kills them.

1. On Kubernetes that process gets the pod's SIGTERM, and the actors do not: raylet SIGKILLs them.
2. Ray's handler (`ray/_private/node.py`, `Node._register_shutdown_hooks`) tells the cluster that the node is being
   preempted, and until when. From this come `ray.train.get_preemption_info()`, the just-in-time checkpoint,
   `RayActorError.preempted`, and retries that cost nothing. The handler leaves the actors running for up to
   `RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S` = 30 s, or until the node is idle. Then it kills every process
   (`Node.kill_all_processes`) and exits with 1.
3. So Ray's handler runs at once, as without the agent, and a thread waits in parallel. When the time that is left is
   what a teardown may need, the thread drains the ranks that Ray would kill. The deadline that Ray announces is set a
   little earlier, because Ray Train stops its workers by that deadline. If Ray is ready to kill earlier (the drain was
   rejected or is turned off, or raylet has exited), `kill_all_processes` waits for the drain.
4. Ray sets its handler with `signal.signal`, late and once. This process is never a rank, so here a replacement of that
   function wraps every handler that SIGTERM gets. `kill_all_processes` is looked up when the signal arrives; if it does
   not exist, the node is still drained in time.
5. If every process of the node is signalled, raylet kills its workers at once, and the ranks with them. A marker of
   this process keeps their entries, so that the log can name the ranks that have died without a teardown.
6. Rejected: to drain first, as this module once did. Ray Train then saw ranks fail without an announced preemption.
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

    from autoteardown.node.entry import Entry
    from autoteardown.settings import Settings

    Handler = Callable[[int, FrameType | None], Any]

_MODULES = ("ray.scripts.scripts",)
_WITH_VALUE = ("--logging-level", "--logging-format")  # options of `ray` itself, before the command
_RAY_TIMEOUT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_RAY_DEFAULT = 30.0
_POD_GRACE = "TERMINATION_GRACE_PERIOD_SECONDS"
# Seconds for the agreed iteration, where AUTOTEARDOWN_STEP_TIMEOUT is auto: all other time is Ray's own.
_ITERATION = 8.0
_MARGIN = 2.0  # seconds that a teardown may need besides the time for an iteration
# Seconds between the deadline that Ray announces and the drain. Ray Train checks every 2 s, and treats a worker that
# ends before that deadline as failed. At the deadline it stops its workers itself, and its retry costs nothing.
_LEAD = 4.0
_LAST = 0.5  # half of the second that every rank keeps free at the end of its grace period


def command(argv: Sequence[str] | None = None) -> list[str]:
    """The `ray` command of this process, or of the given command line, with its arguments; empty if it is not `ray`."""
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
    """Hook `ray start`, or drain for `ray stop`, if this process is one of them. `module` is `signal`."""
    words = command()
    if words[:1] == ["start"]:
        install(module)
    elif words[:1] == ["stop"]:
        from autoteardown.launchers import ray_stop

        ray_stop.drain_first(words[1:])


class DrainingHandler:
    """A signal handler that calls the program's handler, and drains the node in parallel."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self._drain: NodeDrain | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> object:
        """Handle the signal; at a second one, only call the program's handler."""
        if self._drain is None:
            try:
                self._drain = NodeDrain()
                self._drain.begin()
            except Exception as error:
                _say(f"the node is not drained: {error!r}")
        return self.handler(signum, frame)


class NodeDrain:
    """The drain of one node: it signals the ranks when time is short, or when Ray is about to kill them."""

    def __init__(self) -> None:
        from autoteardown import settings

        self._settings, _ = settings.load(os.environ)
        self._started = unpatched.monotonic()
        self._total, self._notice = times(self._settings, os.environ)
        self._announced = 0.0  # seconds: the timeout that this module has set for Ray; 0 if none
        self._drain_now = unpatched.allocate_lock()  # released to make the thread drain at once
        self._done = unpatched.allocate_lock()  # released when the drain has ended
        self._seen: list[Entry] = []  # the ranks of the node when the signal came
        self._drain_now.acquire()
        self._done.acquire()

    def begin(self) -> None:
        """Start the thread, and make Ray wait for it before it kills. Does nothing on a node without ranks."""
        from autoteardown.node import registry

        marker = registry.DrainMarker(self._settings.runtime_dir)
        self._seen = self._ranks()
        if not self._seen:
            marker.close()
            return
        when = f"in {self._notice:.0f}s at the latest" if self._notice else "now"
        self._say(f"SIGTERM: Ray drains this node; its {len(self._seen)} rank(s) are drained {when}")
        unpatched.start_new_thread(self._run, ())
        self._delay_kill()
        self._set_deadline()

    def _set_deadline(self) -> None:
        """Make Ray announce the deadline of this drain to the cluster, instead of that of its own processes."""
        constants = sys.modules.get("ray._private.ray_constants")
        default, wanted = getattr(constants, _RAY_TIMEOUT, None), self._notice - _LEAD
        if isinstance(default, (int, float)) and default > wanted >= 1:
            setattr(constants, _RAY_TIMEOUT, wanted)
            self._announced = wanted

    def _run(self) -> None:
        try:
            until = self._started + self._notice
            while unpatched.monotonic() < until and self._ranks():
                if self._drain_now.acquire(timeout=min(0.2, max(0.0, until - unpatched.monotonic()))):
                    break
            self._drain()
        except Exception as error:
            _say(f"the node was not drained: {error!r}")
        finally:
            self._done.release()

    def _ranks(self) -> list[Entry]:
        """The ranks of the node that still run."""
        from autoteardown.node import drain

        return drain.would_signal(self._settings.runtime_dir, _of_this_node(), self._say)

    def _drain(self) -> None:
        from autoteardown.node import drain

        found = self._settings
        left = max(0.0, self._left())
        ranks, _ = drain.drain(
            found.runtime_dir,
            found.signals[0],
            left,
            selection=_of_this_node(),
            killed_after=True,
            seen=self._seen,
        )
        for rank in ranks:
            self._say(rank.line())
        clean = sum(rank.clean for rank in ranks)
        how = f"{clean} of {len(ranks)} left cleanly" if ranks else "its ranks have left"
        self._say(f"{how}; Ray's own shutdown continues")

    def _left(self) -> float:
        return self._started + self._total - _LAST - unpatched.monotonic()

    def _delay_kill(self) -> None:
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
        """Drain now, and wait until that has ended, at most until the time is up."""
        early = unpatched.monotonic() < self._started + self._announced - _LAST or not self._announced
        if early and self._drain_now.locked():
            self._drain_now.release()
        if self._done.acquire(timeout=max(0.0, self._left()) + _LAST / 2):
            self._done.release()

    def _say(self, text: str) -> None:
        if self._settings.log != "quiet":
            _say(text)


def times(found: Settings, environ: Any) -> tuple[float, float]:
    """How long the node has after the signal, and when its ranks have to be drained, both in seconds.

    The least of Ray's timeout, the pod's grace period and the ranks' own counts, less the longest wait for an
    iteration.
    """
    pod = _seconds(environ.get(_POD_GRACE), found.grace)
    total = min(found.grace, pod) if pod > 0 else found.grace
    until_kill = min(total, max(0.0, _seconds(environ.get(_RAY_TIMEOUT), _RAY_DEFAULT)))
    need = (min(found.step_timeout, _ITERATION) if found.step_auto else found.step_timeout) + _MARGIN
    return total, max(0.0, until_kill - need)


def _seconds(text: str | None, otherwise: float) -> float:
    try:
        seconds = float(text or otherwise)
    except ValueError:
        return otherwise
    return seconds if abs(seconds) < 1e9 else otherwise  # also for NaN


def install(module: ModuleType) -> None:
    """Wrap every handler that SIGTERM gets from now on. Idempotent."""
    real_signal, real_getsignal = module.signal, module.getsignal

    @functools.wraps(real_signal)
    def signal(signalnum: Any, handler: Any) -> Any:
        if signalnum == module.SIGTERM and callable(handler) and not isinstance(handler, DrainingHandler):
            handler = DrainingHandler(handler)
        return _real(real_signal(signalnum, handler))

    @functools.wraps(real_getsignal)
    def getsignal(signalnum: Any) -> Any:
        return _real(real_getsignal(signalnum))

    module.signal, module.getsignal = signal, getsignal  # type: ignore[attr-defined]


def _of_this_node() -> Any:
    """Selects the ranks that Ray's shutdown would end: all if this is a container's main process, else its descendants.

    Several Ray nodes may share a machine, and so may other jobs.
    """
    from autoteardown.node import drain, procfs

    class OfThisNode(drain.Selection):
        __slots__ = ()

        def matches(self, record: Any) -> bool:
            return super().matches(record) and own in procfs.ancestors(record.pid)

    own = os.getpid()
    return drain.Selection() if own == 1 or not procfs.available() else OfThisNode()


def _say(text: str) -> None:
    from autoteardown import stderr

    stderr.say(f"autoteardown: ray start: {text}")  # dropped if the pipe is full


def _real(handler: Any) -> Any:
    return handler.handler if isinstance(handler, DrainingHandler) else handler
