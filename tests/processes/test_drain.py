"""`autoteardown drain`: signals every armed rank of the node and no other process, waits, prints the outcomes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
from harness import NONE, alive, wait_until
from namespaces import in_pid_namespace

from autoteardown.node import drain, procfs, registration, registry
from autoteardown.node.entry import own_name

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away, or mount one")

# A stand-in for a rank: it is in the registry, and takes its signal in the way it is told to.
RANK = """
    import os, signal, sys
    from autoteardown.node import registration

    how, number = sys.argv[1:]
    fields = {"rank": int(number), "world_size": 2, "backend": "gloo", "program": "train.py"}
    if how == "other signal":
        fields["signal"] = signal.SIGUSR1
    entry = registration.enter(os.environ["AUTOTEARDOWN_RUNTIME_DIR"], fields, print)

    def leave(signum, frame):
        print("got", signum, flush=True)
        if how in ("clean", "aborted", "other signal"):
            entry.leave(how if how == "aborted" else "clean", 143)
            os._exit(143)
        if how == "ended":
            entry.leave()
            os._exit(0)
        if how == "crash":
            os._exit(1)

    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, leave)
    if how == "default action":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if how in ("yielding", "stopping", "parked", "leaving"):
        entry.update(state=how)
    print("ready", flush=True)
    while True:
        signal.pause()
"""


@pytest.fixture
def runtime(job):
    return job.runtime


@pytest.fixture
def ranks(job):
    """Starts one stand-in for each way of taking the signal."""

    def start(*ways):
        started = [job.start(RANK, how, number, mode=NONE, fresh=True) for number, how in enumerate(ways)]
        for rank in started:
            rank.wait_for("^ready$")
        return started

    return start


class Command:
    """A running `autoteardown drain`."""

    def __init__(self, runtime, *options, **env):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autoteardown", "drain", *map(str, options)],
            env={**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(runtime), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def signal(self, signum):
        self._process.send_signal(signum)

    def finish(self):
        self.stdout, self.stderr = self._process.communicate(timeout=100)
        self.code = self._process.returncode
        return self


def run(runtime, *options, **env):
    return Command(runtime, *options, **env).finish()


def outcomes(command):
    return [rank["outcome"] for rank in json.loads(command.stdout)["ranks"]]


def forge(runtime, rank, **parts):
    """Turn the entry of a stand-in into that of another process."""
    (path,) = (path for path in runtime.iterdir() if path.name.startswith(f"{rank.pid}-"))
    pid, started, namespace, boot = path.stem.split("-")
    names = {"pid": pid, "started": started, "namespace": namespace, "boot": boot, **parts}
    return path.rename(path.with_name("{pid}-{started}-{namespace}-{boot}.json".format(**names)))


# -- outcomes ------------------------------------------------------------------------------------------------------


def test_all_leave_cleanly(ranks, runtime):
    started = ranks("clean", "ended")
    command = run(runtime)
    assert (command.code, command.stderr) == (0, "")
    first, second, last = command.stdout.splitlines()
    assert first.startswith(f"rank=0/2 pid={started[0].pid} train.py: clean, exit 143 (")
    assert second.startswith(f"rank=1/2 pid={started[1].pid} train.py: ended on its own (")
    assert last == "2 of 2 left cleanly"
    assert [rank.wait() for rank in started] == [143, 0]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("aborted", "aborted"), ("crash", "died"), ("default action", "died"), ("ignore", "running")],
)
def test_one_that_does_not_leave_cleanly(ranks, runtime, how, outcome):
    started = ranks("clean", how)
    command = run(runtime, "--json", *(["--timeout", "1.5"] if outcome == "running" else []))
    assert command.code == 1
    answer = json.loads(command.stdout)
    assert (answer["clean"], answer["interrupted"]) == (False, False)
    assert outcomes(command) == ["clean", outcome]
    for rank, told in zip(started, answer["ranks"]):
        assert told["pid"] == rank.pid
        assert told["signal"] == signal.SIGTERM
        assert told["clean"] == (told["outcome"] == "clean")
        assert told["exit_code"] == (143 if told["outcome"] in ("clean", "aborted") else None)
    assert started[1].running == (outcome == "running")
    left = {path.name.split("-")[0] for path in runtime.iterdir()}
    assert left == ({str(started[1].pid)} if outcome == "running" else set())


def test_one_that_is_killed_meanwhile(ranks, runtime):
    (rank,) = ranks("ignore")
    command = Command(runtime, "--json")
    rank.wait_for("^got")
    rank.signal(signal.SIGKILL)
    assert command.finish().code == 1
    assert outcomes(command) == ["died"]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("how", ["folder", "entry"])
def test_what_cannot_be_read_is_not_taken_for_clean(ranks, runtime, how):
    (rank,) = ranks("ignore")
    command = Command(runtime, "--json")
    rank.wait_for("^got")
    if how == "folder":
        runtime.chmod(0o777)
    else:
        (path,) = runtime.glob(f"{rank.pid}-*")
        path.write_text("garbage")
    rank.signal(signal.SIGKILL)
    assert command.finish().code == 1
    assert outcomes(command) == ["unknown"]
    (rank,) = json.loads(command.stdout)["ranks"]
    assert ("0777" if how == "folder" else "not an entry") in rank["detail"]
    assert command.stderr.count("\n") <= 1


def test_there_is_none(runtime):
    command = run(runtime)
    assert (command.code, command.stdout, command.stderr) == (0, "no armed ranks on this node\n", "")
    command = run(runtime, "--json")
    assert command.code == 0
    assert json.loads(command.stdout) == {"clean": True, "interrupted": False, "ranks": []}


def test_one_that_arms_meanwhile_is_drained_too(ranks, runtime):
    (stuck,) = ranks("ignore")
    command = Command(runtime, "--json")
    stuck.wait_for("^got")
    (late,) = ranks("clean")
    assert late.wait() == 143
    stuck.signal(signal.SIGKILL)
    command.finish()
    assert sorted(outcomes(command)) == ["clean", "died"]


# -- the signal ----------------------------------------------------------------------------------------------------


def test_the_first_of_the_signals_is_sent(ranks, runtime):
    (rank,) = ranks("clean")
    assert run(runtime, AUTOTEARDOWN_SIGNALS="SIGUSR1,SIGTERM").code == 0
    rank.wait_for(f"^got {signal.SIGUSR1:d}$")


def test_a_rank_that_waits_for_another_signal_gets_that(ranks, runtime):
    (rank,) = ranks("other signal")
    assert run(runtime).code == 0
    rank.wait_for(f"^got {signal.SIGUSR1:d}$")


@pytest.mark.parametrize("state", ["yielding", "stopping", "parked", "leaving"])
def test_a_rank_on_its_way_out_is_only_waited_for(ranks, runtime, state):
    (rank,) = ranks(state)
    command = run(runtime, "--json", "--timeout", "0.3")
    assert outcomes(command) == ["running"]
    rank.signal(signal.SIGUSR1)  # what it says now is all that it was sent
    rank.wait_for("^got")
    assert f"got {signal.SIGTERM:d}" not in rank.stdout


def test_a_pid_that_belongs_to_another_process_is_not_signalled(ranks, runtime):
    (rank,) = ranks("clean")
    forge(runtime, rank, started=procfs.start_time(rank.pid) - 1)
    assert run(runtime).stdout == "no armed ranks on this node\n"
    rank.signal(signal.SIGUSR1)
    rank.wait_for("^got")
    assert f"got {signal.SIGTERM:d}" not in rank.stdout


def test_a_pid_that_is_given_away_after_the_look_is_not_signalled(ranks, runtime, monkeypatch):
    """The process that has the pid now is not the one whose entry was read a moment before."""
    (stranger,) = ranks("clean")
    (record,) = registry.read(str(runtime))
    record.start_time -= 1
    reads = iter([[record]])
    monkeypatch.setattr(registry, "read", lambda *args: next(reads, []))
    ((rank,), _) = drain.drain(str(runtime), signal.SIGTERM, 10)
    assert rank.signalled is None
    stranger.signal(signal.SIGUSR1)
    stranger.wait_for("^got")
    assert f"got {signal.SIGTERM:d}" not in stranger.stdout


@pytest.mark.parametrize("part", ["namespace", "boot"])
def test_ranks_of_other_containers_are_not_signalled(ranks, runtime, part):
    (rank,) = ranks("clean")
    forge(runtime, rank, **{part: "abcdef"})
    command = run(runtime)
    assert (command.code, command.stdout) == (
        0,
        "no armed ranks on this node (1 of other pid namespaces or boots)\n",
    )
    assert rank.running


def test_without_proc_nobody_is_signalled(ranks, runtime, monkeypatch):
    (rank,) = ranks("clean")
    forge(runtime, rank, started=0, namespace=0, boot=0)
    monkeypatch.setattr(procfs, "available", lambda: False)
    ((told,), _) = drain.drain(str(runtime), signal.SIGTERM, 10)
    assert (told.outcome, told.clean, told.signalled) == ("refused", False, None)
    assert "/proc" in told.line()
    assert rank.running


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), None])
def test_without_pidfds(ranks, runtime, monkeypatch, error):
    """Old kernels, gVisor and strict seccomp profiles have none; nor do some builds of Python."""
    if error is None:
        monkeypatch.delattr(os, "pidfd_open")
    else:

        def pidfd_open(pid):
            raise error

        monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    ranks("clean", "crash")
    told, interrupted = drain.drain(str(runtime), signal.SIGTERM, 60)
    assert ([rank.outcome for rank in told], interrupted) == (["clean", "died"], False)


def test_it_does_not_signal_itself(ranks, runtime):
    registration.enter(str(runtime), {"rank": 9})
    ranks("clean")
    descriptors = len(os.listdir("/proc/self/fd"))
    told, _ = drain.drain(str(runtime), signal.SIGTERM, 60)
    assert [rank.record.rank for rank in told] == [0]
    assert [record.rank for record in registry.read(str(runtime))] == [9]
    assert len(os.listdir("/proc/self/fd")) == descriptors


# -- which ranks ---------------------------------------------------------------------------------------------------


def name_jobs(runtime, ranks, *jobs):
    """Have each stand-in's entry say whose it is."""
    for rank, job in zip(ranks, jobs):
        (path,) = (path for path in runtime.iterdir() if path.name.startswith(f"{rank.pid}-"))
        path.write_text(json.dumps({**json.loads(path.read_text()), "job": job}))


def test_a_job_is_drained_and_its_neighbour_is_not(ranks, runtime):
    started = ranks("clean", "clean")
    name_jobs(runtime, started, "4711", "4712")
    command = run(runtime, "--job", "4711")
    assert (command.code, command.stderr) == (0, "")
    first, last = command.stdout.splitlines()
    assert first.startswith(f"rank=0/2 pid={started[0].pid} job=4711 train.py: clean, exit 143 (")
    assert last == "1 of 1 left cleanly"
    assert (started[0].wait(), started[1].running) == (143, True)


def test_pids_are_drained_and_nobody_else(ranks, runtime):
    started = ranks("clean", "clean", "clean")
    command = run(runtime, "--json", "--pid", started[0].pid, "--pid", started[2].pid)
    assert [rank["pid"] for rank in json.loads(command.stdout)["ranks"]] == [started[0].pid, started[2].pid]
    assert started[1].running


@pytest.mark.parametrize("options", [("--job", "4713"), ("--pid", "1")])
def test_none_of_them_is_meant(ranks, runtime, options):
    (rank,) = ranks("clean")
    command = run(runtime, *options)
    assert (command.code, command.stderr, rank.running) == (0, "", True)
    assert "none of the 1 armed ranks on this node is selected" in command.stdout


def test_a_dry_run_signals_nobody_and_waits_for_nothing(ranks, runtime):
    started = ranks("ignore", "clean")
    name_jobs(runtime, started, "4711", "4711")
    command = run(runtime, "--dry-run", "--job", "4711", "--pid", started[1].pid)
    assert (command.code, command.stderr) == (0, "")
    assert command.stdout.splitlines() == [
        f"rank=1/2 pid={started[1].pid} job=4711 train.py: would be sent SIGTERM",
        "1 would be signalled; none was (--dry-run)",
    ]
    found = json.loads(run(runtime, "--dry-run", "--json").stdout)
    assert found["dry_run"] is True
    assert [(rank["pid"], rank["signal"]) for rank in found["ranks"]] == [(r.pid, "SIGTERM") for r in started]
    assert all(rank.running for rank in started)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["soon", "", "30s", "-1", "nan", "inf", "1e9"])
def test_nonsense_as_timeout(ranks, runtime, value):
    (rank,) = ranks("clean")
    command = run(runtime, f"--timeout={value}")
    assert (command.code, command.stdout) == (2, "")
    error = command.stderr.splitlines()[-1]
    assert "--timeout" in error
    assert repr(value) in error
    assert "seconds from 0 to 86400" in error
    assert rank.running


def test_ctrl_c_ends_the_waiting_and_not_the_report(ranks, runtime):
    (rank, other) = ranks("ignore", "clean")
    command = Command(runtime)
    other.wait()
    rank.wait_for("^got")
    command.signal(signal.SIGINT)
    command.finish()
    assert (command.code, command.stderr) == (1, "")
    assert command.stdout.splitlines()[-1].startswith("interrupted: ")
    assert "still running" in command.stdout
    assert alive(rank.pid)
    assert not any(path.name.startswith("drain-") for path in runtime.iterdir())


def test_a_killed_drain_leaves_nothing_that_lasts(ranks, runtime):
    (rank,) = ranks("ignore")
    command = Command(runtime)
    rank.wait_for("^got")
    command.signal(signal.SIGKILL)
    command.finish()
    rank.signal(signal.SIGKILL)
    rank.wait()
    assert len(list(runtime.iterdir())) == 2
    assert run(runtime).code == 0
    assert list(runtime.iterdir()) == []


def test_two_drains_at_once(ranks, runtime):
    started = ranks("clean", "ignore")
    commands = [Command(runtime, "--json") for _ in range(2)]
    wait_until(lambda: sum(path.name.startswith("drain-") for path in runtime.iterdir()) == 2, "both")
    for rank in started:
        rank.wait_for("^got")
    started[1].signal(signal.SIGKILL)
    for command in commands:
        assert command.finish().code == 1
        assert outcomes(command)[-1] == "died"
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("how", ["0777", pytest.param("uid 65534", marks=root_only)])
def test_a_registry_that_cannot_be_trusted(ranks, runtime, how):
    (rank,) = ranks("clean")
    if how == "0777":
        runtime.chmod(0o777)
    else:
        os.chown(runtime, 65534, 65534)
    command = run(runtime)
    assert (command.code, command.stdout) == (1, "")
    assert command.stderr.count("\n") == 1
    assert how in command.stderr
    assert rank.running


def test_entries_that_are_none_beside_one_that_is(ranks, runtime):
    """A stale one, one of a pid that was given away, and one that was cut off: only the rank is signalled."""
    rank, stranger, cut_off, dead = started = ranks("clean", "clean", "clean", "ignore")
    forge(runtime, stranger, started=procfs.start_time(stranger.pid) - 1)
    (path,) = runtime.glob(f"{cut_off.pid}-*")
    path.write_text('{"rank": 2')
    dead.signal(signal.SIGKILL)
    dead.wait()
    command = run(runtime, "--json")
    assert (command.code, command.stderr) == (0, "")
    assert [told["pid"] for told in json.loads(command.stdout)["ranks"]] == [rank.pid]
    for other in (stranger, cut_off):
        other.signal(signal.SIGUSR1)
        other.wait_for("^got")
    assert [f"got {signal.SIGTERM:d}" in each.stdout for each in started] == [True, False, False, False]


@root_only
def test_a_folder_that_cannot_be_written(ranks, runtime):
    """The ranks are signalled all the same. They cannot know that somebody wants to hear of their outcome."""
    unshare = ["unshare", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("this user may not make a mount namespace")
    (rank,) = ranks("clean")
    drain_there = f'mount -o bind,ro "$1" "$1" && exec {sys.executable} -m autoteardown drain'
    command = subprocess.run(
        [*unshare, "sh", "-c", drain_there, "sh", str(runtime)],
        env={**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
    )
    assert (command.returncode, command.stderr) == (0, "")
    assert "ended on its own" in command.stdout
    assert rank.wait() == 143


def test_names_cannot_forge_a_line(job, runtime):
    program = RANK.replace("train.py", r"x\nrank=1/2 pid=1 y: clean\x1b[2J")
    job.start(program, "crash", 0, mode=NONE, fresh=True).wait_for("^ready$")
    command = run(runtime)
    assert command.code == 1
    assert len(command.stdout.splitlines()) == 2
    assert "\x1b" not in command.stdout


# -- PID 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("nsenter"),
    reason="needs root, and nsenter",
)
def test_pre_stop_hook_under_a_shell_that_forwards_nothing(job, runtime):
    """A container whose PID 1 is a shell: what the platform signals is the shell, and the rank hears nothing."""
    shell = "; ".join((f"{sys.executable} $0 clean 0", "echo rank ended with $?", "sleep 600"))
    launcher = (*in_pid_namespace(), "sh", "-c", shell)
    script = job.folder / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    container = job.start("\n", mode=NONE, fresh=True, launcher=(*launcher, str(script)))
    container.wait_for("^ready$")
    (entry,) = (path.name for path in runtime.iterdir())
    inside = wait_until(lambda: children(container.pid), "the shell")[0]
    os.kill(inside, signal.SIGTERM)  # PID 1 without a handler: the kernel drops it

    enter = ["nsenter", "--target", str(inside), "--pid", "--mount"]
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(runtime)}
    command = [*enter, sys.executable, "-m", "autoteardown", "drain"]
    hook = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (hook.returncode, hook.stderr) == (0, "")
    assert hook.stdout.splitlines()[-1] == "1 of 1 left cleanly"
    assert f"pid={entry.split('-')[0]} " in hook.stdout
    container.wait_for("^rank ended with 143$")
    assert own_name().split("-")[2] != entry.split("-")[2]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
