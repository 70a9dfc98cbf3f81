"""Runs one training job of a drill: starts it with torchrun, evicts it, and watches until the last rank has ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from autoteardown.drills import processes
from autoteardown.drills.environment import environment
from autoteardown.drills.outcome import Outcome, RankOutcome, check_checkpoint
from autoteardown.drills.rank import Lines, Rank
from autoteardown.drills.scenario import AGENT, HAND_WRITTEN, PROTECTIONS, Scenario

AFTERMATH = 3.0  # seconds after the grace period for a launcher to notice that its workers were killed
_AGENT_LINE = re.compile(r"autoteardown rank=(\S+)/\S+ pid=\d+ host=\S+ (\+\d+\.\d+s .*)")


class Job:
    """A job with one kind of protection.

    Its state goes from `starting` to `ready` (the scenario can begin), `going` (evict it at the next suitable moment),
    `evicted`, `over`; or to `failed`. `poll` advances it.
    """

    def __init__(
        self,
        scenario: Scenario,
        protection: str,
        ranks: int,
        grace: float,
        folder: Path,
        say: Callable[[str, str], object],
        show_log: bool,
    ) -> None:
        self.scenario = scenario
        self.protection = protection
        self.grace = grace
        self.folder = folder
        self.state = "starting"
        self.ranks = [Rank(number, folder) for number in range(ranks)]
        self.problem: str | None = None
        self.evicted_at = 0.0
        self.log: list[str] = []
        self._say = say
        self._show_log = show_log
        self._output = Lines(folder / "output")
        self._exits = Lines(folder / "exits")
        self._codes: dict[int, int] = {}
        self._up = False

    @property
    def label(self) -> str:
        """The protection's name for a reader."""
        return PROTECTIONS[self.protection]

    @property
    def status(self) -> str:
        """What the job does now, for the live view."""
        if self.state == "evicted":
            left = [str(rank.number) for rank in self.ranks if rank.alive]
            running = f"rank{'s' if len(left) > 1 else ''} {', '.join(left[:8])}" if left else "torchrun"
            return f"{time.monotonic() - self.evicted_at:4.1f} s since the signal; still running: {running}"
        if self.state in ("over", "failed"):
            return self.state
        steps = min(rank.steps for rank in self.ranks)
        return f"training, step {steps}" if steps else "starting"

    def start(self) -> None:
        """Launch the job."""
        self.folder.mkdir()
        for name in ("reports", "tmp"):
            (self.folder / name).mkdir()
        env = environment(self.folder, self.grace, self.protection == AGENT)
        env["TMPDIR"] = str(self.folder / "tmp")  # torch and torchrun leave folders behind
        training = ["-m", "autoteardown.drills.training", self.scenario.name, str(self.folder)]
        if self.protection == HAND_WRITTEN:
            training.append("--hand-written")
        with (self.folder / "output").open("wb") as output:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, "-m", "autoteardown.drills.torchrun", str(self.folder / "exits")),
                    *("--standalone", f"--nproc-per-node={len(self.ranks)}", *training),
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.folder,
                start_new_session=True,
            )
        self._show(f"torchrun starts {len(self.ranks)} rank{'s' if len(self.ranks) > 1 else ''}")

    def poll(self) -> None:
        """Read what has happened, and take the next step."""
        ended = (
            self._launcher.poll() is not None
        )  # before the files are read, so that their last lines are read, too
        for rank in self.ranks:
            rank.read()
        self._read_output()
        if self.state in ("starting", "ready", "going"):
            if ended:
                self.fail(f"the job ended by itself, torchrun with exit {self._launcher.returncode}")
            elif self.state == "starting" and self._is_ready():
                self.state = "ready"
            elif self.state == "going" and (self.scenario.name != "pod" or self.ranks[0].saving):
                self._evict()
        elif self.state == "evicted":
            self._watch()
            if ended and not any(rank.alive for rank in self.ranks):
                self._end()

    def fail(self, problem: str) -> None:
        """Give up before the eviction."""
        self.state, self.problem = "failed", problem
        self._show(problem)

    def tail(self, count: int = 12) -> list[str]:
        """The last lines that torchrun and the ranks have printed."""
        return (self.folder / "output").read_text(errors="replace").splitlines()[-count:]

    def outcome(self) -> Outcome:
        """The outcome, once all processes of the job have ended."""
        ranks = [
            RankOutcome(
                rank=rank.number,
                pid=rank.process.pid if rank.process else None,
                code=rank.code,
                seconds=rank.exited_at - self.evicted_at
                if rank.exited_at is not None and self.evicted_at
                else None,
                right=self.scenario.right_codes(rank.signalled),
                signalled=rank.signalled,
                lost=rank.lost,
                sigkilled=rank.sigkilled,
                hanging=rank.hanging,
                step=rank.steps or None,
            )
            for rank in self.ranks
        ]
        trains = self.scenario.name != "init"
        found = Outcome(
            self.scenario.name,
            self.protection,
            self.grace,
            ranks,
            backend=self.ranks[0].backend,
            launcher_code=self._launcher.returncode,
            checkpoint=check_checkpoint(self.folder / "checkpoint.pt") if trains else None,
            compares_steps=self.scenario.stage == "step",
            kept=self.ranks[0].saved_step if self.ranks[0].saved else None,
            log=self.log,
        )
        if self.state == "failed":
            found.ranks, found.checkpoint, found.compares_steps = [], None, False
            found.problems = [self.problem or "", *self.tail()]
        else:
            may_fail_alone = self.scenario.name == "peer-lost"  # a rank may fail before it is signalled
            reporting = ranks if self.protection == AGENT and not may_fail_alone else []
            found.read_reports(self.folder / "reports", reporting)
        return found

    # -- the steps --------------------------------------------------------------------------------------------------

    def _show(self, text: str) -> None:
        self._say(self.label, text)

    def _is_ready(self) -> bool:
        ranks, stage = self.ranks, self.scenario.stage
        if not self._up and all(rank.stage not in ("", "started") for rank in ranks):
            self._up = True
            self._show(f"all ranks are up and join a process group ({ranks[0].backend})")
        if stage == "waiting":
            there = ranks[0].stage == stage and all(rank.stage == "elsewhere" for rank in ranks[1:])
            ready = there and ranks[0].still()
        elif stage == "joining":
            still = [
                rank.still() for rank in ranks
            ]  # all are called: each call starts or continues a rank's clock
            ready = all(rank.stage == stage for rank in ranks) and all(still)
        else:
            ready = ranks[0].saved and all(rank.stage == stage for rank in ranks)
        if ready:
            self._show(
                {
                    "waiting": "rank 0 waits in an all_reduce that no other rank joins",
                    "joining": "the ranks wait in init_process_group",
                }.get(stage, f"training is at step {ranks[0].steps}, a checkpoint is saved")
            )
        return ready

    def _evict(self) -> None:
        """Send the signals, as a platform does at the beginning of the grace period."""
        self.evicted_at = time.monotonic()
        self.state = "evicted"
        number = self.scenario.lost(len(self.ranks))
        if number is not None:
            lost = self.ranks[number]
            assert lost.process is not None
            lost.lost = lost.process.signal(signal.SIGKILL)
            self._show(f"SIGKILL to rank {number} (pid {lost.process.pid})")
        if self.scenario.whole_pod:
            self._launcher.send_signal(signal.SIGTERM)
            for rank in self.ranks:
                rank.signalled = True
            busy = "; rank 0 is writing a checkpoint" if self.ranks[0].saving else ""
            self._show(
                f"SIGTERM to torchrun (pid {self._launcher.pid}), which passes it on to its ranks{busy}"
            )
        else:
            victim = self.ranks[self.scenario.victim(len(self.ranks))]
            assert victim.process is not None
            victim.signalled = victim.process.signal(signal.SIGTERM)
            step = f", at step {victim.steps}" if self.scenario.stage == "step" else ""
            self._show(f"SIGTERM to rank {victim.number} (pid {victim.process.pid}){step}")

    def _watch(self) -> None:
        now = time.monotonic()
        for rank in self.ranks:
            if rank.exited_at is None and not rank.alive:
                rank.exited_at = now
        for rank in sorted(self.ranks, key=lambda rank: rank.exited_at or now):
            if rank.exited_at is not None and rank.code is None and rank.process is not None:
                rank.code = self._codes.get(rank.process.pid)
                if rank.code is None:
                    rank.code = processes.reap(rank.process.pid)
                if rank.code is not None:
                    after = rank.exited_at - self.evicted_at
                    how = f"exit {rank.code}" if rank.code >= 0 else signal.Signals(-rank.code).name
                    self._show(f"+{after:.2f} s rank {rank.number} has ended: {how}")
        if now >= self.evicted_at + self.grace + AFTERMATH:
            self._end()
        elif now >= self.evicted_at + self.grace:
            self._end_of_grace()

    def _end_of_grace(self) -> None:
        """SIGKILL the ranks that got the signal, as a platform does at the end of the grace period."""
        for rank in self.ranks:
            if rank.alive and not rank.sigkilled and not rank.hanging:
                assert rank.process is not None
                rank.sigkilled, rank.hanging = rank.signalled, not rank.signalled
                what = "SIGKILL to" if rank.signalled else "hanging:"
                self._show(f"the grace period is over; {what} rank {rank.number} (pid {rank.process.pid})")
                if rank.signalled:
                    rank.process.signal(signal.SIGKILL)
        if self.scenario.whole_pod and self._launcher.poll() is None:
            self._launcher.kill()

    def _end(self) -> None:
        """Stop waiting."""
        for rank in self.ranks:
            if rank.code is None and rank.sigkilled:
                rank.code = -signal.SIGKILL
        self.state = "over"

    def _read_output(self) -> None:
        for line in self._exits.new():
            pid, code = map(int, line.split())
            self._codes[pid] = code
        for line in self._output.new():
            match = _AGENT_LINE.match(line)
            if match:
                self.log.append(line)
                if self._show_log:
                    self._show(f"    rank {match[1]}: {match[2]}")
