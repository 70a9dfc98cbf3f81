"""Evictions at random moments of a real multi-process job: `make chaos`.

`CHAOS_RUNS` (default 1,000) of them, `CHAOS_WORKERS` at a time (default 3). The seed of each is printed when it fails;
`CHAOS_SEED=<seed> CHAOS_RUNS=1` replays it (the moment of the signal, not the scheduler's moods).
"""

import contextlib
import os
import signal
import time

import pytest
import torch
from chaos_runs import Eviction, run_evictions

ACTIVITIES = [
    *(
        "idle",
        "step",
        "all_reduce",
        "checkpoint",
        "dataloader",
        "forks",
        "threads",
        "gc",
        "logging",
        "import",
    ),
    *("everything", "rendezvous", "stuck", "reinit"),
]
EVENTS = ("one", "some", "all", "twice", "killed", "frozen")
GRACE = 8.0
SLACK = 4.0  # for a machine that runs many jobs at once; beyond it a process is past its deadline


class Chaos(Eviction):
    """On one host."""

    def __init__(self, seed, folder, server):
        super().__init__(seed, folder, server)
        self.activity = self.random.choice(ACTIVITIES)
        # Between a destroy and the next init a rank is nobody's, and its peers would wait for it: all are signalled.
        self.event = self.random.choice(EVENTS) if self.activity not in ("rendezvous", "reinit") else "all"
        self.kind = self.activity, self.event

    def _run(self):
        size = self.random.choice((2, 2, 3))
        missing = (size - 1,) if self.activity == "rendezvous" else ()
        args = (self.folder, self.activity, self.seed)
        ranks = self.job.world("chaos.py", size, *args, missing=missing, AUTOTEARDOWN_GRACE=GRACE)
        for rank in ranks:
            rank.wait_for("going")
        time.sleep(self.random.uniform(0.0, 0.4))
        chosen = self._signal(ranks)
        for rank in ranks:
            code = rank.outlast(GRACE + SLACK)
            self._judge(rank, rank in chosen, code)
        self._look_around()

    def _signal(self, ranks):
        shuffled = self.random.sample(ranks, len(ranks))
        count = {"all": len(ranks), "some": max(1, len(ranks) - 1)}.get(self.event, 1)
        chosen, others = shuffled[:count], shuffled[count:]
        for rank in list(chosen):
            try:
                rank.signal()
            except (AssertionError, ProcessLookupError):  # the notice was faster: a peer, and gone
                chosen.remove(rank)
            time.sleep(self.random.choice((0.0, 0.0, 0.05)))
        self.dead = self.frozen = None
        with contextlib.suppress(ProcessLookupError):
            if self.event == "twice":
                for _ in range(self.random.randrange(1, 30)):
                    os.kill(chosen[0].pid, signal.SIGTERM)
            elif self.event == "killed":
                # With the host of the store the notice may be lost, and ranks that do not communicate never hear.
                spared = ranks[:1] if self.activity == "stuck" else []
                self.dead = next((rank for rank in others if rank not in spared), None)
                if self.dead is not None:
                    os.kill(self.dead.pid, signal.SIGKILL)
            elif self.event == "frozen":
                self.frozen = others[0]
                os.kill(self.frozen.pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(0.0, 2.0))
                os.kill(self.frozen.pid, signal.SIGCONT)
        return chosen

    def _judge(self, rank, signalled, code):
        if rank is self.dead:
            return
        # Whom the notice reaches before its own signal is a peer. A rank whose connection a dead or frozen peer has
        # dropped fails of itself, before it hears of anything; without a group (reinit) the default action applies.
        allowed = {0, 143} if signalled and self.event in ("some", "all") else {0} if signalled else {143}
        if self.event in ("killed", "frozen") and not signalled:
            allowed.add(1)
        if self.activity == "reinit":
            allowed |= {1, -signal.SIGTERM}
        if code == -signal.SIGKILL:
            self.wrong.append(f"SIGKILL needed: {rank.story()}")
        elif code not in allowed:
            self.wrong.append(f"exit code {code}, not {allowed}: {rank.story()}")

    def _look_around(self):
        for path in self.folder.glob("checkpoint*"):
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                # One that was being written by a rank that the test itself has killed may be torn.
                if self.dead is None:
                    self.wrong.append(f"torn checkpoint {path.name}: {error}")
        entries = list(self.job.runtime.glob("*.json"))
        if entries and self.dead is None and self.activity != "reinit":
            self.wrong.append(f"leftover registry entries: {entries}")
        deadline = time.monotonic() + 8.0  # DataLoader's watchdog looks every 5 s
        while self.job.survivors() and time.monotonic() < deadline:
            time.sleep(0.05)
        # A DataLoader worker takes for its parent whom it finds at its start: one that starts while the test kills its
        # rank stays, with or without the agent.
        loads = self.activity in ("dataloader", "everything") and self.dead is not None
        if self.job.survivors() and not loads:
            self.wrong.append(f"orphans: {self.job.survivors()}")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_chaos(tmp_path, capsys):
    """Issue 6: no SIGKILL needed, no wrong exit code, no torn checkpoint, no orphan, no leftover, nobody late."""
    run_evictions(Chaos, tmp_path, capsys, 1000)
