"""Callbacks that run during a stop, registered with `on_teardown()` or named in `AUTOTEARDOWN_ON_TEARDOWN`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import reduce
from typing import Any, Callable, Optional

registered: list[Callable[[], object]] = []
"""The callbacks of `autoteardown.on_teardown`."""


def prepare(names: Iterable[tuple[str, str]], say: Callable[[str], object]) -> None:
    """Import the modules of the named callbacks, long before a stop: nothing is imported for the first time in one.

    Args:
        names: module and function of each callback.
        say: called with one line for each that cannot be found.
    """
    for module, function in names:
        try:
            if module != "__main__":  # its functions are defined while it runs
                importlib.import_module(module)
                _find(module, function)
        except (Exception, SystemExit) as error:  # a script that ends with sys.exit(main())
            say(f"AUTOTEARDOWN_ON_TEARDOWN: {module}:{function} cannot be found: {error!r}")


def run(names: Iterable[tuple[str, str]], say: Callable[[str], object]) -> Optional[str]:
    """Call all callbacks, last registered first, each even if another has failed.

    Returns:
        The first error, in one line, or None.
    """
    problems = []
    calls: list[Callable[[], object]] = [_named(*name) for name in names]
    for callback in reversed(calls + registered):
        try:
            callback()
        except BaseException as error:
            problems.append(f"on_teardown callback failed: {type(error).__name__}: {error}")
            say(problems[-1])
    return problems[0] if problems else None


def _named(module: str, function: str) -> Callable[[], object]:
    return lambda: _find(module, function)()


def _find(module: str, function: str) -> Any:
    found: Any = sys.modules.get(module)
    if found is None:
        raise ModuleNotFoundError(f"{module} is not imported")
    found = reduce(getattr, function.split("."), found)
    if not callable(found):
        raise TypeError(f"{module}:{function} is not callable")
    return found
