"""Reads the on/off switch `AUTOTEARDOWN`, and writes lines to stderr.

This is all that a process needs that is switched off, so this module imports no other module of the package.
"""

import os

# No imports for types, not even of __future__: each is another file to read.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCH = "AUTOTEARDOWN"
_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def switch(environ: "Mapping[str, str]") -> "tuple[bool, str | None]":
    """Whether the agent is switched on, and one line for a log if the value means neither on nor off."""
    value = environ.get(SWITCH, "")
    word = value.strip().lower()
    if word in _ON:
        return True, None
    if word in _OFF:
        return False, None
    return False, f"{SWITCH}={value!r} is neither on ({', '.join(_ON)}) nor off ({', '.join(_OFF[1:])}): off"


def say(text: str) -> None:
    """Write one line to stderr. Not with print or logging: neither may work at the time of the call."""
    try:
        os.write(2, f"autoteardown: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass
