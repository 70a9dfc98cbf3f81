"""One rank of the drill's own job, as its notes and its process show it."""

from __future__ import annotations

import time
from pathlib import Path

from autoteardown.drills import processes

STILL = 0.5  # seconds without a tick of processor time: the main thread waits in C


class Rank:
    """What is known of it; `read` brings it up to date."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.process: processes.Process | None = None
        self.stage = ""
        self.backend: str | None = None
        self.steps = 0
        self.saving = False
        self.saved = False
        self.kept = 0  # the step of its last checkpoint
        self.signalled = self.lost = self.sigkilled = self.hanging = False
        self.code: int | None = None
        self.out: float | None = None  # when it was seen to be gone
        self._notes = Lines(folder / f"rank-{number}")
        self._idle: tuple[str, int] | None = None
        self._idle_since = 0.0

    def read(self) -> None:
        """Take in what it has noted since."""
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
                self.saved, self.kept = True, int(value)
            if what not in ("saving", "saved"):
                self.stage = what

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.alive

    def still(self) -> bool:
        """Whether its main thread has been asleep for a while."""
        now = self.process.main_thread() if self.process is not None else ("X", 0)
        if now != self._idle or now[0] != "S":
            self._idle, self._idle_since = now, time.monotonic()
        return time.monotonic() - self._idle_since > STILL


class Lines:
    """The lines that a file has got since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[str]:
        """Whole lines only; none while there is no file."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]
