"""Evictions of whole jobs whose ranks are on several hosts, over networks that break: namespaces, so this needs root.

What is signalled is out inside the grace period, whatever is cut; peers are told whenever a packet can get through;
and where nothing is cut, all stop after the same iteration. The channel by itself is in test_hosts.py, torchrun in
test_network_torchrun.py.
"""

import signal
import time

import pytest
from harness import wait_until
from hosts import Net, needs, slow_line
from jobs_on_hosts import end_by_themselves, hub_port, out_in_time, stopped_together, train

from autoteardown.channel import connection, hub
from autoteardown.event_loop import sockets

pytestmark = needs("ss", "nft")

GRACE = 25
SHORT = (
    10  # where something is cut: all of ours is scaled down to it, and the time-outs of the network are not
)
SOON = {"AUTOTEARDOWN_LOST": 3}


@pytest.fixture
def net():
    net = Net()
    yield net
    net.close()


def three(net, **families):
    return [net.host(number, **families) for number in (1, 2, 3)]


def evict_together(ranks, victim):
    """One rank is signalled, and nothing is cut."""
    ranks[victim].signal()
    out_in_time([ranks[victim]], GRACE)
    end_by_themselves([rank for rank in ranks if rank is not ranks[victim]], {143}, GRACE)
    stopped_together(ranks)


# -- networks as they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 2])
def test_ipv4(net, job, victim):
    evict_together(train(job, three(net), AUTOTEARDOWN_GRACE=GRACE), victim)


def test_ipv6_only(net, job):
    hosts = three(net, v4=False, v6=True)
    evict_together(train(job, hosts, MASTER_ADDR=hosts[0].ip6, AUTOTEARDOWN_GRACE=GRACE), 1)


def test_two_interfaces(net, job):
    """The store is reached by one, and what GLOO_SOCKET_IFNAME names is the other: the hub is reached by that."""
    hosts = three(net)
    net.add_switch(f"{net.name}-other")
    for host in hosts:
        host.plug("fast0", f"{net.name}-other", [f"10.66.0.{host.number}/24"])
    ranks = train(job, hosts, GLOO_SOCKET_IFNAME="fast0", AUTOTEARDOWN_GRACE=GRACE)
    assert hosts[2].lines(ranks[2].pid)[0][1].startswith("10.66.0.1:")
    evict_together(ranks, 2)


@pytest.mark.slow
@pytest.mark.parametrize("servers", ["none", "black hole"])
def test_names_that_do_not_resolve(net, job, servers):
    """Addresses are all that is needed: the agent looks no name up."""
    hosts = three(net)
    for host in hosts:
        host.file("resolv.conf", "nameserver 10.77.0.99\n" if servers == "black hole" else "")
        host.file("hosts", "127.0.0.1 localhost\n")
        host.nft(f"chain o {{ type filter hook output priority 0; udp dport 53 counter {DROP[servers]}; }}")
    ranks = train(job, hosts, fresh=True, AUTOTEARDOWN_GRACE=GRACE)
    asked = [host.run("nft", "list", "ruleset").split("packets ")[1].split()[0] for host in hosts]
    evict_together(ranks, 1)
    assert [host.run("nft", "list", "ruleset").split("packets ")[1].split()[0] for host in hosts] == asked


DROP = {"black hole": "drop", "none": "reject"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_far_away_over_a_bad_line(net, job, victim):
    """300 ms there and back, and one packet in fifty is lost."""
    hosts = [net.host(number) for number in (1, 2)]
    address, _ = slow_line(net, *hosts, 0.15, 0.02)
    for host in hosts:
        host.ip("link", "set", "eth0", "down")
    where = {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": "slow0"}
    evict_together(train(job, hosts, **where, AUTOTEARDOWN_GRACE=GRACE), victim)


# -- idle connections, and an eviction after them ----------------------------------------------------------------


@pytest.mark.parametrize("whose", ["hub", "rank"])
def test_idle_connections_were_reset(net, job, whose):
    """In the moment before: the notice goes over the next connection."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    if whose == "hub":
        hosts[0].reset(*hosts[0].lines(ranks[0].pid))
    else:
        for host, rank in zip(hosts[1:], ranks[1:]):
            host.reset(*host.lines(rank.pid))
    evict_together(ranks, 2)


def test_idle_connections_were_forgotten(net, job):
    """What is sent over them is swallowed; the rank that has something to say notices that."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    hosts[2].forget(*hosts[2].lines(ranks[2].pid))
    evict_together(ranks, 2)


@pytest.mark.parametrize("later", [0.0, sockets.USER_TIMEOUT + 3])
def test_idle_connections_were_forgotten_and_the_hub_has_something_to_say(net, job, later):
    """Its words are swallowed until the rank has noticed, and are said again then: a step is not waited for so long."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    hosts[2].forget(*hosts[2].lines(ranks[2].pid))
    time.sleep(later)
    ranks[0].signal()
    out_in_time([ranks[0]], GRACE)
    end_by_themselves(ranks[1:], {143}, GRACE)
    assert {rank.report()["cause"] for rank in ranks[1:]} == {"peer"}
    if later:
        stopped_together(ranks)


def test_a_connection_whose_other_end_is_gone(net, job):
    """Half open: the hub's kernel knows nothing of it, and says so when it is used."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    hosts[0].nft("chain o { type filter hook output priority 0; tcp flags & rst == rst drop; }")
    hosts[0].reset(*hosts[0].lines(ranks[0].pid))
    hosts[0].nft()
    evict_together(ranks, 1)


@pytest.mark.slow
def test_a_proxied_port(net, job):
    """By a sidecar that ends what is idle for a second: the line is made again and again, and the eviction is told."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    port = hub_port(hosts, ranks)
    net.proxy(hosts[2], 15001, mark=7, idle=1.0)
    hosts[2].nft(
        "chain n { type nat hook output priority -100;"
        f" meta mark != 7 ip daddr {hosts[0].ip4} tcp dport {port} redirect to :15001; }}"
    )
    hosts[2].reset(*hosts[2].lines(ranks[2].pid))
    time.sleep(4)
    wait_until(lambda: hosts[2].lines(ranks[2].pid), "its line by the proxy")
    evict_together(ranks, 2)


# -- the hub's port is closed in mid-job --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "verdict"),
    [
        (2, "reject with tcp reset"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, "reject with tcp reset"), (0, "drop"))
        ),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "drop"), (2, "drop"))),
    ],
)
def test_the_hubs_port_is_closed(net, job, victim, verdict):
    """By a policy that nobody thought of: who is signalled leaves in time, alone if need be.

    Its peers are freed by its leaving, gloo's way, or by the hub where that can be heard.
    """
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=SHORT, **SOON)
    hosts[0].close_port(hub_port(hosts, ranks), verdict)
    ranks[victim].signal()
    out_in_time([ranks[victim]], SHORT)
    end_by_themselves([rank for rank in ranks if rank is not ranks[victim]], {143, 1})


# -- cables -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_cable_is_pulled(net, job, cut, victim, when):
    """Before the signal or after it, of the hub's host or another: a signalled rank is out in time.

    The others are blocked in a collective with hosts that are not there any more: they are told if a packet gets
    through, and else know that somebody is lost.
    """
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=SHORT, **SOON)
    if when == "before":
        hosts[cut].pull()
        time.sleep(0.2)
    ranks[victim].signal()
    if when == "after":
        hosts[cut].pull()
    out_in_time([ranks[victim]], SHORT)
    end_by_themselves([rank for rank in ranks if rank is not ranks[victim]], {143, 1})


@pytest.mark.slow
def test_a_cable_is_pulled_for_a_moment(net, job):
    """A second, around the signal: all are told, and all stop together."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE)
    hosts[2].pull()
    ranks[1].signal()
    time.sleep(1)
    hosts[2].plug_in()
    evict_together_after(ranks, 1)


def evict_together_after(ranks, victim):
    out_in_time([ranks[victim]], GRACE)
    end_by_themselves([rank for rank in ranks if rank is not ranks[victim]], {143}, GRACE)
    stopped_together(ranks)


# -- power --------------------------------------------------------------------------------------------------------


def lose_power(host, rank):
    """Its kernel says nothing to anybody any more."""
    host.pull()
    rank.signal(signal.SIGKILL)
    rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [0, 2])
def test_a_host_loses_power(net, job, dark):
    """The others are blocked in a collective with it that never ends, and are let go."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=GRACE, **SOON)
    lose_power(hosts[dark], ranks[dark])
    others = [rank for rank in ranks if rank is not ranks[dark]]
    end_by_themselves(others, {143}, NOTICED + 3 + GRACE)
    for rank in others:
        report = rank.report()
        assert (report["cause"], report["origin"]["rank"]) == ("lost", dark), rank.transcript()


# Packets are not answered any more, everybody knows, and so much for a busy machine.
NOTICED = sockets.USER_TIMEOUT + sockets.KEEPALIVE_IDLE + hub.RECONNECT_SECONDS + connection.LOST_AFTER + 10


@pytest.mark.slow
@pytest.mark.parametrize("dark", [0, 2])
@pytest.mark.parametrize("later", [0.5, 8])
def test_a_host_loses_power_and_another_is_evicted(net, job, dark, later):
    """Whether the others know by then or not."""
    hosts = three(net)
    ranks = train(job, hosts, AUTOTEARDOWN_GRACE=SHORT, AUTOTEARDOWN_LOST=15)
    lose_power(hosts[dark], ranks[dark])
    time.sleep(later)
    ranks[1].signal()
    out_in_time([ranks[1]], SHORT)
    other = ranks[2 - dark]
    if dark != 0:  # the hub is there, and tells
        end_by_themselves([other], {143}, SHORT)
        assert other.report()["cause"] == "peer"
    else:
        end_by_themselves([other], {143, 1}, 90)
