"""`torchrun --nnodes 3` on hosts of their own (network namespaces, so this needs root): `make network`.

What torchrun adds: its agent passes the signal on to its worker, the agent of the first node hosts the store, and an
agent whose worker has failed ends.
"""

import os
import re
import signal
import time

import pytest
from harness import SIGTERM, free_port, wait_until
from hosts import Net, needs

pytestmark = [needs("ss"), pytest.mark.slow]

GRACE = 25


@pytest.fixture
def net():
    net = Net()
    yield net
    net.close()


class Nodes:
    """Three nodes with a torchrun each, and a worker each that trains."""

    def __init__(self, net, job, rendezvous):
        self.job = job
        self.hosts = [net.host(number) for number in (1, 2, 3)]
        port, self.agents = free_port(), []
        for number, host in enumerate(self.hosts):
            if rendezvous == "static":
                where = (
                    f"--node-rank={number}",
                    f"--master-addr={self.hosts[0].ip4}",
                    f"--master-port={port}",
                )
            else:
                where = (
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={self.hosts[0].ip4}:{port}",
                    "--rdzv-id=job",
                    # By itself torchrun takes a host for the store's if one of its names leads to that address.
                    f"--rdzv-conf=is_host={int(number == 0)}",
                )
            options = ("--nnodes=3", f"--local-addr={host.ip4}", *where)
            env = {"GLOO_SOCKET_IFNAME": "eth0", "AUTOTEARDOWN_GRACE": GRACE, "AUTOTEARDOWN_LOST": 3}
            self.agents.append(job.torchrun("train.py", ranks=1, nodes=options, host=host, **env))
        # torchrun gives the ranks in an order of its own, unless it is static.
        self.node_of, self.pid_of = {}, {}
        for number, agent in enumerate(self.agents):
            found = agent.wait_for(r"^rank (\d) pid (\d+) step 5$")
            self.node_of[int(found[1])], self.pid_of[int(found[1])] = number, int(found[2])
        for rank in (1, 2):
            host = self.hosts[self.node_of[rank]]
            wait_until(lambda host=host, rank=rank: host.lines(self.pid_of[rank]), "its line to the hub")

    def reports(self, *ranks):
        """Of these ranks, once they are out: in time, and without a SIGKILL."""
        start = time.monotonic()
        found = wait_until(
            lambda: all(rank in self.job.all_reports() for rank in ranks) and self.job.all_reports(),
            f"the reports of {ranks}: {[agent.transcript() for agent in self.agents]}",
        )
        for rank in ranks:
            wait_until(lambda rank=rank: not os.path.exists(f"/proc/{self.pid_of[rank]}"), "its end", GRACE)
        assert time.monotonic() - start < GRACE
        for agent in self.agents:
            assert "SIGKILL" not in agent.stderr and "-9" not in agent.stderr, agent.transcript()
        return found

    def stopped_together(self, signalled):
        found = self.reports(0, 1, 2)
        assert [found[rank]["outcome"] for rank in range(3)] == ["clean"] * 3, found
        assert len({found[rank]["steps"]["stopped_at"] for rank in range(3)}) == 1, found
        assert [found[rank]["exit_code"] for rank in range(3)] == [
            0 if rank in signalled else 143 for rank in range(3)
        ]


@pytest.fixture(params=["static", "c10d"])
def nodes(request, net, job):
    return Nodes(net, job, request.param)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker(nodes, victim):
    os.kill(nodes.pid_of[victim], SIGTERM)
    nodes.stopped_together([victim])
    # Those whose worker has failed, to them, end; the one whose worker has succeeded waits for the others.
    for number, agent in enumerate(nodes.agents):
        if number != nodes.node_of[victim]:
            assert agent.wait() == 1


@pytest.mark.parametrize("node", [0, 1])
def test_a_node(nodes, node):
    """Its agent gets the signal; the first one's hosts the store."""
    nodes.agents[node].signal()
    signalled = [rank for rank, where in nodes.node_of.items() if where == node]
    nodes.stopped_together(signalled)
    assert nodes.agents[node].wait(GRACE) == 1


def test_all_nodes_at_once(nodes):
    for agent in nodes.agents:
        agent.signal()
    found = nodes.reports(0, 1, 2)
    assert {report["outcome"] for report in found.values()} == {"clean"}
    assert len({report["steps"]["stopped_at"] for report in found.values()}) == 1
    # Whom the notice reaches first is a peer, and still a rank that got the signal.
    assert {report["exit_code"] for report in found.values()} <= {0, 143}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("node", [0, 2])
def test_a_node_whose_network_goes_first(net, job, node, when):
    nodes = Nodes(net, job, "static")
    if when == "before":
        nodes.hosts[node].pull()
    nodes.agents[node].signal()
    if when == "after":
        time.sleep(0.05)
        nodes.hosts[node].pull()
    assert nodes.reports(node)[node]["exit_code"] == 0
    assert nodes.agents[node].outlast(GRACE + 5) == 1, nodes.agents[node].transcript()
    for rank in {0, 1, 2} - {node}:
        wait_until(lambda rank=rank: not os.path.exists(f"/proc/{nodes.pid_of[rank]}"), "a peer's end")


@pytest.mark.parametrize("node", [0, 2])
def test_a_node_without_power(net, job, node):
    """Its network has failed, and its processes have ended: the others are not left in their collective."""
    nodes = Nodes(net, job, "static")
    nodes.hosts[node].pull()
    nodes.agents[node].signal(signal.SIGKILL)
    os.kill(nodes.pid_of[node], signal.SIGKILL)
    others = sorted({0, 1, 2} - {node})
    for rank in others:
        wait_until(lambda rank=rank: not os.path.exists(f"/proc/{nodes.pid_of[rank]}"), "a peer's end")
    found = job.all_reports()
    for rank in others:
        report = found[rank]
        assert (report["cause"], report["origin"]["rank"], report["exit_code"]) == ("lost", node, 143)
    ended = [nodes.agents[rank].wait() for rank in others]
    assert ended == [1, 1]
    assert not re.search("SIGKILL", nodes.agents[others[0]].stderr)
