"""The channel over networks that break: hosts are network namespaces, so this needs root."""

import re
import time

import pytest
from hosts import Net, needs, slow_line, split
from talkers import Talk, expect_lost

from autoteardown.channel import connection, hub, rendezvous
from autoteardown.event_loop import sockets

pytestmark = needs()

# From the moment that packets are no longer answered to the moment that all know.
NOTICED = sockets.USER_TIMEOUT + sockets.KEEPALIVE_IDLE + hub.RECONNECT_SECONDS + connection.LOST_AFTER


@pytest.fixture
def net():
    net = Net()
    yield net
    net.close()


@pytest.fixture
def talk(tmp_path):
    talk = Talk(tmp_path)
    yield talk
    talk.close()


def spread(talk, hosts, each=1, **options):
    """A world of connected ranks, so many on each host."""
    world = len(hosts) * each
    talkers = [talk.start(rank, world, prefix=hosts[rank // each].prefix, **options) for rank in range(world)]
    for talker in talkers:
        talker.expect("ready")
        talker.ask("open", answer="opened")
    for talker in talkers[1:]:
        talker.expect("heard", "up")
    return talkers


def all_hear(ranks, by, kind, patience=60):
    """One rank says something, and all of them hear it; after how many seconds the last."""
    start = time.monotonic()
    by.tell("post", kind, None)
    for rank in ranks:
        rank.expect("heard", kind, patience=patience)
    return time.monotonic() - start


def connections(host):
    """Local and remote ends of the connections of a host."""
    lines = host.run("ss", "-Htn", "state", "established").splitlines()
    return [tuple(line.split()[2:4]) for line in lines]


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_hosts(net, talk, family):
    hosts = [net.host(number, v4=family == "IPv4", v6=family == "IPv6") for number in (1, 2, 3)]
    ranks = spread(talk, hosts, each=2)
    for rank in ranks[::2]:
        all_hear(ranks, rank, f"from{rank.rank}")
    # Ranks on the hub's host come by loopback, whatever becomes of the network.
    ends = {re.sub(r":\d+$", "", there) for _, there in connections(hosts[0])}
    wanted = {each.ip4 if family == "IPv4" else f"[{each.ip6}]" for each in hosts[1:]}
    assert ends == {"127.0.0.1", *wanted}


def test_what_is_bound(net, talk):
    """Its own addresses, never all of them: nothing that comes up later."""
    host = net.host(1)
    spread(talk, [host], each=2)
    listener = {line.split()[3] for line in host.run("ss", "-Htnl").splitlines()}
    assert {re.sub(r":\d+$", "", each) for each in listener} == {"10.77.0.1", "127.0.0.1"}


@needs("nft")
def test_an_interface_that_the_others_do_not_reach(net, talk):
    """Two interfaces, and the first swallows what comes: the next address is tried before the first has failed."""
    hosts = [net.host(1), net.host(2)]
    net.add_switch(f"{net.name}-other")
    for host in hosts:
        host.ip("link", "del", "eth0")
        host.plug("first0", f"{net.name}-other", [f"10.66.0.{host.number}/24"])
        host.plug("eth0", net.switch, [f"{host.ip4}/24"])
    hosts[0].nft("chain i { type filter hook input priority 0; iifname first0 drop; }")
    start = time.monotonic()
    ranks = spread(talk, hosts)
    address = rendezvous.HubAddress.decode((talk.folder / "store" / "autoteardown-hub").read_bytes())
    assert [host for host, _ in address.hosts] == ["10.66.0.1", "10.77.0.1", "127.0.0.1"]
    assert time.monotonic() - start < 7
    all_hear(ranks, ranks[1], "hello")


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_the_interface_that_the_user_names(net, talk, variable):
    hosts = [net.host(1), net.host(2)]
    net.add_switch(f"{net.name}-other")
    for host in hosts:
        host.plug("fast0", f"{net.name}-other", [f"10.66.0.{host.number}/24"])
    spread(talk, hosts, **{variable: "fast0"})
    assert [re.sub(r":\d+$", "", there) for _, there in connections(hosts[0])] == ["10.66.0.2"]
    listener = {line.split()[3] for line in hosts[0].run("ss", "-Htnl").splitlines()}
    assert {re.sub(r":\d+$", "", each) for each in listener} == {"10.66.0.1"}


def test_an_idle_connection_is_reset(net, talk):
    """By whatever lies between: made again, and an eviction after it is heard of by all."""
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    for host in hosts[1:]:
        host.run("ss", "-K", "-tn", "dst", hosts[0].ip4)
    for rank in ranks[1:]:
        rank.expect("heard", "down")
        rank.expect("heard", "up")
    assert all_hear(ranks, ranks[2], "notice") < 5
    assert ranks[0].heard("lost") == []


def test_reset_on_the_hubs_side_in_the_moment_of_the_notice(net, talk):
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    for number in range(5):
        ranks[2].tell("post", "notice", number)
        hosts[0].run("ss", "-K", "-tn", "dst", "10.77.0.0/24")
    ranks[2].tell("post", "last", None)
    for rank in ranks:
        rank.expect("heard", "last")
        assert [value for _, value in rank.heard("notice")] == [[2, number] for number in range(5)]


@pytest.mark.parametrize("whose", ["rank", "hub"])
def test_a_cable_that_is_pulled_for_a_while(net, talk, whose):
    """What is said meanwhile arrives when packets do, once; nobody is lost for that."""
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    cut = hosts[0] if whose == "hub" else hosts[2]
    cut.pull()
    ranks[2].tell("post", "mine", None)
    ranks[0].tell("post", "yours", None)
    time.sleep(4)
    cut.plug_in()
    for rank in ranks:
        rank.expect("heard", "mine", patience=20)
        assert len(rank.heard("yours")) == len(rank.heard("mine")) == 1 or rank.expect("heard", "yours")
    assert ranks[0].heard("lost") == []


@needs("nft")
def test_a_live_rank_behind_a_firewall_is_not_known_to_be_dead(net, talk):
    """Its connection is reset, and the next ones are refused for a while: no more than lost, and then back."""
    hosts = [net.host(number) for number in (1, 2)]
    ranks = spread(talk, hosts)
    (local, remote), *_ = hosts[1].lines(ranks[1].pid)
    hosts[0].close_port(split(remote)[1], "reject with tcp reset", new=True)
    hosts[1].reset((local, remote))
    ranks[0].expect("heard", "lost", [1, False])
    time.sleep(hub.DEAD_AFTER / 2 - hub.RECONNECT_SECONDS)
    hosts[0].nft()
    ranks[0].expect("heard", "back", [1, None])
    assert ranks[0].heard("lost") == [["lost", [1, False]]]
    assert all_hear(ranks, ranks[0], "notice") < 5


@pytest.mark.slow
def test_a_rank_of_another_host_that_was_killed(net, talk):
    """Lost at once, and known to be dead when a live one would be back."""
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    ranks[2].kill()
    start = time.monotonic()
    for rank in ranks[:2]:
        rank.expect("heard", "lost", [2, False])
    assert time.monotonic() - start < hub.RECONNECT_SECONDS + 5
    for rank in ranks[:2]:
        rank.expect("heard", "lost", [2, True])
    assert time.monotonic() - start > hub.DEAD_AFTER - 1


@pytest.mark.slow
def test_a_host_that_loses_power(net, talk):
    """Its kernel says nothing to anybody."""
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    hosts[2].pull()
    ranks[2].kill()
    start = time.monotonic()
    for rank in ranks[:2]:
        expect_lost(rank, 2, NOTICED + 10)
    assert time.monotonic() - start < NOTICED + 5
    assert all_hear(ranks[:2], ranks[1], "notice") < 5


@pytest.mark.slow
def test_the_hubs_host_loses_power(net, talk):
    hosts = [net.host(number) for number in (1, 2, 3)]
    ranks = spread(talk, hosts)
    hosts[0].pull()
    ranks[0].kill()
    start = time.monotonic()
    for rank in ranks[1:]:
        rank.expect("heard", "down", patience=NOTICED + 10)
        rank.expect("heard", "lost", 0, patience=NOTICED + 10)
    assert time.monotonic() - start < NOTICED + 5
    time.sleep(10)  # a whole round of attempts
    connected, why, _ = ranks[1].ask("state")
    assert not connected
    assert re.fullmatch(r"the hub cannot be reached: 10\.77\.0\.1:\d+: (timed out|no route to host)", why), (
        why
    )


@pytest.mark.slow
def test_a_host_that_was_away_is_back(net, talk):
    hosts = [net.host(number) for number in (1, 2)]
    ranks = spread(talk, hosts)
    hosts[1].pull()
    expect_lost(ranks[0], 1, NOTICED + 10)
    ranks[1].expect("heard", "lost", 0, patience=NOTICED + 10)
    ranks[1].tell("post", "away", None)
    hosts[1].plug_in()
    ranks[0].expect("heard", "away", patience=20)
    ranks[1].expect("heard", "up")
    ranks[1].expect("heard", "back", 0)
    assert ["back", [1, None]] in ranks[0].heard("back")
    assert all_hear(ranks, ranks[0], "notice") < 5


@needs("nft")
@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("drop", "timed out"),
        ("reject with tcp reset", "connection refused"),
        ("reject", "connection refused"),
    ],
)
def test_a_closed_port(net, talk, verdict, words):
    """Said as it is, and tried again: a policy that is mended is enough."""
    hosts = [net.host(1), net.host(2)]
    hosts[0].nft(f"chain i {{ type filter hook input priority 0; meta l4proto tcp iifname eth0 {verdict}; }}")
    ranks = [talk.start(rank, 2, prefix=hosts[rank].prefix) for rank in range(2)]
    for rank in ranks:
        rank.expect("ready")
        rank.ask("open", answer="opened")
    end = time.monotonic() + 30
    while words not in ranks[1].ask("state")[1]:
        assert time.monotonic() < end, ranks[1].transcript()
        time.sleep(0.1)
    assert ranks[1].ask("state")[1].startswith("the hub cannot be reached: 10.77.0.1:")
    hosts[0].nft()
    ranks[1].expect("heard", "up", patience=20)
    all_hear(ranks, ranks[1], "hello")


@needs("nft")
def test_a_translator_that_forgets(net, talk):
    """Silently: what the rank sends is swallowed, and so is what it is sent."""
    hosts = [net.host(1), net.host(2)]
    router, inner = net.host(3), f"{net.name}-inner"
    net.add_switch(inner)
    router.plug("in0", inner, ["10.55.0.1/24"])
    router.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    router.nft(
        "chain n { type nat hook postrouting priority 100; oifname eth0 masquerade; }",
        "chain f { type filter hook forward priority 0; ct state invalid drop; }",
        "chain i { type filter hook input priority 0; meta l4proto tcp drop; }",
    )
    router.run("sh", "-c", "echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose")
    hosts[1].ip("link", "del", "eth0")
    hosts[1].plug("eth0", inner, ["10.55.0.2/24"])
    hosts[1].ip("route", "add", "default", "via", "10.55.0.1")
    ranks = spread(talk, hosts)
    all_hear(ranks, ranks[1], "before")

    def forget():  # a masquerading interface that goes down takes its translations with it
        router.ip("link", "set", "eth0", "down")
        router.ip("link", "set", "eth0", "up")

    forget()
    assert all_hear(ranks, ranks[1], "posted", patience=30) < 3 * connection.ACKNOWLEDGE_SECONDS + 5
    forget()
    assert all_hear(ranks, ranks[0], "told", patience=60) < 5 + sockets.USER_TIMEOUT + 10


def test_far_away_over_a_bad_line(net, talk):
    """300 ms there and back, and one packet in twenty is lost."""
    hosts = [net.host(1), net.host(2)]
    slow_line(net, *hosts, 0.15, 0.05)
    for host in hosts:
        host.ip("link", "set", "eth0", "down")
    ranks = spread(talk, hosts)
    for number in range(20):
        assert all_hear(ranks, ranks[number % 2], f"m{number}") < 15
    for rank in ranks:
        assert [kind for kind, _ in rank.heard() if kind.startswith("m")] == [f"m{n}" for n in range(20)]
    assert ranks[0].heard("lost") == []


def test_a_frozen_hub(net, talk):
    """Its host answers, it does not: nobody takes that for a loss, and it goes on where it was."""
    hosts = [net.host(1), net.host(2)]
    ranks = spread(talk, hosts)
    ranks[0].freeze()
    ranks[1].tell("post", "during", None)
    time.sleep(3)
    ranks[0].thaw()
    for rank in ranks:
        rank.expect("heard", "during", patience=30)
    assert ranks[0].heard("during") == [["during", [1, None]]]
