"""What a check of doctor's has to say."""

from __future__ import annotations

from typing import NamedTuple

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"


class Finding(NamedTuple):
    """One thing found, and what to do about it."""

    area: str
    level: str
    """`problem`: not protected, or not as asked for (doctor exits 1); `warning`: it may well fall short."""
    text: str
    advice: str | None = None
