"""Lazy interest in `signal` and `torch`: a meta path finder that acts when they are imported, and never before.

Importing them, or wrapt, at start-up would cost every process of the image milliseconds (`signal` needs `enum`).

* The work is done by a loader, not in `find_spec`: importlib calls `find_spec` with the global import lock held, and
  importing anything there deadlocks with a thread that is importing the same thing. It also keeps apart asking for
  a module (`importlib.util.find_spec("torch")`, as many libraries do) and importing it.
* The real loader is back in place before the module's code runs, so that nobody finds ours on the module.
* The finder stays on `sys.meta_path` when it has nothing left to do: taking it out makes another thread that is
  iterating over that list skip a finder, and fail to import something that exists.
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

_waiting: "dict[str, Callable[[ModuleType], None]]" = {}


def install() -> None:
    """Watch for both modules; one that is imported already is served at once."""
    _waiting.update(signal=_tap_signals, torch=_hook_torch)
    sys.meta_path.insert(0, _Finder())
    for name in ("signal", "torch"):
        module = sys.modules.get(name)
        if module is not None:
            _serve(name, module)


def _tap_signals(module: "ModuleType") -> None:
    from autoteardown.signals import interception

    interception.install(module)
    # Looked at closely only where `ray` is among the words: this runs in most processes of the image.
    words = getattr(sys, "orig_argv", None)  # 3.10 and later
    if words is None or any(word.rpartition("/")[2] in ("ray", "ray.scripts.scripts") for word in words):
        from autoteardown.launchers import ray_start as ray_node

        ray_node.serve(module)


def _hook_torch(module: "ModuleType") -> None:
    # A loader that cannot be chained (a zipped stdlib on 3.9) or a finder ahead of ours hides `signal` from us.
    if "signal" in _waiting:
        import signal

        _serve("signal", signal)
    from autoteardown.rank import torch_hooks

    torch_hooks.register()


def _serve(name: str, module: "ModuleType") -> None:
    """Call the hook for `name`, once. The import that led here goes on whatever comes of it."""
    hook = _waiting.pop(name, None)
    if hook is None:
        return
    try:
        hook(module)
    except KeyboardInterrupt:
        raise  # the user's, not ours
    except BaseException as error:
        say(f"hook on {name} failed: {error!r}; this process is not guarded")


class _Finder:
    """First on `sys.meta_path`; passes everything on but the modules waited for."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """What the other finders find, with our loader around theirs."""
        if not _waiting:
            return None
        if name in _waiting:
            wanted, after = name, name == "signal"
        elif name.startswith("torch.") and "torch" in _waiting:
            # `torch` came from a finder that was asked before us
            wanted, after = "torch", False
        else:
            return None
        try:
            spec = self._ask_the_others(name, path, target)
            if spec is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader, wanted, after)  # type: ignore[assignment, arg-type]
        except Exception:
            return None  # importlib asks the others now: if it was not us, they will raise it again
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
    """The real loader, with our hook before or after the module's own code."""

    __slots__ = ("_after", "_real", "_wanted")  # no __dict__: the real one's is found

    def __init__(self, real: "Loader", wanted: str, after: bool) -> None:
        self._real = real
        self._wanted = wanted
        self._after = after

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    # ddtrace puts a `get_code` of its own on the loader that it finds.
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

    # Whoever asked for the module and does not import it may copy, pickle and compare what he got: the real one.
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
        """Step aside, then run the module and the hook."""
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        if not self._after:
            _serve(self._wanted, module)
        self._real.exec_module(module)
        if self._after:
            _serve(self._wanted, module)
