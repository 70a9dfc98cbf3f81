"""In a child process of a rank: decides what an eviction signal means that would end the child.

1. SLURM, systemd, a cgroup's kill and `tini -g` signal every process of a job, not only the ranks. If a DataLoader
   worker died of it, the rank's main thread would raise "DataLoader worker killed by signal" and never reach the
   iteration that the group has agreed on; if a checkpoint writer died, half a checkpoint would be left.
2. So a signal that the rank gets, too, does not end the child: the kernel kills it when the rank has ended. A signal
   that the rank does not get ends the child, as does one that the rank itself has sent (`Process.terminate()`).
3. The handler is a Python-level one. Caught signals have their default action again after an exec, so what the child
   itself starts is not concerned. A child that is stuck in C cannot run it: `termination` sends SIGKILL to one that
   its rank terminates.
4. It stands for the default action and for the handler in C of torch's workers only. A child that sets a handler of
   its own has that one.
5. The interpreter's shutdown puts the default action back, in the place of every handler, but leaves what is ignored.
   So a child that has reached it, and is about to end anyway, ignores the signals; `termination` still ends it.
6. Rejected: a process group for each worker (SLURM and systemd do not look at groups); the signal blocked, with a
   thread in `sigwaitinfo` (the mask is inherited over an exec); PR_SET_PDEATHSIG (it means the thread that forked, not
   the process, and the fork server); to continue in the rank without its workers (there is no next batch).
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import TYPE_CHECKING, Optional

from autoteardown import unpatched
from autoteardown.children import termination
from autoteardown.children.eviction_page import ENDS_WITH_RANK, SIGNALS_ARE_ITS_OWN, WAITS, EvictionPage
from autoteardown.fail_open import fail_open
from autoteardown.unpatched import sleep

if TYPE_CHECKING:
    from autoteardown.signals.interception import SignalInterceptor

_LOOK = 0.01  # seconds between two looks at the page
# Looks from the signal of a child to that of its rank, if everybody gets one: on a busy machine, both take longer.
_LOOKS = 70
_SET_SIGNAL = 10  # F_SETSIG, which `fcntl` does not name; Linux only

_attached: Optional[ChildSignals] = None


class ChildSignals:
    """What this process does with the eviction signals while it is a child of an armed rank.

    Args:
        page: the rank's.
        interceptor: what stands between the application and the `signal` module.
    """

    def __init__(self, page: EvictionPage, interceptor: SignalInterceptor) -> None:
        self._page = page
        self._interceptor = interceptor
        self._pid = os.getpid()
        self._is_worker = False  # one of torch's DataLoaders
        self._dies_with_rank = False
        self._taken: set[int] = set()

    def copy(self) -> ChildSignals:
        """The same for a process that this one has forked."""
        return ChildSignals(self._page, self._interceptor)

    # -- which signals come here: on the main thread ------------------------------------------------------------------

    def attach(self) -> None:
        """Have the signals come here that have their default action."""
        self._page.set_terminated(self._pid, False)
        self._interceptor.child = self
        for signum in self._interceptor.signals:
            self.handler_set(signum)

    def become_worker(self) -> None:
        """In a DataLoader worker, when torch has set its handlers.

        As long as the rank lives, its workers do; and not longer, also if they are stuck in C, on a mutex that was held
        at the fork, for example.
        """
        self._is_worker = True
        self._die_with_rank()
        # torch's handler in C has taken the place of any that the rank's program had set before the fork.
        self._take(signal.SIGTERM)

    def handler_set(self, signum: int) -> None:
        """The application has set a handler, or the default action again."""
        if self._interceptor.handler_of(signum) == signal.SIG_DFL:
            self._take(signum)
        else:
            self._taken.discard(signum)
            self._note_state()

    def _take(self, signum: int) -> None:
        if signum in self._interceptor.signals:
            self._interceptor.take_in_child(signum)
            self._taken.add(signum)
        self._note_state()

    def _note_state(self, armed: bool = False) -> None:
        state = ENDS_WITH_RANK if self._dies_with_rank else WAITS
        self._page.set_state(self._pid, state if self._taken and not armed else SIGNALS_ARE_ITS_OWN)

    def suspend(self) -> None:
        """This process becomes a rank itself, with signals of its own. `attach` when it is none any more."""
        self._note_state(armed=True)

    def handles(self, signum: int) -> bool:
        """Whether the signal comes here."""
        return signum in self._taken

    def at_exit(self) -> None:
        """In the last atexit callback."""
        if self._page.state(self._pid) == SIGNALS_ARE_ITS_OWN:
            return
        for signum in self._taken:
            self._interceptor.originals[0](signum, signal.SIG_IGN)

    # -- a signal -----------------------------------------------------------------------------------------------------

    def on_signal(self, signum: int) -> None:
        """On the main thread, between two bytecodes: an eviction signal has come, whose action is the default."""
        try:
            if self._outlives_signal():
                self._die_with_rank()
                self._note_state()
                if not self._rank_has_ended():
                    return
        except Exception:  # then the signal does what it does without the agent
            pass
        self._end(signum)

    def _outlives_signal(self) -> bool:
        for _ in range(_LOOKS):
            if self._page.terminated(self._pid) or self._rank_has_ended():
                break
            if self._page.evicted:
                return True
            if not self._page.armed:
                break
            sleep(_LOOK)
        return False

    def _rank_has_ended(self) -> bool:
        poll = unpatched.poll()
        poll.register(self._page.pipe, 0)
        return bool(poll.poll(0))

    def _die_with_rank(self) -> None:
        """Have the kernel kill this process when the rank's end of the pipe closes. Nothing is ever written to it."""
        if self._dies_with_rank:
            return
        # An open file of its own: the flags below belong to it, and a forked child shares that of its parent.
        pipe = os.open(f"/proc/self/fd/{self._page.pipe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(pipe, fcntl.F_SETOWN, self._pid)
        fcntl.fcntl(pipe, _SET_SIGNAL, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
        self._dies_with_rank = True

    def _end(self, signum: int) -> None:
        """Do what the signal would have done without the agent."""
        _remove_temporary_folder()
        if self._is_worker and self._page.terminated(self._pid):
            os._exit(0)  # as torch's own handler, if the sender is the parent
        self._interceptor.originals[0](signum, signal.SIG_DFL)
        os.kill(self._pid, signum)


@fail_open
def _remove_temporary_folder() -> None:
    """The folder of multiprocessing's sockets, if this process has made one: nothing else would remove it."""
    util = sys.modules.get("multiprocessing.util")
    for finalizer in list(getattr(util, "_finalizer_registry", {}).values()):
        if getattr(finalizer, "_callback", None) is getattr(util, "_remove_temp_dir", finalizer):
            finalizer()


# -- how a process becomes a child of a rank --------------------------------------------------------------------------


def attach(page: EvictionPage, interceptor: SignalInterceptor) -> None:
    """Attach this process, on its main thread.

    Raises:
        OSError, IndexError: that is not possible; the process is as without the agent.
    """
    global _attached
    if _attached is None:
        os.register_at_fork(after_in_child=_after_fork_in_child)
    child = ChildSignals(page, interceptor)
    child.attach()
    _attached = child
    termination.watch(page, interceptor.signals)


@fail_open
def attach_spawned(interceptor: SignalInterceptor) -> None:
    """In a process that multiprocessing has spawned, or its fork server: attach it if its parent is a rank."""
    page = EvictionPage.of_parent()
    if page is not None:
        attach(page, interceptor)


@fail_open
def become_worker() -> None:
    """In a DataLoader worker, when torch has set its handlers."""
    if _attached is not None:
        _attached.become_worker()


@fail_open
def suspend() -> None:
    """This process becomes a rank itself."""
    if _attached is not None:
        _attached.suspend()


@fail_open
def resume() -> None:
    """This process is no rank any more."""
    if _attached is not None:
        _attached.attach()


@fail_open
def at_exit() -> None:
    """Called by the atexit callback of `startup.py`."""
    if _attached is not None:
        _attached.at_exit()


@fail_open
def _after_fork_in_child() -> None:
    global _attached
    if _attached is not None:
        _attached = _attached.copy()
        _attached.attach()
