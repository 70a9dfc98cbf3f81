"""What every source of notices has in common: a notice, and how to read one."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import NamedTuple, Optional

from autoteardown.cloud_notice import http


class Notice(NamedTuple):
    """The announcement that this machine ends."""

    key: str
    """Identifies the notice: another key is another notice."""
    text: str
    """What is announced, in words."""
    seconds: Optional[float]
    """How long the machine still runs, by the clock of who announces it; None: not told."""
    assumed: Optional[float] = None
    """If it is not told: seconds from the announcement to the end, as the vendor documents them; None: not known."""


class Source:
    """A place where notices appear. `name` is what `--source` calls it."""

    name = ""
    address = ""
    """The default address of the metadata service."""

    def __init__(self, where: tuple[str, int]) -> None:
        self.where = where

    @property
    def place(self) -> str:
        """Where notices are read, for messages."""
        return f"{self.name} at {self.where[0]}" + (f":{self.where[1]}" if self.where[1] != 80 else "")

    def read(self, wait: float) -> tuple[Optional[Notice], bool]:
        """The notice that is there now, and whether this call has waited for a change by itself.

        Args:
            wait: seconds that the caller would sleep before the next call.

        Raises:
            http.Unavailable: the source gives no usable answer.
        """
        raise NotImplementedError

    def acknowledge(self, key: str) -> None:
        """Tell the cloud that it need not wait any longer."""


def unexpected(answer: http.Answer) -> http.Unavailable:
    """The error for a status that the protocol of this source does not have."""
    if 300 <= answer.status < 400:
        return http.Unavailable(f"it redirects (HTTP {answer.status}), which no metadata service does")
    return http.Unavailable(f"HTTP {answer.status}")


def iso_time(text: object) -> Optional[float]:
    """An ISO 8601 time, UTC unless it says otherwise, in seconds since 1970; None: it is none."""
    try:
        found = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def seconds_until(moment: Optional[float], answer: http.Answer) -> Optional[float]:
    """Seconds to a moment by the clock of the service that announces it: this machine's may be wrong by minutes.

    The service's clock comes in the header Date of its answer, in whole seconds.
    """
    now = answer.date
    return None if moment is None or now is None else max(0.0, moment - now - 1.0)
