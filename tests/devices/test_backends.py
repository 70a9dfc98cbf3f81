"""The agent's calls on devices and groups, in real ranks while something is stuck."""

import json
import re
from pathlib import Path

import pytest
from harness import NONE, TESTS

pytestmark = pytest.mark.timeout(600)

HEAD = f"""
import os, sys, time, threading, json
sys.path.insert(1, {str(TESTS)!r})
import simulated_accelerator, torch, torch.distributed as dist
from autoteardown.process_groups import operations

def say(name, value):
    print(name, json.dumps(value), flush=True)

def timed(function, times=200):
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times * 1e6

def beside(function):
    threading.Thread(target=function, daemon=True).start()
"""

STUCK = """
device = simulated_accelerator.install()
dist.init_process_group("simulated", device_id=torch.device("simulated:0"))
rank = dist.get_rank()
ones = torch.ones(4, device="simulated")
for _ in range(3):
    dist.all_reduce(ones)
other = dist.new_group([0, 1])
dist.all_reduce(ones, group=other)
device.synchronize()
say("before", [operations.sequence_numbers(), operations.stuck_collective()])
if rank == 0:
    dist.broadcast(ones, 0, group=other)
    def look():
        time.sleep(0.3)
        first = operations.progress()
        time.sleep(0.3)
        say("still", operations.progress() == first)
        stuck = operations.stuck_collective()
        say("stuck", dict(stuck))
        say("written", operations.evidence(os.environ["EVIDENCE"], stuck))
        say("found", stuck)
        costs = operations.progress, operations.sequence_numbers, operations.stuck_collective
        say("cost", [timed(each) for each in costs])
    beside(look)
    device.synchronize()
else:
    time.sleep(600)
"""


def values(rank, *names):
    """What a rank has said under these names."""
    return [json.loads(rank.wait_for(f"^{name} (.*)$")[1]) for name in names]


def start(job, source, ranks, devices, **options):
    return job.world(HEAD + source, ranks, mode=NONE, **devices.settings(), **options)


def test_what_is_stuck(job, devices, tmp_path):
    """The group and the number while the device hangs; the operation, and the file, when nothing can be lost."""
    evidence = tmp_path / "rank0"
    first, _ = start(job, STUCK, 2, devices, EVIDENCE=evidence)
    (before, stuck), still = values(first, "before", "still")
    group = next(name for name, number in before.items() if number == 1)
    assert before == {"0": 3, group: 1}, first.transcript()
    assert stuck is None and still is True
    stuck, written, found, cost = values(first, "stuck", "written", "found", "cost")
    assert stuck == {"op": None, "seq": 2, "group": group}
    assert found == {"op": "broadcast", "seq": 2, "group": group}
    assert written == [f"{evidence}-simulated.trace"]
    entries = json.loads(Path(written[0]).read_text())["entries"]
    assert [entry["state"] for entry in entries].count("completed") == len(entries) - 1
    assert max(cost) < 20_000, cost  # microseconds; a hundredth of that on a quiet machine


def test_progress_while_the_host_waits(job, devices):
    """The device works off what was launched: another value from look to look, with the main thread in the driver."""
    (rank, _) = start(
        job,
        """
device = simulated_accelerator.install()
dist.init_process_group("simulated", device_id=torch.device("simulated:0"))
ones = torch.ones(4, device="simulated")
for _ in range(10):
    device.compute(100)
    dist.all_reduce(ones)
def look():
    seen = set()
    while True:
        seen.add(operations.progress())
        say(f"values{len(seen)}", True)
        time.sleep(0.02)
beside(look)
device.synchronize()
time.sleep(600)
""",
        2,
        devices,
    )
    rank.wait_for("^values8 ")


def test_gloo_counts_too(job, devices):
    """The safe reads work on any thread while a gloo collective is blocked, and name it."""
    (first, _) = start(
        job,
        """
dist.init_process_group("gloo")
ones = torch.ones(4)
dist.all_reduce(ones)
if dist.get_rank() == 0:
    def look():
        time.sleep(0.5)
        say("numbers", operations.sequence_numbers())
        say("stuck", operations.stuck_collective())
        say("cost", [timed(operations.progress), timed(operations.sequence_numbers)])
    beside(look)
    dist.broadcast(ones, 0)
    dist.barrier()
time.sleep(600)
""",
        2,
        devices,
    )
    numbers, stuck, cost = values(first, "numbers", "stuck", "cost")
    assert numbers["0"] >= 2
    assert stuck["group"] in ("0", None) and stuck["op"] in ("broadcast", "barrier", None)
    assert max(cost) < 20_000


@pytest.mark.parametrize("waitable", [True, False])
@pytest.mark.parametrize("bound", [True, False])
def test_a_device_by_the_name_that_its_vendor_gave_it(job, devices, waitable, bound):
    """The PrivateUse1 backend is drained; where it cannot be waited for that is said, never "idle in 0.00 s"."""
    (rank,) = start(
        job,
        f"""
device = simulated_accelerator.install(waitable={waitable})
say("unused", operations.accelerators())
dist.init_process_group("simulated", device_id=torch.device("simulated:0") if {bound} else None)
dist.all_reduce(torch.ones(1, device="simulated"))
device.compute(700)
start = time.monotonic()
say("drained", operations.drain())
say("took", time.monotonic() - start)
say("used", operations.accelerators())
say("unwaitable", operations.unwaitable())
""",
        1,
        devices,
    )
    unused, drained, took, used, unwaitable = values(rank, "unused", "drained", "took", "used", "unwaitable")
    assert (unused, drained, used) == ([], None, ["simulated"]), rank.transcript()
    assert took > 0.6 if waitable else "simulated: " in unwaitable[0]
    assert bool(unwaitable) is not waitable


def test_a_device_that_captures(job, devices):
    """To synchronise raises in a capture: no fault of the rank's, and no proof that its device is idle."""
    (rank,) = start(
        job,
        """
device = simulated_accelerator.install()
dist.init_process_group("simulated", device_id=torch.device("simulated:0"))
graph = device.graph()
graph.__enter__()
say("drained", operations.drain())
say("unwaitable", operations.unwaitable())
""",
        1,
        devices,
    )
    drained, unwaitable = values(rank, "drained", "unwaitable")
    assert drained is None and re.search("captured", unwaitable[0])
