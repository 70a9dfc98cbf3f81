"""The switch, and one line on stderr: all that a process needs which is switched off. Imports nothing of ours."""

import os

# No imports for the sake of types, not even of __future__: each is another file to read.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCH = "AUTOTEARDOWN"
_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def switch(environ: "Mapping[str, str]") -> "tuple[bool, str | None]":
    """Whether the agent is switched on, and a line about a value that says neither on nor off."""
    value = environ.get(SWITCH, "")
    word = value.strip().lower()
    if word in _ON:
        return True, None
    if word in _OFF:
        return False, None
    return False, f"{SWITCH}={value!r} is neither on ({', '.join(_ON)}) nor off ({', '.join(_OFF[1:])}): off"


def say(text: str) -> None:
    """One line on stderr. Not print, not logging: neither may be in working order where this is called from."""
    try:
        os.write(2, f"autoteardown: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass
