"""Lines of JSON: what goes over a connection of the channel, as bytes and back. Pure.

Every line is an array that begins with its kind. To the hub:

    ["hello", rank, world, member, attempt, heard, near, proof]
                                     the first line: who comes (`member` names one life of the rank), for which time,
                                     the last index it has heard, and whether it is on the hub's host (0 or 1). The
                                     proof holds for this once: attempts grow
    ["p", number, kind, value]       a post; numbers grow by one
    ["bye"]                          this rank has left the group

From the hub:

    ["welcome", seen, proof]         the hub knows the token too, and has the posts up to that number
    ["no", reason]                   not now, or not a rank of this group
    ["m", index, kind, value]        a message; indices grow
    ["ack", number]                  the posts up to that number have come
    ["end"]                          rank 0 has left the group, and the hub is no more
"""

from __future__ import annotations

import hmac
import json
from typing import Any, NoReturn

LIMIT = 16384
"""Longest line, in bytes."""
FIRST = 512
"""Bytes that are read at a time while the other end has yet to prove who it is: all that is read is parsed. A first
line has some 130."""
KIND = 32
"""Longest kind of a message, in characters."""

Json = Any


class Malformed(Exception):
    """What came is no line of ours."""


def encode(*line: Json) -> bytes:
    """One line.

    Raises:
        TypeError, ValueError: it cannot be written as JSON, or is too long.
    """
    data = _encoder.encode(line).encode() + b"\n"
    if len(data) > LIMIT:
        raise ValueError(f"a message of {len(data)} bytes, the limit is {LIMIT}")
    return data


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


# Made once: json.dumps and json.loads make new ones each time that they are told how, which takes as long as a line.
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_decoder = json.JSONDecoder(parse_constant=_no_number)


def decode(line: bytes | bytearray) -> list[Json]:
    """The array on a line.

    Raises:
        Malformed: there is none.
    """
    try:
        found = _decoder.decode(line.decode())
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise Malformed("not an array with a kind")
    return found


class Lines:
    """Bytes in, lines out.

    Args:
        limit: longest line in bytes; a longer one is malformed before it has come to its end.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list[list[Json]]:
        """The lines that these bytes complete.

        Raises:
            Malformed: one of them is not ours. What came before it is lost with it.
        """
        *lines, self._rest = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        if len(self._rest) > self._limit or any(len(line) > self._limit for line in lines):
            raise Malformed("a line that is too long")
        return [decode(line) for line in lines]


def whole(value: Json, low: int = 0, high: int = 2**53) -> int:
    """The value, if it is a whole number in these bounds; else raises `Malformed`."""
    if type(value) is not int or not low <= value <= high:
        raise Malformed("not a number in its bounds")
    return value


def kind_of(value: Json) -> str:
    """The value, if it can be the kind of a message; else raises `Malformed`."""
    if not isinstance(value, str) or not 0 < len(value) <= KIND or not value.isidentifier():
        raise Malformed("not a kind")
    return value


def name_of(value: Json) -> str:
    """The value, if it can be a random name; else raises `Malformed`."""
    if not isinstance(value, str) or not 0 < len(value) <= 64 or not (value.isascii() and value.isalnum()):
        raise Malformed("not a name")
    return value


def proof(token: str, *log: str | int) -> str:
    """That whoever says this knows the token, which itself is never sent."""
    text = "\n".join(map(str, log))
    return hmac.digest(token.encode(), text.encode(), "sha256").hex()


def proven(found: Json, expected: str) -> bool:
    """Whether a proof is right, in constant time."""
    return isinstance(found, str) and found.isascii() and hmac.compare_digest(found, expected)
