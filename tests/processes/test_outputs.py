"""The outputs of a teardown: log lines, JSON report, termination log; and a teardown that cannot write them."""

import json
import os
import re
import socket
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from harness import AGENT, GRACE, HANDWRITTEN, LOG_LINE, NONE, SHORT, SIGTERM, wait_until

from autoteardown.node import registry

FIELDS = {
    "schema", "host", "pid", "program", "rank", "local_rank", "world_size", "backend", "python", "torch", "cause",
    "signal", "origin", "received_at", "phases", "steps", "stuck", "outcome", "exit_code",
}  # fmt: skip
PHASES = ("yield", "step", "park", "drain", "quiet", "destroy", "abort", "exit")


def evicted(job, program="train.py", **settings):
    """Rank 0 of two, evicted; the other rank."""
    ranks = job.world(program, **settings)
    ranks[0].wait_for("step 3$") if program == "train.py" else ranks[0].wait_blocked("ready")
    assert ranks[0].evict() == 0, ranks[0].transcript()
    ranks[1].signalled = ranks[0].signalled
    assert ranks[1].outlast() == 143, ranks[1].transcript()
    return ranks


def test_the_lines_in_the_readme_are_those_of_a_stop(job):
    """But for numbers, times and names."""
    shown = (
        (Path(__file__).parents[2] / "README.md")
        .read_text("utf-8")
        .partition("```text\n")[2]
        .partition("```")[0]
    )

    def without_numbers(text):
        return [
            re.sub(
                r"\([^()]*Z[^()]*\)", "(when)", re.sub(r"\d+(\.\d+)?s?", "0", LOG_LINE.match(line)["text"])
            )
            for line in text.splitlines()
        ]

    rank = evicted(job)[0]
    assert without_numbers(shown) == without_numbers(rank.stderr)


def test_log_lines(job):
    """The log line: fixed prefix and fields, `+` seconds since the signal, the last line sums up."""
    for index, rank in enumerate(evicted(job)):
        lines = [LOG_LINE.match(line) for line in rank.stderr.splitlines()]
        assert all(lines), rank.stderr
        for line in lines:
            assert (line["rank"], line["world"]) == (str(index), "2")
            assert line["pid"] == str(rank.pid)
            assert line["host"] == socket.gethostname()
        seconds = [float(line["seconds"]) for line in lines]
        assert seconds == sorted(seconds)
        stopped = rank.report()["steps"]["stopped_at"]
        code = rank.report()["exit_code"]
        assert lines[-1]["text"] == f"done: clean, stopped at step {stopped}, exit {code}"
        assert re.match(
            r"drain ok \(\d+\.\d\ds\)", next(text for text in rank.log_lines if text.startswith("drain"))
        )


@pytest.mark.parametrize("program", ["train.py", "stuck.py"])
def test_report(job, program):
    """The report: the fields of the contract, with sensible values, on the clean and the wedged path."""
    before = datetime.now(timezone.utc)
    ranks = evicted(job, program)
    for index, rank in enumerate(ranks):
        report = rank.report()
        assert set(report) >= FIELDS
        assert report["schema"] == 2
        assert (report["host"], report["pid"]) == (socket.gethostname(), rank.pid)
        assert (report["rank"], report["local_rank"], report["world_size"]) == (index, index, 2)
        assert report["backend"] == "gloo"
        assert report["python"] == sys.version.split()[0]
        assert report["torch"].startswith("2.")
        assert (report["cause"], report["signal"]) in (("signal", "SIGTERM"), ("peer", None)), report
        assert report["cause"] == ("peer" if index else "signal")
        assert report["origin"] == {"rank": 0, "host": socket.gethostname(), "pid": ranks[0].pid}
        received = datetime.fromisoformat(report["received_at"].replace("Z", "+00:00"))
        assert before <= received <= datetime.now(timezone.utc)
        names = [phase["name"] for phase in report["phases"]]
        assert len(set(names)) == len(names)
        at = 0.0
        for phase in report["phases"]:
            assert set(phase) == {"name", "start", "end", "outcome", "detail"}
            assert phase["name"] in PHASES
            assert phase["outcome"] in ("ok", "skipped", "timeout", "error"), phase
            assert at <= phase["start"] <= phase["end"] <= GRACE
            at = phase["start"]
        assert report["exit_code"] == (143 if index else 0)
        if program == "train.py":
            assert report["outcome"] == "clean"
            assert set(report["steps"]) == {"at_signal", "agreed", "stopped_at"}
        else:
            assert report["steps"] is None
    assert not [
        path.name
        for path in job.reports.iterdir()
        if not re.fullmatch(r".+-\d+-\d{8}T\d{6}Z(\.json|-gloo\.trace)", path.name)
    ]


def test_program_in_the_report(job):
    """The report says which program it was."""
    assert "train.py" in evicted(job)[0].report()["program"]


def test_stacks_of_what_was_in_the_way(job):
    """`stuck` holds the stacks of the threads that were in the way."""
    rank = evicted(job, "stuck.py")[0]
    assert "all_reduce" in json.dumps(rank.report()["stuck"])
    assert "stuck.py" in json.dumps(rank.report()["stuck"])


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("program", ["train.py", "stuck.py"])
def test_termination_log(job, program, exists):
    """The termination log gets the same lines in at most 4,096 bytes of text, if the file exists."""
    path = job.folder / "termination-log"
    if exists:
        path.touch()
    rank = evicted(job, program, each={0: {"AUTOTEARDOWN_TERMINATION_LOG": path}})[0]
    assert path.exists() == exists
    if exists:
        text = path.read_text()
        assert 0 < len(text.encode()) <= 4096
        assert "exit" in text
        assert rank.report()["outcome"] in text


@pytest.mark.parametrize("level", ["quiet", "info", "debug"])
def test_log_levels(job, level):
    """AUTOTEARDOWN_LOG: `quiet` says nothing; `debug` is still one line an event."""
    rank = evicted(job, AUTOTEARDOWN_LOG=level)[0]
    assert bool(rank.log_lines) == (level != "quiet"), rank.stderr
    assert rank.noise == []


def test_a_bad_setting_is_said_once(job):
    """A bad value is one line that names variable, value and what is allowed; the default is used."""
    rank = evicted(job, AUTOTEARDOWN_STEP_TIMEOUT="soon", AUTOTEARDOWN_LOG="loud")[0]
    for variable, value in ("AUTOTEARDOWN_STEP_TIMEOUT", "soon"), ("AUTOTEARDOWN_LOG", "loud"):
        lines = [line for line in rank.stderr.splitlines() if variable in line]
        assert len(lines) == 1, rank.stderr
        assert value in lines[0]
    assert rank.report()["outcome"] == "clean"


def test_a_bad_setting_is_said_once_by_a_fresh_process(job):
    """The same with the whole way from the interpreter's start on, in a program that does nothing else."""
    rank = job.start("import signal, torch.distributed\n", fresh=True, AUTOTEARDOWN_GRACE="-3")
    assert rank.wait() == 0
    assert rank.stderr.count("AUTOTEARDOWN_GRACE") <= 1, rank.stderr


STDERR = {
    "closed": "os.close(2)",
    "a broken pipe": "ours, theirs = os.pipe(); os.dup2(theirs, 2); os.close(theirs); os.close(ours)",
    "a full pipe": """
ours, theirs = os.pipe()
os.set_blocking(theirs, False)
try:
    while True:
        os.write(theirs, b"x" * 4096)
except BlockingIOError:
    pass
os.set_blocking(theirs, True)
os.dup2(theirs, 2)
""",
    "a full device": "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "a read-only file": "os.dup2(os.open('/dev/null', os.O_RDONLY), 2)",
    "sys.stderr is None": "sys.stderr = sys.stdout = None",
    "a stderr that raises": """
class Raises:
    def write(self, text): raise OSError("broken")
    def flush(self): raise OSError("broken")
sys.stderr = Raises()
""",
}


@pytest.mark.parametrize("program", ["loop", "blocked"])
@pytest.mark.parametrize("stderr", STDERR)
def test_broken_stderr(job, stderr, program):
    """Stderr closed, a full pipe that nobody reads: right exit code, inside the grace period."""
    end = "while True:\n    time.sleep(0.01)\n" if program == "loop" else "dist.new_group([0, 1])\n"
    rank, *_ = job.world(
        "import os, sys, time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "os.write(1, b'ready\\n')\n"
        "if dist.get_rank(): time.sleep(3600)\n" + STDERR[stderr] + "\nos.write(1, b'steady\\n')\n" + end,
        1 if program == "loop" else 2,
        AUTOTEARDOWN_EXIT_CODE="signal",  # unslothai/unsloth#9083: print raised, the exit became 0
        AUTOTEARDOWN_PEERS="off",
    )
    rank.wait_for("steady") if program == "loop" else rank.wait_blocked("steady")
    assert rank.evict() == 128 + SIGTERM, rank.transcript()
    assert rank.report()["exit_code"] == 128 + SIGTERM


@pytest.mark.parametrize("mode", [AGENT, HANDWRITTEN])
def test_logging_lock_is_held(job, mode):
    """A logging handler whose lock is held by a thread that never lets go."""
    rank = job.start(
        """
        import logging, os, threading, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        class Never(logging.Handler):
            def emit(self, record):
                os.write(1, b"ready\\n")
                time.sleep(3600)
        root = logging.getLogger()
        root.handlers[:] = [Never()]
        root.setLevel(0)
        threading.Thread(target=root.warning, args=["x"], daemon=True).start()
        while True:
            time.sleep(0.01)
        """,
        mode=mode,
    )
    rank.wait_for("ready")
    grace = GRACE if mode == AGENT else SHORT
    assert rank.evict(grace) in ((0,) if mode == AGENT else (0, -9)), rank.transcript()


@pytest.mark.parametrize("where", ["/dev/null/reports", "/proc/reports", "missing/folder", "file"])
def test_unwritable_report_folder(job, where):
    """An unwritable report folder: right exit code; said once, if at all; a missing folder is made."""
    (job.folder / "file").touch()
    ranks = evicted(job, AUTOTEARDOWN_REPORT_DIR=where if where[0] == "/" else job.folder / where)
    for rank in ranks:
        assert "Traceback" not in rank.stderr
        assert "done: clean" in rank.log_lines[-1], rank.stderr
    if where == "missing/folder":
        assert len(list((job.folder / where).glob("*.json"))) == 2


def test_a_cleaner_of_tmp(job):
    """Each day a rank writes its entry anew: what removes old files from /tmp hides it from `drain` no longer."""
    rank = job.start(
        """
        import time
        import torch.distributed as dist
        import autoteardown.event_loop.loop as loop
        loop.DAY = 0.2
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """
    )
    rank.wait_for("ready")
    (entry,) = job.runtime.glob("*.json")
    entry.unlink()
    wait_until(entry.exists, "the entry")
    assert rank.evict() == 0, rank.transcript()


@pytest.mark.parametrize("where", ["/dev/null/runtime", "/proc/runtime", "file", "someone else's"])
def test_unusable_runtime_folder(job, where):
    """Without a registry the rank is guarded all the same."""
    path = where if where[0] == "/" else job.folder / where
    if where == "file":
        path.touch()
    if where == "someone else's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        path.mkdir()
        os.chown(path, 12345, 12345)
    for rank in evicted(job, AUTOTEARDOWN_RUNTIME_DIR=path):
        assert rank.report()["outcome"] == "clean"
        assert "Traceback" not in rank.stderr


def test_disk_full(job):
    """A report that cannot be written to the end leaves no half one, and the exit code is right."""
    rank = job.start(
        """
        import os, resource, signal, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        print("steady", flush=True)
        while True:
            time.sleep(0.01)
        """
    )
    rank.wait_for("steady")
    assert rank.evict() == 0, rank.transcript()
    assert not list(job.reports.glob("*.json"))


def test_no_fds_left(job):
    """A rank that has run out of file descriptors still leaves in time with the right code."""
    (rank,) = job.world(
        """
        import os, resource, time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                os.dup(0)
        except OSError:
            os.write(1, b"ready\\n")
        while True:
            time.sleep(0.01)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


def test_no_threads_left(job):
    """A rank that cannot start another thread still leaves in time with the right code."""
    (rank,) = job.world(
        """
        import _thread, threading, time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        def refuse(*args, **kwargs):
            raise RuntimeError("can't start new thread")
        _thread.start_new_thread = threading._start_new_thread = refuse
        if hasattr(threading, "_start_joinable_thread"):
            threading._start_joinable_thread = _thread.start_joinable_thread = refuse
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


def test_stdout_is_the_programs(job):
    """Nothing of ours ever reaches stdout, teardown included."""
    for rank in evicted(job):
        assert all(re.fullmatch(r"rank \d pid \d+ step \d+", line) for line in rank.stdout.splitlines())


def test_the_first_line_comes_at_once(job):
    """A human who watches sees that the signal was taken, whatever comes after."""
    ranks = job.world("stuck.py", AUTOTEARDOWN_PEERS="off")
    ranks[0].wait_blocked("ready")
    ranks[0].signal()
    wait_until(lambda: ranks[0].log_lines, "the first line")
    assert time.monotonic() - ranks[0].signalled < 3
    assert "SIGTERM" in ranks[0].log_lines[0]


def test_control_nothing_is_said_without_us(job):
    """The parser of these tests does not find lines of ours where the agent is off."""
    ranks = job.world("train.py", 2, "--steps", 2, mode=NONE)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert [rank.log_lines for rank in ranks] == [[], []]


@pytest.mark.parametrize("peers, said", [("on", ""), ("off", "AUTOTEARDOWN_PEERS is off")])
def test_the_registry_says_whether_peers_are_told(job, peers, said):
    """What `ps` and `doctor` show of each rank, the hub's own included."""
    ranks = job.world(
        """
        import time, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        print("ready", flush=True)
        time.sleep(3600)
        """,
        2,
        AUTOTEARDOWN_PEERS=peers,
    )
    for rank in ranks:
        rank.wait_for("ready")

    def told():
        return {record.rank: record.alone for record in registry.read(str(job.runtime))}

    wait_until(lambda: told() == {0: said, 1: said}, f"{said!r}")
