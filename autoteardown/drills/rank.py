"""Tracks one rank of the drill's own job, from the lines that it writes and from its process."""

from __future__ import annotations

import time
from pathlib import Path

from autoteardown.drills import processes

STILL = 0.5  # seconds without processor time after which the main thread counts as waiting in C


class Rank:
    """The state of one rank; `read` updates it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.process: processes.Process | None = None
        self.stage = ""
        self.backend: str | None = None
        self.steps = 0
        self.saving = False
        self.saved = False
        self.saved_step = 0  # of its last checkpoint
        self.signalled = self.lost = self.sigkilled = self.hanging = False
        self.code: int | None = None
        self.exited_at: float | None = None  # monotonic time at which its exit was noticed
        self._notes = Lines(folder / f"rank-{number}")
        self._idle: tuple[str, int] | None = None
        self._idle_since = 0.0

    def read(self) -> None:
        """Read the lines that it has written since the last call."""
        for line in self._notes.new():
            what, _, value = line.partition(" ")
            if what == "started":
                self.process = processes.Process(int(value))
            elif what == "step":
                self.steps = int(value)
            elif what == "joining":
                self.backend = value
            self.saving = what == "saving"
            if what == "saved":
                self.saved, self.saved_step = True, int(value)
            if what not in ("saving", "saved"):
                self.stage = what

    @property
    def alive(self) -> bool:
        """Whether its process is running."""
        return self.process is not None and self.process.alive

    def still(self) -> bool:
        """Whether its main thread has been sleeping for `STILL` seconds."""
        now = self.process.main_thread() if self.process is not None else ("X", 0)
        if now != self._idle or now[0] != "S":
            self._idle, self._idle_since = now, time.monotonic()
        return time.monotonic() - self._idle_since > STILL


class Lines:
    """Reads new lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[str]:
        """The complete lines since the last call; none if there is no file yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]
