"""The environment as `Settings`, and one line about everything in it that is wrong.

Read in any process that imports `signal`, so it imports next to nothing itself (no dataclasses, enum, re, typing).
"""

from __future__ import annotations

import _signal
import os

from autoteardown.switch import SWITCH, switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["SWITCH", "VARIABLES", "Settings", "known", "load", "signal_name", "switch"]

_PREFIX = "AUTOTEARDOWN_"
_SAVING = 6.0  # seconds that `AUTOTEARDOWN_YIELD=auto` keeps back for our own work
_DAY = 86400.0
_TIMEOUTS = ("STEP", "DRAIN", "DESTROY", "ABORT", "EXIT")
# The first two cannot be handled; after the others the faulting instruction is repeated for ever.
_UNUSABLE = ("SIGKILL", "SIGSTOP", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")


class Settings:
    """What the environment asks for, checked, and with the time-outs made to fit the grace period."""

    __slots__ = (
        "abort_timeout",
        "destroy_timeout",
        "drain_timeout",
        "exit_code",
        "exit_timeout",
        "grace",
        "hard",
        "log",
        "peer_exit_code",
        "peers",
        "report_dir",
        "runtime_dir",
        "scaled",
        "signals",
        "sources",
        "step_timeout",
        "stop_at",
        "termination_log",
        "yield_seconds",
    )

    signals: tuple[int, ...]
    grace: float
    hard: float  # seconds after the signal when the process is gone
    exit_code: int | None  # None: 128 + signal number
    peer_exit_code: int
    peers: bool
    stop_at: str  # "step" or "now"
    step_timeout: float
    drain_timeout: float
    destroy_timeout: float
    abort_timeout: float
    exit_timeout: float
    yield_seconds: float
    log: str  # "quiet", "info" or "debug"
    report_dir: str | None
    termination_log: str | None
    runtime_dir: str
    scaled: float  # what the time-outs were multiplied by to fit; 1.0: nothing
    sources: dict[str, tuple[str | None, object]]  # variable: what the environment says, what is in force

    def exit_code_for(self, signum: int | None) -> int:
        """The exit code of a rank that got this signal; None: a peer got it."""
        if signum is None:
            return self.peer_exit_code
        return 128 + signum if self.exit_code is None else self.exit_code


def load(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings in force, and a line for each value that was refused and replaced by its default."""
    found = Settings()
    found.sources = {}
    problems: list[str] = []
    for name, (default, read, allowed, _) in _TABLE.items():
        variable = _PREFIX + name
        raw = environ.get(variable)
        # Templates leave empty values behind: they count as unset, but for the one to which `empty` means off.
        given = raw is not None and (raw.strip() or name == "TERMINATION_LOG")
        try:
            value = read(raw.strip() if given and raw is not None else default)
        except ValueError:
            problems.append(f"{variable}={raw!r} is not {allowed}: using the default, {default}")
            value = read(default)
        setattr(found, _ATTRIBUTES.get(name, name.lower()), value)
        found.sources[variable] = (raw, value)
    found.hard = found.grace - 1.0
    found.yield_seconds = (
        max(0.0, found.hard - _SAVING) if found.yield_seconds < 0 else min(found.yield_seconds, found.hard)
    )
    _record(found, "YIELD", found.yield_seconds)
    _scale(found)
    return found, problems


def known(variable: str) -> bool:
    """Whether an environment variable is one of ours, settings and switches alike."""
    return variable in (SWITCH, "AUTOTEARDOWN_SKIP") or variable[len(_PREFIX) :] in _TABLE


def signal_name(number: int) -> str:
    """SIGTERM for 15; the number as text where it has no name."""
    return next((name for name, value in _signals().items() if value == number), str(number))


def _scale(found: Settings) -> None:
    """Shrink the time-outs together until they fit; a single one counts for no more than all the time there is."""
    wanted = {name: min(getattr(found, f"{name.lower()}_timeout"), found.hard) for name in _TIMEOUTS}
    total = sum(wanted.values())
    found.scaled = min(1.0, found.hard / total) if total else 1.0
    for name, seconds in wanted.items():
        setattr(found, f"{name.lower()}_timeout", seconds * found.scaled)
        _record(found, f"{name}_TIMEOUT", seconds * found.scaled)


def _record(found: Settings, name: str, effective: object) -> None:
    found.sources[_PREFIX + name] = (found.sources[_PREFIX + name][0], effective)


def _signals() -> dict[str, int]:
    names = vars(_signal).items()
    return {
        name: number for name, number in names if name[:3] == "SIG" and name[3] != "_" and type(number) is int
    }


def _read_signals(text: str) -> tuple[int, ...]:
    by_name = _signals()
    allowed = set(_signal.valid_signals()) - {by_name[name] for name in _UNUSABLE}
    chosen: dict[int, None] = {}
    for word in text.upper().split(","):
        word = word.strip()
        number = int(word) if word.isdecimal() else by_name.get(word, by_name.get(f"SIG{word}", 0))
        if number not in allowed:
            raise ValueError(word)
        chosen[number] = None
    return tuple(chosen)


def _read_seconds(text: str, least: float = 0.0) -> float:
    seconds = float(text)
    if not least <= seconds <= _DAY:  # nan is not either
        raise ValueError(text)
    return seconds


def _read_grace(text: str) -> float:
    return _read_seconds(text, 2.0)


def _read_yield(text: str) -> float:
    word = text.lower()
    return {"auto": -1.0, "off": 0.0}[word] if word in ("auto", "off") else _read_seconds(text)


def _read_code(text: str) -> int:
    code = int(text)
    if not 0 <= code <= 255:
        raise ValueError(text)
    return code


def _read_exit_code(text: str) -> int | None:
    return None if text.lower() == "signal" else _read_code(text)


def _read_flag(text: str) -> bool:
    on, problem = switch({SWITCH: text})
    if problem is not None:
        raise ValueError(text)
    return on


def _word_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(text)
        return text.lower()

    return read


def _read_path(text: str) -> str | None:
    """Absolute, so that a program that changes its directory later does not move it."""
    if text in ("", "unset"):
        return None
    try:
        return os.path.abspath(os.path.expanduser(text))
    except OSError:  # the current directory is gone
        return text


def _read_runtime_dir(text: str) -> str | None:
    # What tempfile.gettempdir() says in all but odd cases, without importing it.
    tmp = os.environ.get("TMPDIR", "")
    tmp = tmp if os.path.isdir(tmp) else "/tmp"
    return _read_path(text.replace("<tmp>", tmp).replace("<uid>", str(os.geteuid())))


_SECONDS = "a number of seconds from 0 to 86400"
_CODE = "a number from 0 to 255"
_ATTRIBUTES = {"YIELD": "yield_seconds"}  # where it is not the variable in lower case
_TABLE: dict[str, tuple[str, Callable[[str], object], str, str]] = {
    "SIGNALS": (
        "SIGTERM",
        _read_signals,
        f"a comma list of signal names or numbers, none of {' '.join(_UNUSABLE)}",
        "comma list of signals that mean eviction (`SIGUSR1` for SLURM's early notice)",
    ),
    "GRACE": (
        "25",
        _read_grace,
        "a number of seconds from 2 to 86400",
        "seconds the platform gives between the signal and SIGKILL; the process is gone one second earlier, whatever "
        "is stuck",
    ),
    "EXIT_CODE": (
        "0",
        _read_exit_code,
        f"{_CODE}, or signal",
        "exit code of a rank that got the signal; `signal` means 128 + signal number",
    ),
    "PEER_EXIT_CODE": (
        "143",
        _read_code,
        _CODE,
        "exit code of a rank that was stopped because a peer got the signal",
    ),
    "PEERS": ("on", _read_flag, "on or off", "`off`: this rank neither tells its peers nor follows them"),
    "STOP_AT": (
        "step",
        _word_of("step", "now"),
        "step or now",
        "`step`: every rank stops after the same optimizer step; `now`: at the next bytecode",
    ),
    "STEP_TIMEOUT": ("8", _read_seconds, _SECONDS, "longest wait for that step"),
    "DRAIN_TIMEOUT": (
        "5",
        _read_seconds,
        _SECONDS,
        "longest wait for the training thread to park and the device to drain, together",
    ),
    "DESTROY_TIMEOUT": ("5", _read_seconds, _SECONDS, "longest wait for `destroy_process_group`"),
    "ABORT_TIMEOUT": ("3", _read_seconds, _SECONDS, "longest wait for an abort"),
    "EXIT_TIMEOUT": (
        "3",
        _read_seconds,
        _SECONDS,
        "longest wait for the program's own `finally` and `atexit` code before `os._exit`",
    ),
    "YIELD": (
        "auto",
        _read_yield,
        f"{_SECONDS}, auto or off",
        "when the application has its own handler: `auto` lets it finish until 6 s before the hard deadline, a number "
        "is that many seconds, `off` takes over at once",
    ),
    "LOG": (
        "info",
        _word_of("quiet", "info", "debug"),
        "quiet, info or debug",
        "`quiet`, `info` or `debug`; always stderr, one line an event",
    ),
    "REPORT_DIR": ("unset", _read_path, "a path", "folder for one JSON report per torn-down process"),
    "TERMINATION_LOG": (
        "/dev/termination-log",
        _read_path,
        "a path",
        "written if the file exists (Kubernetes mounts it); empty turns it off",
    ),
    "RUNTIME_DIR": (
        "<tmp>/autoteardown-<uid>",
        _read_runtime_dir,
        "a path",
        "node-local registry of armed processes, mode 0700, owner checked",
    ),
}

VARIABLES = tuple((_PREFIX + name, row[0], row[3]) for name, row in _TABLE.items())
"""Name, default and meaning of every setting, for the docs and for doctor."""
