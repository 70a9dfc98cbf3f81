"""Child processes are not ranks, unless they become ranks."""

import os
import re
import signal
import time

import pytest
from harness import AGENT, GRACE, NONE, SIGTERM, alive, wait_until

KINDS = ["fork", "early", "spawn", "forkserver", "popen"]


def anonymous(rank):
    """What it printed, without what differs between two runs of the same program."""
    lines = sorted((rank.stdout + rank.stderr).splitlines())
    return [re.sub(r"\b\d{2,}\b|0x[0-9a-f]+", "N", line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_dies_as_without_us(job, kind):
    """`kill -TERM` to a child: it dies of it, and the parent sees what it would see without the agent."""
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start("family.py", kind, mode=mode)
        rank.wait_for("child up")
        child = int(rank.wait_for(r"^child (\d+)$")[1])
        os.kill(child, SIGTERM)
        rank.wait_for("^group")
        seen.append(anonymous(rank))
        assert not alive(child)
        assert rank.running, rank.transcript()
        if mode == AGENT:
            # The parent is as well guarded as before; its own teardown is not confused by the child's death.
            assert rank.evict() == 0, rank.transcript()
            assert rank.report()["outcome"] == "clean", rank.transcript()
    assert seen[0] == seen[1]
    assert "it ended with -N" in seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_reports_nothing(job, kind):
    """A rank with a living child is evicted: one report, the rank's; the child is the platform's business."""
    rank = job.start("family.py", kind)
    rank.wait_for("child up")
    child = int(rank.wait_for(r"^child (\d+)$")[1])
    assert rank.evict() == 0, rank.transcript()
    assert [path.name.split("-")[-2] for path in job.reports.iterdir()] == [str(rank.pid)]
    assert len([line for line in rank.stderr.splitlines() if " done: " in line]) == 1
    assert alive(child)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_worker_killed_alone(job, context):
    """SIGTERM to a DataLoader worker alone kills it within a second, and its parent as without the agent."""
    for mode in (AGENT, NONE):
        (rank,) = job.world("loader.py", 1, context, 1, mode=mode)
        rank.wait_for("^step 3$")
        worker = int(re.search(r"^worker (\d+)$", rank.stdout, re.MULTILINE)[1])
        sent = time.monotonic()
        os.kill(worker, SIGTERM)
        wait_until(lambda: not alive(worker), "the worker's end")  # noqa: B023
        assert time.monotonic() - sent < 3  # 1 s, and room for a busy machine
        assert rank.wait() == 1, rank.transcript()
        assert not list(job.reports.iterdir()), rank.transcript()
        # torch raises the one or the other, whichever it notices first.
        died = r"DataLoader worker .* (killed by signal: Terminated|exited unexpectedly)|ConnectionResetError|EOFError"
        assert re.search(died, rank.stderr), rank.transcript()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_whole_process_group_signalled(job, context):
    """The workers of a rank on its way to its last step stay until it has parked."""
    ranks = job.world("loader.py", 2, context, 1 if context == "spawn" else 2)
    for rank in ranks:
        rank.wait_for("^step 3$")
    workers = [int(pid) for rank in ranks for pid in re.findall(r"^worker (\d+)$", rank.stdout, re.MULTILINE)]
    assert len(workers) == (2 if context == "spawn" else 4)
    for rank in ranks:
        rank.signalled = time.monotonic()
        os.killpg(rank.pid, SIGTERM)
    for rank in ranks:
        assert rank.outlast() == 0, rank.transcript()
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert rank.noise == [], rank.transcript()  # no "DataLoader worker is killed" traceback
    stopped = {rank.report()["steps"]["stopped_at"] for rank in ranks}
    assert len(stopped) == 1
    wait_until(lambda: not any(map(alive, workers)), "the workers' end", 10)  # their own watchdog's 5 s


def test_control_whole_process_group_signalled(job):
    """The control of the test above: a rank that wants one more batch does not get it."""
    rank = job.start(
        """
        import signal, sys, threading
        signal.signal(signal.SIGTERM, lambda *args: print("one more", flush=True))
        sys.argv[1:] = ["fork"]
        import os, torch.distributed as dist
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_PORT="0")
        import loader
        loader.main()
        """,
        mode=NONE,
    )
    rank.wait_for("^step 3$")
    os.killpg(rank.pid, SIGTERM)
    assert rank.wait() == 1, rank.transcript()
    assert "dataloader.py" in rank.stderr


@pytest.mark.parametrize("how", ["persistent", "terminated", "stuck"])
def test_workers_end_as_without_us(job, how):
    """Live at the program's end, terminated by it, or stuck in C: torch's own handler is there."""
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start("unchanged_loader.py", how, mode=mode)
        code = rank.wait()
        seen.append((code, anonymous(rank)))
    assert seen[0] == seen[1]
    assert seen[0][0] == (7 if how == "stuck" else 0), seen


def test_a_worker_stuck_in_c_goes_with_its_group(job):
    """What a launcher kills with the rank's process group ends with it, also where no bytecode runs."""
    rank = job.start("unchanged_loader.py", "abandoned")
    worker = int(rank.wait_for(r"^stuck (\d+)$")[1])
    rank.wait_for("^waiting$")
    os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
    wait_until(lambda: not alive(worker), "the worker's end", 10)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_no_worker_outlives_a_killed_rank(job, context):
    """No worker outlives its parent by more than its own watchdog's 5 s, killed in mid-teardown or not."""
    (rank,) = job.world("loader.py", 1, context, 1)
    rank.wait_for("^step 3$")
    workers = [int(pid) for pid in re.findall(r"^worker (\d+)$", rank.stdout, re.MULTILINE)]
    os.killpg(rank.pid, SIGTERM)
    rank.signal(signal.SIGKILL) if rank.running else None
    rank.wait()
    wait_until(lambda: not any(map(alive, workers)), "the workers' end", 12)


def test_a_forked_child_that_inits_is_a_rank(job):
    """A fork of a process with the agent active that calls init is armed for itself, its parent for itself."""
    parent = job.start(
        """
        import os, sys, time
        import torch.distributed as dist
        pid = os.fork()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if pid == 0:
            print("child", os.getpid(), flush=True)
            time.sleep(3600)
        print("it ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        time.sleep(3600)
        """,
        AUTOTEARDOWN_EXIT_CODE=77,
    )
    child = int(parent.wait_for(r"^child (\d+)$")[1])
    os.kill(child, SIGTERM)
    assert parent.wait_for(r"^it ended with (-?\d+)$")[1] == "77", parent.transcript()
    assert list(job.reports.glob(f"*-{child}-*.json"))
    assert parent.evict() == 77, parent.transcript()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_started_by_multiprocessing(job, method):
    """`torch.multiprocessing` ranks: each is armed; the parent, which never calls init, is not a rank."""
    parent = job.start(
        """
        import os, sys, time
        import torch.distributed as dist
        import torch.multiprocessing as mp

        def train(rank):
            dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=rank, world_size=2)
            dist.barrier()
            print("rank", rank, "pid", os.getpid(), flush=True)
            while True:
                time.sleep(0.01)

        if __name__ == "__main__":
            context = mp.start_processes(train, nprocs=2, join=False, start_method=sys.argv[1])
            for process in context.processes:
                process.join()
            print("codes", sorted(process.exitcode for process in context.processes), flush=True)
        """,
        method,
    )
    first = int(parent.wait_for(r"^rank 0 pid (\d+)$")[1])
    parent.wait_for(r"^rank 1 pid")
    os.kill(first, SIGTERM)
    parent.wait_for(r"^codes \[0, 143\]$")
    assert parent.wait() == 0, parent.transcript()
    assert sorted(job.all_reports()) == [0, 1]


def test_many_forks_while_evicted(job):
    """A rank that forks all the time is evicted: no child tears down, the rank's own exit is right."""
    rank = job.start(
        """
        import os
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        count = 0
        while True:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            count += 1
            if count == 20:
                print("ready", flush=True)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert len(list(job.reports.iterdir())) == 1


def test_signal_to_the_group_of_a_rank_with_children(job):
    """`kill -TERM -- -PGID`, as shells and launchers do it: the rank tears down, its plain children just die."""
    rank = job.start("family.py", "fork")
    rank.wait_for("child up")
    child = int(rank.wait_for(r"^child (\d+)$")[1])
    rank.signalled = time.monotonic()
    os.killpg(rank.pid, SIGTERM)
    assert rank.outlast(GRACE) == 0, rank.transcript()
    wait_until(lambda: not alive(child), "the child's end")
    assert rank.report()["outcome"] == "clean"


@pytest.mark.parametrize("kind", ["idle", "pool", "spawned", "log", "busy"])
def test_a_helper_is_no_writer(job, kind):
    """Of the processes that a program has started, only one that writes a checkpoint is waited for."""
    ranks = job.world("helpers.py", 2, kind, AUTOTEARDOWN_GRACE=16)
    for rank in ranks:
        rank.wait_for("^helper up$")
        rank.wait_for("^step 3$")
    time.sleep(5.5 if kind == "busy" else 0)  # who computes might be on its way to a file for its first 5 s
    ranks[0].signal()
    for rank in ranks:
        rank.signalled = ranks[0].signalled
        assert rank.outlast(16) == (0 if rank is ranks[0] else 143), rank.transcript()
        report = rank.report()
        assert report["outcome"] == "clean", rank.transcript()
        assert [phase["outcome"] for phase in report["phases"] if phase["name"] == "park"] == ["ok"]
