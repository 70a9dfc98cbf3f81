"""A rank's one connection with the hub: found, kept, and made again for as long as the group lives.

What is posted is kept until the hub has said that it has it, and sent again over the next connection; the hub counts
each post once. What the hub says is numbered, and a new connection goes on where the last one was cut.
"""

from __future__ import annotations

import collections
import functools
import os
import random
from typing import TYPE_CHECKING, Any, Callable, Optional

from autoteardown import primitives
from autoteardown.boundary import failed
from autoteardown.channel.dial import Dial, Link
from autoteardown.channel.messages import Malformed, encode, kind_of, whole
from autoteardown.channel.sockets import READ, Ended

if TYPE_CHECKING:
    from autoteardown.channel.loop import Loop, Timer
    from autoteardown.channel.rendezvous import Card, Desk

Deliver = Callable[[str, Any], object]

LOST_AFTER = 5.0
"""Seconds without the hub after which rank 0 counts as lost."""
UNHEARD = 2.0
"""Seconds without a word about a post after which a second connection is tried beside the first."""
# Seconds until the next try: the first, the longest, that after some minutes in vain, the longest while posts wait.
_SOON, _IDLE_WAIT, _LONG_WAIT, _BUSY_WAIT = 0.02, 5.0, 30.0, 0.5
_STUCK_WAIT = 1.5
_AFTERWARDS = 7  # where the waits begin when rank 0 has left: 2 s, in which the other ranks leave as well


class Connection:
    """See above. Everything but `post` and the attributes happens on the loop thread.

    Args:
        loop: the rank's.
        desk: where the hub's card is.
        rank, world: ours.
        deliver: for what the hub says, and `down`, `up`, `lost`, `back`.
    """

    def __init__(self, loop: Loop, desk: Desk, rank: int, world: int, deliver: Deliver) -> None:
        self.why = "rank 0 has not published its hub"  # why not connected
        self._loop, self._desk, self._deliver = loop, desk, deliver
        self._rank, self._world, self._member = rank, world, os.urandom(8).hex()
        self._card: Optional[Card] = None
        self._session = ""  # whose numbers these are: the name of a hub
        self._heard = 0
        self._posted = 0
        self._unheard: collections.deque[tuple[int, str, Any, float]] = collections.deque()
        self._flushes: list[tuple[int, Callable[[], object]]] = []
        self._link: Optional[Link] = None
        self._dial: Optional[Dial] = None
        self._retry: Optional[Timer] = None
        self._doubt: Optional[Timer] = None
        self._mourn: Optional[Timer] = None
        self._tries = 0
        self._attempts = 0
        self._patience = UNHEARD
        self._lost = False
        self._ended = False  # rank 0 has said that it is no more in the group
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether the hub has let us in and the line is there, as far as anybody can know."""
        return self._link is not None

    def start(self) -> None:
        """Set out."""
        self._set_out()

    def post(self, kind: str, value: Any) -> None:
        """Tell the hub."""
        if self._closed:
            return
        self._posted += 1
        post = (self._posted, kind, value, primitives.monotonic())
        self._unheard.append(post)
        if self._link is not None:
            self._send(self._link, encode("p", *post[:3]))
            self._watch_over()
        else:
            self._hurry()

    def when_heard(self, function: Callable[[], object]) -> None:
        """Call it when the hub has everything posted so far."""
        if self._unheard:
            self._flushes.append((self._posted, function))
        else:
            function()

    def close(self) -> None:
        """Say good-bye and be gone."""
        if self._link is not None and not self._closed:
            try:
                self._link.send(encode("bye"))
            except Ended:
                pass
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """Close what there is, without a word."""
        self._closed = True
        for timer in (self._retry, self._doubt, self._mourn):
            if timer is not None:
                timer.cancel()
        if self._dial is not None:
            self._dial.cancel()
        if self._link is not None:
            self._drop_link()

    # -- finding the hub --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if self._closed:
            return
        looking = self._desk.look(lambda card, why: self._loop.call(lambda: self._looked(card, why)))
        if not looking and self._card is None:
            self.why = "the store does not answer"  # or the program itself waits in it

    def _looked(self, card: Optional[Card], why: str) -> None:
        if self._closed or self.connected:
            return
        if card is None:
            if self._card is None:
                self.why = why
                self._again()
            return
        news = card != self._card
        self._card = card
        if news:
            if self._dial is not None:
                self._dial.cancel()
                self._dial = None
            self._tries = 0
            self._set_out()

    def _again(self) -> None:
        """Try again later: soon at first, and soon while posts wait."""
        if self._closed or (self._ended and not self._unheard and self._tries > 20):
            return
        longest = _BUSY_WAIT if self._unheard else _IDLE_WAIT if self._tries < 30 else _LONG_WAIT
        least = max(_SOON, self._world * 50e-6)  # a store's server has one thread
        wait = min(longest, least * 2.0 ** min(self._tries, 12)) * random.uniform(0.7, 1.3)
        self._tries += 1
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.at(wait, self._set_out)

    def _hurry(self) -> None:
        if self._dial is None and self._retry is not None and self._tries > 1:
            self._tries = 1
            self._again()

    def _set_out(self) -> None:
        if self._closed or self._dial is not None or (self.connected and not self._unheard):
            return
        if self._retry is not None:
            self._retry.cancel()
        if self._card is None:
            self._look()
            # The thread that looks may be stuck in the store for long: then no answer comes, and none is needed.
            self._retry = self._loop.at(_STUCK_WAIT, self._again)
            return
        done: list[tuple[Any, ...]] = []

        def finished(*result: Any) -> None:
            if self._dial is None:
                done.append(result)  # at once, in the constructor
            else:
                self._dialed(*result)

        dial = Dial(self._loop, self._card, functools.partial(self._hello, self._card), finished)
        if done:
            self._dialed(*done[0])
        else:
            self._dial = dial

    def _hello(self, card: Card) -> tuple[int, int, str, int, int, int]:
        self._attempts += 1
        heard = self._heard if card.name == self._session else 0
        return self._rank, self._world, self._member, self._attempts, heard, int(card.near)

    def _dialed(self, link: Optional[Link], seen: int, lines: list[list[Any]], why: str) -> None:
        self._dial = None
        if link is None:
            if not self.connected:
                self.why = f"the hub cannot be reached: {why}"
                self._look()  # it may be another group's that was here before
            self._again()
            return
        again = self.connected
        if again:
            self._drop_link()
        self._take(link, seen)
        if not again:
            self._tell("up", None)
            if self._lost:
                self._lost = False
                self._tell("back", 0)
        self._take_lines(link, lines)

    def _take(self, link: Link, seen: int) -> None:
        card = self._card
        assert card is not None
        if card.name != self._session:
            self._session, self._heard = card.name, 0
            posts = [(number, *post[1:]) for number, post in enumerate(self._unheard, 1)]
            self._unheard = collections.deque(posts)
            self._flushes = [(len(posts), function) for _, function in self._flushes]
            self._posted = len(posts)
        self._link = link
        self._ended = False
        self._tries = 0
        self.why = ""
        if self._mourn is not None:
            self._mourn.cancel()
        self._acknowledged(seen)
        self._loop.watch(link.fd, READ, self._ready)
        waiting = b"".join(encode("p", *post[:3]) for post in self._unheard)
        if waiting:
            self._send(link, waiting)
            self._watch_over()

    # -- the line ---------------------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        link = self._link
        if link is None:
            return
        try:
            if link.waiting:
                link.send(b"")
            lines = link.lines.feed(link.receive())
        except (Ended, Malformed) as error:
            self._down(f"{link.where}: {error}")
            return
        self._take_lines(link, lines)

    def _take_lines(self, link: Link, lines: list[list[Any]]) -> None:
        try:
            for kind, *rest in lines:
                if self._link is not link:
                    return
                if kind == "m" and len(rest) == 3:
                    index = whole(rest[0], 1)
                    if index > self._heard:
                        self._heard = index
                        self._tell(kind_of(rest[1]), rest[2])
                elif kind == "ack" and len(rest) == 1:
                    self._acknowledged(whole(rest[0]))
                elif kind == "end" and not rest:
                    self._ended = True
                    self._down("rank 0 has left the process group")
                    return
                else:
                    raise Malformed("not what a hub says")
        except Malformed as error:
            self._down(f"{link.where}: {error}")
            return
        self._watch_events(link)

    def _send(self, link: Link, data: bytes) -> None:
        try:
            link.send(data)
        except Ended as error:
            self._down(f"{link.where}: {error}")
            return
        self._watch_events(link)

    def _watch_events(self, link: Link) -> None:
        if self._link is link:
            self._loop.watch(link.fd, link.events, self._ready)

    def _acknowledged(self, seen: int) -> None:
        while self._unheard and self._unheard[0][0] <= seen:
            self._unheard.popleft()
            self._patience = UNHEARD
        while self._flushes and self._flushes[0][0] <= seen:
            self._flushes.pop(0)[1]()

    def _watch_over(self) -> None:
        """A translator that has forgotten the connection swallows what we send: the kernel needs long to notice."""
        if self._doubt is None and self._unheard:
            self._doubt = self._loop.at(self._patience, self._in_doubt)

    def _in_doubt(self) -> None:
        self._doubt = None
        if self._closed or not self._unheard:
            return
        age = primitives.monotonic() - self._unheard[0][3]
        if self._link is not None and age >= UNHEARD:
            self._patience *= 2  # a hub that has too much to do is not helped by more connections
            self._set_out()
        self._watch_over()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._loop.unwatch(link.fd)
            link.close()

    def _down(self, why: str) -> None:
        self._drop_link()
        self.why = why
        self._tell("down", why)
        if self._closed:
            return
        if self._ended:
            self._tries = _AFTERWARDS
            self._card = None
            self._again()
            return
        self._mourn = self._loop.at(LOST_AFTER, self._count_lost)
        if self._dial is None:
            self._set_out()

    def _count_lost(self) -> None:
        if not self._closed and not self.connected and not self._ended:
            self._lost = True
            self._tell("lost", 0)

    def _tell(self, kind: str, value: Any) -> None:
        try:
            self._deliver(kind, value)
        except Exception as error:
            failed("to hear a message", error)
