"""The table of the agent's environment variables: default, parser, allowed values, and meaning of each.

1. A new setting needs one row here, and its attribute in `settings.Settings`.
2. Every process that imports `signal` imports this, so it imports almost nothing itself (no dataclasses, enum, re,
   typing).
"""

from __future__ import annotations

import _signal
import os

from autoteardown.switch import SWITCH, switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_DAY = 86400.0
# The first two cannot be handled; after a handler for one of the others, the faulting instruction repeats for ever.
_UNUSABLE = ("SIGKILL", "SIGSTOP", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")
_LAUNCHERS = "from the launcher"
JOB_LENGTH = 200
"""Longest job name, in characters; a longer one is cut."""


def signals() -> dict[str, int]:
    """The numbers of all signals that have a name on this system, by name."""
    names = vars(_signal).items()
    return {
        name: number for name, number in names if name[:3] == "SIG" and name[3] != "_" and type(number) is int
    }


def _read_signals(text: str) -> tuple[int, ...]:
    by_name = signals()
    allowed = set(_signal.valid_signals()) - {by_name[name] for name in _UNUSABLE}
    chosen: dict[int, None] = {}
    for word in text.upper().split(","):
        word = word.strip()
        number = int(word) if word.isdecimal() else by_name.get(word, by_name.get(f"SIG{word}", 0))
        for first, sign in (("RTMIN", 1), ("RTMAX", -1)):  # SIGRTMIN+3, SIGRTMAX-2
            base, _, distance = word.replace("SIG", "").partition("+" if sign > 0 else "-")
            if base == first and distance.isdecimal():
                number = by_name.get(f"SIG{first}", 0) + sign * int(distance)
        if number not in allowed:
            raise ValueError(word)
        chosen[number] = None
    return tuple(chosen)


def _read_seconds(text: str, least: float = 0.0) -> float:
    seconds = float(text)
    if not least <= seconds <= _DAY:  # also refuses nan
        raise ValueError(text)
    return seconds


def _read_grace(text: str) -> float:
    return _read_seconds(text, 2.0)


def _read_yield(text: str) -> float:
    word = text.lower()
    return {"auto": -1.0, "off": 0.0}[word] if word in ("auto", "off") else _read_seconds(text)


def _read_step(text: str) -> float:
    return -1.0 if text.lower() == "auto" else _read_seconds(text)


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
    """The absolute path, so that it stays the same when the program changes its directory."""
    if text in ("", "unset"):
        return None
    try:
        return os.path.abspath(os.path.expanduser(text))
    except OSError:  # the current directory has been removed
        return text


def _read_job(text: str) -> str | None:
    return None if text in ("", _LAUNCHERS) else text[:JOB_LENGTH]


def _read_lost(text: str) -> float | None:
    return None if text.lower() == "off" else _read_seconds(text)


def _read_callbacks(text: str) -> tuple[tuple[str, str], ...]:
    if text == "unset":
        return ()
    found = []
    for word in text.split(","):
        module, colon, name = word.strip().partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ValueError(word)
        found.append((module, name))
    return tuple(found)


def _read_runtime_dir(text: str) -> str | None:
    # The same as tempfile.gettempdir() in all usual cases, without importing tempfile.
    tmp = os.environ.get("TMPDIR", "")
    tmp = tmp if os.path.isdir(tmp) else "/tmp"
    return _read_path(text.replace("<tmp>", tmp).replace("<uid>", str(os.geteuid())))


_SECONDS = "a number of seconds from 0 to 86400"
_CODE = "a number from 0 to 255"
TABLE: dict[str, tuple[str, Callable[[str], object], str, str]] = {
    "SIGNALS": (
        "SIGTERM",
        _read_signals,
        f"a comma list of signal names or numbers, none of {' '.join(_UNUSABLE)}",
        "comma list of signals that mean eviction. torchrun passes them on to its workers if the agent is on in it; "
        "other launchers may die of a `SIGUSR1`",
    ),
    "GRACE": (
        "25",
        _read_grace,
        "a number of seconds from 2 to 86400",
        "seconds between the signal and SIGKILL that the platform gives, less 5; the process exits one second before "
        "they have passed",
    ),
    "EXIT_CODE": (
        "0",
        _read_exit_code,
        f"{_CODE}, or signal",
        "exit code of a rank that got the signal; `signal` means 128 + signal number. If it is set, torchrun returns "
        "it, too",
    ),
    "PEER_EXIT_CODE": (
        "143",
        _read_code,
        _CODE,
        "exit code of a rank that was stopped because a peer got the signal. If it is set, a torchrun whose workers "
        "were stopped so returns it, too",
    ),
    "PEERS": (
        "on",
        _read_flag,
        "on or off",
        "`off`: this rank neither notifies its peers nor stops with them",
    ),
    "STOP_AT": (
        "step",
        _word_of("step", "now"),
        "step or now",
        "`step`: every rank stops after the same iteration; `now`: at the next bytecode",
    ),
    "HANDLERS": (
        "together",
        _word_of("together", "alone"),
        "together or alone",
        "the application's own handlers run on every rank of the group after the same iteration; `alone`: at once, on "
        "the signalled rank only, and its peers are not notified until its time is over",
    ),
    "LOST": (
        "30",
        _read_lost,
        f"{_SECONDS}, or off",
        "seconds that a rank waits, blocked and without progress, for a peer that vanished, before it is torn down as "
        "a peer; `off`: never",
    ),
    "ON_TEARDOWN": (
        "unset",
        _read_callbacks,
        "a comma list of module:function",
        "comma list of `module:function`, called like `on_teardown` callbacks: for programs that must not be changed",
    ),
    "CHECKPOINT": (
        "off",
        _read_flag,
        "on or off",
        "`on`: the framework's own checkpoint is written at the agreed iteration (HF Trainer, Lightning, Accelerate)",
    ),
    "STEP_TIMEOUT": (
        "auto",
        _read_step,
        f"{_SECONDS}, or auto",
        "longest wait for the agreed iteration; `auto`: what drain, abort and exit leave of the grace period (13 s of "
        "25, 98 of 110); if a callback is registered or the application has its own handler, a third of that, at most "
        "30 s, is kept for it",
    ),
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
    "LOG_FORMAT": (
        "text",
        _word_of("text", "json"),
        "text or json",
        "`json`: one JSON object a line, with wall clock, job, rank, event and outcome, for a log pipeline",
    ),
    "JOB": (
        _LAUNCHERS,
        _read_job,
        "text",
        "names the job in log lines, reports, `ps` and `drain --job`; default: torchrun's `--rdzv-id`, "
        "`SLURM_JOB_ID` or Ray's job id, whichever is there first",
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
"""By the variable's name without the prefix: the default as it would be written, the parser (ValueError: not allowed),
the allowed values in words, and the meaning."""
