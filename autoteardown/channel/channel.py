"""How one rank of a group hears of the others, as the guard uses it: post, be told, and know whether the line is there.

guard ── Channel ── Connection ──(TCP)── Hub ── Council          (on rank 0: Channel ── Hub ── Council)
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

_PATIENCE = 0.5  # seconds for the loop thread, which needs nothing but the GIL, to come by
_PUBLISH_AGAIN = 2.0  # seconds

_open: weakref.WeakSet[Channel] = weakref.WeakSet()


class Channel:
    """One rank's part in the channel of a group. Use `Channel.open`."""

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
        """The channel of the group with this store; never raises, never waits.

        Call it on the thread that has just called init_process_group: rank 0 writes one key. All else is done on the
        loop thread, and is tried again and again for as long as the group lives.

        Args:
            store: the group's, of any kind, or None.
            rank, world: of the default group.
            loop: the rank's.
            deliver: called on the loop thread with kind and value of each message, in order, once each. Beside what
                the council says: `up` and `down` (value: None, why) when the hub comes and goes, `lost` and `back`
                (value: 0) when it stays away and returns, `note` (value: a line for the log; at most one of a sort).
            council: makes what decides; called on rank 0 only.
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
        proven = (
            addresses.proven(rendezvous.port) if choice else []
        )  # which init waits for, as for all of this
        found = addresses.ordered(interfaces, os.environ, proven, one_host)
        for host in found or ["127.0.0.1", "::1"]:
            try:
                listeners.append(sockets.listen(host))
            except OSError as error:
                problem = f"{host}: {sockets.words(error)}"
        if not listeners:
            raise OSError(problem)
        hosts = tuple(each.getsockname()[:2] for each in listeners)
        address = HubAddress(os.urandom(8).hex(), os.urandom(16).hex(), world, addresses.here(), hosts)
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
            self._loop.at(_PUBLISH_AGAIN, lambda: self._publish_again(rendezvous, address))

    def _publish_again(self, rendezvous: Rendezvous, address: HubAddress) -> None:
        """On the loop thread, which must not wait for a store."""
        if not self._closed:
            rendezvous.on_a_thread(lambda: self._publish(rendezvous, address))

    # -- for any thread ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether what is posted now gets to the others, as far as anybody can know."""
        end = self._end
        if self._closed or self._loop is None or not self._loop.running or end is None:
            return False
        return not self._why if isinstance(end, Hub) else end.connected

    @property
    def why(self) -> str:
        """Why this rank is not connected, in words for a person; empty if it is."""
        if self.connected:
            return ""
        if self._why:
            return self._why
        if self._closed:
            return "the process group is gone"
        if self._loop is not None and not self._loop.running:
            return "the agent's thread has ended"
        return self._end.why if isinstance(self._end, Connection) else ""

    def post(self, kind: str, value: Any = None) -> None:
        """Tell the council; from any thread, at any bytecode, never waits.

        Args:
            kind: an identifier of at most 32 characters.
            value: anything that JSON can hold, 16,000 bytes of it at most; copied at once.
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
        """Wait until the hub has everything that was posted, or on the hub the kernels of all that are connected.

        Returns:
            Whether that is so. False on the loop thread, which must not wait.
        """
        end, loop = self._end, self._loop
        if self._closed or end is None or loop is None or not loop.running or loop.is_current:
            return False
        heard = unpatched.allocate_lock()
        heard.acquire()
        loop.call(lambda: end.when_heard(lambda: _release(heard)))
        return heard.acquire(timeout=max(0.0, seconds))

    def close(self) -> None:
        """Leave the group: says good-bye, and is gone when this returns. May be called again; raises nothing."""
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
        gone = unpatched.allocate_lock()
        gone.acquire()

        def leave() -> None:
            try:
                end.close()
            finally:
                gone.release()

        loop.call(leave)
        if not gone.acquire(timeout=_PATIENCE):
            try:
                end.forget()  # under the hands of the loop's thread, which has yet to come to it, or is at it
            except Exception as error:
                report_failure("to close the channel", error)

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's."""
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
    """At exit: close every channel."""
    for channel in list(_open):
        channel.close()
