"""A training job whose ranks are on hosts of their own."""

from harness import wait_until
from hosts import split


def train(job, hosts, *args, program="train.py", ready=r"step 3$", **env):
    """Start a rank on each host; all of them train, and all are connected with the hub."""
    own = {rank: {"host": host} for rank, host in enumerate(hosts)}
    where = {"MASTER_ADDR": hosts[0].ip4, "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = job.world(program, len(own), *args, each=own, **{**where, **env})
    for rank in ranks:
        rank.wait_for(ready)
    for host, rank in zip(hosts[1:], ranks[1:]):
        wait_until(lambda host=host, rank=rank: host.lines(rank.pid), "its line to the hub")
    return ranks


def hub_port(hosts, ranks):
    """At which port of its first address the hub of these ranks is reached from other hosts; one rank a host."""
    _, remote = hosts[-1].lines(ranks[-1].pid)[0]
    return split(remote)[1]


def out_in_time(ranks, grace):
    """Who was signalled is out inside the grace period, with the code of an eviction."""
    for rank in ranks:
        assert rank.signalled
        assert rank.outlast(grace) == 0, rank.transcript()


def end_by_themselves(ranks, codes, patience=60):
    """And the others, in their own time: nobody is left behind in a collective."""
    for rank in ranks:
        assert rank.wait(patience) in codes, rank.transcript()


def stopped_together(ranks):
    """After the same iteration, devices idle, groups released: as if there were no network between them."""
    steps = [rank.report()["steps"] for rank in ranks]
    assert len({step["stopped_at"] for step in steps}) == 1, steps
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
