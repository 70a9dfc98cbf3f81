"""The program's own code on the way out of a stop, when the group is gone (FACTS F20)."""

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
        assert rank.outlast(GRACE) == (0 if rank is ranks[0] else 143), rank.story()
        assert rank.noise == [], rank.story()
        assert rank.stdout.splitlines()[-1] == "the end", rank.story()
        assert re.search(rf"^I was {number} 2 gloo$", rank.stdout, re.MULTILINE)
        assert re.search("^no group: .*not been initialized", rank.stdout, re.MULTILINE), rank.story()
        assert rank.report()["outcome"] == "clean"
