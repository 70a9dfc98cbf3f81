"""Calls a hook when a module that is just being imported is complete.

1. wrapt calls a post-import hook at once if the module is in `sys.modules`. A module is there already while it is being
   imported: transformers and accelerate import torch, and with it the agent, in the middle of their own import.
2. importlib clears `_initializing` of a module's spec when the module is complete. So the spec gets a class that calls
   the hook then.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable

Hook = Callable[[ModuleType], object]


def when_imported(name: str, hook: Hook) -> None:
    """Call `hook` with the module, now or when its import ends; not at all if that fails. The hook must not raise."""
    import wrapt

    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if not getattr(spec, "_initializing", False):
        wrapt.register_post_import_hook(hook, name)
    elif isinstance(spec, _NoticedSpec):
        spec._autoteardown_hooks.append(hook)
    elif type(spec) is ModuleSpec:
        spec.__dict__["_autoteardown_hooks"] = [hook]
        spec.__class__ = _NoticedSpec  # the same layout


class _NoticedSpec(ModuleSpec):
    """A spec that calls hooks once, when its module is complete."""

    _autoteardown_hooks: list[Hook]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            hooks = self.__dict__.pop("_autoteardown_hooks", ())
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            module = sys.modules.get(self.name)
            for hook in hooks if module is not None else ():
                hook(module)
