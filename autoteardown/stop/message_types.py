"""Validates the messages that a rank receives from the hub. Pure.

Another version of this package, or anyone with the group's token, could send anything. A message of an unknown kind,
or not in the shape of its kind, is ignored; so no peer can fake an event of this rank's own ("drained").
"""

from __future__ import annotations

from typing import Any, Callable, Optional

MOST = 1000
"""Longest text, in characters."""


def understood(kind: str, value: Any) -> bool:
    """Whether a message has a known kind and the shape of that kind."""
    shape = _SHAPES.get(kind)
    return shape is not None and shape(value)


def _nothing(value: Any) -> bool:
    return value is None


def _flag(value: Any) -> bool:
    return type(value) is bool


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _moment(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**53


def _words(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST


def _why(value: Any) -> bool:
    return value is None or _words(value)


def _notice(value: Any) -> bool:
    return isinstance(value, dict)  # the fields are validated where they are read


def _plan(value: Any) -> bool:
    return (
        _has(value, "stop", "owned", "why")
        and (value["stop"] is None or _number(value["stop"]))
        and _flag(value["owned"])
        and _words(value["why"])
    )


def _callback_failed(value: Any) -> bool:
    return _has(value, "rank", "why") and _number(value["rank"]) and _words(value["why"])


def _more(value: Any) -> bool:
    until: Optional[Any] = value["until"] if _has(value, "round", "until") else None
    return isinstance(until, dict) and _number(value["round"]) and all(map(_number, until.values()))


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "notice": _notice,
    "plan": _plan,
    "advance": _more,
    "aligned": _nothing,
    "halt": _words,
    "busy": _flag,
    "owners_done": _nothing,
    "abort": _moment,
    "callback_failed": _callback_failed,
    "quiet": _flag,
    "departed": _number,
    "lost": _number,
    "all_left": _nothing,
    # about the connection to the hub
    "back": _number,
    "up": _nothing,
    "down": _why,
    "note": _words,
}
