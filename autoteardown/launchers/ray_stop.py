"""Drains the machine's Ray ranks before `ray stop` does anything.

1. `ray stop` sends SIGTERM to raylet, which signals its workers and kills them 0.2 s later. That is too soon for any
   rank, and the ranks on other nodes are not notified.
2. `ray stop` has no hook, and acts as soon as it runs. So the drain runs while the process starts.
3. `ray stop --force` does not wait.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_WITHOUT_DRAIN = ("-f", "--force", "--help")
_DEFAULT = 16.0  # seconds: the default of `ray stop --grace-period`
_RAYLET = "raylet"


def grace_period(words: Sequence[str]) -> float:
    """The grace period in these arguments of `ray stop`, in seconds; 0: none."""
    if any(word in _WITHOUT_DRAIN for word in words):
        return 0.0
    found = _DEFAULT
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--grace-period" and equals:
            pass
        elif word in ("-g", "--grace-period"):
            value = words[place + 1] if place + 1 < len(words) else ""
        elif word.startswith("-g"):
            value = word[2:]
        else:
            continue
        try:
            found = float(value)
        except ValueError:
            return 0.0  # `ray stop` will report the error
    return found if 0 < found < 1e6 else 0.0


def drain_first(words: Sequence[str]) -> None:
    """Drain the ranks, and write each result to stderr. Never raises; writes nothing if there are no ranks."""
    from autoteardown import settings, stderr
    from autoteardown.node import drain

    try:
        seconds = grace_period(words)
        found, _ = settings.load(os.environ)

        def say(text: str) -> None:
            if found.log != "quiet":
                stderr.say(f"autoteardown: ray stop: {text}")

        selection = _below_raylet()
        if not seconds or not drain.would_signal(found.runtime_dir, selection, say):
            return
        ranks, _ = drain.drain(
            found.runtime_dir,
            found.signals[0],
            min(seconds, found.hard + 0.5),
            selection=selection,
            killed_after=True,
        )
        for rank in ranks:
            say(rank.line())
        say(f"{sum(rank.clean for rank in ranks)} of {len(ranks)} left cleanly; Ray is stopped now")
    except Exception as error:
        stderr.say(f"autoteardown: ray stop: the node was not drained: {error!r}")


def _below_raylet() -> Any:
    from autoteardown.node import drain, procfs

    class BelowRaylet(drain.Selection):
        """Selects the ranks that `ray stop` ends: the descendants of every raylet of the machine, and no others."""

        __slots__ = ()

        def matches(self, record: Any) -> bool:
            parents = procfs.ancestors(record.pid) if super().matches(record) else []
            return any(procfs.name(pid) == _RAYLET for pid in parents)

    return BelowRaylet()
