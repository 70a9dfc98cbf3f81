"""What is to be called in a stop: given by `autoteardown.on_teardown` or by name, by `AUTOTEARDOWN_ON_TEARDOWN`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import reduce
from typing import Any, Callable, Optional

registered: list[Callable[[], object]] = []
"""What `autoteardown.on_teardown` was given."""


def prepare(names: Iterable[tuple[str, str]], say: Callable[[str], object]) -> None:
    """Import what the names need, long before the stop: nothing is imported for the first time in one.

    Args:
        names: module and function each.
        say: called with a line for each that is not there.
    """
    for module, function in names:
        try:
            if module != "__main__":  # whose functions come into being while it runs
                importlib.import_module(module)
                _find(module, function)
        except (Exception, SystemExit) as error:  # a script that ends with sys.exit(main())
            say(f"AUTOTEARDOWN_ON_TEARDOWN: {module}:{function} is not to be had: {error!r}")


def run(names: Iterable[tuple[str, str]], say: Callable[[str], object]) -> Optional[str]:
    """Call them all, last in, first out, each on its own.

    Returns:
        The first thing that went wrong, or None.
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
