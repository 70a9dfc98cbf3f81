"""One armed rank: when it is armed and disarmed, and what makes it stop.

Arming comes before torch's own `init_process_group` runs, so that a rank which is stuck in rendezvous can leave, too;
the world becomes known, and the channel to its other ranks is opened, when that has returned.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, Optional

from autoteardown import native_calls
from autoteardown.channel import channel as channels
from autoteardown.checkpoints import callbacks
from autoteardown.fail_open import fail_open, report_failure
from autoteardown.frameworks import ray
from autoteardown.node.entry import printable, text, whole
from autoteardown.process_groups import operations
from autoteardown.rank.control import LocalRankControl
from autoteardown.rank.eviction_owner import EvictionOwner
from autoteardown.rank.lost_peer import LostPeerTimer
from autoteardown.rank.main_thread import MainThread
from autoteardown.rank.state import RankState
from autoteardown.stop.coordinator import Coordinator
from autoteardown.stop.driver import Teardown, end
from autoteardown.stop.message_types import understood
from autoteardown.stop.posix_timer import HardDeadlineTimer
from autoteardown.training import optimizer_hooks
from autoteardown.unpatched import allocate_lock, get_ident

_GOODBYE = 0.2  # seconds for the others to hear that this rank has left by itself
_SETTLE = 2.0  # seconds at exit for what our threads do in C++
_LAST = 3.0  # seconds that the hub stays for the others when its application has ended by itself


class Guard(RankState):
    """The guard of this process."""

    def __init__(self, real_destroy: Callable[[], object]) -> None:
        super().__init__(real_destroy)
        self._owner = EvictionOwner(self)
        self.main = MainThread(self, self._owner)
        self._begun = allocate_lock()
        self._gone = allocate_lock()  # released when all others have left
        self._gone.acquire()
        self._watch: Optional[LostPeerTimer] = None
        self._finalized = False
        self._timer = HardDeadlineTimer()
        self._signalled = False
        self._hooks: Optional[optimizer_hooks.OptimizerHooks] = None

    # -- the life of a rank -----------------------------------------------------------------------------------------

    def before_init(self) -> None:
        """Before torch's init: from here on an eviction signal is ours."""
        self.gate.begin(get_ident())
        # Cleaners of /tmp remove what has not been written to for some days (10, systemd-tmpfiles).
        self.listener.arm(self._on_signal, self.main.on_signal, self.identity.mark)
        self._finalize_multiprocessing()
        self.identity.joining()
        if self.listener.main_thread_pending:
            text = "armed off the main thread, which has yet to come by: a signal before that has its default action"
            self.identity.log.line(text, level="debug")

    def _finalize_multiprocessing(self) -> None:
        # A forked child of multiprocessing leaves by os._exit: its finalizers are all the atexit that it has.
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None and not self._finalized:
            from multiprocessing import util

            self._finalized = True
            util.Finalize(None, fail_open(at_exit), exitpriority=-(10**6))

    def after_init(self) -> None:
        """After torch's init, or that of a group without it: the world is known."""
        world = operations.world()
        if world is None:
            return
        self.joined, self.unshared = True, world.alone
        self.identity.joined(world)
        if self._hooks is None:
            self._hooks = optimizer_hooks.OptimizerHooks(self.listener.reclaim)
        callbacks.prepare(self.settings.on_teardown, self.identity.log.line)
        loop = self.listener.loop
        if self.settings.peers and world.size > 1 and loop is not None and not world.alone:
            self.channel = channels.Channel.open(
                world.store,
                world.rank,
                world.size,
                loop,
                fail_open(self._hear),
                lambda: Coordinator(world.size),
            )
            self._watch = LostPeerTimer(loop, self.gate, self.settings.lost, self._lost)
        connects = world.size > 1 and self.channel is not None and not self.channel.is_hub
        alone = None if world.size == 1 or connects else self.alone
        self.identity.mark_joined(alone)

    def before_destroy(self) -> None:
        """Before torch's destroy: in an eviction the others hear of it before they find a connection of gloo's closed.

        A rank without a handler of its own would fail in its next collective, and that would be its exit code.
        """
        if self.teardown is not None and not self.teardown.committed:
            self._close_channel()

    def after_destroy(self) -> None:
        """After torch's destroy: nothing to guard any more, and the application gets its handler back."""
        if self.teardown is not None and self.teardown.committed:
            return
        self._close_channel()
        # In an eviction that it has heard of from a peer, its own signal may be yet to come: not to be killed by then.
        if self.teardown is None:
            self.listener.disarm()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self.identity.unregister()
        self.joined = False

    def _close_channel(self) -> None:
        if self._watch is not None:
            self._watch.close()
        channel, self.channel = self.channel, None
        if channel is None:
            return
        if self.teardown is not None:
            # The application ends by itself, in its own time: the others need not wait for it. They hear each other
            # through the hub, which therefore leaves last, or nearly.
            self.events.put(("leaves", None))
            channel.post("left")
            channel.flush(_GOODBYE)
            if channel.is_hub:
                self._gone.acquire(timeout=_LAST)
        channel.close()

    # -- what makes it stop -----------------------------------------------------------------------------------------

    def _hear(self, kind: str, value: Any) -> None:
        """On the loop thread: from the council, or of the line to it."""
        if not understood(kind, value):
            return
        if kind in ("up", "down") and self.teardown is None:
            self.identity.mark(alone=value or "")
        if kind == "note":
            self.identity.log.line(value, level="debug")
        elif kind in ("lost", "back") and self._watch is not None:
            self._watch.hear(kind, value)
        elif kind == "notice" and self._begun.acquire(False):
            try:
                self._begin("peer", None, value)
            except Exception as error:
                report_failure("to stop with a peer", error)
                self.teardown = None
                self._begun.release()  # its own signal may yet come
        elif self.teardown is not None:
            if kind == "notice":
                value = _origin(value)
                self.teardown.begun_by(value)  # the first to be signalled
            if kind == "all_left" and self._gone.locked():
                self._gone.release()
            if kind in ("up", "down"):
                kind, value = "down", value if kind == "down" else None
            self.events.put((kind, value))

    def _lost(self, rank: int) -> None:
        """On the loop thread: this rank has waited long enough for one that is lost."""
        if self._begun.acquire(False):
            self._begin("lost", None, {"rank": rank, "host": None, "pid": None})

    def _on_signal(self, signum: int) -> bool:
        """On the loop thread; whether the application's handler is to be called later, and not now."""
        try:
            first, self._signalled = not self._signalled, True
            if self.teardown is not None:
                ray.call_abort_off()
                self.teardown.also_signalled(signum)
                return first and self._owner.is_deferred(signum)  # a peer's notice was faster
            if self._begun.acquire(False):
                # Before anything else: on a starved machine this thread may not get the GIL again for long.
                self._timer.arm(self.settings.hard, self.settings.exit_code_for(signum))
                ray.call_abort_off()
                self.signum = signum
                own = {"rank": self.identity.rank, "host": self.identity.host, "pid": os.getpid()}
                self._begin("signal", signum, own)
                return self._owner.is_deferred(signum)
        except BaseException as error:
            # What is left of the contract: out in time, with the right code.
            try:
                self.identity.log.line(f"internal error: {type(error).__name__}: {error}")
            finally:
                end(lambda: self.settings.exit_code_for(signum))
        return False

    def _begin(self, cause: str, signum: Optional[int], origin: dict[str, Any]) -> None:
        owns = self._owner.application_owns(signum or self.settings.signals[0])
        if cause == "peer" and self.settings.handlers == "alone":
            owns = False
        control = LocalRankControl(self, self.main, owns)
        self.teardown = Teardown(
            control, cause, signum, _origin(origin) if cause == "peer" else origin, self._timer
        )
        if self.channel is not None and not self.channel.connected:
            self.events.put(("down", self.channel.why))
        self.teardown.begin()

    # -- the end ----------------------------------------------------------------------------------------------------

    def at_exit(self) -> None:
        """Last of all atexit callbacks."""
        self.main.over = True
        self._leave_to_the_stop()
        if self.teardown is not None:
            self.events.put(("exits", None))
        self._close_channel()  # which may take a while, and a stop may begin meanwhile
        self._leave_to_the_stop()
        self.identity.unregister()
        channels.close_all()
        native_calls.wait_for_running(_SETTLE)

    def _leave_to_the_stop(self) -> None:
        teardown = self.teardown
        if teardown is not None and teardown.committed:
            if not teardown.leaving:
                # A daemon thread that trains can still get to its iteration; if it has ended, too, `look` notices.
                if self.gate.thread in (None, get_ident()):
                    self.events.put(("ended", None))
                self.gate.parking.wait_for_exit()
            teardown.ended()


def _origin(notice: Any) -> dict[str, Any]:
    """Who is being evicted, and how many seconds it has `left`, as far as the notice makes sense.

    A notice that nobody understands is still one: the other ranks have read it, too.
    """
    found = notice if isinstance(notice, dict) else {}
    origin: dict[str, Any] = {
        "rank": whole(found.get("rank")),
        "host": printable(text(found.get("host"))),
        "pid": whole(found.get("pid")),
    }
    left = found.get("left")
    if isinstance(left, (int, float)) and 0 <= left <= 86400:  # NaN is not
        origin["left"] = float(left)
    return origin


guard: Optional[Guard] = None
"""The process's guard, once an init has been seen."""


def of_process(real_destroy: Callable[[], object]) -> Guard:
    """The process's guard, made when first asked for."""
    global guard
    if guard is None:
        guard = Guard(real_destroy)
    return guard


def at_exit() -> None:
    """Called by the gate's atexit callback."""
    if guard is not None:
        guard.at_exit()


def _after_fork_in_child() -> None:
    global guard
    parents, guard = guard, None
    if parents is not None and parents.channel is not None:
        parents.channel.forget()


os.register_at_fork(after_in_child=fail_open(_after_fork_in_child))
