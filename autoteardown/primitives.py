"""Threads, locks, sockets, polling and clocks as the interpreter made them.

Programs replace them (`gevent.monkey.patch_all()`, eventlet): then a thread of ours would be a greenlet, which runs
only when the program waits, and a wait of ours would wait for the program. So they are taken here, once, before a
program can have them replaced, and the rest of the agent takes them from here alone.
"""

import _socket
import _thread
import os
import select
import time

builtin_function = type(_thread.allocate_lock)
start_new_thread = _thread.start_new_thread
allocate_lock = _thread.allocate_lock
get_ident = _thread.get_ident
monotonic = time.monotonic
sleep = time.sleep
poll = select.poll
epoll = getattr(select, "epoll", None)  # Linux; gevent removes it from the module
socket = _socket.socket
socketpair = _socket.socketpair


def on_main_thread() -> bool:
    """Whether this is the thread that the process began with, or was forked on: the one that Python's signals need."""
    return _thread.get_native_id() == os.getpid()
