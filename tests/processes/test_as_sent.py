"""Signals as platforms really send them (twice, to slow jobs, at a PID limit), and programs that end by themselves."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from harness import PROGRAMS
from programs import pid_limit

from autoteardown.node import drain
from autoteardown.timeline import reports, summary

ROOMY = {"AUTOTEARDOWN_GRACE": 30}


def started(job, style, seconds=0.01, iteration=10, **settings):
    """Two ranks that have made some iterations."""
    saved = job.folder / "saved"
    saved.mkdir()
    ranks = job.world("as_sent.py", 2, args=[style, seconds], SAVED=saved, **{**ROOMY, **settings})
    for rank in ranks:
        rank.wait_for(rf"^iteration {iteration}$")
    return ranks


def saved(job):
    """The iterations after which each rank has saved."""
    return {path.name: path.read_text().split() for path in (job.folder / "saved").iterdir()}


def assert_saved_together(job, *ranks):
    found = saved(job)
    assert found.keys() == {"0", "1"}, "\n".join(rank.transcript() for rank in ranks)
    assert found["0"] == found["1"] and len(found["0"]) == 1, found


@pytest.mark.parametrize("style", ["flag", "polls", "callback"])
def test_every_rank_is_signalled_twice(job, style):
    """SLURM's time limit, with one rank an iteration ahead of the other."""
    ranks = started(job, style, 0.3)
    for _ in range(2):
        for rank in ranks:
            rank.signal()
        time.sleep(0.02)
    codes = [rank.outlast(25) for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.transcript() for rank in ranks)
    assert_saved_together(job, *ranks)
    if style == "flag":
        assert all("signals 1\n" in rank.stdout for rank in ranks)


def long_iterations(seconds, grace):
    """In `.ci/run` only what was too long for 0.2, with one style."""
    usual = seconds == 10
    return [
        pytest.param(style, seconds, grace, marks=[] if usual and style == "flag" else pytest.mark.slow)
        for style in ("flag", "polls", "callback")
    ]


@pytest.mark.parametrize(
    ("style", "seconds", "grace"),
    [*long_iterations(2, 25), *long_iterations(10, 60), *long_iterations(40, 110)],
)
def test_long_iterations(job, style, seconds, grace):
    """Uneven, too: the second rank is an iteration ahead of the first, and waits for its gradients."""
    ranks = started(job, style, seconds, iteration=2, AUTOTEARDOWN_GRACE=grace)
    ranks[1].signal()
    for rank, code in zip(ranks, (143, 0) if style == "callback" else (0, 0)):
        assert rank.outlast(grace) == code, rank.transcript()
    assert_saved_together(job, *ranks)
    if seconds > 2:
        waits = re.compile(r"waits for the end of iteration [34], until (\d+)\.\ds at most")
        (until,) = filter(None, map(waits.fullmatch, ranks[0].log_lines))
        assert seconds < int(until[1]) < grace


PIECES = """
import json, os, time
import torch, torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
folder = f"{os.environ['SAVED']}/{dist.get_rank()}"
os.makedirs(folder)
for step in range(10**6):
    model(torch.ones(2, 4)).sum().backward()
    time.sleep(2)
    optimizer.step()
    if step == 2:
        print("saving", flush=True)
        with open(f"{folder}/model.tmp", "wb") as file:
            torch.save(model.state_dict(), file)
        time.sleep(2)
        os.replace(f"{folder}/model.tmp", f"{folder}/model")
        torch.save(optimizer.state_dict(), f"{folder}/optimizer")
        time.sleep(1)
        with open(f"{folder}/step.json", "w") as file:
            json.dump(step, file)
"""


@pytest.mark.parametrize("timeout", ["auto", 1])
def test_a_checkpoint_in_pieces(job, timeout):
    """Written by a script's own lines, with pauses, in a loop that is slower than the time for an iteration."""
    (job.folder / "saved").mkdir()
    ranks = job.world(PIECES, 2, SAVED=job.folder / "saved", AUTOTEARDOWN_STEP_TIMEOUT=timeout, **ROOMY)
    for rank in ranks:
        rank.wait_for("^saving$")
    time.sleep(0.5)
    ranks[0].signal()
    for rank in ranks:
        rank.outlast(30)
    for number, rank in enumerate(ranks):
        found = sorted(path.name for path in (job.folder / f"saved/{number}").iterdir())
        assert found == ["model", "optimizer", "step.json"], rank.transcript()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_in_c_that_chains(job, when):
    """It chains to the default action, or to the agent's: the stop goes on."""
    ranks = started(job, "callback", CHAIN=when)
    ranks[0].signal()
    assert [rank.outlast(28) for rank in ranks] == [0, 143], ranks[0].transcript()
    assert "as_sent.py" in ranks[0].stderr, "no stacks"
    assert ranks[0].report()["outcome"] in ("clean", "partial")


@pytest.mark.parametrize("style", ["flag", "polls"])
def test_a_program_that_ends_by_itself_leaves_a_report(job, style):
    ranks = started(job, style)
    ranks[0].signal()
    for rank in ranks:
        assert rank.outlast(25) == 0, rank.transcript()
        report = rank.report()
        assert (report["ended_by"], report["exit_code"], report["outcome"]) == ("application", 0, "clean")
    assert_saved_together(job, *ranks)


@pytest.mark.parametrize(("style", "code"), [("flag", 143), ("polls", 143), ("raises", 1)])
def test_a_half_trained_job_is_not_completed(job, style, code):
    """With an exit code set, a program that ends by itself with 0 exits with it; its own other code stays."""
    ranks = started(job, style, AUTOTEARDOWN_EXIT_CODE="signal", AUTOTEARDOWN_PEER_EXIT_CODE="143")
    ranks[0].signal()
    codes = {rank.outlast(25) for rank in ranks}
    assert codes == {code}, ranks[0].transcript()


def test_an_uncaught_exception_is_no_success(job):
    ranks = started(job, "raises")
    ranks[0].signal()
    assert all(rank.outlast(25) != 0 for rank in ranks), ranks[0].transcript()


def test_a_failed_callback_is_known_to_every_rank(job):
    log = [job.folder / f"termination-{rank}" for rank in range(2)]
    for path in log:
        path.touch()
    each = {rank: {"AUTOTEARDOWN_TERMINATION_LOG": path} for rank, path in enumerate(log)}
    (job.folder / "saved").mkdir()
    ranks = job.world(
        "as_sent.py", 2, each=each, args=["callback", 0.01], SAVED=job.folder / "saved", FAILS=1, **ROOMY
    )
    for rank in ranks:
        rank.wait_for("^iteration 10$")
    ranks[0].signal()
    for rank, path in zip(ranks, log):
        rank.outlast(25)
        why = "rank 1: on_teardown callback failed: OSError: disk full"
        assert f"done: partial ({why}" in rank.stderr, rank.transcript()
        assert why in path.read_text().splitlines()[0]
        assert rank.report()["outcome"] == "partial"


def test_a_failed_callback_is_in_the_verdict(job):
    """Of a drain, for each rank, and of the timeline."""
    (job.folder / "saved").mkdir()
    ranks = job.world("as_sent.py", 2, args=["callback", 0.01], SAVED=job.folder / "saved", FAILS=1, **ROOMY)
    for rank in ranks:
        rank.wait_for("^iteration 10$")
    drained, _ = drain.drain(str(job.runtime), signal.SIGTERM, 30, print)
    why = "rank 1: on_teardown callback failed: OSError: disk full"
    for result in drained:
        assert result.outcome == "partial" and why in result.detail
        assert f": partial ({why}" in result.line()
    ((stop,), _) = reports.read(job.reports)
    assert why in summary.sentence(stop)


def test_a_long_callback_is_clean(job):
    """Longer than the others need to drain and abort."""
    ranks = started(job, "callback", AUTOTEARDOWN_GRACE=45, CALLBACK=22)
    ranks[0].signal()
    for rank in ranks:
        rank.outlast(45)
        assert rank.report()["outcome"] == "clean", rank.transcript()
    assert_saved_together(job, *ranks)


def limited(spare):
    """In `.ci/run` all kinds of programs where no thread is left, and one where some are."""
    return [
        pytest.param(style, how, spare, marks=[] if spare == 0 or style == "callback" else pytest.mark.slow)
        for how in ("rlimit", "cgroup")
        for style in ("flag", "polls", "callback")
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="a user or a cgroup of its own for each rank: root only")
@pytest.mark.parametrize(("style", "how", "spare"), [*limited(0), *limited(1), *limited(2)])
def test_no_thread_can_be_started(job, style, how, spare):
    """A container at its PID limit: the application's handler runs, peers are told, all save."""
    if how == "cgroup" and pid_limit.hierarchy() is None:
        pytest.skip("no pids cgroup can be made here")
    folder = job.public_folder()
    (job.folder / "saved").symlink_to(folder)
    # A forked rank would have its fork server's user.
    settings = {"fresh": how == "rlimit", "LIMIT": f"{how}:{spare}", **ROOMY}
    ranks = job.world("as_sent.py", 2, args=[style, 0.01], SAVED=folder, **settings)
    for rank in ranks:
        rank.wait_for("^limited$")
        rank.wait_for("^iteration 10$")
    ranks[0].signal()
    codes = [rank.outlast(25) for rank in ranks]
    pid_limit.remove_cgroups(rank.pid for rank in ranks)
    assert codes == ([0, 143] if style == "callback" else [0, 0]), "\n".join(
        rank.transcript() for rank in ranks
    )
    assert_saved_together(job, *ranks)


def test_a_framework_that_cannot_be_hooked_is_no_clean_stop(job):
    """A version of Accelerate that has another class: its checkpoint is not saved."""
    (job.folder / "accelerate").mkdir()
    (job.folder / "accelerate" / "__init__.py").write_text(
        "import torch\nfrom accelerate import accelerator\n"
    )
    (job.folder / "accelerate" / "accelerator.py").write_text("")
    rank = job.start(
        """
        import accelerate, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """,
        fresh=True,
        PYTHONPATH=job.folder,
        AUTOTEARDOWN_CHECKPOINT="on",
    )
    rank.wait_for("^ready$")
    assert "saves nothing: accelerate.accelerator cannot be hooked" in rank.stderr
    rank.evict()
    assert rank.report()["outcome"] == "partial", rank.transcript()
    assert "accelerate.accelerator cannot be hooked" in rank.report()["why"]


NO_FILES = """
import builtins, os, sys

# No file descriptor is left after ten iterations, but one for the program's own checkpoint.
source = open(os.environ["PROGRAM"]).read().replace('print(f"iteration', 'done == 10 and exhaust(); print(f"iteration')
sys.argv = ["as_sent.py", sys.argv[1], "0.01"]
taken = []


def exhaust():
    while not autoteardown.status()["connected"]:
        time.sleep(0.01)
    dist.barrier()
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass


def open(*args):
    os.close(taken.pop())
    return builtins.open(*args)


import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
sys.path.insert(0, os.path.dirname(os.environ["PROGRAM"]))
exec(compile(source, os.environ["PROGRAM"], "exec"))
"""


@pytest.mark.parametrize("style", ["flag", "callback"])
def test_no_file_can_be_opened(job, style):
    """EMFILE at the signal: all save; reports cannot be written, and a line says so."""
    (job.folder / "saved").mkdir()
    program = {"SAVED": job.folder / "saved", "PROGRAM": PROGRAMS / "as_sent.py"}
    ranks = job.world(NO_FILES, 2, style, fresh=True, **program, **ROOMY)
    for rank in ranks:
        rank.wait_for("^iteration 10$")
    ranks[0].signal()
    codes = [rank.outlast(25) for rank in ranks]
    assert codes == ([0, 143] if style == "callback" else [0, 0]), ranks[0].transcript()
    assert_saved_together(job, *ranks)


# In a mount namespace of its own: $1 is the folder, the rest the program.
FULL = 'mount -t tmpfs -o size=8k none "$1" && head -c 8192 /dev/zero > "$1/full"; shift; exec "$@"'
READ_ONLY = 'mount -t tmpfs -o ro none "$1" && shift; exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: root only")
@pytest.mark.parametrize("how", [FULL, READ_ONLY], ids=["full", "read-only"])
@pytest.mark.parametrize("style", ["flag", "callback"])
def test_nothing_can_be_written(job, style, how):
    """A disk that is full, or read-only: for registry, reports, termination log and temporary files alike."""
    disk = job.folder / "disk"
    for folder in (disk, job.folder / "saved"):
        folder.mkdir()
    names = ("AUTOTEARDOWN_RUNTIME_DIR", "AUTOTEARDOWN_REPORT_DIR", "AUTOTEARDOWN_TERMINATION_LOG", "TMPDIR")
    ranks = job.world(
        "as_sent.py",
        2,
        style,
        0.01,
        launcher=("unshare", "-m", "sh", "-c", how, "sh", str(disk)),
        SAVED=job.folder / "saved",
        **dict.fromkeys(names, disk),
        **ROOMY,
    )
    for rank in ranks:
        rank.wait_for("^iteration 10$")
    ranks[0].signal()
    codes = [rank.outlast(25) for rank in ranks]
    assert codes == ([0, 143] if style == "callback" else [0, 0]), ranks[0].transcript()
    assert_saved_together(job, *ranks)
    assert list(job.reports.iterdir()) == []
    assert "not written" in ranks[0].stderr, ranks[0].transcript()
