"""torchrun gives its ranks their grace period, passes signals on, and returns the right exit code."""

import json
import os
import re
import signal
import sys
import time

import pytest
from harness import NONE, PROGRAMS, SIGTERM, free_port, needs_torch, wait_until
from test_launchers import OWN_STORE, listening

PATIENT = {"AUTOTEARDOWN_GRACE": 25}
LINE = re.compile(r"^autoteardown: torchrun: (.*)$", re.MULTILINE)
SLOW = pytest.mark.slow  # each torchrun takes ten seconds of a processor
SHUTDOWN_TIMEOUT = needs_torch(2, 13, "torchrun has no --shutdown-timeout")


def start(job, what, *more, options=("--standalone",), ranks=2, world=None, **env):
    """A torchrun whose ranks have met."""
    launcher = job.torchrun("launched.py", what, *more, nodes=options, ranks=ranks, **{**PATIENT, **env})
    if world is None:
        met(ranks, launcher)
    return launcher


def met(world, *launchers, attempt=0):
    """Wait for all ranks of an attempt; their pids by rank."""
    line = re.compile(rf"^attempt {attempt} rank (\d+) pid (\d+)$", re.MULTILINE)

    def look():
        assert any(each.running for each in launchers), [each.transcript() for each in launchers]
        pids = {int(rank): int(pid) for each in launchers for rank, pid in line.findall(each.stdout)}
        return pids if len(pids) == world else None

    return wait_until(look, f"attempt {attempt} of {world} ranks")


def saved(job, ranks=2):
    return sorted(path.name for path in job.folder.glob("saved-*")) == [
        f"saved-{rank}" for rank in range(ranks)
    ]


def launcher_line(launcher):
    """The one line of torchrun's own agent."""
    (line,) = LINE.findall(launcher.stderr)
    return line


def no_orphan(job):
    wait_until(lambda: not job.survivors(), "the end of all processes")


# -- the exit code and the line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, code",
    [
        (None, 1),
        ("signal", 143),
        pytest.param("0", 0, marks=SLOW),
        pytest.param("77", 77, marks=SLOW),
        ("mistake", 1),
    ],
)
def test_exit_code(job, given, code):
    """torchrun is signalled: it returns AUTOTEARDOWN_EXIT_CODE if that is set, and its own 1 otherwise."""
    env = {} if given is None else {"AUTOTEARDOWN_EXIT_CODE": given}
    launcher = start(job, "saves", **env)
    launcher.signal()
    assert launcher.wait() == code, launcher.transcript()
    assert saved(job)
    assert "Traceback" not in launcher.stderr, launcher.transcript()
    assert launcher_line(launcher) == f"SIGTERM: 2 of 2 workers have left; exit {code}"
    assert {report["outcome"] for report in job.all_reports().values()} == {"clean"}


def test_control_exit_code(job):
    """Without the agent: a traceback of SignalException, and 1."""
    launcher = start(job, "plain", mode=NONE, AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal()
    assert launcher.wait() == 1
    assert "SignalException" in launcher.stderr


def test_switched_off(job):
    """AUTOTEARDOWN=0 is torchrun as it was."""
    launcher = start(job, "plain", mode=NONE, AUTOTEARDOWN="0", AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal()
    assert launcher.wait() == 1
    assert "SignalException" in launcher.stderr and "autoteardown" not in launcher.stderr


@pytest.mark.parametrize("log, form, lines", [("quiet", "text", 0), ("info", "json", 1)])
def test_log(job, log, form, lines):
    launcher = start(job, "plain", AUTOTEARDOWN_LOG=log, AUTOTEARDOWN_LOG_FORMAT=form)
    launcher.signal()
    assert launcher.wait() == 1, launcher.transcript()
    found = [json.loads(line) for line in launcher.stderr.splitlines() if line.startswith("{")]
    assert len([line for line in found if line["event"] == "launcher"]) == lines
    assert "autoteardown: " not in launcher.stderr and "Traceback" not in launcher.stderr


# -- how long it waits ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_waits_as_long_as_the_grace_period(job):
    """A callback of 40 s in a grace period of 60 is done on all ranks; torch's own wait is 30 s."""
    launcher = start(job, "saves", 40, AUTOTEARDOWN_GRACE=60, AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal()
    assert launcher.wait() == 143, launcher.transcript()
    assert saved(job)


@pytest.mark.slow
@pytest.mark.timeout(200)
@SHUTDOWN_TIMEOUT
def test_control_waits(job):
    """The same with torch's own 30 s, asked for explicitly: nothing is saved."""
    options = ("--standalone", "--shutdown-timeout=30")
    launcher = start(job, "saves", 40, options=options, AUTOTEARDOWN_GRACE=60)
    launcher.signal()
    assert launcher.wait() == 1, launcher.transcript()
    assert not list(job.folder.glob("saved-*"))


@SHUTDOWN_TIMEOUT
@pytest.mark.parametrize("code, returned", [("0", 1), pytest.param("signal", 143, marks=SLOW)])
@pytest.mark.parametrize("way", ["option", pytest.param("variable", marks=SLOW)])
def test_an_explicit_timeout_wins(job, code, returned, way):
    """Workers are killed after 2 s if somebody says so. That is no success, whatever AUTOTEARDOWN_EXIT_CODE says."""
    options, env = ("--standalone",), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 2}
    if way == "option":
        options, env = (*options, "--shutdown-timeout=2"), {}
    launcher = start(job, "saves", 20, options=options, AUTOTEARDOWN_EXIT_CODE=code, **env)
    launcher.signal()
    assert launcher.wait() == returned, launcher.transcript()
    assert launcher.seconds < 20
    assert not list(job.folder.glob("saved-*"))
    killed = "local rank 0 was ended by SIGKILL, local rank 1 was ended by SIGKILL"
    assert launcher_line(launcher) == f"SIGTERM: 0 of 2 workers have left, {killed}; exit {returned}"


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGRTMIN+3", marks=SLOW)])
def test_early_notice(job, name):
    """A signal of AUTOTEARDOWN_SIGNALS reaches the ranks as itself, and torchrun does not die of it."""
    signum = signal.SIGUSR1 if name == "SIGUSR1" else signal.SIGRTMIN + 3
    launcher = start(job, "saves", AUTOTEARDOWN_SIGNALS=f"SIGTERM,{name}", AUTOTEARDOWN_EXIT_CODE="signal")
    launcher.signal(signum)
    assert launcher.wait() == 128 + signum, launcher.transcript()
    assert saved(job)
    assert {report["signal"] for report in job.all_reports().values()} == {name}
    no_orphan(job)


def test_control_early_notice(job):
    """Without the agent, torchrun dies of SIGUSR1, and its workers run on."""
    launcher = start(job, "plain", mode=NONE, AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1")
    launcher.signal(signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1
    time.sleep(1)
    assert job.survivors()


def test_a_signal_that_means_no_eviction(job):
    """SIGHUP: torchrun's own way, traceback and 1."""
    launcher = start(job, "saves", AUTOTEARDOWN_EXIT_CODE="signal", options=("--standalone",))
    launcher.signal(signal.SIGHUP)
    assert launcher.wait() == 1
    assert "SignalException" in launcher.stderr and not LINE.findall(launcher.stderr)


@pytest.mark.parametrize("pause", [0.02, pytest.param(0.5, marks=SLOW), 3.0])
def test_signalled_again(job, pause):
    """Twice within two seconds is one eviction; a later signal does not end the wait either."""
    seconds = 3 * pause + 3
    launcher = start(
        job, "saves", seconds, AUTOTEARDOWN_EXIT_CODE="signal", AUTOTEARDOWN_SIGNALS="SIGUSR1,SIGTERM"
    )
    launcher.signal(signal.SIGUSR1)
    for _ in range(2):
        time.sleep(pause)
        launcher.signal()
    assert launcher.wait() == 128 + signal.SIGUSR1, launcher.transcript()
    assert saved(job), launcher.transcript()
    assert "Traceback" not in launcher.stderr, launcher.transcript()
    no_orphan(job)


@pytest.mark.parametrize("mode", ["agent", NONE])
def test_signalled_while_it_starts_its_workers(job, mode):
    """It stops those that have been started. Without the agent it does not know them, and they run on."""
    python = (str(PROGRAMS / "signalled_at_start.py"), "--standalone", "--nproc-per-node=2")
    launcher = job.start("launched.py", "plain", fresh=True, python=python, mode=mode, **PATIENT)
    assert launcher.wait() == 1, launcher.transcript()
    if mode == NONE:
        assert job.survivors()
    else:
        no_orphan(job)
        assert launcher_line(launcher).startswith("SIGTERM: 2 of 2 workers have left")


# -- workers that are evicted, and workers that fail ------------------------------------------------------------------


@pytest.mark.parametrize(
    "codes, returned",
    [
        pytest.param({}, 1, marks=SLOW),
        pytest.param({"PEER_EXIT_CODE": 77}, 77, marks=SLOW),
        ({"EXIT_CODE": "signal"}, 143),
        ({"EXIT_CODE": 66, "PEER_EXIT_CODE": 77}, 66),
    ],
)
def test_a_worker_is_evicted(job, codes, returned):
    """torchrun is not signalled: it returns what its workers do, as far as that is set."""
    env = {f"AUTOTEARDOWN_{name}": value for name, value in codes.items()}
    launcher = start(job, "saves", **env)
    os.kill(met(2, launcher)[1], SIGTERM)
    assert launcher.wait() == returned, launcher.transcript()
    assert saved(job)
    assert "Traceback" not in launcher.stderr, launcher.transcript()
    assert launcher_line(launcher).startswith("its workers were evicted (exited with ")
    assert launcher_line(launcher).endswith(f"; exit {returned}")


def normalized(text):
    """What torchrun prints, without what differs from one run to the next, and without what the ranks print."""
    text = re.sub(r"^(\[rank\d\]:|autoteardown rank=|W|E)[^\n]*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"pid: \d+", "pid: P", text)
    return re.sub(r"\d{4}-\d\d-\d\d_[\d:]+", "TIME", text)


@pytest.mark.parametrize("what, code", [("fails", 1), ("leaves", 143)])
def test_a_failure_is_reported_as_by_plain_torchrun(job, what, code):
    """Also one with the exit code of an eviction: word for word, traceback included."""
    env = {"AUTOTEARDOWN_EXIT_CODE": "signal", "AUTOTEARDOWN_PEER_EXIT_CODE": 77}
    output = []
    for mode in ("agent", NONE):
        launcher = start(job, what, mode=mode, **env)
        (job.folder / "go").touch()
        assert launcher.wait() == 1, launcher.transcript()
        (job.folder / "go").unlink()
        assert f"exitcode  : {code}" in launcher.stderr
        output.append(launcher)
    # The other rank fails in its collective, or of torchrun's SIGTERM, whichever is first.
    agents, plain = (normalized(each.stderr).partition("Failures:") for each in output)
    assert agents[0] == plain[0]
    agents, plain = (normalized(each.stderr).partition("Root Cause")[2] for each in output)
    assert agents == plain and "exitcode" in agents


def test_a_failure_uses_up_a_restart(job):
    """As without the agent: one restart, then the report of a failure."""
    options = ("--standalone", "--max-restarts=1")
    launcher = start(job, "fails", options=options, **OWN_STORE)
    (job.folder / "go").touch()
    assert launcher.wait() == 1, launcher.transcript()
    assert "attempt 1 rank 0" in launcher.stdout and "attempt 2" not in launcher.stdout
    assert "ChildFailedError" in launcher.stderr


def test_evictions_use_up_no_restart(job):
    """Three evictions with --max-restarts=1. Each attempt has a number of its own, as with torchrun's restarts."""
    options = ("--standalone", "--max-restarts=1")
    (job.folder / "last").write_text("3")
    launcher = start(job, "restarts", options=options, AUTOTEARDOWN_EXIT_CODE="signal", **OWN_STORE)
    for attempt in range(3):
        os.kill(met(2, launcher, attempt=attempt)[0], SIGTERM)
    assert launcher.wait() == 0, launcher.transcript()
    assert launcher.stdout.count("attempt 3") == 4
    assert len(LINE.findall(launcher.stderr)) == 3


@pytest.mark.slow
def test_evictions_of_two_nodes_use_up_no_restart(job):
    """The same with two torchruns."""
    port = free_port()
    nodes = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}"]
    nodes += ["--local-addr=127.0.0.1", "--max-restarts=1"]
    (job.folder / "last").write_text("3")
    agents = []
    for _ in range(2):  # the first one hosts the rendezvous
        more = {"AUTOTEARDOWN_EXIT_CODE": "signal", **OWN_STORE}
        agents.append(start(job, "restarts", options=nodes, ranks=1, world=2, **more))
        wait_until(lambda: listening(port), "the rendezvous")
    for attempt in range(3):
        os.kill(met(2, *agents, attempt=attempt)[attempt % 2], SIGTERM)
    assert [agent.wait() for agent in agents] == [0, 0], [agent.transcript() for agent in agents]
    assert all("attempt 3" in agent.stdout and "trained" in agent.stdout for agent in agents)


def test_nothing_is_left_in_the_registry(job):
    """What the ranks leave for torchrun to read goes with it."""
    launcher = start(job, "saves")
    os.kill(met(2, launcher)[1], SIGTERM)
    launcher.wait()
    assert list(job.runtime.iterdir()) == []


def test_without_a_registry(job):
    """Nothing is known of the workers: they have failed, as without the agent."""
    (job.folder / "file").touch()
    launcher = start(job, "saves", AUTOTEARDOWN_RUNTIME_DIR=job.folder / "file" / "x")
    os.kill(met(2, launcher)[1], SIGTERM)
    assert launcher.wait() == 1
    assert "ChildFailedError" in launcher.stderr


# -- the ways to start it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        "static",
        "module",
        *(pytest.param(way, marks=SLOW) for way in ("no-python", "redirects", "tee", "launch")),
    ],
)
def test_ways(job, way):
    """Each of torchrun's ways to start workers: they save, and it returns the code."""
    script, port = str(PROGRAMS / "launched.py"), free_port()
    options = ["--nproc-per-node=2", "--standalone"]
    module = "torch.distributed.run"
    if way in ("static", "launch"):
        options[1:] = ["--rdzv-backend=static", f"--master-port={port}", "--master-addr=127.0.0.1"]
    if way == "launch":
        module, options = "torch.distributed.launch", [*options[:1], "--use-env", f"--master-port={port}"]
    if way == "module":
        options += ["-m"]
    if way == "no-python":
        wrapper = job.folder / "wrapper"
        wrapper.write_text(f'#!/bin/sh\nexec "$PYTHON_HERE" {script} "$@"\n')
        wrapper.chmod(0o755)
        options += ["--no-python"]
    if way in ("redirects", "tee"):
        options += [f"--{way}=3", f"--log-dir={job.folder / 'logs'}"]
    target = {"module": "launched", "no-python": str(job.folder / "wrapper")}.get(way, script)
    command = [sys.executable, "-m", module, *options, target, "saves"]
    # `Job.start` puts an interpreter and a program behind the launcher; `env` lets it take neither.
    launcher = job.start(
        "launched.py",
        launcher=(*command, "0", "--"),
        AUTOTEARDOWN_EXIT_CODE="signal",
        PYTHON_HERE=sys.executable,
        **PATIENT,
    )
    logs = job.folder / "logs"
    wait_until(
        lambda: (
            (launcher.stdout + "".join(p.read_text() for p in logs.rglob("stdout.log"))).count("attempt 0")
            >= 2
            or not launcher.running
        ),
        "both ranks",
    )
    launcher.signal()
    assert launcher.wait() == 143, launcher.transcript()
    assert saved(job), launcher.transcript()
    assert "Traceback" not in launcher.stderr, launcher.transcript()


def test_as_a_library(job):
    """The program gets torch's own exception, catches it, and ends as it wants to."""
    launcher = job.start("elastic_function.py", fresh=True, AUTOTEARDOWN_EXIT_CODE="signal", **PATIENT)
    met(2, launcher)
    launcher.signal()
    assert launcher.wait() == 5, launcher.transcript()
    assert "caught SIGTERM" in launcher.stdout
    assert saved(job), launcher.transcript()
