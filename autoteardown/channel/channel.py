"""One rank's interface to the group's messages: post to the coordinator, receive its decisions, query the connection.

guard ── Channel ── Connection ──(TCP)── Hub ── Coordinator          (on rank 0: Channel ── Hub ── Coordinator)
"""

from __future__ import annotations

import json
import os
import weakref
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import unpatched
from autoteardown.channel import addresses
from autoteardown.channel.connection import Connection, Deliver
from autoteardown.channel.coordinator import Coordinator
from autoteardown.channel.hub import Hub
from autoteardown.channel.rendezvous import HubAddress, Rendezvous, no_store
from autoteardown.channel.wire import encode, kind_of
from autoteardown.event_loop import sockets
from autoteardown.fail_open import report_failure

if TYPE_CHECKING:
    from autoteardown.event_loop.loop import Loop

_CLOSE_SECONDS = 0.5  # for the loop thread, which needs nothing but the GIL, to close the connections
_PUBLISH_RETRY = 2.0  # seconds

_open: weakref.WeakSet[Channel] = weakref.WeakSet()


class Channel:
    """One rank's end of the group's channel. Create it with `Channel.open`."""

    def __init__(self, loop: Optional[Loop], deliver: Deliver, rank: int) -> None:
        self._loop = loop
        self._deliver = deliver
        self._pid = os.getpid()
        self._rendezvous: Optional[Rendezvous] = None
        self._end: Connection | Hub | None = None
        self._why = ""
        self._closed = False
        self.is_hub = rank == 0
        """Whether this rank is the hub."""

    @staticmethod
    def open(
        store: Any,
        rank: int,
        world: int,
        loop: Loop,
        deliver: Deliver,
        coordinator: Callable[[], Coordinator],
    ) -> Channel:
        """Open the channel of the group with this store; never raises, never waits.

        Call it on the thread that has just called init_process_group: rank 0 writes one key. Everything else runs on
        the loop thread, and is retried for as long as the group exists.

        Args:
            store: the group's store, of any kind, or None.
            rank, world: of the default group.
            loop: the rank's event loop.
            deliver: called on the loop thread with the kind and value of each message, in order, once each. Besides the
                coordinator's messages: `up` and `down` (value: None, the reason) when the connection to the hub opens
                and closes, `lost` and `back` (value: 0) when it stays closed and when it returns, `note` (value: a line
                for the log; at most one of each kind).
            coordinator: makes the coordinator; called on rank 0 only.
        """
        channel = Channel(loop, deliver, rank)
        try:
            problem = "a world of one rank has no peers" if world < 2 else no_store(store)
            if problem:
                channel._why = problem
                return channel
            channel._rendezvous = Rendezvous(store, world)
            if rank == 0:
                channel._open_hub(channel._rendezvous, world, coordinator())
            else:
                channel._end = Connection(loop, channel._rendezvous, rank, world, deliver)
            loop.call(channel._end.start)  # type: ignore[union-attr]
            _open.add(channel)
        except Exception as error:
            report_failure("the channel", error)
            channel._why = f"{type(error).__name__}: {error}"
            channel.close()
        return channel

    def _open_hub(self, rendezvous: Rendezvous, world: int, coordinator: Coordinator) -> None:
        assert self._loop is not None
        listeners, problem = [], "this host has no address"
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        interfaces = addresses.interfaces()
        choice = not one_host and sum(not each.loopback for each in interfaces) > 1
        # Only where there is a choice, because the program's init waits for this.
        used = addresses.used_by_store(rendezvous.port) if choice else []
        found = addresses.ordered(interfaces, os.environ, used, one_host)
        for host in found or ["127.0.0.1", "::1"]:
            try:
                listeners.append(sockets.listen(host))
            except OSError as error:
                problem = f"{host}: {sockets.reason(error)}"
        if not listeners:
            raise OSError(problem)
        hosts = tuple(each.getsockname()[:2] for each in listeners)
        address = HubAddress(os.urandom(8).hex(), os.urandom(16).hex(), world, addresses.host_id(), hosts)
        self._end = Hub(
            self._loop,
            address,
            listeners,
            coordinator,
            self._deliver,
            lambda text: self._deliver("note", text),
        )
        self._publish(rendezvous, address)

    def _publish(self, rendezvous: Rendezvous, address: HubAddress) -> None:
        try:
            rendezvous.publish(address)
            self._why = ""
        except Exception as error:
            self._why = f"the store cannot be written to: {type(error).__name__}"
            assert self._loop is not None
            self._loop.at(_PUBLISH_RETRY, lambda: self._publish_again(rendezvous, address))

    def _publish_again(self, rendezvous: Rendezvous, address: HubAddress) -> None:
        """Publish on another thread: the loop thread must not wait for a store."""
        if self._closed or rendezvous.on_a_thread(lambda: self._publish(rendezvous, address)):
            return
        assert self._loop is not None
        self._loop.at(_PUBLISH_RETRY, lambda: self._publish_again(rendezvous, address))

    # -- for any thread ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether this rank can reach the coordinator, as far as is known."""
        end = self._end
        if self._closed or self._loop is None or not self._loop.running or end is None:
            return False
        return not self._why if isinstance(end, Hub) else end.connected

    @property
    def why(self) -> str:
        """Why this rank is not connected, for a log line; empty if it is connected."""
        if self.connected:
            return ""
        if self._why:
            return self._why
        if self._closed:
            return "the process group has been destroyed"
        if self._loop is not None and not self._loop.running:
            return "the agent's thread has ended"
        return self._end.why if isinstance(self._end, Connection) else ""

    def post(self, kind: str, value: Any = None) -> None:
        """Send a message to the coordinator; from any thread, at any bytecode, never waits.

        Args:
            kind: an identifier of at most 32 characters.
            value: anything that JSON can hold, at most 16,000 bytes; copied at once.
        """
        end, loop = self._end, self._loop
        if self._closed or end is None or loop is None:
            return
        try:
            copy = json.loads(encode("p", 2**53, kind_of(kind), value))[3]
        except Exception as error:
            report_failure("a message", error)
            return
        loop.call(lambda: end.post(kind, copy))

    def flush(self, seconds: float) -> bool:
        """Wait until the hub has acknowledged all posts; on rank 0, until all connected hosts have all messages.

        Args:
            seconds: at most this long.

        Returns:
            Whether they have. False on the loop thread, which must not wait.
        """
        end, loop = self._end, self._loop
        if self._closed or end is None or loop is None or not loop.running or loop.is_current:
            return False
        done = unpatched.allocate_lock()
        done.acquire()
        loop.call(lambda: end.when_acknowledged(lambda: _release(done)))
        return done.acquire(timeout=max(0.0, seconds))

    def close(self) -> None:
        """Leave the group, and close everything before this returns. May be called again; raises nothing."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        end, loop = self._end, self._loop
        if end is None or loop is None:
            return
        if loop.is_current or not loop.running:
            end.close()
            return
        done = unpatched.allocate_lock()
        done.acquire()

        def leave() -> None:
            try:
                end.close()
            finally:
                done.release()

        loop.call(leave)
        if not done.acquire(timeout=_CLOSE_SECONDS):
            try:
                end.forget()  # from this thread, although the loop thread may be closing them, or will later
            except Exception as error:
                report_failure("to close the channel", error)

    def forget(self) -> None:
        """In a forked child: close the parent's descriptors."""
        self._closed = True
        _open.discard(self)
        if self._end is not None:
            self._end.forget()


def _release(lock: Any) -> None:
    try:
        lock.release()
    except RuntimeError:
        pass


def close_all() -> None:
    """Close every open channel, at exit."""
    for channel in list(_open):
        channel.close()
