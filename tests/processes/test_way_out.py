"""The program's own code on the way out of a stop, when the group has been destroyed."""

import re

from harness import GRACE

PROGRAM = """
import sys, time
import torch
import torch.distributed as dist

def main():
    dist.init_process_group("gloo")
    half = dist.new_group([0, 1])
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    try:
        for step in range(1 << 30):
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            time.sleep(0.005)
            if step == 3:
                print("ready", flush=True)
    finally:
        if dist.is_initialized():
            print("initialized", flush=True)
        print("I was", dist.get_rank(), dist.get_world_size(), dist.get_backend(), flush=True)
        if "collective" in sys.argv:
            try:
                dist.barrier()
            except ValueError as error:
                print("no group:", error, flush=True)
        dist.destroy_process_group()
        print("the end", flush=True)

main()
"""


def test_torch_s_own_idiom(job):
    """`finally: dist.destroy_process_group()`: not a word on stderr on any rank, and the code after it runs."""
    ranks = job.world(PROGRAM, 2, "collective")
    for rank in ranks:
        rank.wait_for("ready")
    ranks[0].signal()
    for number, rank in enumerate(ranks):
        assert rank.outlast(GRACE) == (0 if rank is ranks[0] else 143), rank.transcript()
        assert rank.noise == [], rank.transcript()
        assert rank.stdout.splitlines()[-1] == "the end", rank.transcript()
        assert re.search(rf"^I was {number} 2 gloo$", rank.stdout, re.MULTILINE)
        assert re.search("^no group: .*not been initialized", rank.stdout, re.MULTILINE), rank.transcript()
        assert rank.report()["outcome"] == "clean"


def test_a_child_of_the_way_out_collects_its_garbage(job):
    """What a rank forks on its way out is a process like any other: its collector is on, as it was."""
    rank = job.start(
        """
        import gc, os, time
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        try:
            while True:
                time.sleep(0.01)
        finally:
            pid = os.fork()
            if pid == 0:
                print("child", gc.isenabled(), dist.is_initialized(), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert "child True False" in rank.stdout, rank.transcript()


def test_nobody_leaves_out_of_a_function_that_is_built_in(job):
    """`set_wakeup_fd` runs no handler in its midst, so event loops written in C call it where nothing may be raised."""
    rank = job.start(
        """
        import signal, time, traceback
        import torch.distributed as dist
        import apart

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        apart.begin()
        time.sleep(0.1)
        print("ready", flush=True)
        try:
            while True:
                list(map(signal.set_wakeup_fd, [-1] * 10000))
                time.sleep(0.005)
        except SystemExit as error:
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            inside = any(name.endswith("signals/replacements.py") for name in files)
            print("raised", "inside" if inside else "outside", flush=True)
            raise
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert "raised outside" in rank.stdout, rank.transcript()
    assert rank.report()["outcome"] == "clean", rank.transcript()
    assert rank.noise == []
