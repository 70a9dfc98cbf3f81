"""NCCL for real: several ranks on one GPU, evicted. `make gpu` runs this and prints a table of what came of it.

NCCL refuses two ranks of one host on one GPU, and tells hosts apart by `NCCL_HOSTID`: with another one for each rank
they talk over the loopback network (NVIDIA/nccl, src/init.cc). What that cannot show is NVLink.
"""

import subprocess
import sys
import time

import pytest
from harness import AGENT, HANDWRITTEN, NONE, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
GRACE = 20.0  # with CUDA, even an exit takes its time
FREE = "import torch; print(torch.cuda.mem_get_info()[0] // 2**20)"
VERSIONS = (
    "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', torch.cuda.nccl.version(),"
    " torch.cuda.get_device_name())"
)


def python(code):
    """What a Python of its own prints: CUDA is never initialised in this process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="module", autouse=True)
def rows(request):
    """A GPU, or a skip; afterwards, the table."""
    works = "import torch, torch.distributed as d; print(torch.cuda.is_available() and d.is_nccl_available())"
    if python(works) != "True":
        pytest.skip("needs an NVIDIA GPU and a torch with NCCL")
    found = []
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{python(VERSIONS)}; grace period {GRACE:g} s\n")
        print("| rank 0 | ranks | protection | rank 0 out, s | last peer free, s | exit codes | outcome |")
        print("|---|---|---|---|---|---|---|")
        for row in found:
            print("| " + " | ".join(map(str, row)) + " |")


def start(job, role, ranks=2, missing=(), **options):
    """A world on one GPU."""
    each = {rank: {"NCCL_HOSTID": f"rank{rank}"} for rank in range(ranks)}
    common = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "AUTOTEARDOWN_GRACE": GRACE}
    world = job.world("nccl.py", ranks, role, each=each, missing=missing, **common, **options)
    text = "^(ready|waiting)$" if not missing else None
    for rank in world:
        if text:
            rank.wait_for(text, 120)
    return world


def evict(world, rows, role, mode=AGENT):
    """SIGTERM to rank 0; all ends, and a row of the table. Peers that hang are ended with the test."""
    first, *peers = world
    code = first.evict(GRACE)
    deadline = time.monotonic() + GRACE
    while any(peer.running for peer in peers) and time.monotonic() < deadline:
        time.sleep(0.01)
    hanging = [peer for peer in peers if peer.running]
    free = max((peer.ended - first.signalled for peer in peers if peer.ended), default=0.0)
    codes = [code, *("hangs" if peer in hanging else peer.code for peer in peers)]
    outcome = first.report()["outcome"] if mode == AGENT else ""
    last = f"more than {GRACE:g}" if hanging else f"{free:.2f}"
    rows.append((role, len(world), mode, f"{first.seconds:.2f}", last if peers else "", codes, outcome))
    return codes


def settled(first):
    """Wait until the main thread waits for its device: in C, where it spins, so that nothing tells that it is there."""
    first.wait_for("^waiting$", 120)
    time.sleep(1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("role", ["idle", "train"])
def test_a_rank_that_runs(job, rows, role, ranks):
    """Clean: drained and destroyed by all, together; nobody aborts."""
    world = start(job, role, ranks)
    if role == "train":
        for rank in world:
            rank.wait_for("^step 3$", 120)
    assert evict(world, rows, role) == [0] + [143] * (ranks - 1), world[0].story()
    for rank in world:
        assert rank.report()["outcome"] == "clean", rank.story()
        assert rank.phase("destroy")["outcome"] == "ok"
        assert rank.phase("abort") is None or rank.phase("abort")["outcome"] == "skipped"
        assert rank.report()["backend"] == "nccl"
        assert "Traceback" not in rank.stderr, rank.story()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("role", ["stuck", "groups"])
def test_a_collective_that_never_completes(job, rows, role, ranks):
    """The wedged rank aborts, all of its groups; its peers are drained and do not; all are out."""
    world = start(job, role, ranks)
    settled(world[0])
    assert evict(world, rows, role) == [0] + [143] * (ranks - 1), world[0].story()
    assert world[0].report()["outcome"] == "aborted", world[0].story()
    assert world[0].phase("abort")["outcome"] == "ok", world[0].story()
    assert "garbage" not in world[0].stdout
    for peer in world[1:]:
        assert peer.phase("abort") is None or peer.phase("abort")["outcome"] == "skipped", peer.story()


def test_a_destroy_with_work_in_flight(job, rows):
    """It never returns, and holds what an abort needs (pytorch/pytorch#192105): all are out in time nevertheless."""
    world = start(job, "flight")
    settled(world[0])
    assert evict(world, rows, "flight") == [0, 143], world[0].story()
    assert world[0].report()["outcome"] in ("aborted", "forced")
    assert "garbage" not in world[0].stdout


@pytest.mark.parametrize("role", ["idle", "train", "stuck"])
@pytest.mark.parametrize("mode", [NONE, HANDWRITTEN])
def test_the_same_without_the_agent(job, rows, role, mode):
    """The control: what the table compares with. A stuck rank with the hand-written handler is SIGKILLed."""
    world = start(job, role, mode=mode)
    if role == "train":
        world[0].wait_for("^step 3$", 120)
    if role == "stuck":
        settled(world[0])
    codes = evict(world, rows, role, mode)
    if role == "stuck":
        assert codes[0] == {NONE: -15, HANDWRITTEN: -9}[mode]


def test_sigterm_in_backward(job, rows):
    """An abort in backward has crashed (pytorch/pytorch#149418): here all ranks finish their step instead."""
    world = start(job, "backward")
    for rank in world:
        rank.wait_for("^backward 2$", 120)
    assert evict(world, rows, "backward") == [0, 143], world[0].story()
    stops = {rank.report()["steps"]["stopped_at"] for rank in world}
    assert len(stops) == 1, stops
    assert all(rank.report()["outcome"] == "clean" for rank in world)


def test_a_device_that_does_not_drain(job, rows):
    """The drain has its time, then comes the abort; a kernel of the program's own ends with the process."""
    world = start(job, "spin")
    world[0].wait_for("^waiting$", 120)
    codes = evict(world, rows, "spin")
    assert codes == [0, 143], world[0].story()
    phases = {phase["name"]: phase["outcome"] for phase in world[0].report()["phases"]}
    assert "timeout" in (phases.get("drain"), phases.get("park")), phases
    assert "abort" in phases, phases


def test_rendezvous(job, rows):
    """A rank that waits for one that never comes."""
    (rank,) = start(job, "idle", 2, missing=[1])
    rank.wait_blocked("^joining$")
    assert evict([rank], rows, "rendezvous") == [0], rank.story()


def test_cuda_is_never_initialised_by_us(job, rows):
    """F4: a gloo rank on a machine with a GPU leaves without ever having had a context on it."""
    world = start(job, "none")
    assert evict(world, rows, "gloo, no CUDA") == [0, 143], world[0].story()
    for rank in world:
        assert "initialised False" in rank.stdout, rank.story()


@pytest.mark.parametrize("role", ["idle", "stuck"])
def test_the_gpu_is_free_afterwards(job, rows, role):
    """All memory is back, and a second job starts on the same GPU at once and trains."""
    before = int(python(FREE))
    world = start(job, role)
    if role == "stuck":
        settled(world[0])
    evict(world, rows, role)
    second = start(job, "train")
    for rank in second:
        rank.wait_for("^step 3$", 120)
    evict(second, rows, f"train, after {role}")
    wait_until(lambda: int(python(FREE)) >= before - 64, "the memory", 30)
