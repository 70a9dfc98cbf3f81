"""`autoteardown watch`: a notice drains the ranks with the time that it gives, before any signal of the platform."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from harness import free_port, wait_until
from metadata_service import Service
from test_drain_deadline import OWNER
from test_drain_longer import TRAINING

WATCH = (sys.executable, "-m", "autoteardown", "watch")


@pytest.fixture
def service(request):
    service = Service(getattr(request, "param", "ec2"))
    yield service
    service.close()


class Watch:
    """A running watch; ended with the test."""

    def __init__(self, job, *options, **env):
        self.folder = job.folder
        self.out = job.folder / f"watch{len(list(job.folder.glob('watch*')))}"
        runtime = {"AUTOTEARDOWN_RUNTIME_DIR": str(job.runtime), "AUTOTEARDOWN_REPORT_DIR": str(job.reports)}
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [*WATCH, *map(str, options)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **runtime, "TEST_MARK": job.mark, **env},
                cwd=job.folder,
            )

    @property
    def output(self):
        return self.out.read_text()

    def wait_for(self, text):
        def look():
            ended = self.process.poll() is not None
            assert text in self.output or not ended, self.output
            return text in self.output

        wait_until(look, repr(text))

    def wait(self):
        return self.process.wait(100)


@pytest.fixture
def watch(job):
    started = []

    def start(*options, **env):
        started.append(Watch(job, *options, **env))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def of(service, *more):
    return ("--source", service.cloud, "--endpoint", service.endpoint, "--interval", 0.1, *more)


@pytest.mark.parametrize("service", ["ec2", "gce"], indirect=True)
def test_in_front_of_torchrun(job, service):
    """Notice at some step: all ranks save after the same iteration, with more time than a grace period, and exit."""
    seconds = 9 if service.cloud == "ec2" else 0
    options = [str(each) for each in of(service)]
    launcher = (*WATCH, *options, "--")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = job.start(
        TRAINING, seconds, fresh=True, launcher=launcher, python=torchrun, AUTOTEARDOWN_GRACE=7
    )
    wait_until(lambda: process.count("ready") == 2, "both ranks")
    service.notice(115)
    assert process.wait() == 0, process.transcript()
    assert process.count("saved") == 2
    reports = [json.loads(path.read_text()) for path in job.reports.glob("*Z.json")]
    assert [report["outcome"] for report in reports] == ["clean", "clean"], process.transcript()
    assert {report["cause"] for report in reports} <= {"signal", "peer"}
    assert len({report["steps"]["stopped_at"] for report in reports}) == 1
    given = 30 if service.cloud == "gce" else 115
    for report in reports:
        assert given - 25 < report["grace"] < given - 4
    assert "drained: 2 of 2 left cleanly" in process.stderr
    (path,) = job.reports.glob("*.notice")
    record = json.loads(path.read_text())
    assert (record["source"], record["ranks"], record["clean"]) == (service.cloud, 2, 2)
    assert given - 20 < record["seconds"] <= given


def test_the_platforms_signal_comes_meanwhile(job, service):
    """SIGTERM to the watch reaches the command, and the shorter time counts."""
    launcher = (*WATCH, *map(str, of(service)), "--")
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    process = job.start(OWNER, fresh=True, launcher=launcher, AUTOTEARDOWN_GRACE=8, **alone)
    process.wait_for("^ready$")
    service.notice(100)
    process.wait_for("^its handler$")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    (report,) = job.all_reports().values()
    assert report["grace"] < 30, process.transcript()


def test_a_daemon_stays_and_drains_later_ranks(job, watch, service):
    daemon = watch(*of(service), "--json")
    daemon.wait_for('"watching"')
    (first,) = job.world(TRAINING, 1, 0)
    first.wait_for("^ready$")
    service.notice(115)
    assert first.wait() == 0
    daemon.wait_for('"drained"')
    (late,) = job.world(TRAINING, 1, 0)
    assert late.wait() == 0
    wait_until(lambda: daemon.output.count('"drained"') == 2, "the second drain")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    events = [json.loads(line)["event"] for line in daemon.output.splitlines()]
    assert events == ["watching", "notice", "rank", "drained", "rank", "drained"]


def test_once_without_a_rank(watch, service):
    service.notice(115)
    command = watch(*of(service), "--once")
    assert command.wait() == 0
    assert command.output.endswith("autoteardown watch: drained: no armed rank to signal\n")


def test_once_with_a_rank_that_does_not_leave_cleanly(job, watch, service):
    (rank,) = job.world(
        "import os, torch.distributed as d; d.init_process_group('gloo')\n"
        "import signal; print('ready', flush=True)\n"
        "while True:\n    signal.pause()\n",
        1,
    )
    rank.wait_for("^ready$")
    os.kill(rank.pid, signal.SIGSTOP)
    service.notice(12)
    command = watch(*of(service), "--once")
    assert command.wait() == 1
    assert "still running" in command.output
    os.kill(rank.pid, signal.SIGKILL)


def test_a_notice_that_is_withdrawn(job, watch):
    service = Service("azure")
    (rank,) = job.world(TRAINING, 1, 0)
    rank.wait_for("^ready$")
    service.notice(900)
    daemon = watch(*of(service))
    daemon.wait_for("notice: Azure evicts this VM (Preempt) in 8")
    service.withdraw()
    daemon.wait_for("the notice is withdrawn")
    service.fault = "reset"
    daemon.wait_for("gives no usable answer")
    service.fault = None
    daemon.wait_for("answers again")
    assert daemon.output.count("gives no usable answer") == 1
    assert rank.running
    service.close()


def test_azures_event_is_acknowledged_after_the_drain(watch):
    service = Service("azure")
    service.notice(60)
    assert watch(*of(service), "--once", "--acknowledge").wait() == 0
    assert service.posted == [{"StartRequests": [{"EventId": "A1"}]}]
    service.close()


def test_a_dry_run_signals_none(job, watch, service):
    (rank,) = job.world(TRAINING, 1, 0)
    rank.wait_for("^ready$")
    service.notice(100)
    command = watch(*of(service), "--dry-run")
    assert command.wait() == 0
    assert (
        "1 armed ranks would be drained" in command.output
        and "EC2 terminates this instance" in command.output
    )
    assert rank.running
    service.fault = 500
    assert watch(*of(service), "--dry-run").wait() == 1


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 7", 7), ("kill -9 $$", 137), ("trap 'exit 5' TERM; kill $PPID; while :; do sleep 0.05; done", 5)],
)
def test_the_exit_code_is_the_commands(watch, script, code, tmp_path):
    assert watch("--source", f"file:{tmp_path}/none", "--", "sh", "-c", script).wait() == code


def test_a_command_that_does_not_exist(watch, tmp_path):
    assert watch("--source", f"file:{tmp_path}/none", "no-such-command").wait() == 127
    assert watch("--source", f"file:{tmp_path}/none", "--", str(tmp_path)).wait() == 126


def test_the_command_gets_the_signal_mask_and_the_actions_that_watch_had(watch, tmp_path):
    script = "grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status"
    with_, without = tmp_path / "with", tmp_path / "without"
    assert watch("--source", f"file:{tmp_path}/none", "--", "sh", "-c", f"{script} > {with_}").wait() == 0
    subprocess.run(["sh", "-c", f"{script} > {without}"], check=True)
    glibc = 3 << 31  # its own two signals, 32 and 33, which no program can set: posix_spawn ignores them
    masks = [
        [int(line.split()[1], 16) & ~glibc for line in path.read_text().splitlines()]
        for path in (with_, without)
    ]
    assert masks[0] == masks[1] and len(masks[0]) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["--source", "ec3"],
        ["--interval", "soon"],
        ["--lead", "-1"],
        ["--endpoint", "http://x"],
        ["--source", "file:"],
    ],
)
def test_a_wrong_option_names_what_is_allowed(watch, options):
    command = watch(*options)
    assert command.wait() == 2
    assert repr(options[1]) in command.output
