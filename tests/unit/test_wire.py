"""The parts of the channel that do no I/O: lines, the message log, addresses, the hub's address in the store."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoteardown.channel import addresses, rendezvous
from autoteardown.channel.addresses import Interface
from autoteardown.channel.message_log import MAX_ENTRIES, MessageLog
from autoteardown.channel.wire import (
    KIND,
    LIMIT,
    Lines,
    Malformed,
    decode,
    encode,
    is_proof,
    kind_of,
    name_of,
    proof,
    whole,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)

on_a_busy_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- lines -----------------------------------------------------------------------------------------------------------


@on_a_busy_machine
@given(st.lists(VALUES, max_size=6), st.lists(st.integers(1, 50), max_size=30))
def test_lines_come_as_they_went_however_they_are_cut(values, cuts):
    data = b"".join(encode("m", number, "kind", value) for number, value in enumerate(values))
    lines, found = Lines(), []
    for size in [*cuts, len(data) + 1]:
        found += lines.feed(data[:size])
        data = data[size:]
    assert found == [["m", number, "kind", value] for number, value in enumerate(values)]


@on_a_busy_machine
@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_malformed(data):
    try:
        for line in Lines().feed(data + b"\n"):
            assert isinstance(line, list) and isinstance(line[0], str)
    except Malformed:
        pass


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"[1]",
        b"null",
        b'["m",NaN]',
        b'["m",Infinity]',
        b"\xff",
        b"[" * 16000,
        b'["m"',
        b'["m"]]',
    ],
)
def test_malformed(line):
    with pytest.raises(Malformed):
        decode(line)


def test_a_line_without_an_end_is_given_up_in_time():
    lines = Lines()
    lines.feed(b"x" * LIMIT)
    with pytest.raises(Malformed):
        lines.feed(b"x")
    with pytest.raises(Malformed):
        Lines().feed(b'["m","' + b"x" * LIMIT + b'"]\n')


def test_what_is_too_long_is_not_sent():
    with pytest.raises(ValueError, match="limit"):
        encode("p", 1, "kind", "x" * LIMIT)
    with pytest.raises(ValueError):
        encode("p", 1, "kind", float("nan"))
    with pytest.raises(TypeError):
        encode("p", 1, "kind", object())


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 2**53 + 1, [1]])
def test_not_a_whole_number(value):
    with pytest.raises(Malformed):
        whole(value)


@pytest.mark.parametrize("value", ["", "a b", "a" * (KIND + 1), 1, None, "x\n"])
def test_not_a_kind(value):
    with pytest.raises(Malformed):
        kind_of(value)


@pytest.mark.parametrize("value", ["", "a-b", "a" * 65, 1, "ä"])
def test_not_a_name(value):
    with pytest.raises(Malformed):
        name_of(value)


def test_a_proof_holds_for_what_was_said():
    said = ("hello", 1, 4, "member", 1, 0)
    assert is_proof(proof("token", *said), proof("token", *said))
    assert not is_proof(proof("other", *said), proof("token", *said))
    assert not is_proof(proof("token", "welcome", *said[1:]), proof("token", *said))
    assert not is_proof(proof("token", *said[:4], 2, 0), proof("token", *said))
    for nonsense in (None, 1, "", "ä" * 64, ["x"]):
        assert not is_proof(nonsense, proof("token", *said))


# -- what has been said ---------------------------------------------------------------------------------------------


def read(data):
    return [line[1:] for line in Lines().feed(data)]


def everything(said, rank, after=0):
    found = []
    while after < said.last:
        data, after = said.after(after, rank)
        found += read(data)
    return found


@on_a_busy_machine
@given(st.lists(st.tuples(st.none() | st.integers(0, 2), VALUES), max_size=20), st.integers(0, 20))
def test_everybody_is_told_what_is_for_it_from_where_it_left_off(messages, heard):
    said = MessageLog()
    for to, value in messages:
        said.add(to, "kind", value)
    heard = min(heard, said.last)
    for rank in range(3):
        wanted = [
            [index, "kind", value]
            for index, (to, value) in enumerate(messages, 1)
            if to in (None, rank) and index > heard
        ]
        assert everything(said, rank, heard) == wanted
        assert said.messages_for(rank, heard) == [("kind", value) for _, _, value in wanted]


def test_much_is_told_piece_by_piece():
    said = MessageLog()
    for _ in range(100):
        said.add(None, "kind", "x" * 10_000)
    data, index = said.after(0, 1)
    assert 0 < len(data) < 300_000 and 0 < index < 100
    assert len(everything(said, 1)) == 100


def test_what_is_very_old_is_forgotten():
    said = MessageLog()
    for number in range(2 * MAX_ENTRIES + 2):
        said.add(None, "kind", number)
    assert said.last == 2 * MAX_ENTRIES + 2
    found = everything(said, 1)
    assert found[-1] == [2 * MAX_ENTRIES + 2, "kind", 2 * MAX_ENTRIES + 1]
    assert MAX_ENTRIES <= len(found) <= 2 * MAX_ENTRIES + 1


# -- addresses -------------------------------------------------------------------------------------------------------

LO = Interface("lo", "127.0.0.1", True)
LO6 = Interface("lo", "::1", True)
ETH = Interface("eth0", "10.0.0.1", False)
ETH6 = Interface("eth0", "fd00::1", False)
IB = Interface("ib0", "10.1.0.1", False)
DOCKER = Interface("docker0", "172.17.0.1", False)
ALL = [LO, DOCKER, ETH, IB, LO6, ETH6]


@pytest.mark.parametrize(
    ("environ", "proven", "wanted"),
    [
        ({}, [], ["10.0.0.1", "10.1.0.1", "fd00::1", "172.17.0.1", "127.0.0.1"]),
        ({}, ["10.1.0.1"], ["10.1.0.1", "10.0.0.1", "fd00::1", "172.17.0.1", "127.0.0.1"]),
        ({}, ["172.17.0.1"], ["172.17.0.1", "10.0.0.1", "10.1.0.1", "fd00::1", "127.0.0.1"]),
        ({}, ["::ffff:10.1.0.1", "10.0.0.1"], ["10.1.0.1", "10.0.0.1", "fd00::1", "172.17.0.1", "127.0.0.1"]),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, ["10.0.0.1"], ["10.1.0.1"]),
        ({"GLOO_SOCKET_IFNAME": "nothing,eth0"}, [], ["10.0.0.1", "fd00::1"]),
        ({"GLOO_SOCKET_IFNAME": "lo"}, [], ["127.0.0.1"]),
        ({"GLOO_SOCKET_IFNAME": "gone"}, [], ["10.0.0.1", "10.1.0.1", "fd00::1", "172.17.0.1", "127.0.0.1"]),
        ({"NCCL_SOCKET_IFNAME": "ib"}, [], ["10.1.0.1"]),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, [], ["10.0.0.1", "fd00::1"]),
        (
            {"NCCL_SOCKET_IFNAME": "=eth"},
            ["10.1.0.1"],
            ["10.1.0.1", "10.0.0.1", "fd00::1", "172.17.0.1", "127.0.0.1"],
        ),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, [], ["10.0.0.1", "10.1.0.1", "fd00::1"]),
        ({"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "eth0"}, [], ["10.1.0.1"]),
    ],
)
def test_the_order_of_addresses(environ, proven, wanted):
    assert addresses.ordered(ALL, environ, proven, False) == wanted


def test_a_world_of_one_host_needs_no_network():
    assert addresses.ordered(ALL, {}, ["10.0.0.1"], True) == ["127.0.0.1"]
    assert addresses.ordered([ETH], {}, [], True) == ["10.0.0.1"]
    assert addresses.ordered([LO6, ETH6], {}, [], True) == ["::1"]


def test_a_few_addresses_are_enough():
    many = [Interface(f"eth{number}", f"10.0.{number}.1", False) for number in range(20)]
    assert len(addresses.ordered([LO, *many], {}, ["10.0.9.1"], False)) == addresses.MAX_ADDRESSES + 1
    assert addresses.ordered([LO, *many], {}, ["10.0.9.1"], False)[0] == "10.0.9.1"
    assert addresses.ordered([], {}, [], False) == []


def test_this_host_has_addresses():
    assert any(each.loopback for each in addresses.interfaces())


# -- the hub's address -----------------------------------------------------------------------------------------------

CARD = rendezvous.HubAddress(
    "name", "token", 4, "here", (("10.0.0.1", 1000), ("fd00::1", 1001), ("127.0.0.1", 1002))
)


def test_a_hub_address_is_decoded_as_it_was_encoded():
    assert rendezvous.HubAddress.decode(CARD.encode().encode()) == CARD


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},  # that of 0.2
        {"name": "a b"},
        {"token": None},
        {"world": "4"},
        {"hosts": [["example.org", 80]]},  # no name is ever looked up
        {"hosts": [["10.0.0.1", 0]]},
        {"hosts": 5},
        {"hosts": [["10.0.0.1"]]},
    ],
)
def test_what_is_no_hub_address(change):
    with pytest.raises(Malformed):
        rendezvous.HubAddress.decode(json.dumps({**json.loads(CARD.encode()), **change}).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b"{}", b"[" * 4000, b"x" * 5000])
def test_nonsense_is_no_hub_address(data):
    with pytest.raises(Malformed):
        rendezvous.HubAddress.decode(data)


@pytest.mark.parametrize(
    ("here", "wanted"),
    [
        ("here", ["127.0.0.1", "10.0.0.1", "fd00::1"]),
        ("elsewhere", ["10.0.0.1", "fd00::1"]),
        ("", ["10.0.0.1", "fd00::1", "127.0.0.1"]),
    ],
)
def test_loopback_leads_to_the_hub_on_its_own_host_only(monkeypatch, here, wanted):
    monkeypatch.setattr(addresses, "host_id", lambda: here)
    assert [host for host, _ in CARD.route()] == wanted
