"""Faults where torch is called: nothing that hangs or raises there keeps a rank beyond its grace period.

The faults are those of `programs/faults.py`: a backend and an accelerator that fail on demand.
"""

import re
import signal

import pytest
from harness import AGENT, HANDWRITTEN, SHORT, wait_until

ALONE = {"AUTOTEARDOWN_PEERS": "off"}


def events(rank, name):
    """What `faults.py` says about one kind of event: (detail, time) pairs."""
    found = re.findall(rf"^{name} (\S+) ([\d.]+)$", rank.stdout, re.MULTILINE)
    return [(detail, float(at)) for detail, at in found]


@pytest.mark.parametrize("exit_code, expected", [("0", 0), ("signal", 143)])
@pytest.mark.parametrize(
    "role, faults, hung",
    [
        ("train", "destroy-hangs", "destroy"),
        ("train", "busy", "drain"),
        ("idle", "busy", "drain"),
        ("stuck", "busy", "park"),
        ("train", "busy,abort-hangs", "abort"),
        ("stuck", "busy,abort-hangs", "abort"),
        ("stuck", "busy,abort-hangs,destroy-hangs", "abort"),
    ],
)
def test_something_never_returns(job, role, faults, hung, exit_code, expected):
    """A destroy, a drain, an abort that never returns: right exit code, inside the grace period."""
    (rank,) = job.world("faulty.py", 1, role, FAULTS=faults, AUTOTEARDOWN_EXIT_CODE=exit_code)
    rank.wait_blocked("ready") if role == "stuck" else rank.wait_for("ready|step 2")
    assert rank.evict() == expected, rank.transcript()
    assert rank.phase(hung)["outcome"] == "timeout", rank.report()
    report = rank.report()
    assert report["outcome"] in ("aborted", "forced")
    assert report["exit_code"] == expected
    assert report["stuck"], "the stacks of what was in the way"


@pytest.mark.parametrize("role, faults", [("train", "destroy-hangs"), ("train", "busy"), ("stuck", "busy")])
def test_control_something_never_returns(job, role, faults):
    """The hand-written handler in the same places is SIGKILLed."""
    (rank,) = job.world("faulty.py", 1, role, mode=HANDWRITTEN, FAULTS=faults)
    rank.wait_blocked("ready") if role == "stuck" else rank.wait_for("step 2")
    assert rank.evict(SHORT) == -signal.SIGKILL, rank.transcript()


def test_a_driver_that_hangs(job):
    """Whatever is stuck, and be it our own thread: out in time with the right code, and it says so."""
    (rank,) = job.world(
        """
        import time
        from autoteardown.rank import control
        import torch.distributed as dist
        dist.init_process_group("gloo")
        control.LocalRankControl.facts = lambda self, cause: time.sleep(600)
        print("ready", flush=True)
        time.sleep(600)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert (rank.report()["outcome"], rank.report()["exit_code"]) == ("forced", 0)
    assert rank.log_lines[-2:] == [
        "hard deadline: ending the process",
        f"done: forced ({rank.report()['why']}), exit 0",
    ]


def test_destroy_that_holds_the_gil(job):
    """The process ends in time although none of its Python code runs any more, the hard deadline included.

    Not made up: with torch 2.13 the destructor of a gloo group joins a thread of its own with the GIL held while
    that thread waits for the GIL, when a scaled-loss DDP model is the last to hold the group.
    """
    (rank,) = job.world("faulty.py", 1, "train", FAULTS="destroy-gil")
    rank.wait_for("step 2")
    assert rank.evict() == 0, rank.transcript()


@pytest.mark.parametrize(
    "faults, phase",
    [("destroy-raises", "destroy"), ("drain-raises", "drain"), ("busy,abort-raises", "abort")],
)
def test_something_raises(job, faults, phase):
    """What raises is logged and reported, and the way out goes on."""
    (rank,) = job.world("faulty.py", 1, "train", FAULTS=faults)
    rank.wait_for("step 2")
    assert rank.evict() == 0, rank.transcript()
    assert rank.phase(phase)["outcome"] == "error", rank.report()
    assert "RuntimeError" in rank.phase(phase)["detail"]
    assert "Traceback" not in rank.stderr


def test_no_garbage_after_the_abort(job):
    """Released by the abort, the main thread does not go on computing with what came of it."""
    (rank,) = job.world("faulty.py", 1, "stuck", FAULTS="busy")
    rank.wait_blocked("ready")
    assert rank.evict() == 0, rank.transcript()
    assert events(rank, "aborted"), rank.transcript()
    assert not events(rank, "garbage")
    assert rank.phase("abort")["outcome"] == "ok"


@pytest.mark.parametrize("faults, aborts", [("", 0), ("busy", 1)])
def test_abort_only_the_wedged(job, faults, aborts):
    """A drained rank never aborts; a rank that could not drain does, and does not destroy."""
    (rank,) = job.world("faulty.py", 1, "train", FAULTS=faults)
    rank.wait_for("step 2")
    assert rank.evict() == 0, rank.transcript()
    assert len(events(rank, "abort")) == aborts
    assert len(events(rank, "destroy")) == 1 - aborts
    assert rank.report()["outcome"] == ("aborted" if aborts else "clean")


def test_a_wedged_rank_and_a_drained_one(job):
    """In a group, only the wedged rank aborts: rank 0 waits for its device for ever, rank 1 is idle."""
    stuck, idle = job.world(
        "faulty.py", each={0: {"args": ["stuck"], "FAULTS": "busy"}, 1: {"args": ["idle"]}}
    )
    stuck.wait_blocked("ready")
    idle.wait_for("ready")
    stuck.signal()
    assert stuck.outlast() == 0, stuck.transcript()
    assert idle.outlast() == 143, idle.transcript()
    assert len(events(stuck, "abort")) == 1
    assert events(idle, "drained")
    assert not events(idle, "abort")
    assert not events(idle, "destroy"), "a destroy would wait for the rank that has aborted"
    assert idle.report()["outcome"] == "partial"  # its peer was wedged


def test_every_group_is_aborted_at_once(job):
    """Serial aborts deadlock (pytorch#119797), and a parent's abort does not release a split child."""
    ranks = job.world("faulty.py", 2, "train", "group", FAULTS="busy,abort-together")
    for rank in ranks:
        rank.wait_for("step 2")
        rank.signal()
    for rank in ranks:
        assert rank.outlast() == 0, rank.transcript()
        assert len(events(rank, "aborted")) == 2, rank.transcript()
        assert rank.phase("abort")["outcome"] == "ok"


def test_every_initialised_device_is_drained(job):
    """The drain: every accelerator that this process has initialised, and never another one."""
    (rank,) = job.world("faulty.py", 1, "train")
    rank.wait_for("step 2")
    assert rank.evict() == 0, rank.transcript()
    assert {device for device, _ in events(rank, "drained")} == {"0", "1"}
    assert not events(rank, "initialised")


def test_nobody_leaves_before_all_are_quiet(job):
    """With accelerators a rank destroys and leaves only when every rank's device is quiet."""
    # The device takes a second: not longer than a drain may take.
    slow, quick = job.world("faulty.py", 2, "train", each={0: {"FAULTS": "slow"}}, AUTOTEARDOWN_GRACE=12)
    for rank in (slow, quick):
        rank.wait_for("step 2")
    quick.signal()
    assert quick.outlast(12) == 0, quick.transcript()
    assert slow.outlast(12) == 143, slow.transcript()
    last_drained = max(at for _, at in events(slow, "drained"))
    assert min(at for _, at in events(quick, "drained")) < last_drained, "the test is to have a slow device"
    for rank in (slow, quick):
        assert [at > last_drained for _, at in events(rank, "destroy")] == [True], (
            slow.transcript() + quick.transcript()
        )
        assert rank.report()["outcome"] == "clean"


def test_a_silent_board_costs_its_time_out_and_no_more(job):
    """A SIGKILLed peer never says that it is quiet: the time floor passes, and nothing hangs."""
    first, second = job.world("faulty.py", 2, "idle")
    for rank in (first, second):
        rank.wait_for("ready")
    second.signal(signal.SIGKILL)
    second.wait()
    assert first.evict() == 0, first.transcript()
    assert events(first, "drained")
    assert not events(first, "abort")
    assert first.report()["outcome"] == "partial"


def test_time_outs_longer_than_the_grace_period(job):
    """vllm#55632: an inner time-out longer than the outer one. All of them are scaled down together."""
    names = ("STEP", "DRAIN", "DESTROY", "ABORT", "EXIT")
    (rank,) = job.world(
        "faulty.py",
        1,
        "train",
        FAULTS="busy,abort-hangs,destroy-hangs",
        **{f"AUTOTEARDOWN_{name}_TIMEOUT": 3600 for name in names},
    )
    rank.wait_for("step 2")
    assert rank.evict() == 0, rank.transcript()


CALLBACKS = {
    "works": ("print('callback', flush=True)", 0.0),
    "raises": ("print('callback', flush=True); 1 / 0", 0.0),
    "exits": ("print('callback', flush=True); raise SystemExit(9)", 0.0),
    "hangs": ("print('callback', flush=True); time.sleep(3600)", 1.0),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_on_teardown(job, kind):
    """`autoteardown.on_teardown(callback)`: runs after the drain, bounded."""
    (rank,) = job.world(
        f"""
        import time
        import autoteardown, faults
        import torch.distributed as dist

        def callback():
            {CALLBACKS[kind][0]}

        autoteardown.on_teardown(callback)
        faults.install()
        dist.init_process_group("faulty")
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    lines = [line.split()[0] for line in rank.stdout.splitlines()]
    assert lines == ["ready", "drained", "drained", "callback", "destroy"]


def test_a_group_of_a_backend_without_abort_is_left_to_the_exit(job):
    """Gloo: no abort; a wedged rank is released by its exit, which closes its sockets."""
    stuck, peer = job.world("stuck.py", **ALONE)
    peer.wait_for("ready")
    stuck.wait_blocked("ready")
    assert stuck.evict() == 0, stuck.transcript()
    assert stuck.phase("abort")["outcome"] == "skipped"
    assert stuck.phase("destroy") is None or stuck.phase("destroy")["outcome"] == "skipped"


HOST_BUGS = {
    "hook": "optim.register_optimizer_step_post_hook = None",
    "store": "dist.distributed_c10d._get_default_store = lambda: 1 / 0",
    "rank": "dist.distributed_c10d.get_rank = lambda *args: 1 / 0",
    "groups": "type(dist.distributed_c10d._world).pg_names = property(lambda self: 1 / 0)",
}


@pytest.mark.parametrize("bug", HOST_BUGS)
def test_the_host_never_pays_for_our_bugs(job, bug):
    """Torch's insides are not as expected: the rank still leaves in time with the right code."""
    (rank,) = job.world(
        f"""
        import time
        import torch.optim.optimizer as optim
        import torch.distributed as dist
        dist.init_process_group("gloo")
        {HOST_BUGS[bug]}
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


ENDS_BY_ITSELF = """
import signal, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
def leave(signum, frame):
    time.sleep(1.5)
    print("saved", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, leave)
"""
POLLS = """
import sys, time
import autoteardown
import torch.distributed as dist
dist.init_process_group("gloo")
def leave():
    time.sleep(1.5)
    print("saved", flush=True)
    sys.exit(5)
autoteardown.stop_requested()
"""
SAVES = """
import time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
class Slow:
    def __reduce__(self):
        print("saving", flush=True)
        time.sleep(1.5)
        return str, ("saved",)
def save():
    torch.save(Slow(), "checkpoint")
    print("saved", flush=True)
"""
FAULTY = """
from autoteardown.rank import control, guard
class Faulty(control.LocalRankControl):
    {bug}
guard.LocalRankControl = Faulty
print("ready", flush=True)
while True:
    {body}
"""
RUN = {
    "handler": (ENDS_BY_ITSELF, "time.sleep(0.01)", 5),
    "poll": (POLLS, "leave() if autoteardown.stop_requested() else time.sleep(0.01)", 5),
    "save": (SAVES, "save(); time.sleep(60)", 0),
}
OUR_BUGS = {
    "facts": "facts = lambda self, cause: 1 / 0",
    "snapshot": "snapshot = lambda self, stopping: 1 / 0",
}


@pytest.mark.parametrize("bug", OUR_BUGS)
@pytest.mark.parametrize("program", RUN)
def test_the_checkpoint_never_pays_for_our_bugs(job, program, bug):
    """An error of the agent's in mid-stop: what the program saves is whole, and an exit of its own keeps its code."""
    start, body, code = RUN[program]
    (rank,) = job.world(start + FAULTY.format(bug=OUR_BUGS[bug], body=body), 1, AUTOTEARDOWN_GRACE=20)
    rank.wait_for("saving" if program == "save" else "ready")
    assert rank.evict(grace=20) == code, rank.transcript()
    assert rank.stdout.count("saved") == 1, rank.transcript()
    assert any("internal error: " in line for line in rank.log_lines)
    assert rank.report()["outcome"] in ("partial", "forced"), rank.report()
    assert rank.seconds < 18, rank.transcript()


@pytest.mark.parametrize("mode", [AGENT, HANDWRITTEN])
def test_init_that_raises(job, mode):
    """A failed `init_process_group` raises as ever, and the process is not left armed with nothing to guard."""
    rank = job.start(
        """
        import time
        import torch.distributed as dist
        try:
            dist.init_process_group("no such backend", store=dist.HashStore(), rank=0, world_size=1)
        except Exception as error:
            print("raised", error, flush=True)
        print("ready", flush=True)
        while True:  # a signal just before a long sleep would have its Python handler run after it
            time.sleep(0.05)
        """,
        mode=mode,
    )
    rank.wait_for("(?i)^raised .*no such backend")
    rank.wait_for("ready")
    assert rank.evict() == (-signal.SIGTERM if mode == AGENT else 0), rank.transcript()


def test_disarm(job):
    """`autoteardown.disarm()`: from then on this process is as without the agent."""
    (rank,) = job.world(
        """
        import time
        import autoteardown
        import torch.distributed as dist
        dist.init_process_group("gloo")
        autoteardown.disarm()
        print("ready", flush=True)
        time.sleep(3600)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == -signal.SIGTERM, rank.transcript()
    assert not list(job.reports.iterdir())


def test_sigkill_in_mid_teardown_leaves_no_half_report(job):
    """Reports are written atomically: whatever is in the folder is whole."""
    (rank,) = job.world("faulty.py", 1, "stuck", FAULTS="busy,abort-hangs")
    rank.wait_blocked("ready")
    rank.signal()
    wait_until(lambda: rank.log_lines, "the teardown to begin")
    rank.signal(signal.SIGKILL)
    rank.wait()
    assert all(isinstance(report, dict) for report in job.all_reports().values())
