"""Every process of a job gets the eviction signal, as SLURM, systemd and a cgroup's kill send it."""

import os
import re
import signal
import time

import pytest
from harness import AGENT, NONE, SIGTERM, alive, wait_until


def started(job, style, kind, **settings):
    (job.folder / "saved").mkdir()
    (job.folder / "tmp").symlink_to(job.public_folder())
    ranks = job.world(
        "everybody.py",
        2,
        args=[style, kind],
        SAVED=job.folder / "saved",
        TMPDIR=(job.folder / "tmp").resolve(),
        AUTOTEARDOWN_GRACE=25,
        **settings,
    )
    for rank in ranks:
        rank.wait_for("^iteration 10$")
    return ranks


def signal_everybody(job, times=1):
    for _ in range(times):
        for pid in job.survivors():
            try:
                os.kill(pid, SIGTERM)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("style", "kind"),
    [
        ("flag", "fork"),
        ("polls", "spawn"),
        ("callback", "fork"),
        ("callback", "forkserver"),
        ("polls", "pool"),
        ("callback", "writer"),
        ("polls", "writer"),
    ],
)
def test_all_ranks_save_after_the_same_iteration(job, style, kind):
    ranks = started(job, style, kind)
    if kind == "writer":
        ranks[0].wait_for("^writing$")
    signal_everybody(job, times=2)
    for rank in ranks:
        assert rank.outlast(25) == 0, rank.transcript()
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert rank.noise == [], rank.transcript()
    saved = {path.name: path.read_text().split() for path in (job.folder / "saved").iterdir()}
    if kind == "writer":
        assert saved.pop("whole") == ["0"] * 20, saved
    assert saved.keys() == {"0", "1"}
    assert saved["0"] == saved["1"] and len(saved["0"]) == 1, saved
    wait_until(lambda: not job.survivors(), "the end of all processes", 10)
    assert list((job.folder / "tmp").glob("pymp-*")) == []


FAMILY = """
import ctypes, multiprocessing, os, signal, sys, time
import torch.distributed as dist

def child(how):
    if how == "own handler":
        signal.signal(signal.SIGTERM, lambda *args: (print("own", flush=True), os._exit(5)))
    if how == "default again":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("child up", os.getpid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
    if how == "stuck":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    while True:
        time.sleep(0.01)

if __name__ == "__main__":
    method, how, then = sys.argv[1:]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process = multiprocessing.get_context(method).Process(target=child, args=[how])
    process.start()
    if then == "keeps":
        signal.signal(signal.SIGTERM, lambda *args: print("kept", flush=True))
        print("ready", flush=True)
    if then == "terminates":
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.01)
        process.terminate()
    process.join()
    print("it ended with", process.exitcode, flush=True)
    if then != "terminates":
        time.sleep(3600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize(
    ("how", "code"), [("plain", -15), ("own handler", 5), ("default again", -15), ("stuck", -9)]
)
def test_a_child_that_its_rank_terminates_ends(job, method, how, code):
    """As without the agent, but for one that is stuck in C: SIGKILL ends it."""
    seen = []
    for mode in (AGENT, NONE):
        go = job.folder / f"go-{mode}"
        rank = job.start(FAMILY, method, how, "terminates", mode=mode, GO=go)
        child = rank.wait_for(r"^child up (\d+) (\w+)$")
        time.sleep(0.3 if how == "stuck" else 0)  # so that it is
        go.touch()
        assert rank.wait() == 0, rank.transcript()
        seen.append((child[2], rank.wait_for(r"^it ended with (-?\d+)$")[1]))
    assert seen[0] == (seen[1][0], str(code))
    assert seen[1] == (seen[1][0], str(-15 if how == "stuck" else code))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_that_its_rank_terminates_in_an_eviction_ends(job, method):
    """The rank has got the signal, too: but it is the rank that has sent the child's."""
    program = FAMILY.replace('print("kept", flush=True)', "process.terminate()")
    rank = job.start(program, method, "plain", "keeps", AUTOTEARDOWN_GRACE=25)
    rank.wait_for("^child up")
    rank.wait_for("^ready")
    rank.signal()
    assert rank.wait_for(r"^it ended with (-?\d+)$")[1] == "-15"


ENDING = """
import multiprocessing, os, signal, sys, time
import torch
import torch.distributed as dist

class Slow:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"shutting down\\n")
        sleep(1)

def be_slow(*args):
    sys.modules["slow"] = Slow()

if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    signal.signal(signal.SIGTERM, lambda *args: print("rank signalled", flush=True))
    if sys.argv[1] == "os.fork":
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            be_slow()
            sys.exit(0)
        code = os.waitpid(pid, 0)[1]
    elif sys.argv[1] == "worker":
        batches = iter(torch.utils.data.DataLoader(
            torch.ones(4), num_workers=1, multiprocessing_context="spawn", worker_init_fn=be_slow))
        list(batches)
        code = batches._workers[0].exitcode
    else:
        child = multiprocessing.get_context("spawn").Process(target=be_slow)
        child.start()
        child.join()
        code = child.exitcode
    print("it ended with", code, flush=True)
"""


@pytest.mark.parametrize("how", ["os.fork", "spawn", "worker"])
def test_a_child_in_its_interpreter_shutdown_does_not_die_of_it(job, how):
    """There, Python has put the default action back."""
    rank = job.start(ENDING, how, fresh=True, AUTOTEARDOWN_GRACE=25)
    rank.wait_for("^shutting down$")
    signal_everybody(job)
    rank.wait_for("^rank signalled$")
    assert rank.wait_for(r"^it ended with (-?\d+)$")[1] == "0", rank.transcript()


@pytest.mark.parametrize("how", ["plain", "own handler", "stuck"])
def test_everybody_is_killed_with_the_rank(job, how):
    """No orphan, whatever ends the rank; a child that is stuck in C, and no DataLoader worker, stays."""
    rank = job.start(FAMILY, "fork", how, "keeps", AUTOTEARDOWN_GRACE=25)
    child = int(rank.wait_for(r"^child up (\d+)")[1])
    rank.wait_for("^ready")
    signal_everybody(job)
    if how == "own handler":
        rank.wait_for("^it ended with 5$")
    else:
        rank.wait_for("^kept$")
        time.sleep(1)
        assert alive(child), rank.transcript()
        rank.signal(signal.SIGKILL)
        rank.wait()
    if how == "stuck":
        assert alive(child)
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not alive(child), "the child's end")


def test_what_a_child_starts_is_left_alone(job):
    """A program that a child of the rank has started ends of SIGTERM at once."""
    rank = job.start(
        """
        import multiprocessing, subprocess, time
        import torch.distributed as dist

        def child():
            process = subprocess.Popen(["sleep", "3600"])
            print("sleep is", process.pid, flush=True)
            print("it ended with", process.wait(), flush=True)
            time.sleep(3600)

        if __name__ == "__main__":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            multiprocessing.get_context("fork").Process(target=child).start()
            time.sleep(3600)
        """
    )
    os.kill(int(rank.wait_for(r"^sleep is (\d+)$")[1]), SIGTERM)
    rank.wait_for("^it ended with -15$")


def test_os_kill_cannot_be_told_from_the_original(job):
    rank = job.start(
        """
        import copy, inspect, os, pickle, posix
        import torch.distributed as dist
        real = os.kill
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert os.kill is not real and os.kill is posix.kill
        assert pickle.loads(pickle.dumps(os.kill)) is os.kill and copy.copy(os.kill) is os.kill
        assert repr(os.kill) == repr(real) and inspect.isbuiltin(os.kill) and os.kill.__doc__ == real.__doc__
        for wrong in ((), (1,), ("a", 1), (1, 2, 3), (1 << 40, 15), (-(1 << 31), 15)):
            problems = []
            for function in (os.kill, real):
                try:
                    function(*wrong)
                except Exception as error:
                    problems.append(repr(error))
            assert len(problems) == 2 and problems[0] == problems[1], problems
        print("same", flush=True)
        """
    )
    rank.wait_for("^same$")
    assert rank.wait() == 0, rank.transcript()


def test_workers_stay_in_the_process_group_of_their_rank(job):
    """Ctrl-C and Ctrl-Z of a terminal go to that group."""
    (rank,) = job.world("loader.py", 1, "fork", 2)
    rank.wait_for("^step 3$")
    workers = [int(pid) for pid in re.findall(r"^worker (\d+)", rank.stdout, re.MULTILINE)]
    assert {os.getpgid(worker) for worker in workers} == {os.getpgid(rank.pid)}
    rank.signalled = time.monotonic()
    os.killpg(rank.pid, SIGTERM)
    assert rank.outlast() == 0, rank.transcript()
    assert rank.noise == [] and rank.report()["outcome"] == "clean", rank.transcript()
