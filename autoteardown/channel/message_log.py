"""The numbered log of the hub's messages, from which each connection is sent what it has not received. No I/O."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from autoteardown.channel.wire import encode

MAX_ENTRIES = 1 << 16
"""Entries kept. Only a group whose ranks were lost and back that often has more."""
_CHUNK = 1 << 17  # bytes


class LoggedMessage(NamedTuple):
    """One message."""

    to: Optional[int]  # None: to every rank
    kind: str
    value: Any
    line: bytes


class MessageLog:
    """Messages by index, from 1 on."""

    def __init__(self) -> None:
        self._entries: list[LoggedMessage] = []
        self._discarded = 0  # entries before the first that is kept
        self.last = 0
        """The index of the newest message; 0 if there is none."""
        self._chunks: dict[int, tuple[bytes, int]] = {}

    def add(self, to: Optional[int], kind: str, value: Any) -> None:
        """Append a message.

        Raises:
            TypeError, ValueError: the message cannot be encoded.
        """
        self._entries.append(LoggedMessage(to, kind, value, encode("m", self.last + 1, kind, value)))
        self.last += 1
        self._chunks.clear()
        if len(self._entries) > 2 * MAX_ENTRIES:
            self._discarded += MAX_ENTRIES
            del self._entries[:MAX_ENTRIES]

    def after(self, index: int, rank: int) -> tuple[bytes, int]:
        """The next chunk of this rank's messages after an index, as bytes, and the index of its last message."""
        found = self._chunks.get(index)
        if found is None:
            start = max(0, index - self._discarded)
            size, end, addressed = 0, start, False
            for entry in self._entries[start:]:
                end += 1
                addressed = addressed or entry.to is not None
                if entry.to is None or entry.to == rank:
                    size += len(entry.line)
                    if size > _CHUNK:
                        break
            data = b"".join(entry.line for entry in self._entries[start:end] if entry.to in (None, rank))
            found = data, self._discarded + end
            if not addressed:  # the same for every rank
                self._chunks[index] = found
        return found

    def messages_for(self, rank: int, after: int) -> list[tuple[str, Any]]:
        """All of this rank's messages after an index, as kinds and values."""
        start = max(0, after - self._discarded)
        return [(entry.kind, entry.value) for entry in self._entries[start:] if entry.to in (None, rank)]
