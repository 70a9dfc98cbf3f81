"""Real NCCL: evicts several ranks on one GPU. `make gpu` runs this and prints a table of the results.

The ranks talk over the loopback network and share the GPU by time slices (`Cuda` in programs/device.py): what that
cannot show is NVLink. If you change this file and have no GPU, run it on the simulated accelerator:
TEST_DEVICE=simulated.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from harness import AGENT, HANDWRITTEN, NONE, PROGRAMS, TESTS, wait_until

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
GRACE = 20.0  # with CUDA, even an exit takes its time
SHORT = 5.0  # shows that a peer hangs: it would after any time
START = 120.0
ROOT = TESTS.parent
FREE = "import torch; print(torch.cuda.mem_get_info()[0] // 2**20)"
VERSIONS = (
    "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', torch.cuda.nccl.version(),"
    " torch.cuda.get_device_name())"
)


def python(code):
    """What a Python of its own prints: CUDA is never initialised in this process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="module", autouse=True)
def rows(request):
    """A GPU, or a skip; afterwards, the table."""
    works = "import torch, torch.distributed as d; print(torch.cuda.is_available() and d.is_nccl_available())"
    if CUDA and python(works) != "True":
        pytest.skip("needs an NVIDIA GPU and a torch with NCCL")
    found, start = [], time.monotonic()
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        versions = python(VERSIONS) if CUDA else "the simulated accelerator"
        print(f"\n\n{versions}; grace period {GRACE:g} s; {time.monotonic() - start:.0f} s in all\n")
        print("| rank 0 | ranks | protection | rank 0 out, s | last peer free, s | exit codes | outcomes |")
        print("|---|---|---|---|---|---|---|")
        for row in found:
            print("| " + " | ".join(map(str, row)) + " |")


@pytest.fixture
def world(job, tmp_path):
    """Starts a world on the GPU, in processes of their own: CUDA and a fork do not go together."""

    def start(role, ranks=2, *args, mode=AGENT, missing=(), said="^ready", **env):
        env = {"AUTOTEARDOWN_GRACE": GRACE, "SIMULATED_JOURNAL": tmp_path / "journal", **env}
        # The agent need not be installed here.
        path = os.pathsep.join(map(str, (ROOT / "sitecustomize", ROOT, PROGRAMS)))
        launcher = ("env", f"PYTHONPATH={path}")
        options = {"mode": mode, "fresh": True, "launcher": launcher, "missing": missing, **env}
        made = job.world("device.py", ranks, role, "--device", DEVICE, *args, **options)
        for rank in made:
            rank.wait_for(said, START)
        return made

    yield start
    for rank in job.ranks:  # here, /proc may not say whose they are
        if rank.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)


def evict(ranks, rows, what, mode=AGENT, peers=143):
    """SIGTERM to rank 0; all ends, and a row of the table. Peers that hang are ended with the test."""
    first, *others = ranks
    code = first.evict(GRACE)
    patience = GRACE if mode == AGENT else SHORT
    deadline = time.monotonic() + patience
    while any(other.running for other in others) and time.monotonic() < deadline:
        time.sleep(0.01)
    hanging = [other for other in others if other.running]
    free = max((other.ended - first.signalled for other in others if other.ended), default=0.0)
    codes = [code, *("hangs" if other in hanging else other.code for other in others)]
    outcomes = []
    for rank in ranks if mode == AGENT else ():
        try:
            outcomes.append(rank.report()["outcome"])
        except AssertionError:  # there is none: the table says so, and the codes are looked at below
            outcomes.append("no report")
    last = f"more than {patience:g}" if hanging else f"{free:.2f}"
    rows.append(
        (what, len(ranks), mode, f"{first.seconds:.2f}", last if others else "", codes, " ".join(outcomes))
    )
    if mode == AGENT:
        assert codes == [0] + [peers] * len(others), "\n".join(rank.transcript() for rank in ranks)
    return codes


def clean(ranks):
    """Drained and destroyed by all, together; nobody aborts."""
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert rank.phase("destroy")["outcome"] == "ok", rank.transcript()
        assert rank.phase("abort") is None or rank.phase("abort")["outcome"] == "skipped"
        assert "Traceback" not in rank.stderr, rank.transcript()


def only_wedged(ranks, wedged):
    """The wedged ranks abort, the others do not; nobody comes back from what never completes."""
    for index, rank in enumerate(ranks):
        abort = rank.phase("abort")
        if index in wedged:
            assert rank.report()["outcome"] == "aborted", rank.transcript()
            assert abort["outcome"] == "ok", rank.transcript()
        else:
            assert abort is None or abort["outcome"] == "skipped", rank.transcript()
        assert "garbage" not in rank.stdout, rank.transcript()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_idle(world, rows, ranks):
    made = world("idle", ranks)
    evict(made, rows, "idle")
    clean(made)


@pytest.mark.parametrize(
    "what, args, env",
    [
        ("ddp", (), {}),
        ("fsdp2", ("--kind", "fsdp2"), {}),
        ("20 steps ahead", ("--ahead", 20, "--ms", 60), {}),
        ("waits for its device", ("--wait", 5, "--ahead", 1000, "--ms", 60), {}),
        ("in backward", ("--backward", "--ms", 300, "--ahead", 1), {}),
        ("three groups", ("--groups",), {}),
        ("cpu:gloo", ("--backend", "cpu:gloo,cuda:nccl" if CUDA else "cpu:gloo,simulated:simulated"), {}),
        ("not bound", ("--lazy",), {}),
        ("non-blocking", (), {"TORCH_NCCL_USE_COMM_NONBLOCKING": "1"}),
    ],
)
def test_training(world, rows, what, args, env):
    """All stop after the same step, also with the host ahead of its device."""
    made = world("train", 2, *args, **env)
    for rank in made:
        said = {"in backward": "^step 3$", "20 steps ahead": "^ahead (19|20)$"}
        rank.wait_for(said.get(what, "^(step 20|waiting 10)$"), START)
    evict(made, rows, f"train, {what}")
    clean(made)
    assert len({rank.report()["steps"]["stopped_at"] for rank in made}) == 1, made[0].transcript()


def test_training_of_four(world, rows):
    made = world("train", 4)
    for rank in made:
        rank.wait_for("^step 10$", START)
    evict(made, rows, "train")
    clean(made)


@pytest.mark.parametrize("groups", [(), ("--groups",)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_collective_that_never_completes(world, rows, ranks, groups):
    """One wedged rank, and three; with one group, and with three."""
    made = world("stuck", ranks, "--absent", ranks - 1, *groups)
    for rank in made[:-1]:
        rank.wait_for("^waiting$", START)
    time.sleep(1)  # nothing tells that it is in the driver
    evict(made, rows, f"stuck, {3 if groups else 1} group{'s' * bool(groups)}")
    only_wedged(made, range(ranks - 1))


def test_a_destroy_with_work_in_flight(world, rows):
    """It never returns, and holds what an abort needs (pytorch/pytorch#192105): all are out in time nevertheless."""
    made = world("flight", 2, "--absent", 1)
    made[0].wait_for("^waiting$", START)
    time.sleep(1)
    evict(made, rows, "destroy in flight")
    assert made[0].report()["outcome"] in ("aborted", "forced")
    assert "garbage" not in made[0].stdout


def test_a_kernel_that_does_not_end(world, rows):
    """The drain has its time, then comes the abort; a kernel of the program's own ends with the process."""
    made = world("spin", 2, "--absent", 1, said="^(ready|launched)")
    made[0].wait_for("^launched$", START)
    evict(made, rows, "a kernel without an end")
    phases = {phase["name"]: phase["outcome"] for phase in made[0].report()["phases"]}
    assert phases["drain"] == "timeout" and "abort" in phases, phases
    assert made[0].report()["outcome"] == "aborted", made[0].transcript()
    assert made[1].report()["outcome"] != "forced", made[1].transcript()


def test_a_peer_that_was_killed(world, rows):
    """SIGKILL to one of three; then another is evicted, and both that are left are out in time."""
    made = world("stuck", 3, "--absent", 2, "--loop", SIMULATED_LINK="net")
    for rank in made[:2]:
        rank.wait_for("^waiting$", START)
    made[2].signal(signal.SIGKILL)
    made[2].wait()
    evict(made[:2], rows, "a peer was killed")


def test_a_watchdog_that_fires_during_the_teardown(world, rows, tmp_path):
    """The group's time-out ends in the drain: its dump is written, the exit code is the contract's."""
    dump = tmp_path / "dump"
    settings = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": dump,
    }
    made = world("stuck", 2, "--absent", 1, "--timeout", 3, **settings)
    made[0].wait_for("^waiting$", START)
    time.sleep(1)
    evict(made, rows, "the watchdog fires")


@pytest.mark.parametrize("role", ["capture", "replay"])
def test_graphs(world, rows, role):
    """In a capture nothing can be waited for, and a healthy rank does not abort for it."""
    made = world(role, 2, "--ms", 5)
    for rank in made:
        rank.wait_for("^(capturing|replayed 20)$", START)
    evict(made, rows, role)
    for rank in made:
        assert rank.report()["outcome"] in ("clean", "partial"), rank.transcript()


@pytest.mark.skipif(not CUDA, reason="the simulated accelerator has no sends")
def test_communicators_between_two(world, rows):
    made = world("pipeline", 2)
    for rank in made:
        rank.wait_for("^turns 20$", START)
    evict(made, rows, "sends and receives")
    for rank in made:
        assert rank.report()["outcome"] != "forced", rank.transcript()


def test_torchrun(job, world, rows, tmp_path):
    """SIGTERM to the launcher."""
    path = os.pathsep.join(map(str, (ROOT / "sitecustomize", ROOT, PROGRAMS)))
    env = {"AUTOTEARDOWN_GRACE": GRACE, "SIMULATED_JOURNAL": tmp_path / "journal"}
    args = ("train", "--device", DEVICE)
    launcher = job.torchrun("device.py", *args, ranks=2, launcher=("env", f"PYTHONPATH={path}"), **env)
    wait_until(lambda: launcher.count("step 10") == 2 or not launcher.running, "the training", START)
    launcher.signal()
    code = launcher.wait(GRACE + 10)
    outcomes = [report["outcome"] for report in job.all_reports().values()]
    rows.append(("torchrun", 2, AGENT, f"{launcher.seconds:.2f}", "", [code], " ".join(outcomes)))
    assert outcomes == ["clean", "clean"], launcher.transcript()


@pytest.mark.parametrize("role", ["idle", "train", "stuck"])
@pytest.mark.parametrize("mode", [NONE, HANDWRITTEN])
def test_the_same_without_the_agent(world, rows, role, mode):
    """The control: what the table compares with. A stuck rank with the hand-written handler is SIGKILLed."""
    made = world(role, 2, "--absent", "1" if role == "stuck" else "", mode=mode)
    if role == "train":
        made[0].wait_for("^step 10$", START)
    if role == "stuck":
        made[0].wait_for("^waiting$", START)
        time.sleep(1)
    codes = evict(made, rows, role, mode)
    if role == "stuck":
        assert codes[0] == {NONE: -15, HANDWRITTEN: -9}[mode]


def test_rendezvous(world, rows):
    """A rank that waits for one that never comes."""
    made = world("idle", 2, missing=[1], said="^joining")
    time.sleep(1)
    evict(made, rows, "rendezvous")


def test_the_device_is_never_initialised_by_us(world, rows):
    """A gloo rank on a machine with a GPU leaves without ever having had a context on it."""
    made = world("none")
    evict(made, rows, "gloo, no device")
    for rank in made:
        assert "unused True" in rank.stdout, rank.transcript()


@pytest.mark.skipif(not CUDA, reason="about the memory of a GPU")
@pytest.mark.parametrize("role", ["idle", "stuck"])
def test_the_gpu_is_free_afterwards(world, rows, role):
    """All memory is back, and a second job starts on the same GPU at once and trains."""
    before = int(python(FREE))
    made = world(role, 2, "--absent", "1" if role == "stuck" else "")
    if role == "stuck":
        made[0].wait_for("^waiting$", START)
    evict(made, rows, role)
    second = world("train")
    for rank in second:
        rank.wait_for("^step 10$", START)
    evict(second, rows, f"train, after {role}")
    wait_until(lambda: int(python(FREE)) >= before - 64, "the memory", 30)


def test_what_the_collectives_tell(job, rows, tmp_path):
    """The number of the collective that is stuck while the main thread is in the driver; the rest from the dump."""
    source = f"""
import json, os, sys, threading, time
sys.path[1:1] = [{str(TESTS)!r}, {str(ROOT)!r}]
import torch, torch.distributed as dist
from autoteardown.process_groups import operations
rank = int(os.environ["RANK"])
if {CUDA}:
    os.environ.update(NCCL_HOSTID=f"rank{{rank}}", NCCL_NET="Socket", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.set_device(0)
else:
    import simulated_accelerator
    simulated_accelerator.install()
dist.init_process_group({"nccl" if CUDA else "simulated"!r}, device_id=torch.device({DEVICE!r}, 0))
ones = torch.ones(16, device={DEVICE!r})
for _ in range(5):
    dist.all_reduce(ones)
torch.accelerator.synchronize() if hasattr(torch, "accelerator") else torch.cuda.synchronize()

def say(name, value):
    print(name, json.dumps(value), flush=True)

def look():
    time.sleep(1)
    first = operations.progress()
    time.sleep(1)
    say("still", first is not None and operations.progress() == first)
    stuck = operations.stuck_collective()
    say("stuck", stuck)
    start = time.perf_counter()
    for _ in range(100):
        operations.progress()
    say("cost", (time.perf_counter() - start) * 1e4)
    say("numbers", operations.sequence_numbers())
    say("written", operations.evidence({str(tmp_path / "dump")!r}, stuck))
    say("found", stuck)

if rank == 0:
    dist.broadcast(ones, 0)
    threading.Thread(target=look, daemon=True).start()
    torch.accelerator.synchronize() if hasattr(torch, "accelerator") else torch.cuda.synchronize()
time.sleep(600)
"""
    made = job.world(source, 2, mode=NONE, fresh=True, SIMULATED_JOURNAL=tmp_path / "journal")
    made[0].wait_for("^found", START)
    said = dict(re.findall(r"^(\w+) (.*)$", made[0].stdout, re.MULTILINE))
    rows.append(("progress() in us", 2, "", "", "", said["cost"], said["found"]))
    assert said["still"] == "true", made[0].transcript()
    assert '"seq": 6' in said["stuck"] and '"broadcast"' in said["found"], made[0].transcript()
    assert "/dump-" in said["written"], made[0].transcript()
