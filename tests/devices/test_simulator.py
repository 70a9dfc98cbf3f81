"""The simulated accelerator does what it documents, without the agent: the other tests here rely on that."""

import re
import signal
import time

import pytest
from harness import NONE, wait_until

pytestmark = pytest.mark.timeout(600)


def program(body):
    """A program of its own on the device."""
    return f"""
        import os, sys, time
        sys.path.insert(1, {str(__import__("harness").TESTS)!r})
        import simulated_accelerator, torch, torch.distributed as dist
        device = simulated_accelerator.install()
        extension = simulated_accelerator.extension
        {body}
        print("over", flush=True)
        """


def run(job, devices, body, **settings):
    """Run one to its end; return what it printed, by name."""
    rank = job.start(program(body.replace("\n", "\n        ")), mode=NONE, **devices.settings(**settings))
    assert rank.wait() == 0, rank.transcript()
    return dict(line.split(" ", 1) for line in rank.stdout.splitlines() if " " in line)


def test_streams_are_in_order_and_launches_do_not_wait(job, devices):
    """The host is ahead, reading waits, and what comes out is what a CPU computes."""
    said = run(
        job,
        devices,
        """
x = torch.ones(8, 8, device="simulated")
start = time.monotonic()
device.compute(400)
y = (x @ x).sum()
print("launched", time.monotonic() - start)
print("pending", extension.pending())
print("value", y.item())
print("read", time.monotonic() - start)
layer, control = torch.nn.Linear(8, 2).to("simulated"), torch.nn.Linear(8, 2)
control.load_state_dict(layer.state_dict())
for each in (layer, control):
    optimizer = torch.optim.AdamW(each.parameters())
    for step in range(5):
        torch.manual_seed(step)
        each(torch.randn(4, 8).to(each.weight.device)).square().mean().backward()
        optimizer.step()
print("equal", torch.equal(layer.weight.cpu(), control.weight))
""",
    )
    assert float(said["launched"]) < 0.35 < 0.39 < float(said["read"])
    assert int(said["pending"]) > 1
    assert (said["value"], said["equal"]) == ("512.0", "True")


def test_streams_run_beside_each_other_and_wait_for_events(job, devices):
    said = run(
        job,
        devices,
        """
other = device.Stream()
start = time.monotonic()
device.compute(500)
with device.stream(other):
    x = torch.ones(1, device="simulated") * 2
    print("beside", x.item(), time.monotonic() - start)
event = device.current_stream().record_event()
other.wait_event(event)
with device.stream(other):
    (x * 2).item()
print("waited", event.query(), time.monotonic() - start)
""",
    )
    assert said["beside"].startswith("2.0") and float(said["beside"].split()[1]) < 0.4
    assert said["waited"].startswith("True") and float(said["waited"].split()[1]) > 0.49


def test_a_launch_queue_fills(job, devices):
    """Then the launch blocks, in C and without the GIL."""
    said = run(
        job,
        devices,
        """
start = time.monotonic()
for _ in range(14):
    device.compute(50)
print("blocked", time.monotonic() - start)
""",
        queue=4,
    )
    assert float(said["blocked"]) > 0.4


def test_a_capture(job, devices):
    """What is captured runs when it is replayed; to synchronise raises, and spoils it."""
    said = run(
        job,
        devices,
        """
x = torch.ones(1, device="simulated")
graph = device.graph()
with graph:
    x.mul_(2)
print("captured", x.item())
graph.replay(); graph.replay()
print("replayed", x.item())
try:
    with device.graph():
        try:
            torch.accelerator.synchronize()
        except RuntimeError as error:
            print("raised", error)
except RuntimeError as error:
    print("spoiled", error)
""",
    )
    assert (said["captured"], said["replayed"]) == ("1.0", "4.0")
    assert "capturing" in said["raised"] and "capture" in said["spoiled"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_real_training_runs_on_it(ranks_on, devices, kind):
    """With the host ahead of the device, two groups and a split one."""
    world = ranks_on("train", 2, "--kind", kind, "--groups", mode=NONE)
    for rank in world:
        rank.wait_for("^step 15$")
    assert all(rank.noise == [] for rank in world), world[0].transcript()


BODY = """
dist.init_process_group("simulated", device_id=torch.device("simulated:0"))
rank, ones = dist.get_rank(), torch.ones(4, device="simulated")
dist.all_reduce(ones)
print("sum", ones.sum().item(), flush=True)
backend = dist.group.WORLD._get_backend(torch.device("simulated"))
if rank == 0:
    dist.all_reduce(ones)
    print("launched", backend._get_sequence_number_for_group(), flush=True)
{0}
print("done", rank, flush=True)
time.sleep(60)
"""


def pair(job, devices, body, **settings):
    """Two ranks, of which the first has launched a collective that the second does not join."""
    source = program(BODY.format(body).replace("\n", "\n        "))
    world = job.world(source, 2, mode=NONE, **devices.settings(**settings))
    world[0].wait_for("^launched 2")
    return world


def test_an_abort_ends_kernels_and_later_launches_raise(job, devices):
    world = pair(
        job,
        devices,
        """
if rank == 0:
    dist.group.WORLD.abort()
    print("aborted", flush=True)
    try:
        dist.all_reduce(ones)
    except RuntimeError as error:
        print("raised", error, flush=True)
""",
    )
    world[0].wait_for("^raised .*aborted")
    assert devices.times_of("rank 0 kernel 2 ends as garbage")


@pytest.mark.parametrize("way", ["aborted", "exited"])
def test_a_peer_that_goes_under_a_running_kernel(job, devices, way):
    """A fault, which stays."""
    what = {"aborted": "dist.group.WORLD.abort()", "exited": "os._exit(0)"}[way]
    world = pair(
        job,
        devices,
        f"""
if rank == 1:
    time.sleep(0.3)
    {what}
else:
    try:
        device.synchronize()
    except RuntimeError as error:
        print("raised", error, flush=True)
""",
    )
    world[0].wait_for(f"^raised .*illegal memory access.*peer 1 {way} under a running kernel")
    assert [pid for pid, _ in devices.faults] == [world[0].pid]
    devices.expected = devices.faults


def test_over_a_network_the_kernel_only_waits(job, devices):
    world = pair(job, devices, "if rank == 1: os._exit(0)\ndevice.synchronize()", link="net")
    assert world[1].wait() == 0
    time.sleep(0.5)
    assert world[0].running and not devices.faults


def test_remote_errors_are_seen(job, devices):
    world = pair(job, devices, "if rank == 1: os._exit(0)\ndevice.synchronize()", link="net", remote_errors=1)
    assert world[0].wait() == -signal.SIGABRT
    assert devices.times_of("WATCHDOG: remote process 1 exited", world[0].pid)


def test_a_watchdog_ends_the_process(job, devices):
    source = program(BODY.format("device.synchronize()").replace("\n", "\n        "))
    source = source.replace(
        'dist.init_process_group("simulated"',
        """import datetime
        dist.init_process_group("simulated", timeout=datetime.timedelta(seconds=1)""",
    )
    world = job.world(source, 2, mode=NONE, **devices.settings())
    assert world[0].wait() == -signal.SIGABRT
    assert devices.times_of("WATCHDOG: ALLREDUCE 2 timed out", world[0].pid)
    devices.expected = devices.faults


def test_a_destroy_waits_for_work_in_flight_and_for_the_peers(job, devices):
    world = pair(job, devices, "if rank == 0: dist.destroy_process_group()")
    wait_until(lambda: devices.times_of("rank 0 destroy begins, in flight"), "the destroy")
    time.sleep(0.5)
    assert not devices.times_of("destroy ends") and not re.search("^done 0", world[0].stdout, re.MULTILINE)


def test_the_abort_of_a_parent_leaves_a_group_that_was_split_off(job, devices):
    world = pair(
        job,
        devices,
        """
if rank == 1:
    dist.all_reduce(ones)
device.synchronize()
child = simulated_accelerator.split_group([0, 1])
dist.group.WORLD.abort()
dist.all_reduce(ones, group=child)
print("child", ones.sum().item(), flush=True)
""",
    )
    for rank in world:
        rank.wait_for(r"^child 32\.0")
