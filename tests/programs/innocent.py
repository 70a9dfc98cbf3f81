"""Healthy programs that look for the agent. `innocent.py WHAT`: prints what it sees, the same without it."""

import copy
import faulthandler
import inspect
import os
import pickle
import pydoc
import signal
import socket
import sys
import threading
import time

what = sys.argv[1]


def init():
    """A group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def say(*words):
    """One line."""
    print(*words, flush=True)


if what == "pause":  # no interrupted system call when another thread calls init

    def in_thread():
        time.sleep(0.3)
        init()
        time.sleep(1)
        say("still paused")
        os._exit(0)

    threading.Thread(target=in_thread).start()
    signal.pause()
    say("woken")
    os._exit(1)

if what == "real-time":  # every real-time signal ends a process that wants none of them
    import torch  # noqa: F401

    for signum in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signum)
            os._exit(0)
        say(signum, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

if what in ("stand-ins", "stand-ins armed"):
    if what.endswith("armed"):
        init()

    class Holder:
        """Holds a function as a class attribute."""

        set_wakeup_fd = signal.set_wakeup_fd

    for function in (signal.signal, signal.getsignal, signal.set_wakeup_fd):
        say(
            function.__name__, function.__qualname__, inspect.isbuiltin(function), inspect.isroutine(function)
        )
        say(function.__doc__, isinstance(function, type(len)))
        try:
            say(inspect.signature(function))
        except ValueError as error:
            say(error)
        say(pickle.loads(pickle.dumps(function)) is getattr(signal, function.__name__))
        say(copy.copy(function) is function, copy.deepcopy(function) is function)
    say(repr(signal.set_wakeup_fd), signal.set_wakeup_fd.__module__, signal.set_wakeup_fd.__self__)
    say(Holder().set_wakeup_fd(-1), Holder.set_wakeup_fd(-1))
    say("set_wakeup_fd" in pydoc.render_doc(signal), pydoc.render_doc(signal.set_wakeup_fd))
    for arguments in ((), (1, 2), ("1",)):
        try:
            signal.set_wakeup_fd(*arguments)
        except Exception as error:
            say(type(error).__name__, error)
    import _thread

    say(repr(_thread.interrupt_main), pickle.loads(pickle.dumps(_thread.interrupt_main)).__name__)
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        _thread.interrupt_main(signum)
    time.sleep(0.3)
    say("alive")

if what == "wake-up errors":  # of the application's wake-up fd, in an armed process
    init()
    signal.signal(signal.SIGUSR1, lambda *args: None)
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setblocking(False)
    for warn in (False, True):
        signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=warn)
        try:
            while True:
                ours.send(b"x" * 1000)
        except BlockingIOError:
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        say("full")
    theirs.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.3)
    signal.set_wakeup_fd(-1)

if what == "faulthandler":  # registered, unregistered and used, with a group that comes and goes
    dump = open("dump", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGTERM, file=dump)
    init()
    import torch.distributed as dist

    dist.destroy_process_group()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    say(os.path.getsize("dump") > 0)
    faulthandler.unregister(signal.SIGTERM)
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
