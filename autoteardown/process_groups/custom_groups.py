"""Recognizes groups made without `init_process_group`, with which RL frameworks sync weights to inference engines.

`init_custom_process_group` of SkyRL, OpenRLHF, verl, SGLang and others is a copy of torch's init: a rendezvous of
its own, then torch's helper `_new_process_group_helper`, called as for a default group, with no ranks. Such a group
reaches across jobs: some of its members are ranks of one default group, some of another, some of none. So

1. it is released with the rank, after its default group, and not waited for: a backend may want all members for
   that;
2. a process that has only such a group is guarded for it;
3. its members are not told of each other's evictions: an evicted engine must not take the trainers with it;
4. its collectives do not show how far the ranks of the default group are: each rank may have a group of that name.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

ALONE = "the members of a group made without init_process_group are not told"
"""Why a process that has only such a group is alone."""

_made: weakref.WeakSet[Any] = weakref.WeakSet()


def is_one(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of torch's helper with these arguments, outside an init, makes such a group."""
    ranks = arguments[2] if len(arguments) > 2 else named.get("global_ranks_in_group")
    return ranks is not None and len(ranks) == 0


def note(returned: Any) -> None:
    """Remember the group that the helper has returned."""
    group = returned[0] if isinstance(returned, tuple) else returned  # before torch 2.0: the group only
    if group is not None and group in sys.modules["torch.distributed.distributed_c10d"]._world.pg_names:
        _made.add(group)


def any_left() -> bool:
    """Whether torch knows of any group, in a process without a default group."""
    world = getattr(sys.modules["torch.distributed.distributed_c10d"], "_world", None)
    return bool(getattr(world, "pg_names", None))


def known(group: Any) -> bool:
    """Whether this group is such a group."""
    return group in _made
