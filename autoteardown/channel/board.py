"""The notice board: what one rank tells all the others, on the default group's c10d store.

Keys, all under `autoteardown/<name of the group's store>/<world size>/<generation>/`, each written once:

    rank<r>     which process is rank r (see `Board._enrol`)
    notice      somebody is being evicted: the origin, as JSON; the first writer wins
    plan        b"now" or b"stop:<step>:<how many ranks step>"; the first writer wins
    next        b"halt", or what `end` holds if nobody halted: a rank can wait for one key only
    end         b"clean" or b"dirty": every rank's device is quiet
    gone        every rank but the host of the store has left

A whole eviction costs a rank ten operations, and the last to answer and the last to be quiet a few more: O(world) in
all. A TCPStore pushes what a rank waits for; at other stores each rank looks once a second, and 20 times a second
after the notice.
"""

from __future__ import annotations

import _thread
import functools
import json
import os
import time
from typing import Any, Callable

from autoteardown.channel.relay import Over, Relay
from autoteardown.channel.stores import Line, NoLine, line_to
from autoteardown.node.record import printable, text, whole

Deliver = Callable[[str, Any], None]

_PROCESS = os.urandom(8).hex()  # names this process; with its pid, because a fork has the same
_DAY = 86400.0
_DIRTY = 1 << 32  # one counter: the quiet ranks in its low half, the dirty ones of them in its high half

_watched: set[Board] = set()


def _post(method: Callable[..., None]) -> Callable[..., None]:
    """Once per board, after the board is connected; a failure ends the board instead of raising."""

    @functools.wraps(method)
    def post(self: Board, *args: Any) -> None:
        try:
            if method.__name__ in self._said:
                return
            self._said.add(method.__name__)
            while self._prefix is None:
                self._line.check()
                time.sleep(0.002)
            method(self, *args)
        except Over:
            pass
        except BaseException as error:
            self._line.end(f"{type(error).__name__}: {error}")

    return post


class Board:
    """One rank's view of the board. `watch` runs on a thread of its own, and nothing else works until it does."""

    def __init__(self, line: Line, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.is_host = line.is_host  # this process hosts the store's server, and so leaves last
        self._line = line.line
        self._namespace = f"autoteardown/{line.namespace}/{world}/"
        self._prefix: str | None = None
        self._said: set[str] = set()
        self._steppers = 0
        self._watching = _thread.allocate_lock()
        self._watcher: int | None = None

    @staticmethod
    def open(store: Any, rank: int, world: int, problem: Callable[[str], None] | None = None) -> Board | None:
        """The board of the group with this store, or None with the reason given to `problem`; never raises.

        At most one operation, on the group's own store: call this on the thread that has just called
        init_process_group, while nobody else can hold that client and the server is there. `watch` connects.
        """
        try:
            if world < 2:
                raise NoLine("a world of one rank has no peers")
            board = Board(line_to(store, rank, world), rank, world)
            _watched.add(board)  # not only when its thread runs: the program may be at its end by then
            return board
        except BaseException as error:
            if problem is not None:
                problem(str(error) if isinstance(error, NoLine) else f"{type(error).__name__}: {error}")
            return None

    def watch(self, deliver: Deliver) -> None:
        """Hear everything: `deliver(kind, value)` for notice, plan, halt, quiet, gone (on the host), lost.

        Returns after gone or lost, after quiet where nothing is left to hear, and after `close`. Three operations to
        start with, then two for each message heard. Makes no noise, raises nothing, holds no lock.
        """
        line = self._line
        self._watcher = _thread.get_ident()
        self._watching.acquire()
        try:
            line.connect(lambda reason: deliver("lost", reason))
            self._prefix = prefix = self._enrol()
            deliver("notice", _origin(line.read(prefix + "notice")))
            line.hurry()
            stop, self._steppers = _plan(line.read(prefix + "plan"))
            deliver("plan", stop)
            end = line.read(prefix + "next")
            if end == b"halt":
                deliver("halt", None)
                end = line.read(prefix + "end")
            deliver("quiet", end == b"clean")
            if self.is_host:
                line.read(prefix + "gone")
                deliver("gone", None)
        except Over as over:
            line.end(str(over))
        except BaseException as error:
            line.end(f"{type(error).__name__}: {error}")
        finally:
            _watched.discard(self)
            self._watching.release()

    @_post
    def tell(self, origin: dict[str, Any]) -> None:
        """Post the notice. Two operations."""
        self._line.hurry()
        self._first("notice", json.dumps(origin))

    @_post
    def answer(self, k: int | None, cannot: bool = False) -> None:
        """Say how many steps this rank has completed: None if it does not step, `cannot` if it will not step again.

        Two operations; the last rank to answer publishes the plan with three more (O(world) where nothing appends).
        """
        said = "cannot" if cannot else "none" if k is None else str(k)
        answers = self._answers(said)
        if answers is None:
            return
        steps = [int(each) for each in answers if each not in ("cannot", "none")]
        reachable = steps and "cannot" not in answers
        self._first("plan", f"stop:{max(steps) + 1}:{len(steps)}" if reachable else "now")

    @_post
    def plan_now(self) -> None:
        """Give the agreed step up: everybody parks where it is, unless a plan is out already. Two operations."""
        self._first("plan", "now")

    @_post
    def arrived(self) -> None:
        """Say that this rank has stopped at the agreed step. The last one halts the ranks that never step.

        No operation where every rank steps, else one; four more for the last.
        """
        if self._steppers == self.world:
            return
        if self._line.store().add(f"{self._prefix}arrived", 1) == self._steppers:
            self._first("next", "halt")

    @_post
    def halt(self) -> None:
        """Somebody cannot get to the agreed step: everybody parks now. Four operations."""
        self._first("plan", "now")
        self._first("next", "halt")

    @_post
    def quiet(self, clean: bool) -> None:
        """Say that this rank's device is quiet. One operation; the last rank tells all with five more."""
        store = self._line.store()
        count = store.add(f"{self._prefix}quiet", 1 if clean else 1 + _DIRTY)
        if count % _DIRTY != self.world:
            return
        end = "dirty" if count // _DIRTY else "clean"
        self._first("plan", "now")  # for ranks that hear the board late, and wait for what nobody published
        store.set(f"{self._prefix}end", end)
        self._first("next", end)

    @_post
    def left(self) -> None:
        """Say that this rank is about to leave; the host waits for the last. One operation, two for the last."""
        if self.is_host:
            return
        store = self._line.store()
        # More than that means that no rank hosts the store, and nobody waits.
        if store.add(f"{self._prefix}left", 1) >= self.world - 1:
            store.set(f"{self._prefix}gone", "1")

    def close(self, patience: float = 0.5) -> None:
        """Leave the board: `watch` returns without a word, and is waited for. No operation."""
        self._line.end("closed", lost=False)
        if self._watcher not in (None, _thread.get_ident()) and self._watching.acquire(timeout=patience):
            self._watching.release()

    def abandon(self) -> None:
        """At exit: nothing may wake a thread that still waits in C++. No operation."""
        self._line.abandon()

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's. No operation."""
        self._watcher = None
        _watched.discard(self)
        self._line.forget()

    def _enrol(self) -> str:
        """Find the keys of this generation of the group.

        A store may outlive a group: torchrun's agent keeps its store over restarts, and there a notice that has
        stopped the last generation must not stop this one, while a rank that comes late must hear its own
        generation's. Restart counts will not tell them apart: each agent has its own. But no process survives a
        notice. So a notice found where another process was this rank before us is not ours, and ours is a generation
        further on.
        """
        store, me, generation = self._line.store(), f"{_PROCESS}-{os.getpid()}".encode(), 0
        while True:
            prefix = f"{self._namespace}{generation}/"
            mine = f"{prefix}rank{self.rank}"
            stale = store.check([mine]) and store.get(mine) != me and store.check([prefix + "notice"])
            self._line.check()
            if not stale:
                store.set(mine, me.decode())
                return prefix
            generation += 1

    def _first(self, name: str, value: str) -> None:
        """Write a key unless somebody has."""
        store, key = self._line.store(), f"{self._prefix}{name}"
        try:
            won = store.compare_set(key, "", value) == value.encode()
        except Exception:
            self._line.check()
            won = store.add(key + "#", 1) == 1  # a store written in Python need not have compare_set
        self._line.check()
        if won:
            store.set(key, value)  # TCPStore's legacy server wakes nobody at a compare_set

    def _answers(self, said: str) -> list[str] | None:
        """Post this rank's answer; all of them, if it was the last."""
        store, key = self._line.store(), f"{self._prefix}answers"
        appends = isinstance(self._line, Relay)
        if appends:
            store.append(key, said + ",")
        else:
            store.set(f"{key}{self.rank}", said)
        if store.add(key + "#", 1) != self.world:
            return None
        if appends:
            return bytes(store.get(key)).decode().rstrip(",").split(",")
        return [bytes(store.get(f"{key}{rank}")).decode() for rank in range(self.world)]


def _origin(notice: bytes) -> dict[str, Any]:
    """Who is being evicted, and how many seconds it has `left`, as far as the notice makes sense.

    Whoever reaches the store can write there, and what comes of it goes into logs and reports. A notice that nobody
    understands is still one: the other ranks have read it, too.
    """
    try:
        said = json.loads(notice)
    except (ValueError, RecursionError):
        said = None
    found = said if isinstance(said, dict) else {}
    origin: dict[str, Any] = {
        "rank": whole(found.get("rank")),
        "host": printable(text(found.get("host"))),
        "pid": whole(found.get("pid")),
    }
    left = found.get("left")
    if isinstance(left, (int, float)) and 0 <= left <= _DAY:  # NaN is not
        origin["left"] = left
    return origin


def _plan(said: bytes) -> tuple[int | None, int]:
    """After which step to stop, and how many ranks step; None and 0 for `now`, and for what makes no sense."""
    try:
        _, step, steppers = said.split(b":")
        return int(step), int(steppers)
    except ValueError:
        return None, 0


# A watcher comes back within milliseconds, but on a starved node; and this wait is all that keeps it from an abort.
_AT_EXIT = 5.0


def close_all() -> None:
    """Close every board, lost ones too: last thing before the interpreter is finalized.

    A thread that comes back from C++ to an interpreter that is gone is made to exit by CPython (up to 3.13), and c10d's
    frames turn that into an abort: a job whose ranks all end at the same moment would be one of SIGABRTs.
    """
    for board in list(_watched):
        board.close(_AT_EXIT)
        board.abandon()
