"""Evictions at random moments of ranks on torch's own ProcessGroupNCCL, with a random fault each: `make nccl-chaos`.

`CHAOS_RUNS` (default 20) of them, `CHAOS_WORKERS` at a time; the seed of each is printed when it fails, and
`CHAOS_SEED=<seed> CHAOS_RUNS=1` replays it.
"""

import contextlib
import os
import signal
import time

import pytest
from chaos_runs import Eviction, run_evictions
from simulated_accelerator import Device

from nccl import plugin
from nccl.conftest import AGENT_PATH, PROGRAM, START

ROLES = {
    "idle": ("idle",),
    "ddp": ("train",),
    "fsdp2": ("train", "--kind", "fsdp2"),
    "groups": ("train", "--groups", "2"),
    "lazy": ("train", "--lazy"),
    "thread": ("train", "--thread"),
    "stuck": ("stuck", "--wait", "synchronize"),
    "item": ("stuck", "--wait", "item"),
    "many": ("stuck", "--groups", "2", "--wait", "work"),
    "busy": ("finish", "--wait", "synchronize", "--launches", "12"),
    "blocked": ("blocked",),
}
STUCK = ("stuck", "item", "many")
FAULTS = ("none", "none", "killed", "remote", "sticky", "slow", "queue")
GRACE = 20.0
LOST = 3.0  # seconds until ranks that wait for a lost one are torn down
SLACK = 4.0  # for a machine that runs several jobs at once


class Chaos(Eviction):
    """One world, one fault, one eviction."""

    def __init__(self, seed, folder, server):
        super().__init__(seed, folder, server)
        self.fault = self.random.choice(FAULTS)
        self.role = "broken" if self.fault == "sticky" else self.random.choice(list(ROLES))
        self.who = self.random.choice(("one", "one", "some", "all"))
        self.kind = self.role, f"{self.fault}/{self.who}"
        self.devices = Device(folder)
        self.dead = None
        self.early = False  # evicted before there was an iteration to stop after

    def _run(self):
        ranks = self._start()
        time.sleep(self.random.uniform(0.0, 1.0))
        chosen = self._evict(ranks)
        self._wait_for_end(ranks)
        for rank in ranks:
            self._judge(rank, rank in chosen, rank.code)
        self._judge_world(ranks)
        if self.wrong:
            self.wrong += [self.devices.transcript(), *map(self._story, ranks)]

    @staticmethod
    def _story(rank):
        """The agent's lines, without what torch's monitors write when the store has gone."""
        return "\n  ".join(
            [f"pid {rank.pid} ended with {rank.code}", *rank.stdout.splitlines()[-2:], *rank.log_lines]
        )

    def _start(self):
        size = self.random.choice((2, 2, 3, 4))
        absent = self.random.randrange(size)
        role = (*ROLES[self.role], "--absent", str(absent)) if self.role in ROLES else ("broken",)
        ms = self.random.choice((2, 20, 60))
        if self.role == "broken":
            role, ms = (*role, "--absent", str(absent)), self.random.choice((2000, 4000))
        settings = {
            "devices": str(size),
            "link": "net" if self.fault in ("killed", "remote") else "nvlink",
            "queue": str(self.random.choice((4, 16))) if self.fault == "queue" else "1024",
            "remote_errors": "1" if self.fault == "remote" else "0",
            "abort_ms": "300",
        }
        slow = self.fault == "slow"
        tails = {
            rank: {"SIMULATED_TAIL_MS": self.random.choice((0, 5, 30)), "SIMULATED_ABORT_MS": abort}
            for rank in range(size)
            for abort in [self.random.choice((300, 2000)) if slow else 300]
        }
        env = {
            "AUTOTEARDOWN_GRACE": GRACE,
            "AUTOTEARDOWN_LOST": LOST,
            **plugin.environment(),
            **self.devices.settings(**settings),
        }
        options = {"fresh": True, "launcher": ("env", f"PYTHONPATH={AGENT_PATH}"), **env}
        each = tails if slow else None
        ranks = self.job.world(str(PROGRAM), size, *role, "--ms", str(ms), each=each, **options)
        for rank in ranks:
            rank.wait_for("^launched" if self.role == "broken" else "^ready", START)
        return ranks

    def _evict(self, ranks):
        # Without iterations a rank stops where it stands, and a peer may wait for what it has yet to launch. With a
        # full queue, launching takes as long as the work.
        known = {"busy": "waiting", "idle": "ready"}.get(self.role, "step 1")
        self.early = any(known not in rank.stdout for rank in ranks)
        count = {"all": len(ranks), "some": max(1, len(ranks) - 1)}.get(self.who, 1)
        chosen = self.random.sample(ranks, count)
        for rank in list(chosen):
            try:
                rank.signal()
            except (AssertionError, ProcessLookupError):  # the notice was faster
                chosen.remove(rank)
        # The program of a blocked rank waits for the store, and fails when its host dies.
        spared = ranks[:1] if self.role == "blocked" else []
        others = [rank for rank in ranks if rank not in chosen and rank not in spared]
        if self.fault in ("killed", "remote") and others:
            time.sleep(self.random.choice((0.0, 0.1, 1.0)))
            self.dead = self.random.choice(others)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.dead.pid, signal.SIGKILL)
        return chosen

    def _wait_for_end(self, ranks):
        # With the hub the notice may be lost: then the others leave as without one.
        until = time.monotonic() + GRACE + SLACK + (2 * LOST if self.dead is ranks[0] else 0)
        while [rank for rank in ranks if rank.running]:  # asks each: that takes the time of its end
            if time.monotonic() > until:
                for rank in ranks:
                    if rank.running:
                        os.kill(rank.pid, signal.SIGKILL)
                        rank.wait()
            time.sleep(0.01)

    def _judge(self, rank, signalled, code):
        # A rank that the notice reaches before its own signal is a peer.
        allowed = {0} if signalled and self.who == "one" else {0, 143} if signalled else {143}
        if rank is self.dead:
            return
        if code not in allowed:
            self.wrong.append(f"exit code {code}, not {allowed}: pid {rank.pid}")
        if "garbage" in rank.stdout:
            self.wrong.append(f"ran on after an abort: pid {rank.pid}")
        if rank.signalled and rank.seconds > GRACE - 0.5:
            self.wrong.append(f"late, after {rank.seconds:.1f} s: pid {rank.pid}")
        try:
            self.outcomes[rank.report()["outcome"]] += 1
        except AssertionError:
            self.wrong.append(f"no report: pid {rank.pid}")

    def _judge_world(self, ranks):
        if self.dead is None and self.fault != "sticky":
            self.wrong += [f"fault: {fault}" for fault in self.devices.faults]
            if self.devices.times_of("abort begins, idle"):
                self.wrong.append("a rank whose device is idle has aborted")
        reports = self.job.all_reports().values()
        if reports and all(report["outcome"] == "clean" for report in reports):
            stopped = {report["steps"]["stopped_at"] for report in reports if report["steps"]}
            if len(stopped) > 1:
                self.wrong.append(f"clean, and stopped after different iterations: {stopped}")
        healthy = self.role not in (*STUCK, "blocked", "broken") and self.dead is None and not self.early
        if healthy and any(report["outcome"] in ("aborted", "forced") for report in reports):
            self.wrong.append("a healthy device was given up")
        if self.job.survivors():
            self.wrong.append(f"orphans: {self.job.survivors()}")


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_chaos(libraries, tmp_path, capsys):
    """No fault by an exit or an abort, nothing computed on, every code right, all in time."""
    run_evictions(Chaos, tmp_path, capsys, 20)
