"""Guards one rank: arms it before torch's init, disarms it after torch's destroy, and begins its stop.

Arming comes before torch's own `init_process_group` runs, so that a rank which is stuck in rendezvous can exit, too.
The world is known, and the channel to the other ranks is opened, when that has returned.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Callable, Optional

from autoteardown import native_calls, spare_threads
from autoteardown.channel import channel as channels
from autoteardown.checkpoints import callbacks
from autoteardown.children import child_signals
from autoteardown.fail_open import fail_open, report_failure
from autoteardown.frameworks import ray, wandb
from autoteardown.node.entry import printable, text, whole
from autoteardown.process_groups import operations
from autoteardown.rank.child_processes import ChildProcesses
from autoteardown.rank.control import LocalRankControl
from autoteardown.rank.eviction_owner import EvictionOwner
from autoteardown.rank.lost_peer import LostPeerTimer
from autoteardown.rank.main_thread import MainThread
from autoteardown.rank.repeated_signals import RepeatedSignals
from autoteardown.rank.state import RankState
from autoteardown.stop.coordinator import Coordinator
from autoteardown.stop.driver import Teardown, end
from autoteardown.stop.message_types import understood
from autoteardown.stop.posix_timer import HardDeadlineTimer
from autoteardown.training import optimizer_hooks
from autoteardown.unpatched import allocate_lock, get_ident

_LEFT_FLUSH = 0.2  # seconds for the message that this rank has left by itself
_NATIVE_CALLS = 2.0  # seconds at exit for the agent's threads that are in C++
_HUB_STAYS = 3.0  # seconds that the hub stays for the others when its application has ended by itself


class Guard(RankState):
    """The guard of this process."""

    def __init__(self, real_destroy: Callable[[], object]) -> None:
        super().__init__(real_destroy)
        self._owner = EvictionOwner(self)
        self._repeats = RepeatedSignals()
        self.main = MainThread(self, self._owner, self._repeats)
        self._begun = allocate_lock()
        self._all_left = allocate_lock()  # released when all other ranks have left
        self._all_left.acquire()
        self._lost_timer: Optional[LostPeerTimer] = None
        self._finalized = False
        self._timer = HardDeadlineTimer()
        self._signalled = False
        self._hooks: Optional[optimizer_hooks.OptimizerHooks] = None
        self._children = ChildProcesses(self.interceptor, self.identity.log.line)

    # -- the life of a rank -----------------------------------------------------------------------------------------

    def before_init(self) -> None:
        """Before torch's init: from now on, the agent deals with eviction signals."""
        self.gate.begin(get_ident())
        child_signals.suspend()
        # systemd-tmpfiles removes files from /tmp that were not written to for 10 days: the entry is rewritten daily.
        self.listener.arm(self._on_signal, self.main.on_signal, self.identity.mark, self._children.attach)
        self._children.rank_is_armed()
        spare_threads.keep()
        self._finalize_multiprocessing()
        self.identity.joining()
        if self.listener.main_thread_pending:
            text = "armed off the main thread, which has yet to come by: a signal before that has its default action"
            self.identity.log.line(text, level="debug")

    def _finalize_multiprocessing(self) -> None:
        # A forked child of multiprocessing exits by os._exit: it runs its finalizers, and no atexit callbacks.
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None and not self._finalized:
            from multiprocessing import util

            self._finalized = True
            util.Finalize(None, fail_open(at_exit), exitpriority=-(10**6))

    def after_init(self) -> None:
        """After torch's init, or after a group was made without it: the world is known."""
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
                fail_open(self._on_message),
                lambda: Coordinator(world.size),
            )
            self._lost_timer = LostPeerTimer(loop, self.gate, self.settings.lost, self._lost)
        connects = world.size > 1 and self.channel is not None and not self.channel.is_hub
        alone = None if world.size == 1 or connects else self.alone
        self.identity.mark_joined(alone)

    def after_shrink(self) -> None:
        """After torch's `shrink_group`: if the default group is a smaller one now, its ranks have new numbers."""
        world = operations.world()
        if world is None or self.teardown is not None or world.size == self.identity.world_size:
            return
        self._close_channel()
        self.after_init()

    def before_destroy(self) -> None:
        """Before torch's destroy: in an eviction, the peers are told before they find a gloo connection closed.

        Otherwise a rank without a handler of its own would fail in its next collective, and exit with that error's
        code.
        """
        if self.teardown is not None and not self.teardown.committed:
            self._close_channel()

    def after_destroy(self) -> None:
        """After torch's destroy: nothing is left to guard, and the application gets its handler back."""
        if self.teardown is not None and self.teardown.committed:
            return
        self._close_channel()
        # In an eviction begun by a peer, this rank's own signal may still come, and must not kill it.
        if self.teardown is None:
            self.listener.disarm()
            self._children.rank_is_disarmed()
            child_signals.resume()
            spare_threads.release()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self.identity.unregister()
        self.joined = False

    def _close_channel(self) -> None:
        if self._lost_timer is not None:
            self._lost_timer.close()
        channel, self.channel = self.channel, None
        if channel is None:
            return
        if self.teardown is not None:
            # The application ends by itself, in its own time: the others need not wait for it. They are connected
            # through the hub, which therefore exits last, or nearly.
            self.events.put(("leaves", None))
            channel.post("left")
            channel.flush(_LEFT_FLUSH)
            if channel.is_hub:
                self._all_left.acquire(timeout=_HUB_STAYS)
        channel.close()

    # -- what makes it stop -----------------------------------------------------------------------------------------

    def _on_message(self, kind: str, value: Any) -> None:
        """On the loop thread: a message of the coordinator's, or about the connection to it."""
        if not understood(kind, value):
            return
        if kind in ("up", "down") and self.teardown is None:
            self.identity.mark(alone=value or "")
        if kind == "note":
            self.identity.log.line(value, level="debug")
        elif kind in ("lost", "back") and self._lost_timer is not None:
            self._lost_timer.hear(kind, value)
        elif kind == "notice" and self._begun.acquire(False):
            try:
                # A peer that is torn down because a rank is lost says so.
                self._begin("lost" if value.get("lost") is True else "peer", None, _origin(value))
            except Exception as error:
                report_failure("to stop with a peer", error)
                self.teardown = None
                self._begun.release()  # this rank's own signal may still come
        elif self.teardown is not None:
            if kind == "notice":
                value = _origin(value)
                self.teardown.begun_by(value)  # the rank that was signalled first
            if kind == "all_left" and self._all_left.locked():
                self._all_left.release()
            if kind in ("up", "down"):
                kind, value = "down", value if kind == "down" else None
            self.events.put((kind, value))

    def _lost(self, rank: int) -> None:
        """On the loop thread: this rank has waited long enough for a lost peer."""
        if self._begun.acquire(False):
            self._begin("lost", None, {"rank": rank, "host": None, "pid": None})

    def _on_signal(self, signum: int, arrived: bool) -> bool:
        """On the loop thread. Returns whether the application's handler is called later, or not for this signal.

        Args:
            signum: the signal.
            arrived: the kernel has just delivered it; else the Python-level handler has been called for it.
        """
        try:
            repeated = arrived and self._repeats.arrived()
            first, self._signalled = not self._signalled, True
            self._children.rank_is_evicted(self.settings.grace)
            if self.teardown is not None:
                ray.cancel_abort()
                if arrived:
                    self.teardown.another_signal()
                self.teardown.also_signalled(signum)
                if not first:
                    return repeated or not arrived
                return self._owner.is_deferred(signum)  # a peer's notice was faster
            if self._begun.acquire(False):
                # Before anything else: on a starved machine, this thread may not get the GIL again for long.
                self._timer.arm(self.settings.hard, self.settings.exit_code_for(signum))
                ray.cancel_abort()
                self.signum = signum
                own = {"rank": self.identity.rank, "host": self.identity.host, "pid": os.getpid()}
                self._begin("signal", signum, own)
                return self._owner.is_deferred(signum)
        except BaseException as error:
            # What can still be kept: the process exits in time, with the right code.
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
        self.teardown = Teardown(control, cause, signum, origin, self._timer)
        if self.channel is not None and not self.channel.connected:
            self.events.put(("down", self.channel.why))
        self.teardown.begin()
        if cause != "lost":
            wandb.mark_preempting()

    # -- the end ----------------------------------------------------------------------------------------------------

    def at_exit(self) -> None:
        """In the last atexit callback."""
        self.main.over = True
        self._leave_to_the_stop()
        if self.teardown is not None:
            self.events.put(("exits", None))
        self._close_channel()  # which may take a while, and a stop may begin meanwhile
        self._leave_to_the_stop()
        if self.teardown is not None:
            self._ignore_signals()
            self.teardown.application_ends()
        self.identity.unregister()
        channels.close_all()
        native_calls.wait_for_running(_NATIVE_CALLS)

    def _ignore_signals(self) -> None:
        """A launcher signals the other ranks when one has exited: the interpreter's shutdown must not die of that."""
        set_handler = self.interceptor.originals[0]
        interrupt = self.listener.ownership.interrupt.number  # the driver may still send it
        for signum in (*self.settings.signals, *([interrupt] if interrupt else [])):
            try:
                set_handler(signum, signal.SIG_IGN)
            except ValueError:  # not on the main thread
                pass

    def _leave_to_the_stop(self) -> None:
        teardown = self.teardown
        if teardown is not None and teardown.committed:
            if not teardown.leaving:
                # A daemon thread that trains can still reach its iteration; if it has ended, too, the poller notices.
                if self.gate.thread in (None, get_ident()):
                    self.events.put(("ended", None))
                self.gate.parking.wait_for_exit()
            teardown.ended()


def _origin(notice: Any) -> dict[str, Any]:
    """Which rank is being evicted, and how many seconds it has `left`, as far as the notice makes sense.

    A malformed notice still counts: the other ranks have received it, too.
    """
    found = notice if isinstance(notice, dict) else {}
    origin: dict[str, Any] = {
        "rank": whole(found.get("rank")),
        "host": printable(text(found.get("host"))),
        "pid": whole(found.get("pid")),
    }
    left = found.get("left")
    if isinstance(left, (int, float)) and 0 <= left <= 86400:  # NaN compares false
        origin["left"] = float(left)
        if found.get("longer") is True:
            origin["longer"] = True
    return origin


guard: Optional[Guard] = None
"""The guard of this process, once an init has been seen."""


def of_process(real_destroy: Callable[[], object]) -> Guard:
    """The guard of this process, created at the first call."""
    global guard
    if guard is None:
        guard = Guard(real_destroy)
    return guard


def at_exit() -> None:
    """Called by the atexit callback of `startup.py`."""
    if guard is not None:
        guard.at_exit()


def _after_fork_in_child() -> None:
    global guard
    parents, guard = guard, None
    if parents is not None and parents.channel is not None:
        parents.channel.forget()


os.register_at_fork(after_in_child=fail_open(_after_fork_in_child))
