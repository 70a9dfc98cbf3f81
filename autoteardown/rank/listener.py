"""The wake-up fd of an armed process, and the thread that reads what CPython's C-level handler writes there."""

from __future__ import annotations

import _thread
import os
import socket
from typing import Callable

DAY = 86400.0
_UCRED = 12  # struct ucred: pid, uid, gid


class Listener:
    """A socket pair and a thread.

    Args:
        hear: called on the thread with signal numbers, one byte each, written by this process.
        deaf: called on the thread, with what went wrong, if it cannot go on.
        quiet: called on the thread after a day without a signal.

    Raises:
        OSError, RuntimeError: no socket pair or no thread to be had.
    """

    def __init__(
        self,
        hear: Callable[[bytes], object],
        deaf: Callable[[Exception], object],
        quiet: Callable[[], object],
    ) -> None:
        self._hear = hear
        self._deaf = deaf
        self._quiet = quiet
        self._pid = os.getpid()
        self._space = 0  # for credentials
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._receiver.settimeout(DAY)
        self.fd = self._sender.fileno()
        try:
            self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._space = socket.CMSG_SPACE(_UCRED)
        except (AttributeError, OSError):  # not Linux: only the fork hooks protect the parent
            pass
        try:
            _thread.start_new_thread(self._run, ())
        except BaseException:
            self.forget()
            raise

    @property
    def here(self) -> bool:
        """Whether the thread is in this process (and not only in the parent that forked it)."""
        return self._pid == os.getpid()

    def write(self, byte: int) -> None:
        """As the C-level handler does; never waits."""
        try:
            os.write(self.fd, bytes([byte]))
        except OSError:
            pass

    def close(self) -> None:
        """End the thread. May be called on it."""
        self._receiver.shutdown(socket.SHUT_RDWR)  # a close alone would leave it in recvmsg
        self.forget()

    def forget(self) -> None:
        """Close our ends; in a forked child the pair itself is the parent's."""
        self._receiver.close()
        self._sender.close()

    def _run(self) -> None:
        try:
            self._listen()
        except Exception as error:
            self._deaf(error)

    def _listen(self) -> None:
        from_this_process = self._pid.to_bytes(4, "little")
        while True:
            try:
                data, ancillary, _, _ = self._receiver.recvmsg(256, self._space)
            except socket.timeout:
                self._quiet()
                continue
            except OSError:
                return
            if not data:
                return
            # A child that was forked or vforked a moment ago still writes here (os.register_at_fork comes too late
            # for it, and never for subprocess): SO_PASSCRED tells who wrote.
            if all(credentials[:4] == from_this_process for _, _, credentials in ancillary):
                self._hear(data)
