"""`ray stop` drains Ray's ranks of this machine before it does anything else.

It sends SIGTERM to raylet, which signals its workers and kills them 0.2 s later: too soon for any rank, and nobody on
other nodes is told. `ray stop` has no place for a hook, and acts as soon as it runs; so the drain is done while the
process starts. `--force` is not kept waiting.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_NOT = ("-f", "--force", "--help")
_DEFAULT = 16.0  # seconds: what `ray stop` gives every process unless it is told
_RAYLET = "raylet"


def grace_period(words: Sequence[str]) -> float:
    """How many seconds these arguments of `ray stop` give the processes; 0: none."""
    if any(word in _NOT for word in words):
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
            return 0.0  # `ray stop` will say so
    return found if 0 < found < 1e6 else 0.0


def drain_first(words: Sequence[str]) -> None:
    """Drain, and say on stderr what became of each rank. Never raises; silent where there is none."""
    from autoteardown import settings, stderr
    from autoteardown.node import drain

    try:
        seconds = grace_period(words)
        found, _ = settings.load(os.environ)

        def say(text: str) -> None:
            if found.log != "quiet":
                stderr.say(f"autoteardown: ray stop: {text}")

        which = _below_raylet()
        if not seconds or not drain.would_signal(found.runtime_dir, which, say):
            return
        ranks, _ = drain.drain(
            found.runtime_dir,
            found.signals[0],
            min(seconds, found.hard + 0.5),
            which=which,
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
        """The ranks that `ray stop` ends: it looks for every raylet of the machine, and for nobody else's processes."""

        __slots__ = ()

        def matches(self, record: Any) -> bool:
            parents = procfs.ancestors(record.pid) if super().matches(record) else []
            return any(procfs.name(pid) == _RAYLET for pid in parents)

    return BelowRaylet()
