"""Tells what PID 1 of a container does with an eviction signal, by its name: init systems, supervisors, launchers.

1. The signal masks in /proc are not enough. tini waits in `sigtimedwait`, which shows in no mask. runsvdir has a
   handler for SIGTERM, and it ends at once. supervisord and s6 pass the signal on, and kill after some seconds.
2. An init that passes the signal to a shell is no better than the shell: it ends at the signal, the init ends with it,
   and the kernel kills every other process of the container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from autoteardown.cli.doctor.finding import NOTE, OK, WARNING, Finding
from autoteardown.switch import switch

AREA = "PID 1"
SHELLS = {"sh", "bash", "dash", "ash", "busybox", "zsh", "ksh"}
_EXEC = 'exec-form ENTRYPOINT ["torchrun", …], or `exec` before the last command of the script'


class _Init(NamedTuple):
    """One kind of PID 1. In the advice, `{grace}` becomes a time that is enough, and `{millis}` the same in ms."""

    level: str
    text: str
    advice: str | None = None
    starts_one: bool = False
    """It starts one program, and passes signals on to that."""


_TINI = _Init(OK, "passes signals on to the program that it starts, and returns its code", None, True)
_RUNIT = _Init(
    WARNING,
    "ends at once at SIGTERM, and the kernel kills every other process",
    "start the container with tini or dumb-init instead; a pod may drain its ranks in a preStop hook",
)
_INITS = {
    "tini": _TINI,
    "tini-static": _TINI,
    "docker-init": _TINI,
    "catatonit": _TINI,
    "dumb-init": _Init(
        OK,
        "passes signals on to every process of the session that it starts, and returns its code",
        None,
        True,
    ),
    "runsvdir": _RUNIT,
    "runit": _RUNIT,
    "runit-init": _RUNIT,
    "s6-svscan": _Init(
        WARNING,
        "stops its services and kills after 3 s what is left; the command of the container gets no signal; returns 0",
        "export S6_CMD_RECEIVE_SIGNALS=1 S6_KILL_GRACETIME={millis}; a service needs timeout-kill {millis}",
    ),
    "supervisord": _Init(
        WARNING,
        "passes SIGTERM on to its programs, kills them after stopwaitsecs (10 s unless it is set), and returns 0",
        "stopwaitsecs={grace} in the program's section, and a Job that does not take 0 for success",
    ),
    "systemd": _Init(
        WARNING,
        "executes itself again at SIGTERM and stops nothing; at SIGRTMIN+3 it signals every process of each unit",
        "STOPSIGNAL SIGRTMIN+3 in the Dockerfile, and TimeoutStopSec={grace} in the unit",
    ),
    "pause": _Init(
        NOTE,
        "of a pod with shareProcessNamespace: the kubelet signals the first process of each container instead",
        "the command of the container must be no shell: as another PID than 1, a shell dies of the signal",
    ),
}


def find(
    words: Sequence[str], command: str, children: Sequence[Sequence[str]], grace: float
) -> Finding | None:
    """The finding on a PID 1 with this command line; None if its name is unknown.

    Args:
        words: its command line.
        command: its name in /proc/1/comm, which tells systemd behind `/sbin/init`.
        children: the command lines of the processes that it has started.
        grace: `AUTOTEARDOWN_GRACE`.
    """
    name = _name(words, command)
    init = _INITS.get(name)
    if init is None:
        return None
    shown = " ".join(words)[:80]
    shell = next((child for child in children if child and _base(child[0]) in SHELLS), None)
    if init.starts_one and shell is not None:
        text = f"{shown}: {name} passes signals on to a shell ({' '.join(shell)[:40]}), which ends and passes none on"
        return Finding(AREA, WARNING, text, _EXEC)
    seconds = round(grace + 5)
    advice = init.advice and init.advice.format(grace=seconds, millis=seconds * 1000)
    return Finding(AREA, init.level, f"{shown}: {init.text}", advice)


def launcher(words: Sequence[str], environ: Mapping[str, str]) -> Finding | None:
    """Whether PID 1 is a launcher that passes no signal on by itself.

    Args:
        words: its command line.
        environ: its environment.
    """
    names = [_base(word) for word in words[:3]]
    if "accelerate" in names or "accelerate.commands.launch" in words[:3]:
        name = "accelerate launch with one process"
    elif "deepspeed" in names or "deepspeed.launcher.runner" in words[:3]:
        name = "deepspeed"
    else:
        return None
    shown = " ".join(words)[:80]
    if switch(environ)[0]:
        return Finding(AREA, OK, f"{shown}: {name} passes signals on, as the agent is on in it")
    text = f"{shown}: {name} passes no signal on by itself, and the agent is off in it"
    return Finding(AREA, WARNING, text, "AUTOTEARDOWN=1 in the environment of the container")


def shell(words: Sequence[str]) -> Finding | None:
    """Whether PID 1 is a shell."""
    if _base(words[0]) not in SHELLS:
        return None
    text = f"a shell ({' '.join(words)[:80]}): it passes no signal on, so the ranks get no eviction signal"
    return Finding(AREA, WARNING, text, _EXEC)


def _name(words: Sequence[str], command: str) -> str:
    names = [_base(word) for word in words[:3]]
    found = next((name for name in names[:1] if name in _INITS), None)
    if found is None and names and names[0].startswith("python"):  # supervisord
        found = next((name for name in names[1:] if name in _INITS), None)
    return found or (command if command in ("systemd", "supervisord") else "")


def _base(word: str) -> str:
    return Path(word).name.lstrip("-")
