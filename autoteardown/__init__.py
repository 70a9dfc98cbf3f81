"""Tears torch.distributed ranks down cleanly when the platform evicts them.

Set `AUTOTEARDOWN=1` where this package is installed; no code has to change. The functions here are for programs that
want more say. All of them are safe to call anywhere, import no torch, and do nothing while the agent is off.
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
            return bool  # polled in a signal handler, on top of the very import: False, once
        function = globals()[name] = getattr(api, name)  # found without this the next time
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
