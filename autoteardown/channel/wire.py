"""The wire format of the channel: encodes and parses lines of JSON, and computes the proofs of the token. No I/O.

Every line is an array that begins with its kind. To the hub:

    ["hello", rank, world, incarnation, attempt, received, same_host, proof]
                                     the first line. `incarnation` is random, and new each time that a rank joins;
                                     `attempt` counts its connections; `received` is the index of the last message it
                                     has received; `same_host` (0 or 1): the rank runs on the hub's host. The proof is
                                     valid once, because attempts grow
    ["p", number, kind, value]       a post; numbers grow by one
    ["bye"]                          this rank has left the group

From the hub:

    ["welcome", seen, proof]         the hub knows the token, too, and has the posts up to that number
    ["no", reason]                   refused: no capacity, or not a rank of this group
    ["m", index, kind, value]        a message; indices grow
    ["ack", number]                  the hub has the posts up to that number
    ["end"]                          rank 0 has left the group, and the hub has closed
"""

from __future__ import annotations

import hmac
import json
from typing import Any, NoReturn

LIMIT = 16384
"""Longest line, in bytes."""
FIRST = 512
"""Bytes read at a time before the other end is authenticated, because everything that is read is parsed. A first line
has about 130."""
KIND = 32
"""Longest kind of a message, in characters."""

Json = Any


class Malformed(Exception):
    """A received line does not follow this format."""


def encode(*line: Json) -> bytes:
    """Encode one line.

    Raises:
        TypeError, ValueError: the line cannot be written as JSON, or is too long.
    """
    data = _encoder.encode(line).encode() + b"\n"
    if len(data) > LIMIT:
        raise ValueError(f"a message of {len(data)} bytes, the limit is {LIMIT}")
    return data


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


# Made once: with options, json.dumps and json.loads make a new encoder or decoder for each call, which takes as long as
# the line itself.
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_decoder = json.JSONDecoder(parse_constant=_no_number)


def decode(line: bytes | bytearray) -> list[Json]:
    """Parse one line.

    Raises:
        Malformed: the line is not an array that begins with a kind.
    """
    try:
        found = _decoder.decode(line.decode())
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise Malformed("not an array with a kind")
    return found


class Lines:
    """Splits received bytes into lines and parses them.

    Args:
        limit: longest line in bytes; a longer one is rejected before its end has arrived.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list[list[Json]]:
        """Return the lines that these bytes complete.

        Raises:
            Malformed: one of the lines is malformed. The lines before it are lost, too.
        """
        *lines, self._rest = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        if len(self._rest) > self._limit or any(len(line) > self._limit for line in lines):
            raise Malformed("a line that is too long")
        return [decode(line) for line in lines]


def whole(value: Json, low: int = 0, high: int = 2**53) -> int:
    """The value, if it is an integer in these bounds; else raises `Malformed`."""
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


def proof(token: str, *fields: str | int) -> str:
    """An HMAC of the fields, which proves that the sender knows the token. The token itself is never sent."""
    text = "\n".join(map(str, fields))
    return hmac.digest(token.encode(), text.encode(), "sha256").hex()


def is_proof(found: Json, expected: str) -> bool:
    """Whether a received proof is the expected one, compared in constant time."""
    return isinstance(found, str) and found.isascii() and hmac.compare_digest(found, expected)
