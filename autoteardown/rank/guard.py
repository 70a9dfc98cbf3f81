"""One armed rank: what it is, what watches over it, and when it is armed and disarmed.

Arming comes before torch's own `init_process_group` runs, so that a rank which is stuck in rendezvous can leave, too;
the world becomes known, and the board is opened, when that has returned.
"""

from __future__ import annotations

import _queue
import _thread
import os
import signal
import socket
import sys
from typing import Any, Callable, Optional

from autoteardown import settings, signals
from autoteardown.boundary import failed, guarded
from autoteardown.channel import board as boards
from autoteardown.frameworks import ray as ray_rank
from autoteardown.node import registry
from autoteardown.rank import backends, threads, training
from autoteardown.stop import report
from autoteardown.stop.driver import Teardown, end

SCHEMA = 1
_PLAN_WAIT = 2.0  # seconds that the main thread waits, in the signal handler, to know if it is to run on


class Guard:
    """The guard of this process, whose rank may come and go with each init and destroy."""

    def __init__(self, real_destroy: Callable[[], object]) -> None:
        self.real_destroy = real_destroy
        self.settings, problems = settings.load(os.environ)
        self.host = socket.gethostname()
        self.program = sys.argv[0] if getattr(sys, "argv", None) else ""
        self.log = report.Log(self.settings.log, self.host)
        for problem in problems:
            self.log.line(problem)
        self.tap = signals.install(signal)
        self.joined = False
        self.rank: Optional[int] = None
        self.world_size: Optional[int] = None
        self.backend: Optional[str] = None
        self.teardown: Optional[Teardown] = None
        self.board: Optional[boards.Board] = None
        self.events: _queue.SimpleQueue[tuple[str, Any]] = _queue.SimpleQueue()
        self.gate = training.renew(self.events.put)
        self.no_board = (
            "AUTOTEARDOWN_PEERS is off" if not self.settings.peers else "this process group has no store"
        )
        self._begun = _thread.allocate_lock()
        self._owner: dict[str, bool] = {}
        self._main_waits = False
        self._finalized = False
        self._entry: Optional[registry.Entry] = None
        self._step_handle: Any = None

    # -- the life of a rank ---------------------------------------------------------------------------------------

    def joining(self) -> None:
        """Before torch's init: from here on an eviction signal is ours."""
        self.rank, self.world_size = _environment_int("RANK"), _environment_int("WORLD_SIZE")
        self.log.rank, self.log.world_size = self.rank, self.world_size
        self.gate.begin(_thread.get_ident())
        # Cleaners of /tmp remove what has not been written to for some days (10, systemd-tmpfiles).
        self.tap.arm(self._on_signal, self._on_main, self.entry_update)
        self._finalize_multiprocessing()
        self._entry = registry.enter(self.settings.runtime_dir, self._entry_fields(), self.log.line)

    def _finalize_multiprocessing(self) -> None:
        # A forked child of multiprocessing leaves by os._exit: its finalizers are all the atexit that it has.
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None and not self._finalized:
            from multiprocessing import util

            self._finalized = True
            util.Finalize(None, guarded(at_exit), exitpriority=-(10**6))

    def join(self) -> None:
        """After torch's init: the world is known."""
        world = backends.world()
        if world is None:
            return
        self.rank, self.world_size, self.backend = world.rank, world.size, world.backend
        self.log.rank, self.log.world_size = world.rank, world.size
        self.joined = True
        self.entry_update(**self._entry_fields())
        if self._step_handle is None:
            optimizer = sys.modules["torch.optim.optimizer"]
            self._step_handle = optimizer.register_optimizer_step_post_hook(training.step_hook)
        if self.settings.peers and world.size > 1 and world.store is not None:
            board = boards.Board.open(world.store, world.rank, world.size, self._no_board)
            if board is not None:
                _thread.start_new_thread(guarded(board.watch), (self._hear,))
            self.board = board

    def leave(self) -> None:
        """After torch's destroy: nothing to guard any more, and the application gets its handler back."""
        if self.teardown is not None and self.teardown.committed:
            return
        self.tap.disarm()
        if self._step_handle is not None:
            self._step_handle.remove()
            self._step_handle = None
        board, self.board = self.board, None
        if board is not None:
            board.close()
        self.entry_leave()
        self.joined = False

    def _no_board(self, reason: str) -> None:
        self.no_board = reason
        self.log.line(f"no notice board: {reason}", level="debug")

    def _hear(self, kind: str, value: Any) -> None:
        """On the board's watcher thread."""
        if kind == "notice" and self._begun.acquire(False):
            try:
                self._begin("peer", None, value)
            except Exception as error:
                failed("to stop with a peer", error)
                self.teardown = None
                self._begun.release()  # its own signal may yet come
        elif self.teardown is None:
            self.board = None  # lost
        else:
            if kind == "notice":
                self.teardown.origin = {
                    key: value[key] for key in value if key != "left"
                }  # the first to be signalled
            self.events.put((kind, value))

    # -- signals ----------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int) -> None:
        """On the listener thread."""
        try:
            ray_rank.call_abort_off()
            if self.teardown is not None:
                self.teardown.also_signalled(signum)
            elif self._begun.acquire(False):
                origin = {"rank": self.rank, "host": self.host, "pid": os.getpid()}
                self._begin("signal", signum, origin)
        except BaseException as error:
            # What is left of the contract: out in time, with the right code.
            try:
                self.log.line(f"internal error: {type(error).__name__}: {error}")
            finally:
                end(lambda: self.settings.exit_code_for(signum))

    def _begin(self, cause: str, signum: Optional[int], origin: dict[str, Any]) -> None:
        yields = signum is not None and self._application_owns(signum)
        self.teardown = Teardown(self, cause, signum, origin, yields)
        if yields:
            self.entry_update(state="yielding")
        self.teardown.begin()

    def _application_owns(self, signum: int) -> bool:
        # Decided once, by whichever thread asks first: the application may restore a handler at any moment.
        if "owner" not in self._owner:
            owns = self.settings.yield_seconds > 0 and self.tap.application_owns(signum)
            self._owner.setdefault("owner", owns)
        return self._owner["owner"]

    def _on_main(self, signum: int) -> bool:
        """On the main thread, from the trampoline."""
        committed = self.teardown is not None and self.teardown.committed
        if not committed and self._application_owns(signum):
            if self.tap.application_owns(signum):
                return False
            # It has put the default back, and the signal has come again: uvicorn raises it when it has shut down.
            self.events.put(("released", None))
        if not self._main_waits:  # in a signal storm each handler runs on top of the last
            self._main_waits = True
            # Some C code (`re`, big integers) runs signal handlers but never lets go of the GIL: this may be the only
            # chance of the other threads. The training thread is not needed until the last step is known.
            self.gate.wait_for_plan(_PLAN_WAIT)
            self._main_waits = False
        self.stop_main()
        return True

    def stop_main(self) -> None:
        """On the main thread: park it if it is time to, or have it leave if it is time for that."""
        teardown = self.teardown
        ident = _thread.get_ident()
        if ident in self.gate.parked:  # on its way out, or still parked below this frame
            return
        # An exception in an exit callback would be printed, and cut it short. Ours is the last of them, and waits.
        if ident != self.gate.thread and threads.in_exit_callback():
            return
        if teardown is not None and teardown.leaving:
            self.gate.parked.add(ident)
            raise SystemExit(teardown.exit_code)
        if self.gate.closed and not self.gate.shielded(ident):
            self.gate.hold()

    # -- what others ask for ----------------------------------------------------------------------------------------

    def at_exit(self) -> None:
        """Last of all atexit callbacks."""
        if self.teardown is not None and self.teardown.committed:
            self.teardown.ended()
        self.entry_leave()
        boards.close_all()

    def run_callbacks(self, say: Callable[[str], None]) -> None:
        """`on_teardown` callbacks, last in, first out, each on its own."""
        for callback in reversed(callbacks):
            try:
                callback()
            except BaseException as error:
                say(f"on_teardown callback failed: {type(error).__name__}: {error}")

    def identity(self) -> dict[str, Any]:
        """The first fields of the report."""
        return {
            "schema": SCHEMA,
            "host": self.host,
            "pid": os.getpid(),
            "program": self.program,
            "rank": self.rank,
            "local_rank": _environment_int("LOCAL_RANK"),
            "world_size": self.world_size,
            "backend": self.backend,
            "python": sys.version.split()[0],
            "torch": str(getattr(sys.modules.get("torch"), "__version__", None)),
        }

    @property
    def report_name(self) -> str:
        """File name of the report."""
        return f"{self.host}-{os.getpid()}.json".replace("/", "_")

    def _entry_fields(self) -> dict[str, Any]:
        keep = ("host", "program", "rank", "local_rank", "world_size", "backend")
        fields = {key: value for key, value in self.identity().items() if key in keep}
        return {**fields, "signal": self.settings.signals[0]}  # what `autoteardown drain` has to send

    def entry_update(self, **fields: Any) -> None:
        """Tell the node's registry."""
        if self._entry is not None:
            self._entry.update(**fields)

    def entry_leave(self, outcome: Optional[str] = None, exit_code: Optional[int] = None) -> None:
        """Leave the node's registry."""
        if self._entry is not None:
            self._entry.leave(outcome, exit_code)


def _environment_int(name: str) -> Optional[int]:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


guard: Optional[Guard] = None
"""The process's guard, once an init has been seen."""

callbacks: list[Callable[[], object]] = []
"""What `autoteardown.on_teardown` has registered."""


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
    if parents is not None and parents.board is not None:
        parents.board.forget()


os.register_at_fork(after_in_child=guarded(_after_fork_in_child))
