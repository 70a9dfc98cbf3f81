"""Writes log lines, the JSON report and the termination log, whatever state the process is in.

The main thread may be frozen between any two bytecodes, and the disk or the terminal may be dead. So there is no
`logging`, no `print`, no lock, and nothing raises. A line that stderr cannot take at once is dropped: a full pipe
that is never read would block the writer for ever.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any, Optional

from autoteardown import stderr
from autoteardown.node import safe_folder
from autoteardown.node.entry import printable

TERMINATION_LOG_BYTES = 4096  # bytes that Kubernetes keeps
_MOST_OF_A_NAME = 20


class Log:
    """Lines on fd 2: `autoteardown rank=3/16 pid=4711 host=node-a +0.412s drain ok (0.02s)`, or JSON objects.

    Args:
        level: `quiet`, `info` or `debug`.
        host: the node's name.
        job: the job's name, if it has one.
        form: `text` or `json`.
    """

    def __init__(self, level: str, host: str, job: Optional[str] = None, form: str = "text") -> None:
        self.level = level
        self.host = printable(host).replace(" ", "?")  # one field of the line
        self.job = job
        self.form = form
        self.rank: Optional[int] = None
        self.world_size: Optional[int] = None
        self._pid = os.getpid()
        self._stderr = stderr.identity(2)

    def first(self, text: str, seconds: float = 0.0) -> None:
        """Write the first line of a stop: in text form with wall clock and job, so that it can be found from other
        logs.
        """
        if self.form == "text":
            text += f" ({_wall_clock()}{f', job {self.job}' if self.job else ''})"
        self.line(text, seconds, event="signal")

    def line(
        self,
        text: str,
        seconds: float = 0.0,
        level: str = "info",
        event: str = "message",
        outcome: Optional[str] = None,
    ) -> None:
        """Write one line.

        Args:
            text: the message.
            seconds: since the signal.
            level: written from this log level on.
            event: for those who filter JSON lines: a phase's name, `signal`, `done`, or `message`.
            outcome: of the phase, or, with `done`, of the stop.
        """
        if self.level == "quiet" or (level == "debug" and self.level != "debug"):
            return
        if self.form == "json":
            stderr.say(self._as_json(text, seconds, level, event, outcome), self._stderr)
            return
        rank = "?" if self.rank is None else self.rank
        size = "?" if self.world_size is None else self.world_size
        prefix = f"autoteardown rank={rank}/{size} pid={self._pid} host={self.host} +{seconds:.3f}s"
        stderr.say(f"{prefix} {printable(text)}", self._stderr)

    def _as_json(self, text: str, seconds: float, level: str, event: str, outcome: Optional[str]) -> str:
        fields: dict[str, Any] = {
            "time": _wall_clock(),
            "logger": "autoteardown",
            "level": level,
            "job": self.job,
            "host": self.host,
            "pid": self._pid,
            "rank": self.rank,
            "world_size": self.world_size,
            "seconds": round(seconds, 3),
            "event": event,
            "outcome": outcome,
            "message": text,
        }
        line = json.dumps(fields)
        # No longer than a pipe takes in one piece, and still JSON: the message is cut. A letter takes up to 12 bytes (a
        # surrogate pair).
        while len(line) >= select.PIPE_BUF and fields["message"]:
            fields["message"] = fields["message"][: -(len(line) - select.PIPE_BUF) // 12 - 1]
            line = json.dumps(fields)
        return line


def _wall_clock() -> str:
    """UTC in ISO 8601, to the millisecond."""
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"


def stacks() -> list[dict[str, Any]]:
    """The stack of every thread. No `traceback`, which reads source files from a disk that may hang."""
    found = []
    for ident, frame in sys._current_frames().items():
        lines: list[str] = []
        walker: Any = frame
        while walker is not None and len(lines) < 60:
            code = walker.f_code
            lines.append(f"{code.co_filename}:{walker.f_lineno} in {code.co_name}")
            walker = walker.f_back
        found.append({"thread": ident, "frames": lines})
    return found


def write_report(directory: str, name: str, report: dict[str, Any]) -> Optional[str]:
    """Write the JSON report, whole or not at all, and never over another process's.

    Args:
        directory: created if it is missing.
        name: `<host>-<pid>.json`. The time of the signal is added to it, since a restarted pod often has the host
            name and process ids of the one before; and a number, if there is a file of that name all the same.
        report: what is known so far. A later call replaces it.

    Returns:
        What went wrong, or None.
    """
    name = _wanted(name, report)
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        descriptor = safe_folder.open_any(directory)
        try:
            data = json.dumps(report, indent=1, default=str).encode("ascii")
            _write_own(descriptor, (directory, name), data)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return f"report {os.path.join(directory, name)!r} not written: {error}"
    return None


def taken(directory: str, name: str, report: dict[str, Any]) -> str:
    """The file name that this process's report has, or would have."""
    wanted = _wanted(name, report)
    return _own.get((directory, wanted), wanted)


def _wanted(name: str, report: dict[str, Any]) -> str:
    return printable(stamped(name, report))


def stamped(name: str, report: dict[str, Any]) -> str:
    """The file name with the time of the signal in it: `node-a-4711-20261124T065900Z.json`."""
    stem, dot, suffix = name.rpartition(".json")
    moment = str(report.get("received_at") or "").partition("+")[0].partition(".")[0].rstrip("Z")
    compact = moment.replace("-", "").replace(":", "")
    return f"{stem}-{compact}Z{dot}{suffix}" if compact else name


_own: dict[
    tuple[str, str], str
] = {}  # reports that this process has written: folder and name wanted, name taken


def _write_own(descriptor: int, wanted: tuple[str, str], data: bytes) -> None:
    if wanted in _own:
        safe_folder.replace(descriptor, _own[wanted], data, 0o644)
        return
    stem, dot, suffix = wanted[1].rpartition(".json")
    for number in range(1, _MOST_OF_A_NAME + 1):
        name = wanted[1] if number == 1 else f"{stem}-{number}{dot}{suffix}"
        try:
            safe_folder.create(descriptor, name, data, 0o644)
        except FileExistsError:
            continue
        _own[wanted] = name
        return
    raise FileExistsError(f"and {_MOST_OF_A_NAME - 1} more of that name are there already")


def write_termination_log(path: str, text: str) -> None:
    """Write the termination log, if the file exists: Kubernetes mounts it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, 0)  # fails if it is not a plain file
            # Not cut inside a letter: the kubelet takes UTF-8 only.
            data = text.encode("utf-8", "backslashreplace")[:TERMINATION_LOG_BYTES]
            os.write(descriptor, data.decode("utf-8", "ignore").encode())
        finally:
            os.close(descriptor)
    except OSError:
        pass
