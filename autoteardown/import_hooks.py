"""Import hooks for `signal` and `torch`: a meta path finder that installs the agent when the program imports them.

1. Importing these modules, or wrapt, at start-up would cost every process of the image milliseconds (`signal` needs
   `enum`).
2. A loader does the work, not `find_spec`. importlib calls `find_spec` with the global import lock held, and an import
   there deadlocks with a thread that is importing the same module. Also, a program that only asks for a module
   (`importlib.util.find_spec("torch")`, as many libraries do) does not trigger the hook.
3. The real loader is back in place before the module's code runs, so that no code finds this module's loader on it.
4. The finder stays on `sys.meta_path` when it has nothing left to do. If it were removed, another thread that is
   iterating over that list would skip a finder, and fail to import a module that exists.
"""

import sys

from autoteardown.switch import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_pending: "dict[str, Callable[[ModuleType], None]]" = {}  # hooks by the module that has not been imported yet
_interceptor: "Any" = None  # what stands in for the functions of `signal`, once it does


def install() -> None:
    """Hook both modules; for a module that is imported already, the hook runs at once."""
    _pending.update(signal=_hook_signal, torch=_hook_torch)
    sys.meta_path.insert(0, _Finder())
    for name in ("signal", "torch"):
        module = sys.modules.get(name)
        if module is not None:
            _serve(name, module)


def _hook_signal(module: "ModuleType") -> None:
    global _interceptor
    from autoteardown.signals import interception

    _interceptor = interception.install(module)
    # This runs in most processes of the image, so the import below is made only if `ray` is in the command line.
    words = getattr(sys, "orig_argv", None)  # 3.10 and later
    if words is None or any(word.rpartition("/")[2] in ("ray", "ray.scripts.scripts") for word in words):
        from autoteardown.launchers import ray_start

        ray_start.serve(module)
    # So that the import below is made only in the processes that `multiprocessing` has started.
    if "--multiprocessing-fork" in getattr(sys, "argv", ()) or any(
        "multiprocessing.forkserver" in word for word in words or ()
    ):
        from autoteardown.children import child_signals

        child_signals.attach_spawned(_interceptor)


def _hook_torch(module: "ModuleType") -> None:
    # The finder may have missed `signal`: its loader cannot be wrapped (a zipped stdlib on 3.9), or another finder that
    # comes first on `sys.meta_path` has found it.
    if "signal" in _pending:
        import signal

        _serve("signal", signal)
    from autoteardown.rank import torch_hooks
    from autoteardown.signals import interception

    if _interceptor is not None:
        import signal

        interception.go_on_with(_interceptor, signal)
    torch_hooks.register()


def _serve(name: str, module: "ModuleType") -> None:
    """Call the hook for `name`, once. The import that led here continues even if the hook fails."""
    hook = _pending.pop(name, None)
    if hook is None:
        return
    try:
        hook(module)
    except KeyboardInterrupt:
        raise  # the user's Ctrl-C
    except BaseException as error:
        say(f"hook on {name} failed: {error!r}; this process is not guarded")


class _Finder:
    """The first finder on `sys.meta_path`; finds nothing except the hooked modules."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders find, with a `_Loader` around its loader."""
        if not _pending:
            return None
        if name in _pending:
            wanted, after = name, name == "signal"
        elif name.startswith("torch.") and "torch" in _pending:
            # `torch` itself was found by a finder before this one
            wanted, after = "torch", False
        else:
            return None
        try:
            spec = self._ask_the_others(name, path, target)
            if spec is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader, wanted, after)  # type: ignore[assignment, arg-type]
        except Exception:
            return (
                None  # importlib asks the other finders now; if one of them has raised this, it raises again
            )
        return spec

    def _ask_the_others(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Wraps the real loader, and runs the hook before or after the module's own code."""

    __slots__ = ("_after", "_real", "_wanted")  # no __dict__, so that `__getattr__` finds the real loader's

    def __init__(self, real: "Loader", wanted: str, after: bool) -> None:
        self._real = real
        self._wanted = wanted
        self._after = after

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    # ddtrace sets its own `get_code` on the loader that it finds.
    def __setattr__(self, name: str, value: object) -> None:
        if name in _Loader.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._real, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._real, name)

    @property  # type: ignore[misc]
    def __class__(self) -> "Any":
        return type(self._real)

    # A program that asks for the module without importing it may copy, pickle and compare the loader: as the real one.
    def __reduce_ex__(self, protocol: "Any") -> "Any":
        return self._real.__reduce_ex__(protocol)

    def __copy__(self) -> "Loader":
        return self._real

    def __eq__(self, other: object) -> bool:
        return bool(self._real == (other._real if isinstance(other, _Loader) else other))

    def __hash__(self) -> int:
        return hash(self._real)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """As the real loader does."""
        return self._real.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        """Put the real loader back, then run the module and the hook."""
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        if not self._after:
            _serve(self._wanted, module)
        self._real.exec_module(module)
        if self._after:
            _serve(self._wanted, module)
