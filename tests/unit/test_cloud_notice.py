"""Sources of notices against metadata services on the loopback, and the decisions about what they say."""

from __future__ import annotations

import os
import threading
import time

import pytest
from metadata_service import Service

from autoteardown.cli.doctor import clouds
from autoteardown.cloud_notice import azure, choose, ec2, file, gce, http, machine
from autoteardown.cloud_notice.decisions import RESERVE, Decisions, for_ranks
from autoteardown.cloud_notice.source import Notice


@pytest.fixture(params=["ec2", "gce", "azure"])
def cloud(request):
    service = Service(request.param)
    yield service
    service.close()


def source_of(service):
    return choose.CLOUDS[service.cloud](service.where)


def test_no_notice_then_one_then_none(cloud):
    source = source_of(cloud)
    assert source.read(0.0)[0] is None
    cloud.notice(100)
    notice, _ = source.read(0.0)
    if cloud.cloud == "gce":
        assert (notice.seconds, notice.assumed) == (None, 30.0)
    else:
        assert 90 < notice.seconds <= 100
    assert source.read(0.0)[0].key == notice.key
    cloud.withdraw()
    assert source.read(0.0)[0] is None


@pytest.mark.parametrize("off", [-600, 600])
@pytest.mark.parametrize("name", ["ec2", "azure"])
def test_a_clock_that_is_off_by_minutes(name, off):
    service = Service(name, clock_off=off)
    service.notice(100)
    assert 90 < source_of(service).read(0.0)[0].seconds <= 100
    service.close()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("reset", "reset"),
        ("garbage", "no HTTP"),
        ("cut", "no HTTP"),
        ("large", "more than"),
        ("redirect", "redirects"),
        (500, "HTTP 500"),
        (503, "HTTP 503"),
    ],
)
def test_an_answer_that_is_no_use(cloud, fault, text):
    source = source_of(cloud)
    assert source.read(0.0)[0] is None
    cloud.fault = fault
    with pytest.raises(http.Unavailable, match=text):
        source.read(0.0)
    cloud.fault = None
    assert source.read(0.0)[0] is None


def test_a_service_that_sends_a_byte_at_a_time(cloud):
    """The whole answer has one deadline, not each byte."""
    cloud.fault = "drip"
    began = time.monotonic()
    with pytest.raises(http.Unavailable, match="within"):
        http.request(cloud.where, "/", {}, 0.3)
    assert time.monotonic() - began < 20  # 50 s for all bytes


def test_nobody_listens():
    service = Service("ec2")
    service.close()
    with pytest.raises(http.Unavailable, match="refused"):
        ec2.EC2(service.where).read(0.0)


def test_no_proxy_is_used(cloud, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert source_of(cloud).read(0.0)[0] is None


def test_ec2_renews_its_token():
    service = Service("ec2")
    source = ec2.EC2(service.where)
    source.read(0.0)
    source.read(0.0)
    assert [method for method, _ in service.requests].count("PUT") == 1
    service.tokens.clear()  # it has ended: 401
    assert source.read(0.0)[0] is None
    assert [method for method, _ in service.requests].count("PUT") == 2
    service.fault = 403
    with pytest.raises(http.Unavailable, match="403"):
        ec2.EC2(service.where).read(0.0)
    service.close()


@pytest.mark.parametrize("wanted", [True, False])
def test_ec2_recommends_to_leave(wanted):
    service = Service("ec2")
    service.set("rebalance", '{"noticeTime": "2026-01-01T00:00:00Z"}')
    notice, _ = ec2.EC2(service.where, rebalance=wanted).read(0.0)
    assert (notice is not None) == wanted
    service.close()


@pytest.mark.parametrize("body", ["", "[]", "null", '{"action": 5}', '{"time": "x"}', "[" * 9000])
def test_ec2_answers_nonsense(body):
    service = Service("ec2")
    service.set("action", body)
    with pytest.raises(http.Unavailable):
        ec2.EC2(service.where).read(0.0)
    service.close()


def test_gce_waits_for_the_change():
    service = Service("gce")
    source = gce.GCE(service.where)
    assert source.read(30.0) == (None, False)  # the first request does not wait
    assert source.read(1.0) == (None, True)
    threading.Timer(0.2, service.notice).start()
    began = time.monotonic()
    assert source.read(60.0)[0].text == "Compute Engine preempts this VM"
    assert time.monotonic() - began < 30
    service.withdraw()
    service.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert source.read(0.0)[0] is None
    service.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert source.read(0.0)[0].key == "maintenance"
    service.close()


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [({"NotBefore": ""}, None), ({"NotBefore": "soon"}, None), ({"EventType": "Reboot"}, 100)],
)
def test_azure_events(changes, seconds):
    service = Service("azure")
    service.notice(100)
    service.values["events"][-1].update(changes)
    notice, _ = azure.Azure(service.where).read(0.0)
    assert notice.key == "A1"
    assert notice.seconds is None if seconds is None else 90 < notice.seconds <= seconds
    azure.Azure(service.where).acknowledge(notice.key)
    assert service.posted == [{"StartRequests": [{"EventId": "A1"}]}]
    service.values["events"] = [{"EventType": "Preempt"}]
    assert azure.Azure(service.where).read(0.0)[0] is None  # it names no VM
    service.values["events"] = 5
    with pytest.raises(http.Unavailable):
        azure.Azure(service.where).read(0.0)
    service.close()


def test_a_file(tmp_path):
    path = tmp_path / "notice"
    source = file.File(str(path))
    assert source.read(0.0) == (None, False)
    for content, low, high in [("90", 80, 90), ("90.5\n", 80, 90.5), ("-1", None, None), ("nan", None, None)]:
        path.write_text(content)
        seconds = source.read(0.0)[0].seconds
        assert seconds is None if low is None else low < seconds <= high
    path.write_text("90")
    os.utime(path, (time.time() - 60,) * 2)
    assert 20 < source.read(0.0)[0].seconds <= 30
    path.write_text(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 50)))
    assert 40 < source.read(0.0)[0].seconds <= 50
    path.unlink()
    os.mkfifo(path)
    assert source.read(0.0)[0].seconds is None
    path.unlink()
    path.mkdir()
    assert source.read(0.0)[0] is not None


@pytest.mark.parametrize(
    ("strings", "found"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "p5.48xlarge"}, "ec2"),
        ({"sys_vendor": "Xen", "bios_version": "4.11.amazon"}, "ec2"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gce"),
        (
            {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
            "azure",
        ),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, ""),
        ({"sys_vendor": "Dell Inc."}, ""),
        ({}, ""),
    ],
)
def test_the_cloud_of_a_machine(tmp_path, strings, found):
    folder = tmp_path / "class" / "dmi" / "id"
    folder.mkdir(parents=True)
    for name, text in strings.items():
        (folder / name).write_text(text + "\n")
    assert machine.cloud(str(tmp_path)) == found


@pytest.mark.parametrize(
    ("command", "level"),
    [
        (b"/usr/bin/python3\0-m\0autoteardown\0watch\0", "ok"),
        (b"python3\0/usr/bin/autoteardown\0watch\0--\0torchrun\0", "ok"),
        (b"python3\0train.py\0", "note"),
        (b"watch\0autoteardown\0ps\0", "note"),
        (None, None),
    ],
)
def test_doctor_tells_whether_a_process_watches(tmp_path, command, level):
    folder = tmp_path / "sys" / "class" / "dmi" / "id"
    folder.mkdir(parents=True)
    if command is not None:
        (folder / "sys_vendor").write_text("Amazon EC2\n")
    (tmp_path / "proc" / "42").mkdir(parents=True)
    (tmp_path / "proc" / "42" / "cmdline").write_bytes(command or b"")
    found = clouds.check(tmp_path)
    assert [finding.level for finding in found] == ([level] if level else [])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("169.254.169.254", ("169.254.169.254", 80)),
        ("localhost:81", ("localhost", 81)),
        ("[fd00:ec2::254]", ("fd00:ec2::254", 80)),
        ("[::1]:8080", ("::1", 8080)),
    ],
)
def test_an_address(text, found):
    assert http.address(text) == found


@pytest.mark.parametrize(
    "text", ["", "a b", "http://x", "x:0", "x:65536", "x:", "[::1", "[::1]8", "x/y", "x:1x"]
)
def test_no_address(text):
    with pytest.raises(ValueError):
        http.address(text)


# -- decisions ------------------------------------------------------------------------------------------------------


def did(steps):
    return [(step.do, step.left) for step in steps]


def test_a_short_notice_is_acted_on_at_once():
    state = Decisions(lead=120, assumed=None, now=0)
    assert state.read(None, 5, 5) == []
    notice = Notice("a", "the end", 118)
    assert did(state.read(notice, 10, 10)) == [("notice", 118), ("drain", 118)]
    assert did(state.read(notice._replace(seconds=113), 15, 15)) == []
    assert for_ranks(118) == 118 - RESERVE


def test_a_long_notice_is_waited_with_and_may_be_withdrawn():
    state = Decisions(lead=120, assumed=None, now=0)
    notice = Notice("a", "the end", 900)
    assert did(state.read(notice, 0, 0)) == [("notice", 900)]
    assert state.wake(0) == 780
    assert state.tick(779) == []
    assert did(state.read(None, 779, 779)) == [("withdrawn", 121)]
    assert state.tick(900) == []
    assert did(state.read(notice, 1000, 1000)) == [("notice", 900)]
    assert did(state.tick(1780)) == [("drain", 120)]
    assert state.tick(1781) == []


def test_a_notice_never_gives_more_time_than_before():
    state = Decisions(lead=10, assumed=None, now=0)
    notice = Notice("a", "the end", 100)
    state.read(notice, 0, 0)
    assert state.read(notice, 50, 50) == [] and state.end == 100
    assert did(state.read(notice._replace(seconds=20), 50, 50)) == [("changed", 20)] and state.end == 70
    assert did(state.read(Notice("b", "the end", 15), 50, 50)) == [("notice", 15)] and state.end == 65


def test_a_second_notice_after_the_drain():
    state = Decisions(lead=120, assumed=None, now=0)
    state.read(Notice("a", "the end", 100), 0, 0)
    assert did(state.read(Notice("b", "the end", 300), 1, 1)) == [("notice", 300)]
    assert state.end == 100 and state.drained


def test_without_a_time_it_counts_from_the_last_reading_without():
    state = Decisions(lead=120, assumed=None, now=0)
    state.read(None, 20, 21)
    notice = Notice("a", "the end", None, 30)
    assert did(state.read(notice, 25, 29)) == [("notice", 21), ("drain", 21)]
    assert state.read(notice, 40, 40) == [] and state.end == 50
    state = Decisions(lead=120, assumed=90, now=0)
    assert did(state.read(notice, 1, 1)) == [("notice", 90), ("drain", 90)]
    state = Decisions(lead=120, assumed=None, now=0)
    assert did(state.read(Notice("a", "the end", None), 1, 1)) == [("notice", None), ("drain", None)]
    assert for_ranks(None) is None and for_ranks(0) == 2
