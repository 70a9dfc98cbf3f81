"""The result type of doctor's checks."""

from __future__ import annotations

from typing import NamedTuple

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"


class Finding(NamedTuple):
    """One result of a check, and what to do about it."""

    area: str
    level: str
    """`problem`: ranks are not protected, or not as the settings ask (doctor exits 1); `warning`: they may not be."""
    text: str
    advice: str | None = None
