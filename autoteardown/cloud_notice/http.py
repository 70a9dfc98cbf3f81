"""Sends one HTTP request to a metadata service, bounded in time and in size.

1. The answer comes over a plain socket, so no proxy of the environment is used: a proxy would ask another machine's
   metadata service.
2. A redirect is not followed: a metadata service sends none, a captive portal does.
3. `http.client` bounds each `recv` and not their sum. A service that sends one byte a second would hold the watcher for
   hours, so the socket's reads share one deadline here.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Mapping
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Optional

LIMIT = 256 * 1024
"""Longest answer, headers included, in bytes."""


class Unavailable(Exception):
    """The metadata service gives no usable answer; the text says why."""


class Answer(NamedTuple):
    """What the service has answered."""

    status: int
    headers: Message
    body: str

    @property
    def date(self) -> Optional[float]:
        """The service's own clock, in seconds since 1970; None: it has not told."""
        return http_date(self.headers.get("Date") or "")


def http_date(text: str) -> Optional[float]:
    """A time as in HTTP headers, in seconds since 1970; None: it is none."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class _Bounded(io.RawIOBase):
    """The receiving side of a socket, until a deadline and up to `LIMIT` bytes."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until, self._left = connection, until, LIMIT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self._left <= 0:
            raise Unavailable(f"it sends more than {LIMIT} bytes")
        self._connection.settimeout(left)
        received = self._connection.recv_into(buffer, min(len(buffer), self._left))
        self._left -= received
        return received

    def makefile(self, mode: str) -> io.BufferedReader:
        """For `HTTPResponse`, which takes this object for a socket."""
        return io.BufferedReader(self)


def address(text: str) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.

    Raises:
        ValueError: it is none of these.
    """
    host, colon, port = text, "", ""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        if not closed or colon not in ("", ":"):
            raise ValueError(text)
    elif text.count(":") == 1:
        host, colon, port = text.partition(":")
    if not host or not host.isascii() or any(c.isspace() or c in "/?#@" for c in host):
        raise ValueError(text)
    number = int(port) if colon and port.isascii() and port.isdigit() else 80
    if (colon and not port.isdigit()) or not 0 < number < 65536:
        raise ValueError(text)
    return host, number


def request(
    where: tuple[str, int],
    path: str,
    headers: Mapping[str, str],
    seconds: float,
    method: str = "GET",
    body: str = "",
) -> Answer:
    """Send a request, and return the answer, whatever its status.

    Raises:
        Unavailable: no answer, or none that is HTTP, in so many seconds.
    """
    until = time.monotonic() + seconds
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Accept: */*"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body or method != "GET":
        lines.append(f"Content-Length: {len(body.encode())}")
    message = ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
    try:
        with socket.create_connection(where, timeout=seconds) as connection:
            connection.sendall(message)
            response = http.client.HTTPResponse(_Bounded(connection, until), method=method)  # type: ignore[arg-type]
            response.begin()
            if (response.length or 0) > LIMIT:
                raise Unavailable(f"it sends more than {LIMIT} bytes")
            text = response.read().decode("utf-8", "replace")
            return Answer(response.status, response.headers, text)
    except TimeoutError:
        raise Unavailable(f"no answer within {seconds:g} s") from None
    except OSError as error:
        raise Unavailable(error.strerror or str(error) or type(error).__name__) from None
    except (http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"its answer is no HTTP: {type(error).__name__}") from None
