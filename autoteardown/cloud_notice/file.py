"""Reads a notice from a file that something else writes: the file's existence is the notice.

Its content may tell when the machine ends: a number of seconds, counted from when the file was written, or an ISO 8601
time by this machine's clock. With any other content, or none, the end is not known.
"""

from __future__ import annotations

import os
import stat
import time
from typing import Optional

from autoteardown.cloud_notice import http
from autoteardown.cloud_notice.source import Notice, Source, iso_time

_LIMIT = 4096
_DAY = 86400.0


class File(Source):
    """A file."""

    name = "file"

    def __init__(self, path: str) -> None:
        super().__init__(("", 0))
        self._path = os.path.abspath(path)

    @property
    def place(self) -> str:
        """See `Source.place`."""
        return f"the file {self._path}"

    def read(self, wait: float) -> tuple[Optional[Notice], bool]:
        """See `Source.read`."""
        try:
            descriptor = os.open(
                self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            )  # a FIFO must not block
            try:
                about = os.fstat(descriptor)
                text = os.read(descriptor, _LIMIT) if stat.S_ISREG(about.st_mode) else b""
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None, False
        except OSError as error:
            raise http.Unavailable(error.strerror or str(error)) from None
        content = text.decode("utf-8", "replace").strip()
        seconds = _seconds(content, about.st_mtime)
        return Notice(f"{about.st_mtime_ns} {content}", f"{self._path} exists", seconds), False


def _seconds(content: str, written: float) -> Optional[float]:
    now = time.time()
    try:
        left = float(content) - max(0.0, now - written)
    except ValueError:
        moment = iso_time(content)
        left = -1.0 if moment is None else max(0.0, moment - now)
        return left if 0 <= left <= _DAY else None
    return max(0.0, left) if float(content) >= 0 and left <= _DAY else None  # also refuses NaN
