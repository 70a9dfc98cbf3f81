"""What the hub has said, and to whom, for as long as somebody may not have heard it. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from autoteardown.channel.wire import encode

MOST = 1 << 16
"""Entries kept. A group whose ranks were lost and back that often has lost more than the oldest of them."""
_AT_ONCE = 1 << 17  # bytes


class LoggedMessage(NamedTuple):
    """One message."""

    to: Optional[int]
    kind: str
    value: Any
    line: bytes


class MessageLog:
    """Messages by index, from 1 on."""

    def __init__(self) -> None:
        self._entries: list[LoggedMessage] = []
        self._gone = 0  # how many there were before the first that is kept
        self.last = 0
        """The index of the newest message; 0 if there is none."""
        self._chunks: dict[int, tuple[bytes, int]] = {}

    def add(self, to: Optional[int], kind: str, value: Any) -> None:
        """Append a message.

        Raises:
            TypeError, ValueError: it cannot be sent.
        """
        self._entries.append(LoggedMessage(to, kind, value, encode("m", self.last + 1, kind, value)))
        self.last += 1
        self._chunks.clear()
        if len(self._entries) > 2 * MOST:
            self._gone += MOST
            del self._entries[:MOST]

    def after(self, index: int, rank: int) -> tuple[bytes, int]:
        """What this rank has to hear after that index, not too much of it, and the index that this leads to."""
        found = self._chunks.get(index)
        if found is None:
            start = max(0, index - self._gone)
            size, end, addressed = 0, start, False
            for entry in self._entries[start:]:
                end += 1
                addressed = addressed or entry.to is not None
                if entry.to is None or entry.to == rank:
                    size += len(entry.line)
                    if size > _AT_ONCE:
                        break
            data = b"".join(entry.line for entry in self._entries[start:end] if entry.to in (None, rank))
            found = data, self._gone + end
            if not addressed:  # the same for everybody
                self._chunks[index] = found
        return found

    def heard_by(self, rank: int, after: int) -> list[tuple[str, Any]]:
        """The same as kinds and values."""
        start = max(0, after - self._gone)
        return [(entry.kind, entry.value) for entry in self._entries[start:] if entry.to in (None, rank)]
