"""Groups made without `init_process_group`: how RL frameworks sync weights between trainers and inference engines.

`init_custom_process_group` of SkyRL, OpenRLHF, verl, SGLang and others is a copy of torch's init: a rendezvous of its
own, then torch's helper `_new_process_group_helper`, called as it is for a default group, with no ranks. Such a group
reaches across jobs: some of its members are ranks of one default group, some of another, some of none. So

- it is released with the rank, after its default group, and not waited for: a backend may want all members for that;
- a process that has only such a group is guarded for its sake;
- its members are not told of each other's evictions: an engine that is evicted must not take the trainers with it;
- its collectives are no evidence of how far the ranks of the default group are: each may have one of that name.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

ALONE = "the members of a group made without init_process_group are not told"
"""Why a process that has only such a group is alone, in words."""

_made: weakref.WeakSet[Any] = weakref.WeakSet()


def is_one(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of the helper with these arguments makes one, given that no init of this thread makes it."""
    ranks = arguments[2] if len(arguments) > 2 else named.get("global_ranks_in_group")
    return ranks is not None and len(ranks) == 0


def note(returned: Any) -> None:
    """Remember the group in what the helper has returned."""
    group = returned[0] if isinstance(returned, tuple) else returned  # before torch 2.0: the group alone
    if group is not None and group in sys.modules["torch.distributed.distributed_c10d"]._world.pg_names:
        _made.add(group)


def any_left() -> bool:
    """Whether torch knows of a group, in a process that has no default group (any more)."""
    world = getattr(sys.modules["torch.distributed.distributed_c10d"], "_world", None)
    return bool(getattr(world, "pg_names", None))


def known(group: Any) -> bool:
    """Whether this group is one."""
    return group in _made
