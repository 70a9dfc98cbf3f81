"""Evictions at random moments of a real multi-process job: `make chaos`.

`CHAOS_RUNS` (default 1,000) of them, `CHAOS_WORKERS` at a time (default 3). The seed of each is printed when it fails;
`CHAOS_SEED=<seed> CHAOS_RUNS=1` replays it (the moment of the signal, not the scheduler's moods). `CHAOS_ACTIVITY` says
what the jobs do, if it is not to be everything: `CHAOS_ACTIVITY=swallow`.
"""

import contextlib
import os
import signal
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from chaos_runs import Eviction, run_evictions
from programs import pid_limit

from autoteardown.node import procfs

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
    *("pieces", "shards", "uneven", "adversarial", "swallow", "flag", "poll"),
    *("slow", "limited"),
]
WANTED = os.environ.get("CHAOS_ACTIVITY", "").split(",") if os.environ.get("CHAOS_ACTIVITY") else ACTIVITIES
OWN_CODE = 3  # of an application that ends by itself
OWNERS = ("flag", "poll")
UNSTEADY = ("rendezvous", "stuck", "reinit")  # no iterations to compare
EVENTS = ("one", "some", "all", "everybody", "twice", "killed", "frozen")
GRACE = 8.0
SLACK = 4.0  # for a machine that runs many jobs at once; beyond it a process is past its deadline


class Chaos(Eviction):
    """On one host."""

    def __init__(self, seed, folder, server):
        super().__init__(seed, folder, server)
        self.activity = self.random.choice(WANTED)
        # Between a destroy and the next init a rank is nobody's, and its peers would wait for it: all are signalled.
        self.event = self.random.choice(EVENTS) if self.activity not in ("rendezvous", "reinit") else "all"
        self.kind = self.activity, self.event

    def _run(self):
        size = self.random.choice((2, 2, 3))
        missing = (size - 1,) if self.activity == "rendezvous" else ()
        args = (self.folder, self.activity, self.seed)
        settings = {"AUTOTEARDOWN_GRACE": GRACE}
        if self.activity not in OWNERS:
            settings["AUTOTEARDOWN_ON_TEARDOWN"] = "__main__:stopped"
        ranks = self.job.world("chaos.py", size, *args, missing=missing, **settings)
        for rank in ranks:
            rank.wait_for("going")
        time.sleep(self.random.uniform(0.0, 0.4))
        chosen = self._signal(ranks)
        for rank in ranks:
            code = rank.outlast(GRACE + SLACK)
            self._judge(rank, rank in chosen, code)
        self._read_trails(ranks)
        self._look_around([rank.pid for rank in ranks])

    def _signal(self, ranks):
        shuffled = self.random.sample(ranks, len(ranks))
        count = {"some": max(1, len(ranks) - 1), "all": len(ranks), "everybody": len(ranks)}.get(
            self.event, 1
        )
        children = [pid for rank in ranks for pid in procfs.descendants(rank.pid)]
        chosen, others = shuffled[:count], shuffled[count:]
        for rank in list(chosen):
            try:
                rank.signal()
            except (AssertionError, ProcessLookupError):  # the notice was faster: a peer, and gone
                chosen.remove(rank)
            time.sleep(self.random.choice((0.0, 0.0, 0.05)))
        self.dead = self.frozen = None
        with contextlib.suppress(ProcessLookupError):
            if self.event == "everybody":  # a second time, too, as SLURM does
                for pid in [*children, *(rank.pid for rank in chosen)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            elif self.event == "twice":
                for _ in range(self.random.randrange(1, 30)):
                    os.kill(chosen[0].pid, signal.SIGTERM)
            elif self.event == "killed":
                # With the host of the store the notice may be lost, and ranks that do not communicate never hear.
                # One that catches all errors of its collectives is not blocked in any, and makes progress for ever.
                spared = ranks[:1] if self.activity in ("stuck", "swallow") else []
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
        allowed = (
            {0, 143}
            if signalled and self.event in ("some", "all", "everybody")
            else {0}
            if signalled
            else {143}
        )
        if self.event in ("killed", "frozen") and not signalled:
            allowed.add(1)
        if self.activity == "reinit":
            allowed |= {1, -signal.SIGTERM}
        if self.activity == "rendezvous" and not rank.stderr:
            allowed.add(-signal.SIGTERM)  # it has not come to init yet
        if (
            self.activity in OWNERS
        ):  # a rank that is lost or out of reach keeps the others from their iteration
            allowed = {OWN_CODE} if self.event not in ("killed", "frozen") else {OWN_CODE, 0, 143, 1}
        if code == -signal.SIGKILL:
            self.wrong.append(f"SIGKILL needed: {rank.transcript()}")
        elif code not in allowed:
            self.wrong.append(f"exit code {code}, not {allowed}: {rank.transcript()}")

    def _read_trails(self, ranks):
        """Nothing ran on after the stop, and where all say that it was clean, all stopped after the same iteration."""
        last, clean = {}, self.dead is None
        for number, rank in enumerate(ranks):
            path = self.folder / f"trail{number}"
            if rank is self.dead or not path.exists():
                continue
            before, _, after = path.read_text().partition("stopped\n")
            if after:
                self.wrong.append(f"ran on: {after.split()} {rank.transcript()}")
            lines = [line for line in before.splitlines() if line.startswith(("step", "own"))]
            last[number] = lines[-1] if lines else ""
            outcome = rank.report()["outcome"] if self._has_report(rank) else None
            self.outcomes[outcome] += 1
            clean = clean and outcome in ("clean", None)
        if self.activity not in UNSTEADY and clean and len(set(last.values())) > 1:
            self.wrong.append(f"different iterations: {last} " + "".join(rank.transcript() for rank in ranks))

    @staticmethod
    def _has_report(rank):
        return any(rank.folder.parent.glob(f"reports/*-{rank.pid}-*Z.json"))

    def _look_around(self, pids):
        size = len(pids)
        if (
            self.dead is None
        ):  # one that was being written by a rank that the test itself has killed may be torn
            for name in ("checkpoint", "pieces"):
                for rank in range(size):
                    self._look_at(sorted(self.folder.glob(f"{name}{rank}*")))
            self._look_at_shards(size)
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
        pid_limit.remove_cgroups(pids)

    def _look_at(self, paths):
        """Files of one checkpoint: each is whole, and every element of all of them is of the same iteration."""
        found = set()
        for path in paths:
            try:
                if not path.name.endswith(".tmp"):
                    found.update(torch.load(path, weights_only=True)["padding"].unique().tolist())
                else:
                    self.wrong.append(f"left behind: {path.name}")
            except Exception as error:
                self.wrong.append(f"torn checkpoint {path.name}: {error}")
        if len(found) > 1:
            self.wrong.append(f"a checkpoint of several iterations {found}: {[path.name for path in paths]}")

    def _look_at_shards(self, size):
        folder = self.folder / "shards"
        if not (folder / ".metadata").exists():
            return
        parts = {f"part{rank}": torch.zeros(1 << 16) for rank in range(size)}
        try:
            dcp.load(parts, checkpoint_id=folder)
            found = {value for part in parts.values() for value in part.unique().tolist()}
            if len(found) > 1:
                self.wrong.append(f"a sharded checkpoint of several iterations: {found}")
        except Exception as error:
            self.wrong.append(f"torn sharded checkpoint: {error}")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_chaos(tmp_path, capsys):
    """No SIGKILL, wrong code, uneven stop, step or save after it, torn checkpoint, orphan, leftover; nobody late."""
    run_evictions(Chaos, tmp_path, capsys, 1000)
