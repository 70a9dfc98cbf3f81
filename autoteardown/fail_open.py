"""Where the host's code calls ours: what ours raises there is said once on stderr, and goes no further.

Only `Exception`s: a parked thread leaves through these functions with SystemExit.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

from autoteardown.switch import say

F = TypeVar("F", bound=Callable[..., Any])

_said: set[str] = set()


def report_failure(what: str, error: BaseException) -> None:
    """Say it, once for each error: what fails in a step hook fails at each step, and in whoever needs its result."""
    problem = repr(error)
    if problem not in _said:
        _said.add(problem)
        say(f"{what} failed, this process may not be guarded: {problem}")


def fail_open(function: F) -> F:
    """The function, which returns None instead of raising."""

    @functools.wraps(function)
    def safe(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            report_failure(function.__name__.strip("_"), error)
            return None

    return safe  # type: ignore[return-value]
