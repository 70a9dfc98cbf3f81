"""Programs whose threads, locks and sockets are not the interpreter's any more."""

import pytest
from harness import GRACE, NONE

PROGRAM = """
import sys
how = sys.argv[1]
if how in ("gevent", "gevent, armed late"):
    from gevent import monkey
    monkey.patch_all()
elif how == "eventlet":
    import eventlet
    eventlet.monkey_patch()
import time
if "armed" in how:
    import autoteardown
    assert autoteardown.arm()
import torch
import torch.distributed as dist
if how == "gevent after torch":
    from gevent import monkey
    monkey.patch_all()

dist.init_process_group("gloo")
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
step = 0
while True:
    weight.grad = torch.ones(1)
    dist.all_reduce(weight.grad)
    optimizer.step()
    step += 1
    print("step", step, flush=True)
    time.sleep(0.005)
"""


@pytest.mark.parametrize("how", ["gevent", "gevent after torch", "gevent, armed late", "eventlet"])
def test_patched_ranks_train_and_leave(job, how):
    """They do not freeze, and an eviction stops both after the same step."""
    pytest.importorskip(how.split()[0].strip(","))
    late = {"mode": NONE, "AUTOTEARDOWN": ""} if "armed" in how else {}
    ranks = job.world(PROGRAM, 2, how, fresh=True, **late)
    for rank in ranks:
        rank.wait_for("^step 20$")
    ranks[0].signal()
    for rank in ranks:
        assert rank.outlast(GRACE) == (0 if rank is ranks[0] else 143), rank.transcript()
        assert rank.report()["outcome"] == "clean", rank.transcript()
    assert len({rank.report()["steps"]["stopped_at"] for rank in ranks}) == 1


SLOW_EXITS = {
    "except": """
def step(real=optimizer.step):
    try:
        real()
    except SystemExit:
        time.sleep(1.5)
        raise
optimizer.step = step
""",
    "thread": """
import threading
threading.Thread(target=time.sleep, args=(3,)).start()
""",
    "atexit": """
import atexit
atexit.register(lambda: [sum(range(10**5)) for _ in range(1500)])
""",
}


@pytest.mark.parametrize("how", ["gevent", "gevent after torch", "eventlet"])
@pytest.mark.parametrize("where", SLOW_EXITS)
def test_an_exit_that_takes_its_time(job, how, where):
    """The program, the interpreter or an exit callback is not done yet: nobody has caught the exit."""
    pytest.importorskip(how.split()[0])
    program = PROGRAM.replace("step = 0\n", f"{SLOW_EXITS[where]}step = 0\n")
    (rank,) = job.world(program, 1, how, fresh=True)
    rank.wait_for("^step 20$")
    assert rank.evict() == 0, rank.transcript()
    assert rank.report()["outcome"] == "clean", rank.transcript()
