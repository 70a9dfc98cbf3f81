"""The channel between real processes: delivery, reconnection, lost ranks, and what strangers can do."""

import contextlib
import json
import resource
import socket
import time

import pytest
from harness import PATIENCE, free_port, needs_torch, stat, wait_until
from talkers import Talk, expect_lost

from autoteardown.channel import addresses, admission, connect, connection, hub, rendezvous, wire


@pytest.fixture
def talk(tmp_path):
    talk = Talk(tmp_path)
    yield talk
    talk.close()


def hub_address_of(talk):
    """What rank 0 has published."""
    return rendezvous.HubAddress.decode(
        (talk.folder / "store" / rendezvous.KEY.replace("/", "-")).read_bytes()
    )


def call_on(address):
    """A connection with the hub."""
    host, port = next(each for each in address.hosts if rendezvous.is_loopback(each[0]))
    return socket.create_connection((host, port), 10)


def until_closed(sock):
    """Everything that comes until the other end hangs up."""
    sock.settimeout(30)
    found = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(65536):
            found += chunk
    return found


def hello(address, rank, member="stranger", attempt=1, heard=0, token=None):
    said = (rank, address.world, member, attempt, heard, 0)
    return wire.encode("hello", *said, wire.proof(token or address.token, "hello", *said))


# -- who hears what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["serve", "file"])
def test_everybody_hears_everything_once(talk, kind):
    """Over the stores that torch has."""
    where = f"file:{talk.folder}/file" if kind == "file" else f"tcp:127.0.0.1:{free_port()}"
    talkers = [talk.start(rank, 3, where if rank else where.replace("tcp", "serve")) for rank in range(3)]
    for talker in talkers:
        talker.expect("ready")
    for talker in reversed(talkers):  # so that the others look in vain at first
        talker.ask("open", answer="opened")
    for talker in talkers[1:]:
        talker.expect("heard", "up")
    talkers[1].tell("post", "notice", {"rank": 1})
    talkers[0].tell("post", "answer", [1, 2])
    talkers[2].tell("post", "whisper", {"to": 1, "text": "you alone"})
    for talker in talkers:
        talker.tell("flush", 10)
        assert talker.expect("flushed")[2] is True
    talkers[1].tell("post", "last", None)
    for talker in talkers:
        talker.expect("heard", "last")
        assert sorted(talker.heard("notice", "answer")) == [
            ["answer", [0, [1, 2]]],
            ["notice", [1, {"rank": 1}]],
        ]
        assert len(talker.heard("joined")) == 3
        assert talker.heard("whisper") == ([["whisper", [2, "you alone"]]] if talker.rank == 1 else [])
    assert [talker.heard("joined", "notice", "answer", "last") for talker in talkers[1:]] == [
        talkers[0].heard("joined", "notice", "answer", "last")
    ] * 2
    # in the order that is worst for a store's clients: its server first
    assert [talker.end() for talker in talkers] == [0, 0, 0]
    assert [talker.stderr for talker in talkers] == ["", "", ""]


def test_a_rank_that_comes_late_hears_it_all(talk):
    talkers = [talk.start(rank, 3) for rank in range(3)]
    for talker in talkers[:2]:
        talker.expect("ready")
        talker.ask("open", answer="opened")
    talkers[1].tell("post", "notice", 1)
    talkers[0].expect("heard", "notice")
    talkers[2].expect("ready")
    talkers[2].ask("open", answer="opened")
    talkers[2].expect("heard", "notice", [1, 1])


def test_what_is_posted_before_there_is_a_hub_is_not_lost(talk):
    rank = talk.start(1, 2)
    rank.expect("ready")
    rank.ask("open", answer="opened")
    for number in range(5):
        rank.tell("post", "early", number)
    assert rank.ask("flush", 0.3, answer="flushed") == [False]
    assert rank.ask("state") == [False, "rank 0 has not published its hub", False]
    first = talk.start(0, 2)
    first.expect("ready")
    first.ask("open", answer="opened")
    for number in range(5):
        first.expect("heard", "early", [1, number])
    assert rank.ask("flush", 10, answer="flushed") == [True]
    assert rank.ask("state") == [True, "", False]
    assert first.ask("state") == [True, "", True]


def test_the_coordinator_has_a_clock(talk):
    ranks = talk.world(2)
    ranks[1].tell("post", "alarm", 0.3)
    for rank in ranks:
        rank.expect("heard", "rang")
        assert rank.heard("rang") == [["rang", None]]


def test_a_council_that_fails_costs_its_answer_only(talk):
    ranks = talk.world(2)
    ranks[1].tell("post", "boom", None)
    ranks[1].tell("post", "after", None)
    ranks[1].expect("heard", "after")
    assert ranks[0].stderr.count("RuntimeError('boom')") == 1


def test_what_cannot_be_sent_is_not(talk):
    """And does not stop what can."""
    ranks = talk.world(2)
    ranks[1].tell(
        "do", "channel.post('bad', object()); channel.post('not a kind', 1); channel.post('b', 'x' * 20000)"
    )
    ranks[1].tell("post", "good", "é\n\u202e")
    ranks[0].expect("heard", "good", [1, "é\n\u202e"])
    assert ranks[1].heard("down") == []


def test_a_rank_cannot_make_what_only_the_hub_makes(talk):
    ranks = talk.world(2)
    ranks[1].tell("post", "lost", 0)
    ranks[1].tell("post", "after", None)
    ranks[1].expect("heard", "after")
    assert ranks[0].heard("lost") == ranks[1].heard("lost") == []


# -- no channel, and why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "world", "why"),
    [
        ("none", 2, "this process group has no store (MPI)"),
        ("hash", 1, "a world of one rank has no peers"),
        (None, 2, "rank 0 has not published its hub"),
    ],
)
def test_why_not(talk, where, world, why):
    rank = talk.start(world - 1, world, where)
    rank.expect("ready")
    rank.ask("open", answer="opened")
    wait_until(lambda: rank.ask("state")[:2] == [False, why], why)
    assert rank.end() == 0
    assert rank.stderr == ""


def test_a_store_that_cannot_be_written_to(talk):
    store = talk.folder / "store"
    store.mkdir()
    (store / "read-only").touch()
    ranks = [talk.start(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.expect("ready")
        rank.ask("open", answer="opened")
    assert ranks[0].ask("state")[:2] == [False, "the store cannot be written to: RuntimeError"]
    (store / "read-only").unlink()
    ranks[1].expect("heard", "up")
    assert ranks[0].ask("state") == [True, "", True]


def test_a_hub_that_cannot_be_reached(talk):
    ranks = talk.world(2)
    ranks[0].kill()
    ranks[1].expect("heard", "down")
    ranks[1].expect("heard", "lost", 0)
    connected, why, _ = ranks[1].ask("state")
    assert not connected
    assert why.startswith("the hub cannot be reached: ") and why.endswith(": connection refused"), why


# -- healing -------------------------------------------------------------------------------------------------------

CUT = """
import _socket, os
for name in os.listdir("/proc/self/fd"):
    try:
        sock = _socket.socket(fileno=os.dup(int(name)))
        if sock.family in (2, 10) and sock.getpeername():
            sock.shutdown(2)
        sock.close()
    except OSError:
        pass
"""


def test_a_hub_that_has_much_to_do(talk):
    """Who has a connection waits for the answer before it tries the next address beside it: but not for ever."""
    rank = talk.start(1, 3)
    rank.expect("ready")
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        hosts = first.getsockname(), second.getsockname()
        address = rendezvous.HubAddress("name", "token", 3, addresses.host_id(), hosts)
        (talk.folder / "store" / rendezvous.KEY.replace("/", "-")).write_text(address.encode())
        rank.ask("open", answer="opened")
        for server in (first, second):
            server.settimeout(PATIENCE)
        sock, _ = first.accept()
        with sock:
            assert sock.recv(1024).startswith(b'["hello",')
            since = time.monotonic()
            second.accept()[0].close()
            assert time.monotonic() - since > connect._ANSWER / 4


def test_a_connection_that_ends_is_made_again(talk):
    ranks = talk.world(3)
    ranks[1].tell("post", "before", None)
    ranks[2].expect("heard", "before")
    for number in range(3):
        ranks[2].tell("do", CUT)
        ranks[2].expect("heard", "down")
        ranks[1].tell("post", "between", number)
        ranks[2].expect("heard", "up")
        ranks[2].expect("heard", "between", [1, number])
        ranks[2].tell("post", "mine", number)
        ranks[0].expect("heard", "mine", [2, number])
    assert ranks[2].heard("before", "between") == [
        ["before", [1, None]],
        *(["between", [1, n]] for n in range(3)),
    ]
    assert ranks[0].heard("lost") == ranks[2].heard("lost") == []


def test_posts_are_counted_once_whatever_happens_to_the_line(talk):
    ranks = talk.world(2)
    ranks[1].tell(
        "do",
        f"import time\nfor n in range(400):\n    channel.post('p', n)\n    if n % 40 == 20:\n        exec({CUT!r})",
    )
    ranks[0].expect("heard", "p", [1, 399])
    assert ranks[0].heard("p") == [["p", [1, number]] for number in range(400)]
    assert [value for _, value in ranks[1].heard("p")] == [[1, number] for number in range(400)]


def test_a_hub_that_was_stopped_for_a_while(talk):
    ranks = talk.world(2)
    ranks[0].freeze()
    ranks[1].tell("post", "during", None)
    time.sleep(2 * connection.ACKNOWLEDGE_SECONDS + 1)
    ranks[0].thaw()
    ranks[0].expect("heard", "during")
    ranks[1].expect("heard", "during")
    assert ranks[1].ask("flush", 20, answer="flushed") == [True]
    assert ranks[0].heard("during") == [["during", [1, None]]]


def test_a_stale_key_leads_to_nobody_for_long(talk):
    """A store outlives groups: what is found there at first is the last generation's."""
    old = talk.world(2)
    old[0].kill()
    old[1].kill()
    rank = talk.start(1, 2)
    rank.expect("ready")
    rank.ask("open", answer="opened")
    wait_until(lambda: "refused" in rank.ask("state")[1], "the old hub's absence")
    first = talk.start(0, 2)
    first.expect("ready")
    first.ask("open", answer="opened")
    rank.expect("heard", "up")
    rank.tell("post", "here", None)
    first.expect("heard", "here")


def test_a_stale_key_whose_hub_still_lives(talk):
    """The next generation's rank is not let into the last one's group, and hears nothing of it."""
    old = talk.world(2)
    rank = talk.start(1, 2)
    rank.expect("ready")
    rank.ask("open", answer="opened")
    wait_until(lambda: "another process holds that rank" in rank.ask("state")[1], "the refusal")
    old[1].tell("post", "notice", None)
    first = talk.start(0, 2)
    first.expect("ready")
    first.ask("open", answer="opened")
    rank.expect("heard", "up")
    rank.tell("post", "here", None)
    first.expect("heard", "here")
    assert rank.heard("notice") == []
    assert old[0].heard("here") == []


# -- lost ----------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_lost_to_all(talk):
    ranks = talk.world(3)
    ranks[2].kill()
    start = time.monotonic()
    for rank in ranks[:2]:
        # Nothing lies between two processes of one host: its kernel has closed the connection, so it is dead.
        rank.expect("heard", "lost", [2, True])
    assert hub.RECONNECT_SECONDS - 0.5 < time.monotonic() - start < hub.RECONNECT_SECONDS + 10
    assert not ranks[1].heard("bye")


@pytest.mark.parametrize("how", ["close", "left"])
def test_a_rank_that_leaves_is_not_lost(talk, how):
    ranks = talk.world(3)
    if how == "close":
        ranks[2].ask("close", answer="closed")
    else:
        ranks[2].tell("post", "left", None)
        assert ranks[2].ask("flush", 10, answer="flushed") == [True]
    ranks[2].kill()
    for rank in ranks[:2]:
        rank.expect("heard", "bye" if how == "close" else "left")
    time.sleep(hub.RECONNECT_SECONDS + 1)
    assert ranks[0].heard("lost") == ranks[1].heard("lost") == []


def test_a_rank_that_was_lost_and_is_back(talk):
    ranks = talk.world(2)
    ranks[1].freeze()
    # its connection ends, and it cannot make another
    ranks[0].tell("do", CUT)
    expect_lost(ranks[0], 1)
    ranks[1].thaw()
    ranks[0].expect("heard", "back", [1, None])
    ranks[1].expect("heard", "up")
    ranks[1].tell("post", "again", None)
    ranks[0].expect("heard", "again")


def test_rank_0_that_leaves_is_not_lost(talk):
    ranks = talk.world(2)
    ranks[0].ask("close", answer="closed")
    ranks[1].expect("heard", "down", "rank 0 has left the process group")
    time.sleep(connection.LOST_AFTER + 1)
    assert ranks[1].heard("lost") == []
    assert ranks[1].ask("state")[0] is False


# -- groups that come and go ---------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_group(talk):
    ranks = [talk.start(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.expect("ready")
    for generation in range(12):
        for rank in ranks:
            rank.ask("open", answer="opened")
        ranks[1].expect("heard", "up")
        ranks[1].tell("post", "generation", generation)
        ranks[0].expect("heard", "generation", [1, generation])
        for rank in ranks:
            rank.ask("close", answer="closed")
        counts = [rank.ask("count") for rank in ranks]
        if generation == 1:
            first = counts
    assert counts == first
    # one thread, the reader of stdin aside
    assert [threads for _, threads in counts] == [2, 2]


def test_what_a_rank_costs(talk):
    ranks = [talk.start(rank, 2) for rank in range(2)]
    before = []
    for rank in ranks:
        rank.expect("ready")
        before.append(rank.ask("count"))
        rank.ask("open", answer="opened")
    ranks[1].expect("heard", "up")
    files, threads = ranks[1].ask("count")
    assert (files - before[1][0], threads - before[1][1]) == (1, 0)  # the wake-up pair was there before


def test_a_forked_child(talk):
    ranks = talk.world(3)
    for rank in ranks:
        before = rank.ask("count")[0]
        child = rank.ask("fork", 0.5, answer="child")
        assert child[1] is False
        assert child[0] < before
    ranks[1].kill()  # what the child has does not keep the connection
    expect_lost(ranks[0], 1)
    time.sleep(0.6)
    ranks[2].tell("post", "stalled", None)
    ranks[0].expect("heard", "stalled")


def test_descriptors_closed_under_us(talk):
    """`os.closerange` of a program that becomes a daemon: said, no spinning, and its next files are left alone."""
    ranks = talk.world(3)
    for rank in ranks[:2]:
        rank.tell("closerange")
        rank.expect("deaf")
        rank.tell("do", "import os\nmine = [os.open('/dev/null', os.O_RDONLY) for _ in range(64)]")
        before = ticks(rank)
        assert rank.ask("state")[:2] == [False, "the agent's thread has ended"]
        time.sleep(0.5)
        rank.ask("close", answer="closed")
        rank.tell(
            "do", "say('mine', [os.fstat(fd).st_rdev for fd in mine] == [os.stat('/dev/null').st_rdev] * 64)"
        )
        assert rank.expect("mine")[2] is True
        assert ticks(rank) - before < 20
        assert rank.stderr == ""


def ticks(rank):
    """Processor time."""
    return sum(map(int, stat(rank.pid)[11:13]))


# -- strangers -----------------------------------------------------------------------------------------------------


def still_well(ranks, mark):
    """The group works as before, and has heard of nothing."""
    ranks[1].tell("post", mark, None)
    for rank in ranks:
        rank.expect("heard", mark)
        assert not rank.heard("lost", "down", "back")


def test_a_port_scanner(talk):
    ranks = talk.world(2)
    for _ in range(200):
        call_on(hub_address_of(talk)).close()
    still_well(ranks, "after")
    assert len(ranks[0].heard("note")) <= 1
    assert ranks[0].stderr == ""


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 100_000,
        b"[" * 16000 + b"\n",
        b'["hello", "a", 1, 2, "b", 0, 5]\n',
        b'["p", 1, "notice", {}]\n',
        b'["hello", NaN]\n',
        b"\xff\xfe\n",
        b'{"hello": 1}\n',
        b'["hello","a",99999999999999999999,2,"b",0,"x"]\n',
    ],
)
def test_garbage(talk, garbage):
    ranks = talk.world(2)
    for _ in range(20):
        with call_on(hub_address_of(talk)) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(garbage)
            until_closed(sock)
    still_well(ranks, "after")
    assert len(ranks[0].heard("note")) == 1
    assert ranks[0].stderr == ""


def test_garbage_costs_no_more_the_more_of_it_there_is(talk):
    """A first line is short: what a stranger sends beyond it is not even read, let alone parsed."""
    ranks = talk.world(2)
    address = hub_address_of(talk)

    def cost(text):
        before = ticks(ranks[0])
        for _ in range(300):
            with call_on(address) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(text)
                until_closed(sock)
        return ticks(ranks[0]) - before

    assert cost(b'["hello"]\n' * 6000) < 3 * cost(b'["hello"]\n') + 50
    still_well(ranks, "after")


def test_a_wrong_token(talk):
    ranks = talk.world(3)
    address = hub_address_of(talk)
    for rank in (1, 2):
        with call_on(address) as sock:
            sock.sendall(hello(address, rank, token="f" * 32) + wire.encode("p", 1, "notice", {}))
            assert until_closed(sock) == b""
    still_well(ranks, "after")
    assert ranks[0].heard("notice") == []
    assert [value for _, value in ranks[0].heard("note")] == [
        "the hub has closed a connection without this group's token"
    ]


def test_the_first_line_does_not_contain_the_token(talk):
    talk.world(2)
    address = hub_address_of(talk)
    assert address.token not in hello(address, 1).decode()


def test_a_replayed_line(talk):
    """Neither what a rank has proven, nor what it has posted, is worth anything a second time."""
    first = talk.start(0, 2)
    first.expect("ready")
    first.ask("open", answer="opened")
    address = hub_address_of(talk)
    once = hello(address, 1) + wire.encode("p", 1, "once", None) * 3
    with call_on(address) as sock:
        sock.sendall(once)
        first.expect("heard", "once")
        with call_on(address) as other:
            other.sendall(once)
            assert json.loads(until_closed(other)) == ["no", "that hello was used before"]
        sock.sendall(wire.encode("p", 2, "twice", None))  # and this connection is not disturbed
        first.expect("heard", "twice")
    with call_on(address) as sock:  # the rank itself comes again, and does not know what has arrived
        sock.sendall(hello(address, 1, attempt=2) + wire.encode("p", 2, "twice", None))
        sock.sendall(wire.encode("p", 3, "thrice", None))
        first.expect("heard", "thrice")
        sock.sendall(wire.encode("p", 5, "gap", None))
        until_closed(sock)
    heard = first.heard("once", "twice", "thrice", "gap")
    assert [kind for kind, _ in heard] == ["once", "twice", "thrice"]


def test_a_replayed_line_of_an_earlier_life(talk):
    """What the process before has proven is worth nothing when the next one has been there."""
    first = talk.start(0, 2)
    first.expect("ready")
    first.ask("open", answer="opened")
    address = hub_address_of(talk)
    for life in ("one", "two"):
        with call_on(address) as sock:
            sock.sendall(hello(address, 1, life) + wire.encode("p", 1, life, None))
            first.expect("heard", life)
    with call_on(address) as sock:
        sock.sendall(hello(address, 1, "one") + wire.encode("p", 1, "replayed", None))
        assert json.loads(until_closed(sock)) == ["no", "that hello was used before"]
    with call_on(address) as sock:
        sock.sendall(hello(address, 1, "three") + wire.encode("p", 1, "after", None))
        first.expect("heard", "after")
    assert first.heard("replayed") == []


def test_silent_connections_are_few(talk):
    """10,000 of them: the hub keeps some dozens, and lets everybody in who knows the token."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    ranks = talk.world(2)
    before = ranks[0].ask("count")[0]
    address = hub_address_of(talk)
    socks = []
    for _ in range(10_000):
        socks.append(call_on(address))
        if len(socks) > min(2000, soft // 2):
            socks.pop(0).close()
    assert ranks[0].ask("count")[0] - before <= admission.MAX_UNAUTHENTICATED + 2
    ranks[1].tell("do", CUT)
    ranks[1].expect("heard", "up")
    ranks[1].tell("post", "after", None)
    for rank in ranks:
        rank.expect("heard", "after")
    assert len(ranks[0].heard("note")) <= 2
    for sock in socks:
        sock.close()


def test_a_guest_has_little_time(talk):
    talk.world(2)
    with call_on(hub_address_of(talk)) as sock:
        start = time.monotonic()
        until_closed(sock)
        assert time.monotonic() - start < 2 * admission.AUTHENTICATION_SECONDS + 5


def two_of_three(talk):
    """Ranks 0 and 1 of a world in which the test itself is rank 2."""
    first, second = talk.start(0, 3), talk.start(1, 3)
    for rank in (first, second):
        rank.expect("ready")
        rank.ask("open", answer="opened")
    second.expect("heard", "up")
    return first, second


def test_a_member_that_does_not_read(talk):
    """Costs the others nothing, and is given up when too much waits for it."""
    first, second = two_of_three(talk)
    address = hub_address_of(talk)
    with call_on(address) as sock:
        sock.sendall(hello(address, 2))
        second.tell("do", "for n in range(3000):\n    channel.post('much', 'x' * 10000)")
        second.tell("post", "after", None)
        first.expect("heard", "after")
        second.expect("heard", "after")


def test_a_member_that_reads_late(talk):
    """Hears everything, also when nothing more is said."""
    _, second = two_of_three(talk)
    address = hub_address_of(talk)
    with call_on(address) as sock:
        sock.sendall(hello(address, 2))
        second.tell("do", "for n in range(1000):\n    channel.post('much', 'x' * 10000)")
        second.tell("post", "last", None)
        second.expect("heard", "last")
        sock.settimeout(30)
        found = b""
        while b'"last"' not in found[-200:]:
            found += sock.recv(1 << 20)
    assert found.count(b'"much"') == 1000


def test_a_hub_without_descriptors(talk):
    """Says so to those that it cannot take, and takes them when there is room again."""
    ranks = [talk.start(rank, 6) for rank in range(6)]
    for rank in ranks:
        rank.expect("ready")
    # The program leaves less than the hub wants to spare, and the hard limit is the soft one. There is room for two, or
    # one more or less where a file is open for a moment as the descriptors are counted.
    ranks[0].tell(
        "do",
        "import os, resource\n"
        "used = len(os.listdir('/proc/self/fd'))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used + 262, used + 262))\n",
    )
    ranks[0].ask("open", answer="opened")
    why = "the hub has no file descriptor left for one more rank (RLIMIT_NOFILE)"
    connected = []
    for refused in ranks[1:]:
        refused.ask("open", answer="opened")

        def settled(rank=refused):
            up, reason, _ = rank.ask("state")
            return up or reason.endswith(why)

        wait_until(settled, f"connected, or: {why}")
        if not refused.ask("state")[0]:
            break
        connected.append(refused)
    assert 1 <= len(connected) <= 3, [rank.transcript() for rank in ranks]
    ranks[0].expect("heard", "note", why)
    connected[0].ask("close", answer="closed")
    refused.expect("heard", "up")
    assert len(ranks[0].heard("note")) == 1


def test_the_low_numbers_are_the_programs(talk):
    """A program that calls select(2) goes on as before, though the soft limit is raised."""
    ranks = [talk.start(rank, 300) for rank in range(2)]
    for rank in ranks:
        rank.expect("ready")
    ranks[0].tell("do", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (320, 4000))")
    ranks[0].ask("open", answer="opened")
    ranks[1].ask("open", answer="opened")
    ranks[1].expect("heard", "up")
    ranks[0].tell(
        "do",
        "import os, resource\n"
        "say('limit', resource.getrlimit(resource.RLIMIT_NOFILE)[0], max(map(int, os.listdir('/proc/self/fd'))))\n"
        "say('next', os.open('/dev/null', os.O_RDONLY))",
    )
    limit, highest = ranks[0].expect("limit")[2:]
    assert 1024 + 300 < limit <= 4000
    assert highest >= 1024
    assert ranks[0].expect("next")[2] < 100


@pytest.mark.parametrize("first", [0, 1])
def test_groups_one_after_another_in_any_order(talk, first):
    """A rank that is early finds the last group's hub, one that is late the next one's: all end up in the right one."""
    ranks = talk.world(3)
    for generation in range(2):
        ranks[first].ask("close", answer="closed")
        ranks[first].ask("open", answer="opened")
        time.sleep(3)
        for rank in ranks:
            if rank is not ranks[first]:
                rank.ask("close", answer="closed")
        for rank in ranks:
            if rank is not ranks[first]:
                rank.ask("open", answer="opened")
        for rank in ranks:
            wait_until(lambda rank=rank: rank.ask("state")[0], "its connection")
        wait_until(lambda: len(connections_of_hub(talk, ranks)) == 2, "both of them")
        for rank in ranks:
            rank.tell("post", f"said{generation}", None)
        for rank in ranks:
            for _ in ranks:
                rank.expect("heard", f"said{generation}")


def connections_of_hub(talk, ranks):
    """Ranks that the hub of today has let in."""
    ranks[0].tell("do", "say('members', [m.rank for m in channel._end._members.values() if m.peer])")
    return ranks[0].expect("members")[2]


# -- the store -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "exit", "kill"])
def test_a_store_whose_server_is_gone(talk, how):
    """c10d prints a page about each use of it: it is not used any more, whether a hub was found there or not."""
    port = free_port()
    ranks = [talk.start(rank, 3, f"{'tcp' if rank else 'serve'}:127.0.0.1:{port}") for rank in range(3)]
    for rank in ranks:
        rank.expect("ready")
    ranks[1].ask("open", answer="opened")  # looks in vain, again and again
    if how != "kill":
        ranks[0].ask("open", answer="opened")
        ranks[2].ask("open", answer="opened")
        ranks[2].expect("heard", "up")
        ranks[1].expect("heard", "up")
    else:
        wait_until(lambda: ranks[1].ask("state")[1] == "rank 0 has not published its hub", "a look")
        time.sleep(
            2
        )  # the looks are rare by then: one that is under way when the server dies fails with a page
    if how == "end":
        assert ranks[0].end() == 0
    elif how == "exit":
        ranks[0].tell("exit")
    else:
        ranks[0].kill()
    if how == "kill":
        why = "the store's server has closed its connections"
        wait_until(lambda: ranks[1].ask("state")[1] == why, "that it is noticed")
    time.sleep(4)
    for rank in ranks[1:]:
        assert rank.end() == 0
        assert rank.stderr == ""


@needs_torch(2, 8, "a store has no clone, and its client one lock")
def test_a_program_that_waits_in_the_store(talk):
    """As for NCCL's unique id, before the first collective: its client has one lock; the rank connects all the same."""
    port = free_port()
    ranks = [talk.start(rank, 2, f"{'tcp' if rank else 'serve'}:127.0.0.1:{port}") for rank in range(2)]
    for rank in ranks:
        rank.expect("ready")
    ranks[1].tell(
        "do",
        "import threading\n"
        "from datetime import timedelta\n"
        "def wait():\n"
        "    store.wait(['never'], timedelta(seconds=30))\n"
        "threading.Thread(target=wait, daemon=True).start()",
    )
    time.sleep(0.5)
    ranks[1].ask("open", answer="opened")
    ranks[0].ask("open", answer="opened")
    ranks[1].expect("heard", "up", patience=20)
    assert ranks[1].stderr == ""


def test_a_group_that_is_left_while_the_loop_is_late(talk):
    """Who leaves does not wait for it for long, and lets go of the hub under it: not a word about that."""
    ranks = talk.world(3)
    ranks[0].tell(
        "do",
        "import threading\n"
        "hub, late = channel._end, []\n"
        "def slow(send):\n"
        "    def sends(data):\n"
        "        if not late:\n"
        "            late.append(threading.Thread(target=hub.forget))\n"
        "            late[0].start()\n"
        "            late[0].join()\n"
        "        send(data)\n"
        "    return sends\n"
        "for member in hub._members.values():\n"
        "    member.peer.send = slow(member.peer.send)\n",
    )
    ranks[0].ask("close", answer="closed")
    assert ranks[0].end() == 0
    assert ranks[0].stderr == ""
