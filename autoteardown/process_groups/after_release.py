"""Answers what the program asks torch after the agent has destroyed the process group.

`finally: dist.destroy_process_group()` is the idiom of torch's own tutorials, and code that logs or saves asks for
its rank. Both would raise, which they do not without the agent: the tracebacks would hide why the rank ended, and a
launcher's error file would blame them. A collective still raises what it raises without a group: no peer is left to
answer.
"""

from __future__ import annotations

import os
from typing import Any

released = False
"""Whether the agent has begun to release the groups: the program has none left to destroy."""


class _Gone:
    """Stands in for the default group: knows its rank and size."""

    def __init__(self, group: Any, unknown: Any) -> None:
        rank, size, name = group.rank(), group.size(), getattr(group, "group_name", "")
        self.rank = lambda: rank
        self.size = lambda: size
        self.group_name = name
        self._unknown = unknown

    def __getattr__(self, name: str) -> Any:
        self._unknown()  # raises, as it does without a group
        raise AttributeError(name)


def release(c10d: Any) -> None:
    """Called before the agent destroys or aborts: from now on the program's own destroy returns at once."""
    global released
    released = True
    if not c10d.is_initialized() or hasattr(c10d._get_default_group, "_autoteardown_real"):
        return
    real = c10d._get_default_group
    group = real()
    gone, backend = _Gone(group, real), c10d._world.pg_map.get(group)

    def _get_default_group() -> Any:
        if c10d.is_initialized():
            return real()
        if backend is not None and gone not in c10d._world.pg_map:
            c10d._world.pg_map[gone] = backend  # for `get_backend`
            # Read when a collective is called: torch up to 2.5 warns of anything that is not a ProcessGroup.
            devices = getattr(c10d._world, "pg_default_device", {})
            devices[gone] = c10d.torch.device("cpu")
        return gone

    _get_default_group._autoteardown_real = real  # type: ignore[attr-defined]
    c10d._get_default_group = _get_default_group


def _after_fork_in_child() -> None:
    global released
    released = False  # a child may make a group of its own


os.register_at_fork(after_in_child=_after_fork_in_child)
