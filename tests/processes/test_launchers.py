"""Launchers other than Ray: what each makes of a rank that was evicted, and of its peers.

torchrun without restarts is in test_group_stop.py, multiprocessing in test_children.py, `accelerate launch` and
`deepspeed` in test_frameworks.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import HANDWRITTEN, NONE, SIGTERM, environment, free_port, wait_until
from namespaces import in_pid_namespace

# Without it, torchrun keeps one store for all attempts. A rank then finds the addresses of the last attempt in there,
# and with gloo it fails or hangs in init, agent or not (pytorch/pytorch#135712, #167288).
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PATIENT = {"AUTOTEARDOWN_GRACE": 25}
RESTARTS = ("--standalone", "--max-restarts=1")


def pids(launcher, *more, attempt=0, world=2):
    """The pids of the ranks of one attempt, by rank, once all of them are there."""
    line = re.compile(rf"^attempt {attempt} rank (\d+) of {world} pid (\d+)$", re.MULTILINE)
    both = (launcher, *more)

    def look():
        assert any(each.running for each in both), launcher.transcript()
        found = {int(rank): int(pid) for each in both for rank, pid in line.findall(each.stdout)}
        return found if len(found) == world else None

    return wait_until(look, f"attempt {attempt} of {world} ranks")


def trained(launcher, attempt=1):
    return f"attempt {attempt} rank" in launcher.stdout and "trained" in launcher.stdout


# -- torchrun -------------------------------------------------------------------------------------------------------


def test_torchrun_restarts(job):
    """A rank blocked in a collective is signalled: both are released, and the next attempt trains on."""
    launcher = job.torchrun("attempts.py", "blocked", nodes=RESTARTS, **OWN_STORE, **PATIENT)
    first = pids(launcher)
    os.kill(first[0], SIGTERM)
    second = pids(launcher, attempt=1)
    assert launcher.wait() == 0, launcher.transcript()
    assert launcher.stdout.count("trained") == 2
    reports = job.all_reports()
    assert {report["pid"]: report["exit_code"] for report in reports.values()} == {first[0]: 0, first[1]: 143}
    assert not set(second.values()) & {report["pid"] for report in reports.values()}


def test_control_torchrun_restarts(job):
    """With the hand-written handler nothing happens: the rank stays in the collective."""
    launcher = job.torchrun("attempts.py", "blocked", nodes=RESTARTS, mode=HANDWRITTEN, **OWN_STORE)
    os.kill(pids(launcher)[0], SIGTERM)
    with pytest.raises(AssertionError, match="waited"):
        launcher.wait(5)
    assert "attempt 1" not in launcher.stdout


@pytest.mark.parametrize("code, attempts", [("0", 1), ("signal", 2)])
def test_torchrun_restarts_only_what_failed(job, code, attempts):
    """A job of one rank that exits with 0 has succeeded, to torchrun."""
    launcher = job.torchrun(
        "attempts.py", "steps", ranks=1, nodes=RESTARTS, AUTOTEARDOWN_EXIT_CODE=code, **OWN_STORE, **PATIENT
    )
    os.kill(pids(launcher, world=1)[0], SIGTERM)
    assert launcher.wait() == 0, launcher.transcript()
    assert trained(launcher) == (attempts == 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["steps", "apart"])
def test_torchrun_restarts_when_a_rank_was_killed(job, what):
    """Its own way: it looks more often than anybody is lost for long."""
    launcher = job.torchrun("attempts.py", what, ranks=3, nodes=RESTARTS, **OWN_STORE, **PATIENT)
    first = pids(launcher, world=3)
    os.kill(first[0], signal.SIGKILL)
    pids(launcher, attempt=1, world=3)
    assert launcher.wait() == 0, launcher.transcript()
    assert launcher.stdout.count("trained") == 3
    reports = job.all_reports()
    # torchrun's own signal, or word of it from the peer that got it first.
    assert "lost" not in {report["cause"] for report in reports.values()}, reports
    assert {report["pid"] for report in reports.values()} <= set(first.values())


@pytest.mark.slow
def test_torchrun_restarts_what_a_lost_rank_has_ended(job):
    """Where torchrun sees nothing for longer than AUTOTEARDOWN_LOST: it finds failed ranks, as after any failure."""
    more = {**OWN_STORE, **PATIENT, "AUTOTEARDOWN_LOST": 1}
    launcher = job.torchrun("attempts.py", "apart", ranks=3, nodes=RESTARTS, **more)
    first = pids(launcher, world=3)
    wait_until(lambda: launcher.stdout.count("apart") == 3, "the groups of their own")
    launcher.signal(signal.SIGSTOP)
    os.kill(first[0], signal.SIGKILL)
    reports = wait_until(lambda: len(job.all_reports()) == 2 and job.all_reports(), "the ends of the others")
    launcher.signal(signal.SIGCONT)
    assert [(reports[rank]["cause"], reports[rank]["exit_code"]) for rank in (1, 2)] == [("lost", 143)] * 2
    pids(launcher, attempt=1, world=3)
    assert launcher.wait() == 0, launcher.transcript()
    assert launcher.stdout.count("trained") == 3


def two_nodes(job, **options):
    """Two torchrun agents that also go on with one; in the order of their ranks."""
    port = free_port()
    nodes = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}"]
    # Once enough nodes are there, how long it waits for more.
    nodes += ["--rdzv-conf=last_call_timeout=3", "--local-addr=127.0.0.1", "--max-restarts=3"]
    agents = []
    for _ in range(2):  # the first one hosts the rendezvous
        agents.append(
            job.torchrun("attempts.py", "steps", ranks=1, nodes=nodes, **OWN_STORE, **PATIENT, **options)
        )
        wait_until(lambda: listening(port), "the rendezvous")
    return agents


def listening(port):
    with open("/proc/net/tcp") as v4, open("/proc/net/tcp6") as v6:
        return f":{port:04X} " in v4.read() + v6.read()


@pytest.mark.slow
def test_torchrun_two_nodes_a_worker(job):
    """One worker is signalled: both nodes start again, and train on together."""
    agents = two_nodes(job, AUTOTEARDOWN_EXIT_CODE="signal")
    os.kill(pids(*agents)[1], SIGTERM)
    pids(*agents, attempt=1)
    assert [agent.wait() for agent in agents] == [0, 0], [agent.transcript() for agent in agents]
    assert all(map(trained, agents))
    assert {report["exit_code"] for report in job.all_reports().values()} == {143}


@pytest.mark.slow
def test_torchrun_two_nodes_one_goes(job):
    """A node is evicted: its agent is signalled, and signals its worker. The other one trains on alone."""
    host, other = two_nodes(job)
    pids(host, other)
    other.signal()
    assert other.wait() == 1
    pids(host, attempt=1, world=1)
    assert host.wait() == 0, host.transcript()
    assert trained(host)
    assert {report["cause"]: report["exit_code"] for report in job.all_reports().values()} == {
        "signal": 0,
        "peer": 143,
    }


# -- torch.multiprocessing.spawn ------------------------------------------------------------------------------------


def spawn(job, **options):
    """The launching process and the pids of its ranks, the first of which is blocked."""
    parent = job.start("spawned.py", fresh=True, WORLD_SIZE=2, MASTER_PORT=free_port(), **PATIENT, **options)
    ranks = [int(parent.wait_for(rf"^rank {rank} pid (\d+)$")[1]) for rank in range(2)]
    return parent, ranks


def test_spawn_a_rank(job):
    """One rank is signalled: both are released, and `spawn` raises."""
    parent, ranks = spawn(job)
    os.kill(ranks[0], SIGTERM)
    assert parent.wait() == 1
    assert "terminated with exit code 143" in parent.stderr
    reports = job.all_reports()
    assert [reports[rank]["exit_code"] for rank in range(2)] == [0, 143]


@pytest.mark.parametrize("signals, stopped", [("SIGTERM", 0), ("SIGTERM,SIGINT", 2)])
def test_spawn_the_parent(job, signals, stopped):
    """It is no rank and dies of SIGTERM; torch has the kernel send SIGINT to its children then."""
    parent, _ = spawn(job, AUTOTEARDOWN_SIGNALS=signals)
    assert parent.evict(25) == -SIGTERM
    wait_until(lambda: not job.survivors(), "the end of the ranks")
    reports = job.all_reports()
    assert len(reports) == stopped
    assert all((report["signal"], report["exit_code"]) == ("SIGINT", 0) for report in reports.values())


# -- plain python ---------------------------------------------------------------------------------------------------


def test_plain_python(job):
    """RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and an interpreter for each rank, as a Kubernetes Job has it."""
    ranks = job.world("stuck.py", fresh=True, **PATIENT)
    for rank in ranks:
        rank.wait_for("^ready$")
    ranks[0].wait_blocked("^ready$")
    assert [ranks[0].evict(25), ranks[1].outlast(25)] == [0, 143], ranks[0].transcript()
    # Rank 0 was blocked in a collective that its peer does not join any more.
    assert {rank.report()["outcome"] for rank in ranks} <= {"aborted", "partial"}


def test_control_plain_python(job):
    """The hand-written handler does not run while the rank is blocked, and its peer is never told."""
    ranks = job.world("stuck.py", mode=HANDWRITTEN, fresh=True)
    for rank in ranks:
        rank.wait_for("^ready$")
    ranks[0].wait_blocked("^ready$")
    assert ranks[0].evict(3) == -signal.SIGKILL
    assert ranks[1].running


# -- a shell as PID 1 -----------------------------------------------------------------------------------------------

# Something after the command: a shell that has nothing else to do becomes the command.
SHELL = ("sh", "-c", '"$0" "$@"; echo "torchrun ended with $?"; sleep 600')


def pod(job, **options):
    """A container whose PID 1 is a shell that has started torchrun. Returns it, and what runs a command in there."""
    if not shutil.which("nsenter"):
        pytest.skip("no nsenter here")
    python = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    container = job.start("stuck.py", launcher=(*in_pid_namespace(), *SHELL), python=python, **options)
    wait_until(lambda: container.stdout.count("ready") == 2 or not container.running, "both ranks")
    (shell,) = map(int, Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split())
    os.kill(shell, SIGTERM)  # what the platform does: nobody hears it

    def inside(*command):
        env = environment(NONE, job.mark, AUTOTEARDOWN_RUNTIME_DIR=job.runtime)
        nsenter = ["nsenter", f"--target={shell}", "--pid", "--mount", sys.executable]
        return subprocess.run(
            [*nsenter, *command], env=env, capture_output=True, text=True, timeout=100, check=False
        )

    return container, inside


def test_pre_stop_drain_where_a_shell_is_pid_1(job):
    """Two ranks under torchrun, one of them blocked in a collective, and `autoteardown drain` as the hook."""
    container, inside = pod(job, **PATIENT)
    listed = inside("-m", "autoteardown", "ps").stdout
    assert listed.count(" armed ") == 2, listed
    hook = inside("-m", "autoteardown", "drain")
    # The one that was blocked is no clean stop, and both are out.
    assert (hook.returncode, hook.stderr) == (1, ""), hook
    assert hook.stdout.splitlines()[-1].endswith("of 2 left cleanly")
    container.wait_for("^torchrun ended with 0$")
    reports = job.all_reports()
    assert [reports[rank]["exit_code"] for rank in range(2)] == [0, 0]
    assert inside("-m", "autoteardown", "ps").stdout == "no armed ranks on this node\n"


def test_control_pre_stop_drain(job):
    """Without the agent there is no rank to drain: they go on until the platform's SIGKILL."""
    container, inside = pod(job, mode=NONE)
    assert inside("-m", "autoteardown", "drain").stdout == "no armed ranks on this node\n"
    with pytest.raises(AssertionError, match="waited"):
        container.wait_for("^torchrun ended", 2)


# -- mpirun ---------------------------------------------------------------------------------------------------------


def mpirun(job, *options, **env):
    """Two ranks, the first of which is blocked; their pids."""
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2", *options]
    launcher = job.start("mpi.py", launcher=command, MASTER_PORT=free_port(), **env)
    ranks = [int(launcher.wait_for(rf"^rank {rank} pid (\d+)$")[1]) for rank in range(2)]
    wait_until(lambda: launcher.stdout.count("ready") == 2 or not launcher.running, "both ranks")
    assert launcher.running, launcher.transcript()
    return launcher, ranks


def test_mpirun_a_rank(job):
    """One rank is signalled: both are released, and mpirun returns the code of the one that failed, to it."""
    launcher, ranks = mpirun(job, **PATIENT)
    os.kill(ranks[0], SIGTERM)
    assert launcher.wait() == 143, launcher.transcript()
    reports = job.all_reports()
    assert reports[1]["exit_code"] == 143
    assert (
        0 not in reports or reports[0]["exit_code"] == 0
    )  # mpirun gives it a second after the first that fails


@pytest.mark.parametrize(
    "seconds, stopped",
    [pytest.param(7, [0, 1], marks=pytest.mark.slow, id="7 s"), pytest.param(None, [], id="default")],
)
def test_mpirun_itself(job, seconds, stopped):
    """It waits, sends SIGTERM, waits as long again, and sends SIGKILL: a second each time, unless told otherwise."""
    options = ("--mca", "odls_base_sigkill_timeout", str(seconds)) if seconds else ()
    launcher, _ = mpirun(job, *options, AUTOTEARDOWN_GRACE=seconds or 25)
    launcher.signal()
    assert launcher.wait() == 1, launcher.transcript()
    wait_until(lambda: not job.survivors(), "the end of the ranks")
    reports = job.all_reports()
    assert sorted(reports) == stopped
    assert all((report["outcome"], report["exit_code"]) == ("clean", 0) for report in reports.values())
