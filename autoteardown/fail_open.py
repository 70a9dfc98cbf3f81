"""Keeps the agent's exceptions out of the host program: reports each once on stderr, and returns instead of raising.

Only `Exception`s are caught: a parked thread exits through these functions with SystemExit.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

from autoteardown.switch import say

F = TypeVar("F", bound=Callable[..., Any])

_reported: set[str] = set()


def report_failure(what: str, error: BaseException) -> None:
    """Write one line to stderr, once for each error: a failing step hook would otherwise report at every step.

    Args:
        what: the agent's action that failed.
        error: the exception.
    """
    problem = repr(error)
    if problem not in _reported:
        _reported.add(problem)
        say(f"{what} failed, this process may not be guarded: {problem}")


def fail_open(function: F) -> F:
    """Decorator: the function returns None instead of raising, and its error is reported."""

    @functools.wraps(function)
    def safe(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            report_failure(function.__name__.strip("_"), error)
            return None

    return safe  # type: ignore[return-value]
