"""Stops torch.distributed ranks together and cleanly when the platform evicts one of them.

Set `AUTOTEARDOWN=1` where this package is installed; no code has to change. The functions of this module are optional,
for programs that want more control. All of them may be called anywhere, do not import torch, and do nothing while the
agent is off.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from autoteardown.api import arm, disarm, on_teardown, protect, status, stop_requested

__version__ = "0.2.0"
__all__ = ["arm", "disarm", "on_teardown", "protect", "status", "stop_requested"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from autoteardown import api

        if name == "stop_requested" and not hasattr(api, name):
            return bool  # called in a signal handler that has interrupted this very import: False, this once
        function = globals()[name] = getattr(api, name)  # so that the next access does not come here
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
