"""Drills the user's launch command with the agent off, to compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from autoteardown.drills import processes
from autoteardown.drills.command import TICK, CommandDrill
from autoteardown.drills.display import Display
from autoteardown.drills.outcome import Outcome, RankOutcome
from autoteardown.drills.scenario import NONE, Scenario
from autoteardown.node import procfs
from autoteardown.node.entry import Entry
from autoteardown.program import parent_of


class ControlDrill(CommandDrill):
    """One run of the command without the agent.

    There are no registry entries without the agent, so the ranks are found by the RANK in their environment, which
    launchers set. They are evicted at the same time after the start as the ranks with the agent.

    Args:
        argv, scenario, grace, patience, folder, display: as for `CommandDrill`.
        count: the number of ranks with the agent.
        at: seconds from the start to the eviction.
    """

    protection = NONE

    def __init__(
        self,
        argv: Sequence[str],
        scenario: Scenario,
        grace: float,
        count: int,
        patience: float,
        at: float,
        folder: Path,
        display: Display,
    ) -> None:
        super().__init__(argv, scenario, grace, count, patience, 0.0, folder, display)
        self._env["AUTOTEARDOWN"] = "0"
        self._at = at

    def _wait(self) -> str | None:
        deadline = self._started + max(self._patience, self._at)
        while True:
            records = ranks_below()
            elapsed = time.monotonic() - self._started
            if len(records) >= (self._wanted or 1) and elapsed >= self._at:
                self._say(f"{len(records)} ranks, without the agent")
                self._ranks = [(r, processes.Process(r.pid), RankOutcome(r.rank, r.pid)) for r in records]
                return None
            if self._process.poll() is not None:
                return f"the command ended by itself, with exit {self._process.returncode}, before it was evicted"
            if time.monotonic() > deadline:
                return f"{len(records)} processes with a RANK in their environment, where {self._wanted} were to be"
            time.sleep(TICK)

    def _ended(self, record: Entry, rank: RankOutcome) -> None:
        # Only its launcher knows its exit code, which may come from a handler of the program.
        self._say(f"+{rank.seconds:.2f} s rank {record.place} has ended")

    def _conclude(self, found: Outcome) -> None:
        found.ranks = [rank for _, _, rank in self._ranks]


def ranks_below() -> list[Entry]:
    """The ranks among this process's descendants: those with a RANK that differs from their parent's."""
    given: dict[int, dict[str, str]] = {}
    for pid in processes.descendants():
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        pairs = (each.decode("utf-8", "replace").partition("=") for each in text.split(b"\0"))
        given[pid] = {name: value for name, _, value in pairs if name in ("RANK", "WORLD_SIZE")}
    found = []
    for pid, variables in given.items():
        rank = variables.get("RANK", "")
        if not rank.isdecimal() or given.get(parent_of(pid), {}).get("RANK") == rank:  # a worker of a rank
            continue
        fields = {name.lower(): int(value) for name, value in variables.items() if value.isdecimal()}
        found.append(Entry("", pid, procfs.start_time(pid) or 0, fields))
    return sorted(found, key=lambda record: record.rank or 0)
