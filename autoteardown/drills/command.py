"""Drills the user's own launch command: runs it unchanged with the agent on, and evicts its ranks.

The ranks are found by their entries in the drill's own registry.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from autoteardown import settings as settings_of
from autoteardown.drills import environment, processes
from autoteardown.drills.display import Display
from autoteardown.drills.job import AFTERMATH
from autoteardown.drills.outcome import Outcome, RankOutcome
from autoteardown.drills.scenario import AGENT, Scenario
from autoteardown.node import registry
from autoteardown.node.entry import Entry

TICK = 0.05
SETTLED = 5.0  # seconds without a new rank after which the other ranks are assumed to be on other nodes


class CommandDrill:
    """One run of the command.

    Args:
        argv: the command.
        scenario: `train` or `pod`.
        grace: seconds from the signal to SIGKILL.
        wanted: the number of ranks on this node to wait for; None: the world size, or as many as start.
        patience: longest wait for the ranks, in seconds.
        after: seconds from the start of the last rank to the eviction.
        folder: for the reports and the registry.
        display: shows the progress.
    """

    protection = AGENT

    def __init__(
        self,
        argv: Sequence[str],
        scenario: Scenario,
        grace: float,
        wanted: int | None,
        patience: float,
        after: float,
        folder: Path,
        display: Display,
    ) -> None:
        self._argv = list(argv)
        self._scenario = scenario
        self._grace = grace
        self._wanted = wanted
        self._patience = patience
        self._after = after
        self._folder = folder
        self._display = display
        self._env = {**os.environ, "AUTOTEARDOWN": "1", **environment.settings(folder, grace)}
        self._settings = settings_of.load(self._env)[0]
        self.evicted_after = 0.0  # seconds from the start to the eviction
        self._ranks: list[tuple[Entry, processes.Process, RankOutcome]] = []

    def run(self) -> Outcome:
        """Start the command, evict its ranks, watch them, and return the outcome."""
        self._display.line()
        (self._folder / "reports").mkdir(parents=True)
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self._argv,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
        )
        switch = "on" if self.protection == AGENT else "off"
        self._say(f"started, with the agent {switch}: pid {self._process.pid}")
        found = Outcome(self._scenario.name, self.protection, self._grace, [])
        try:
            problem = self._wait()
            if problem is None:
                marker = registry.DrainMarker(self._settings.runtime_dir)
                try:
                    self._evict()
                    self._watch()
                finally:
                    marker.close()
                self._conclude(found)
            else:
                found.problems.append(problem)
            found.launcher_code = self._process.poll()
            if found.launcher_code is None:
                self._say("the command still runs; it ends with the drill")
            else:
                self._say(f"the command has ended with exit {found.launcher_code}")
        finally:
            stubborn = processes.end_all()
        if stubborn:
            found.problems.append(f"could not be killed: {', '.join(map(str, sorted(stubborn)))}")
        self._display.outcome(found)
        return found

    def _say(self, text: str) -> None:
        self._display.line(f"drill: {text}", "bold")

    def _wait(self) -> str | None:
        """Wait for armed ranks in a process group; return the problem, or None."""
        deadline = time.monotonic() + self._patience
        count, since = 0, 0.0
        while True:
            there = [r for r in registry.read(self._settings.runtime_dir) if r.backend and r.outcome is None]
            if len(there) != count:
                count, since = len(there), time.monotonic()
                self._say(f"{count} rank{'s' if count != 1 else ''} armed")
            wanted = self._wanted or (there[0].world_size if there else None) or 1
            settled = count and self._wanted is None and time.monotonic() - since > max(SETTLED, self._after)
            if settled or (count >= wanted and time.monotonic() - since > self._after):
                self._ranks = [(r, processes.Process(r.pid), RankOutcome(r.rank, r.pid)) for r in there]
                return None
            if self._process.poll() is not None:
                return f"the command ended by itself, with exit {self._process.returncode}, before it was evicted"
            if time.monotonic() > deadline:
                if count:
                    return f"{count} of {wanted} ranks were armed after {self._patience:g} s"
                why = "`autoteardown doctor`, run as the ranks are run, says if the agent is active"
                return f"no rank was armed after {self._patience:g} s; {why}"
            time.sleep(TICK)

    def _evict(self) -> None:
        signum = self._settings.signals[0]
        name = signal.Signals(signum).name
        self._evicted_at = time.monotonic()
        self.evicted_after = self._evicted_at - self._started
        signalled = self._settings.exit_code_for(signum)
        for _, _, rank in self._ranks:
            # Launchers pass signals on, and send their own when a first worker has failed.
            rank.right = {signalled, self._settings.peer_exit_code}
            rank.signalled = self._scenario.whole_pod
        if self._scenario.whole_pod:
            self._process.send_signal(signum)
            self._say(f"{name} to the command (pid {self._process.pid})")
        else:
            record, process, rank = self._ranks[-1]
            rank.right = {signalled}
            rank.signalled = process.signal(signum)
            self._say(f"{name} to rank {record.place} (pid {record.pid})")

    def _watch(self) -> None:
        """Watch until all ranks and the command have ended, or their time is over."""
        over = False
        while True:
            elapsed = time.monotonic() - self._evicted_at
            for record, process, rank in self._ranks:
                if rank.seconds is None and not process.alive:
                    rank.seconds = elapsed
                    self._ended(record, rank)
            ended = all(rank.seconds is not None for _, _, rank in self._ranks)
            if not over and elapsed >= self._grace:
                over = True
                self._end_of_grace()
            if (ended and self._process.poll() is not None) or elapsed >= self._grace + AFTERMATH:
                return
            time.sleep(TICK)

    def _ended(self, record: Entry, rank: RankOutcome) -> None:
        """Note how a rank ended, by its entry in the registry: only its launcher knows the real exit code."""
        try:
            last = registry.reread(self._settings.runtime_dir, record)
        except OSError:
            last = record
        rank.withdrew = last is None
        rank.code = last.exit_code if last is not None else None
        how = "ended by itself" if rank.withdrew else "died" if rank.code is None else f"exit {rank.code}"
        self._say(f"+{rank.seconds:.2f} s rank {record.place} has ended: {how}")

    def _end_of_grace(self) -> None:
        for record, process, rank in self._ranks:
            if rank.seconds is None:
                rank.sigkilled, rank.hanging = rank.signalled, not rank.signalled
                if rank.signalled:
                    process.signal(signal.SIGKILL)
                what = "SIGKILL to" if rank.signalled else "hanging:"
                self._say(f"the grace period is over; {what} rank {record.place} (pid {record.pid})")
        if self._scenario.whole_pod and self._process.poll() is None:
            self._process.kill()

    def _conclude(self, found: Outcome) -> None:
        found.ranks = [rank for _, _, rank in self._ranks]
        found.backend = self._ranks[0][0].backend
        reporting = [r for r in found.ranks if not (r.withdrew or r.sigkilled or r.hanging)]
        found.read_reports(self._folder / "reports", reporting)
        steps = {report.pid: report.stopped_at for stop in found.stops for report in stop.ranks}
        for rank in found.ranks:
            rank.step = steps.get(rank.pid)
        found.compares_steps = True
