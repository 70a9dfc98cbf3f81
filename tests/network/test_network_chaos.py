"""Evictions of jobs on several hosts while their network breaks at random moments: `make network-chaos`.

`CHAOS_RUNS` (default 300) of them, `CHAOS_WORKERS` at a time (default 3). The seed of each is printed when it fails;
`CHAOS_SEED=<seed> CHAOS_RUNS=1` replays it (the moments of the signals and of the faults, not the scheduler's moods).
"""

import contextlib
import os
import signal
import time

import pytest
from chaos_runs import Eviction, run_evictions
from hosts import Net, needs
from jobs_on_hosts import hub_port, train

ACTIVITIES = ("step", "step", "all_reduce", "idle", "checkpoint", "threads", "gc")
SIGNALS = ("one", "one", "twice", "some", "all")
# What the ranks do not notice; what cuts some of them off for a while or for good; and what ends one of them.
WHOLE = ("nothing", "reset", "loss")
CUTS = ("forgotten", "moment", "cable", "closed port", "refused port")
ENDS = ("killed", "frozen", "dark")
GRACE = 10.0
SLACK = 4.0  # for a machine that runs many jobs at once; beyond it a process is past its deadline
LOST = 2
FREED = 60.0  # seconds for peers that nothing could be told, when the network is whole again


class NetworkChaos(Eviction):
    """On three or four hosts."""

    def __init__(self, seed, folder, server):
        super().__init__(seed, folder, server)
        self.activity = self.random.choice(ACTIVITIES)
        self.signals = self.random.choice(SIGNALS)
        self.fault = self.random.choice(self.random.choice((WHOLE, CUTS, ENDS)))
        self.early = self.random.random() < 0.5  # the fault comes before the signal
        self.kind = self.fault, self.signals, "early" if self.early else "late"
        self.gone = None

    def _run(self):
        self.net = Net()
        try:
            self._evict()
        finally:
            self.job.close()
            self.net.close()

    def _evict(self):
        self.hosts = [self.net.host(number) for number in range(1, self.random.choice((3, 3, 4)) + 1)]
        args = (self.folder, self.activity, self.seed)
        env = {"AUTOTEARDOWN_GRACE": GRACE, "AUTOTEARDOWN_LOST": LOST}
        self.ranks = train(self.job, self.hosts, *args, program="chaos.py", ready="^going$", **env)
        self.port = hub_port(self.hosts, self.ranks)
        time.sleep(self.random.uniform(0.0, 0.3))
        place = self.random.randrange(len(self.ranks))
        if self.early:
            self._break(place)
            time.sleep(self.random.choice((0.0, 0.3, 3.0)) * self.random.random())
            chosen = self._signal()
        else:
            chosen = self._signal()
            time.sleep(self.random.choice((0.0, 0.1, 1.0)) * self.random.random())
            self._break(place)
        for rank in chosen:
            self._judge(rank, rank.outlast(GRACE + SLACK), self._codes_of_signalled(chosen))
        self._rest([rank for rank in self.ranks if rank not in chosen and rank is not self.gone])
        self.outcomes.update(report["outcome"] for report in self.job.all_reports().values())
        if self.fault in WHOLE and not (self.fault == "loss" or self.gone):
            self._same_iteration()
        if self.job.survivors():
            time.sleep(1)
            if self.job.survivors():
                self.wrong.append(f"orphans: {self.job.survivors()}")

    # -- what happens ---------------------------------------------------------------------------------------------

    def _signal(self):
        shuffled = self.random.sample(self.ranks, len(self.ranks))
        count = {"all": len(shuffled), "some": len(shuffled) - 1}.get(self.signals, 1)
        chosen = []
        for rank in shuffled[:count]:
            with contextlib.suppress(
                AssertionError, ProcessLookupError
            ):  # dead already, of what happened to others
                if rank is not self.gone:
                    rank.signal()
                    chosen.append(rank)
            time.sleep(self.random.choice((0.0, 0.0, 0.05)))
        if self.signals == "twice" and chosen:
            for _ in range(self.random.randrange(1, 30)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chosen[0].pid, signal.SIGTERM)
        return chosen

    def _break(self, place):
        host, rank = self.hosts[place], self.ranks[place]
        lines = host.lines(rank.pid) if rank.running else []
        if self.fault == "reset":
            host.reset(*lines)
        elif self.fault == "forgotten":
            host.forget(*lines)
        elif self.fault == "loss":
            host.lose(self.random.choice((5, 10, 20)))
        elif self.fault == "moment":
            host.pull()
            time.sleep(self.random.uniform(0.05, 1.5))
            host.plug_in()
        elif self.fault == "cable":
            host.pull()
        elif self.fault in ("closed port", "refused port"):
            refused = self.fault == "refused port"
            self.hosts[0].close_port(self.port, "reject with tcp reset" if refused else "drop")
        elif self.fault == "frozen":
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(0.0, 2.0))
                os.kill(rank.pid, signal.SIGCONT)
        elif self.fault in ("killed", "dark"):
            if self.fault == "dark":
                host.pull()
            self.gone = rank
            with contextlib.suppress(AssertionError, ProcessLookupError):
                rank.signal(signal.SIGKILL)

    # -- what has to come of it -----------------------------------------------------------------------------------

    def _codes_of_signalled(self, chosen):
        # Whom a notice reaches before its own signal may be a peer whose launcher reacts. Before the signal, a rank may
        # have failed of what happened to another, and the signal finds an interpreter at its end.
        codes = {0, 143} if len(chosen) > 1 else {0}
        return codes | {1, -signal.SIGTERM} if self.early and self.fault not in WHOLE else codes

    def _judge(self, rank, code, allowed):
        if rank is self.gone:
            return
        if code == -signal.SIGKILL:
            self.wrong.append(f"SIGKILL needed: {rank.transcript()}")
        elif code not in allowed:
            self.wrong.append(f"exit code {code}, not {allowed}: {rank.transcript()}")
        elif rank.signalled and rank.ended - rank.signalled > GRACE + SLACK / 2:
            self.wrong.append(f"late, after {rank.ended - rank.signalled:.1f} s: {rank.transcript()}")

    def _rest(self, peers):
        """Told, and out with the others; or, where nothing could be told, when the network is whole again."""
        if self.fault in WHOLE:
            for rank in peers:
                self._judge(rank, rank.outlast(GRACE + SLACK), {143})
            return
        for host in self.hosts:
            host.plug_in()
            host.nft()
        end = time.monotonic() + FREED
        for rank in peers:
            while rank.running and time.monotonic() < end and self.activity != "idle":
                time.sleep(0.02)
            if (
                rank.running and self.activity == "idle"
            ):  # it is not blocked, and nobody is there to tell it anything
                rank.signal()
                self._judge(rank, rank.outlast(GRACE + SLACK), {0, 143, 1})
            elif rank.running:
                self.wrong.append(f"left behind: {rank.transcript()}")
            else:
                self._judge(rank, rank.code, {143, 1})

    def _same_iteration(self):
        reports = self.job.all_reports()
        if len(reports) != len(self.ranks):
            self.wrong.append(f"{len(reports)} reports of {len(self.ranks)}")
        if self.activity in ("idle", "all_reduce"):  # these have an optimizer that never steps
            return
        stopped = {(report["steps"] or {}).get("stopped_at") for report in reports.values()}
        if (
            len(stopped) != 1
            or None in stopped
            or {each["outcome"] for each in reports.values()} != {"clean"}
        ):
            stories = "\n".join(rank.transcript() for rank in self.ranks)
            self.wrong.append(f"not after the same iteration, or not clean: {stopped}\n{stories}")


@needs("ss", "nft")
@pytest.mark.chaos
@pytest.mark.timeout(14400)
def test_network_chaos(tmp_path, capsys):
    """No SIGKILL needed, no wrong exit code, nobody late or left behind, no orphan; whole networks: one iteration."""
    run_evictions(NetworkChaos, tmp_path, capsys, 300)
