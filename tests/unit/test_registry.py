"""The registry of a node: which ranks are in it, and what others may do to its folder."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from harness import NONE, wait_until
from namespaces import in_pid_namespace

from autoteardown.node import procfs, registration, registry, safe_folder
from autoteardown.node.entry import own_name

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
NOBODY = 65534

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(registry.__file__)))


@pytest.fixture
def runtime(tmp_path):
    return tmp_path / "runtime"


def enter(runtime, **fields):
    problems = []
    entry = registration.enter(str(runtime), {"rank": 0, "world_size": 2, **fields}, problems.append)
    assert problems == []
    return entry


def refused(runtime):
    """The one line that says why the folder is not used."""
    problems = []
    assert registration.enter(str(runtime), {}, problems.append) is None
    (line,) = problems
    assert "\n" not in line
    assert repr(str(runtime)) in line
    assert registry.read(str(runtime)) == []
    assert registry.state_of(str(runtime), os.getpid()) is None
    return line


def renamed(**parts):
    """The name of this process's entry with some of its parts changed."""
    pid, started, namespace, boot = own_name()[: -len(".json")].split("-")
    names = {"pid": pid, "started": started, "namespace": namespace, "boot": boot, **parts}
    return "{pid}-{started}-{namespace}-{boot}.json".format(**names)


def dead_name():
    """The name of an entry of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = procfs.start_time(process.pid)
    return renamed(pid=process.pid, started=started)


# -- entries -------------------------------------------------------------------------------------------------------


def test_an_entry_is_there_until_its_process_leaves(runtime):
    entry = enter(runtime, rank=3, local_rank=1, world_size=16, backend="nccl", program="train.py")
    (record,) = registry.read(str(runtime))
    assert (record.pid, record.rank, record.local_rank, record.world_size) == (os.getpid(), 3, 1, 16)
    assert (record.backend, record.program, record.state) == ("nccl", "train.py", "armed")
    assert record.start_time == procfs.start_time(os.getpid())
    assert abs(record.armed_at - time.time()) < 600
    assert registry.alive(record)
    entry.update(state="parked", rank=4)
    (record,) = registry.read(str(runtime))
    assert (record.state, record.rank) == ("parked", 4)
    entry.leave()
    assert list(runtime.iterdir()) == []
    entry.update(state="armed")
    assert list(runtime.iterdir()) == []


def test_nobody_else_can_read_or_write_it(runtime):
    old = os.umask(0)
    try:
        enter(runtime)
    finally:
        os.umask(old)
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    (path,) = runtime.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_fields_of_any_kind_are_written(runtime):
    enter(runtime, program="é\ud800\n" * 9999, backend=object(), rank=float("nan"), world_size=None)
    (record,) = registry.read(str(runtime))
    assert record.program.startswith("é\ud800\n")
    assert (record.rank, record.world_size) == (None, None)


def test_an_outcome_is_left_only_for_a_drain(runtime):
    enter(runtime).leave("clean", 0)
    assert list(runtime.iterdir()) == []

    entry = enter(runtime)
    (record,) = registry.read(str(runtime))
    marker = registry.DrainMarker(str(runtime))
    entry.leave("clean", 0)
    entry.leave("forced", 143)
    entry.update(state="parked")  # a late thread
    entry.leave()
    last = registry.reread(str(runtime), record)
    assert (last.state, last.outcome, last.exit_code) == ("left", "forced", 143)
    marker.close()
    assert [path.name for path in runtime.iterdir()] == [entry.name]


@contextlib.contextmanager
def about_to_write(entry, monkeypatch):
    """A thread is about to write what was true before, and the process ends before it could look again."""
    real, about = safe_folder.replace, threading.Event()

    def replace(*args):
        if threading.current_thread() is not slow:
            return real(*args)
        about.set()
        time.sleep(0.05)
        real(*args)
        raise SystemExit

    monkeypatch.setattr(safe_folder, "replace", replace)

    def update():
        with contextlib.suppress(SystemExit):
            entry.update(state="parked")

    slow = threading.Thread(target=update)
    slow.start()
    assert about.wait(60)
    yield
    slow.join()


def test_a_slow_thread_does_not_undo_the_outcome(runtime, monkeypatch):
    entry = enter(runtime)
    (record,) = registry.read(str(runtime))
    marker = registry.DrainMarker(str(runtime))
    with about_to_write(entry, monkeypatch):
        entry.leave("clean", 0, why="none")
    last = registry.reread(str(runtime), record)
    assert (last.state, last.outcome, last.exit_code, last.why) == ("left", "clean", 0, "none")
    marker.close()


def test_a_slow_thread_leaves_no_entry_behind(runtime, monkeypatch):
    entry = enter(runtime)
    with about_to_write(entry, monkeypatch):
        entry.leave("clean", 0)
    assert registry.read(str(runtime)) == []


def test_a_drain_tells_how_much_time_is_left(runtime):
    entry = enter(runtime)
    assert entry.time_left() is None
    marker = registry.DrainMarker(str(runtime))
    assert entry.time_left() is None
    marker.announce([entry.name], time.monotonic() + 7)
    assert 5 < entry.time_left() <= 7
    marker.announce(["another", entry.name], time.monotonic() - 1)
    assert entry.time_left() < 0
    marker.announce(["another"], time.monotonic() + 7)
    assert entry.time_left() is None
    marker.announce([entry.name], time.monotonic() + 7)
    marker.close()
    assert entry.time_left() is None


def test_a_drain_that_is_dead_tells_nothing(runtime):
    entry = enter(runtime)
    (runtime / f"drain-{dead_name()}").write_text(json.dumps({"until": 1, "ranks": [entry.name]}))
    assert entry.time_left() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"7",
        b"\xff",
        b'{"until": 1}',
        b'{"until": "soon", "ranks": [NAME]}',
        b'{"until": 1, "ranks": 1}',
        b'{"until": NaN, "ranks": [NAME]}',
        b'{"until": Infinity, "ranks": [NAME]}',
        b"[" * 60000,
    ],
)
def test_a_drain_that_tells_nonsense(runtime, content):
    entry = enter(runtime)
    marker = registry.DrainMarker(str(runtime))
    (path,) = runtime.glob("drain-*")
    path.write_bytes(content.replace(b"NAME", json.dumps(entry.name).encode()))
    assert entry.time_left() is None
    marker.close()


def test_the_marker_of_a_dead_drain_does_not_count(runtime):
    entry = enter(runtime)
    (runtime / f"drain-{dead_name()}").write_text("{}")
    entry.leave("clean", 0)
    assert registry.read(str(runtime)) == []
    assert list(runtime.iterdir()) == []


def test_a_forked_child_leaves_its_parents_entry_alone(runtime):
    entry = enter(runtime)
    pid = os.fork()
    if not pid:
        entry.update(state="parked")
        entry.leave()
        entry.leave("clean", 0)
        os._exit(0)
    os.waitpid(pid, 0)
    (record,) = registry.read(str(runtime))
    assert record.state == "armed"


def test_it_survives_a_cleaner_of_tmp(runtime):
    entry = enter(runtime)
    shutil.rmtree(runtime)
    assert registry.read(str(runtime)) == []
    entry.update(state="stopping")
    (record,) = registry.read(str(runtime))
    assert (record.rank, record.state) == (0, "stopping")


def test_it_imports_next_to_nothing():
    code = "import sys, autoteardown.node.registry; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    costly = {
        "typing",
        "dataclasses",
        "pathlib",
        "contextlib",
        "inspect",
        "threading",
        "logging",
        "subprocess",
    }
    assert not costly & set(run.stdout.split())


# -- several writers -----------------------------------------------------------------------------------------------


def test_readers_never_see_a_part_of_an_entry(runtime):
    entry = enter(runtime, program="0" * 900, backend="0" * 900)
    (record,) = registry.read(str(runtime))
    stop = threading.Event()

    def write(letters):
        while not stop.is_set():
            for letter in letters:
                entry.update(program=letter * 900, backend=letter * 900)

    threads = [threading.Thread(target=write, args=(letters,)) for letters in ("abc", "xyz")]
    for thread in threads:
        thread.start()
    try:
        seen, reads = set(), 0
        while reads < 500 or len(seen) < 3:
            reads += 1
            now = registry.reread(str(runtime), record)
            assert len(now.program) == len(now.backend) == 900
            assert len(set(now.program)) == 1
            seen.add(now.program[0])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    entry.update(state="leaving")
    now = registry.reread(str(runtime), record)
    assert now.state == "leaving"
    assert [path.name for path in runtime.iterdir()] == [entry.name]


@pytest.fixture
def interrupted_write(monkeypatch):
    """Runs a function in the middle of the next write, as another thread or a signal handler would."""
    replace = safe_folder.replace

    def use(act):
        def interrupted(descriptor, name, data):
            monkeypatch.setattr(safe_folder, "replace", replace)
            act()
            replace(descriptor, name, data)

        monkeypatch.setattr(safe_folder, "replace", interrupted)

    return use


def test_a_slow_writer_does_not_put_back_what_is_over(runtime, interrupted_write):
    entry = enter(runtime)
    interrupted_write(lambda: entry.update(state="leaving"))
    entry.update(state="parked")
    (record,) = registry.read(str(runtime))
    assert record.state == "leaving"


def test_a_slow_writer_does_not_bring_back_an_entry_that_is_gone(runtime, interrupted_write):
    entry = enter(runtime)
    interrupted_write(entry.leave)
    entry.update(state="parked")
    assert list(runtime.iterdir()) == []


def test_nor_one_that_told_of_the_end(runtime, interrupted_write):
    """`leaving` says how it is to end, before it does."""
    entry = enter(runtime)
    interrupted_write(lambda: entry.leave("clean", 0))
    entry.update(state="leaving", outcome="clean", exit_code=0)
    assert list(runtime.iterdir()) == []


def test_nor_does_one_take_away_what_a_drain_reads(runtime, interrupted_write, monkeypatch):
    """Not for a moment: a rank whose entry is not there has ended without an outcome."""
    entry = enter(runtime)
    marker = registry.DrainMarker(str(runtime))
    asked, answer, markers = threading.Event(), threading.Event(), registry.markers

    def slow(descriptor):
        asked.set()
        answer.wait()
        return markers(descriptor)

    def leave():
        thread.start()
        asked.wait()

    monkeypatch.setattr(registry, "markers", slow)
    thread = threading.Thread(target=entry.leave, args=["clean", 0])
    interrupted_write(leave)
    entry.update(state="leaving", outcome="clean", exit_code=0)
    there = (runtime / entry.name).exists()
    answer.set()
    thread.join()
    assert there
    assert (runtime / entry.name).exists()
    marker.close()


def test_a_thread_that_never_gets_on_holds_nobody_up(runtime, interrupted_write):
    entry = enter(runtime)
    frozen, thaw = threading.Event(), threading.Event()

    def freeze():
        frozen.set()
        thaw.wait()

    interrupted_write(freeze)
    thread = threading.Thread(target=entry.update, kwargs={"state": "stopping"})
    thread.start()
    frozen.wait()
    entry.update(state="parked")
    (record,) = registry.read(str(runtime))
    assert record.state == "parked"
    entry.leave("clean", 0)
    assert list(runtime.iterdir()) == []
    thaw.set()
    thread.join()
    assert list(runtime.iterdir()) == []


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_link_is_not_followed(runtime, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    runtime.symlink_to(elsewhere)
    assert "a link" in refused(runtime)
    assert "a link" in refused(f"{runtime}/")
    assert list(elsewhere.iterdir()) == []


def test_a_link_that_replaces_the_folder_later_is_not_followed(runtime, tmp_path):
    entry = enter(runtime)
    runtime.rename(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / entry.name).read_bytes()
    runtime.symlink_to(tmp_path / "elsewhere")
    entry.update(state="parked")
    entry.leave()
    assert (tmp_path / "elsewhere" / entry.name).read_bytes() == before


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(runtime, mode):
    runtime.mkdir()
    runtime.chmod(mode)
    assert f"{mode:04o}" in refused(runtime)
    assert list(runtime.iterdir()) == []


@root_only
def test_a_folder_of_another_user_is_not_used(runtime):
    runtime.mkdir(mode=0o700)
    os.chown(runtime, NOBODY, NOBODY)
    assert f"uid {NOBODY}" in refused(runtime)
    assert list(runtime.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_not_used(runtime):
    assert "No such file" in refused(runtime / "deeper")
    runtime.write_text("")
    assert "no folder" in refused(runtime)
    assert "Not a directory" in refused(runtime / "deeper")


def test_a_folder_that_cannot_be_written_is_not_used():
    """Not even root can make anything in /proc."""
    refused("/proc/autoteardown")


def test_a_full_disk_costs_the_entry_and_nothing_else(runtime):
    code = """
        import resource, signal, sys
        from autoteardown.node import registration, registry
        entry = registration.enter(sys.argv[1], {"rank": 0})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        entry.update(program="x" * 900)
        print([record.program for record in registry.read(sys.argv[1])])
        print(registration.enter(sys.argv[1], {"rank": 1}, print))
        entry.leave()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(runtime)]
    run = subprocess.run(command, capture_output=True, text=True)
    kept, problem, none = run.stdout.splitlines()
    assert (kept, none, run.stderr) == ("[None]", "None", "")
    assert "not used" in problem
    assert list(runtime.iterdir()) == []


@root_only
def test_a_file_of_another_user_is_not_read(runtime):
    entry = enter(runtime)
    os.chown(runtime / entry.name, NOBODY, NOBODY)
    assert registry.read(str(runtime)) == []


@root_only
def test_a_process_that_changed_its_user_is_not_signalled(runtime, job):
    """Same folder, same pid, but no longer this user's to signal."""
    program = """
        import os, signal, sys
        from autoteardown.node import registration
        registration.enter(sys.argv[1], {"rank": 0})
        os.setuid(65534)
        print("ready", flush=True)
        signal.pause()
    """
    job.start(program, runtime, mode=NONE, fresh=True).wait_for("ready")
    assert len(list(runtime.iterdir())) == 1
    assert registry.read(str(runtime)) == []


# -- entries that are none -----------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "cut off": b'{"rank": 1',
    "no object": b"[1]",
    "no text": b"\xff\xfe\x00",
    "too deep": b"[" * 60000,
    "too long": b'{"rank": 1, "program": "' + b"x" * 100_000 + b'"}',
    "overflow": b'{"armed_at": 1' + b"0" * 400 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_corrupt_entry_is_ignored_and_in_time_removed(runtime, content):
    runtime.mkdir(mode=0o700)
    for name in (own_name(), dead_name()):
        (runtime / name).write_bytes(content)
    assert registry.read(str(runtime)) == []
    assert registry.state_of(str(runtime), os.getpid()) is None
    assert [path.name for path in runtime.iterdir()] == [own_name()]  # ours may still be set right


def test_wrong_types_are_left_out(runtime):
    runtime.mkdir(mode=0o700)
    fields = {
        "rank": "0",
        "world_size": 2.5,
        "local_rank": True,
        "backend": 7,
        "state": [],
        "armed_at": "now",
    }
    fields["exit_code"] = 10**30
    (runtime / own_name()).write_text(json.dumps(fields))
    (record,) = registry.read(str(runtime))
    assert (record.rank, record.world_size, record.local_rank, record.exit_code) == (None,) * 4
    assert (record.backend, record.state, record.age) == (None, "armed", 0.0)
    assert record.place == "?/?"


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_plain_files_are_read(runtime, tmp_path, kind):
    runtime.mkdir(mode=0o700)
    path = runtime / own_name()
    if kind == "link":
        (tmp_path / "entry").write_text('{"rank": 1}')
        path.symlink_to(tmp_path / "entry")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert registry.read(str(runtime)) == []
    assert registry.state_of(str(runtime), os.getpid()) is None


def test_other_files_are_left_alone(runtime):
    runtime.mkdir(mode=0o700)
    names = {
        "notes.txt",
        "1.json",
        "1-2.json",
        "--0-0.json",
        "²-1-0-0.json",
        f"{'9' * 150}-1-0-0.json",
        ".hidden",
    }
    names |= {renamed(pid="-1"), renamed(pid="²"), renamed(started="1-1")}
    for name in names:
        (runtime / name).write_text("{}")
    assert registry.read(str(runtime)) == []
    assert {path.name for path in runtime.iterdir()} == names


# -- whose entry it is ---------------------------------------------------------------------------------------------


def test_what_a_dead_process_left_is_removed(runtime):
    runtime.mkdir(mode=0o700)
    dead = dead_name()
    for name in (dead, f".{dead}.7f00.3", f"drain-{dead}", f".drain-{dead}.7f00.3"):
        (runtime / name).write_text('{"rank": 1}')
    entry = enter(runtime)
    assert [path.name for path in runtime.iterdir()] == [entry.name]


def test_the_dead_stay_while_a_drain_has_to_read_them(runtime):
    runtime.mkdir(mode=0o700)
    dead = dead_name()
    (runtime / dead).write_text("{}")
    marker = registry.DrainMarker(str(runtime))
    assert registry.read(str(runtime)) == []
    assert (runtime / dead).exists()
    marker.close()
    assert registry.read(str(runtime)) == []
    assert list(runtime.iterdir()) == []


def test_a_pid_that_was_given_to_another_process_is_not_the_rank(runtime):
    runtime.mkdir(mode=0o700)
    earlier = renamed(started=procfs.start_time(os.getpid()) - 1)
    (runtime / earlier).write_text('{"rank": 1, "state": "parked"}')
    assert registry.state_of(str(runtime), os.getpid()) is None
    assert registry.read(str(runtime)) == []
    assert not (runtime / earlier).exists()


@pytest.mark.parametrize("part", ["namespace", "boot"])
def test_entries_of_other_containers_are_neither_ours_nor_removed(runtime, part):
    runtime.mkdir(mode=0o700)
    (runtime / renamed(**{part: "abcdef"})).write_text('{"rank": 1}')
    (runtime / renamed(pid=dead_name().split("-")[0], **{part: "abcdef"})).write_text('{"rank": 1}')
    (runtime / f"drain-{renamed(**{part: 'abcdef'})}").write_text("{}")
    enter(runtime).leave("clean", 0)  # no drain of ours waits for it
    assert registry.read(str(runtime)) == []
    assert registry.state_of(str(runtime), os.getpid()) is None
    assert len(list(runtime.iterdir())) == 3
    assert registry.elsewhere(str(runtime)) == 2


def test_containers_that_share_a_folder_do_not_see_each_other(runtime, job):
    program = """
        import os, sys, signal
        from autoteardown.node import registration, registry
        registration.enter(sys.argv[1], {"rank": int(sys.argv[2])})
        print(os.getpid(), [record.rank for record in registry.read(sys.argv[1])], flush=True)
        signal.pause()
    """
    launcher = in_pid_namespace()
    enter(runtime, rank=9)
    for rank in (1, 2):
        job.start(program, runtime, rank, mode=NONE, fresh=True, launcher=launcher).wait_for(
            rf"^1 \[{rank}\]$"
        )
    assert [record.rank for record in registry.read(str(runtime))] == [9]
    assert registry.elsewhere(str(runtime)) == 2


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: procfs.start_time(process.pid) is None, "the child's end")
    assert os.path.exists(f"/proc/{process.pid}")
    assert not procfs.lives(process.pid, 0)
    process.wait()


@pytest.mark.parametrize("name", ["a b", ") S 1 (", "((", "x) Z 0"])
def test_a_program_may_be_called_anything(name):
    code = f"print(open('/proc/self/comm', 'w').write({name!r}), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        started = procfs.start_time(process.pid)
        process.stdout.readline()
        with open(f"/proc/{process.pid}/stat") as file:
            assert f"({name})" in file.read()
        assert procfs.start_time(process.pid) == started
        process.communicate(b"\n")
    assert started


def test_a_worker_can_ask_for_its_parents_state(runtime):
    entry = enter(runtime)
    for state in ("armed", "parked"):
        entry.update(state=state)
        state_of = f"registry.state_of({str(runtime)!r}, os.getppid())"
        asked = f"import os; from autoteardown.node import registry; print({state_of})"
        run = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert run.stdout == f"{state}\n"
    assert registry.state_of(str(runtime), 1 if os.getpid() != 1 else 2) is None
    assert registry.state_of(str(runtime), 2**22 + 1) is None


def test_without_proc_entries_are_kept_and_listed(runtime, monkeypatch):
    monkeypatch.setattr(procfs, "available", lambda: False)
    entry = enter(runtime)
    assert entry.name == f"{os.getpid()}-0-0-0.json"
    dead = dead_name().split("-")[0]
    (runtime / f"{dead}-0-0-0.json").write_text("{}")
    assert [record.pid for record in registry.read(str(runtime))] == [os.getpid()]
    assert registry.state_of(str(runtime), os.getpid()) == "armed"
    entry.leave()
    assert list(runtime.iterdir()) == []


def test_a_proc_of_another_namespace_is_not_believed(monkeypatch):
    assert procfs.available()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert procfs.available() == (os.readlink("/proc/self") == "1")
    assert procfs.space() == "0-0"


# -- ps ------------------------------------------------------------------------------------------------------------


def ps(runtime, *options):
    command = [sys.executable, "-m", "autoteardown", "ps", *options]
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(runtime)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_ps_lists_the_ranks(runtime):
    enter(
        runtime,
        job="llama 7b",
        rank=3,
        world_size=16,
        backend="gloo",
        program="train.py",
        armed_at=time.time() - 7500,
    )
    run = ps(runtime)
    assert (run.returncode, run.stderr) == (0, "")
    head, row = run.stdout.splitlines()
    assert head.split() == ["PID", "JOB", "RANK", "BACKEND", "PROGRAM", "STATE", "AGE", "PEERS"]
    assert row.split() == [str(os.getpid()), "llama", "7b", "3/16", "gloo", "train.py", "armed", "2h5m", "-"]
    for title, cell in zip(
        head.split(), [str(os.getpid()), "llama 7b", "3/16", "gloo", "train.py", "armed", "2h5m"]
    ):
        assert head.index(title) == row.index(cell)
    (rank,) = json.loads(ps(runtime, "--json").stdout)
    assert (
        rank.items()
        >= {"pid": os.getpid(), "job": "llama 7b", "rank": 3, "world_size": 16, "backend": "gloo"}.items()
    )
    assert rank.items() >= {"program": "train.py", "state": "armed"}.items()
    assert 7500 <= rank["age"] < 8000


def test_ps_without_ranks(runtime):
    run = ps(runtime)
    assert (run.returncode, run.stdout, run.stderr) == (0, "no armed ranks on this node\n", "")
    assert ps(runtime, "--json").stdout == "[]\n"
    runtime.mkdir(mode=0o700)
    (runtime / renamed(namespace="abcdef")).write_text("{}")
    assert "1 of other pid namespaces" in ps(runtime).stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("how", ["0777", pytest.param(f"uid {NOBODY}", marks=root_only)])
def test_ps_says_so_when_the_registry_cannot_be_trusted(runtime, how, options):
    enter(runtime)
    if how == "0777":
        runtime.chmod(0o777)
    else:
        os.chown(runtime, NOBODY, NOBODY)
    run = ps(runtime, *options)
    assert run.returncode == 1
    assert run.stdout in ("", "[]\n")
    assert run.stderr.count("\n") == 1
    assert how in run.stderr


def test_ps_leaves_out_what_is_no_rank(runtime):
    """Beside a rank's: a stale entry, that of a pid that was given away, and one that was cut off."""
    enter(runtime, rank=3)
    (runtime / dead_name()).write_text('{"rank": 4}')
    (runtime / renamed(started=procfs.start_time(os.getpid()) - 1)).write_text('{"rank": 5}')
    parent = os.getppid()
    (runtime / renamed(pid=parent, started=procfs.start_time(parent))).write_text('{"rank": 6')
    run = ps(runtime)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split()[2] for line in run.stdout.splitlines()] == ["RANK", "3/2"]
    assert [rank["rank"] for rank in json.loads(ps(runtime, "--json").stdout)] == [3]


def test_names_cannot_forge_a_line_of_ps(runtime):
    enter(runtime, program="x\n4711  0/1  gloo\x1b[2J\u202e\ud800")
    run = ps(runtime)
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 2
    assert all(letter.isprintable() for line in run.stdout.splitlines() for letter in line)
    assert json.loads(ps(runtime, "--json").stdout)[0]["program"].startswith("x\n")


def test_ps_and_doctor_say_whose_peers_are_not_told(runtime):
    entry = enter(runtime, rank=3, world_size=16, alone="")
    assert ps(runtime).stdout.splitlines()[1].endswith("connected")
    entry.update(alone="the hub cannot be reached:\x1b refused")
    assert ps(runtime).stdout.rstrip().endswith("not told: the hub cannot be reached:? refused")
    command = [sys.executable, "-m", "autoteardown", "doctor"]
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(runtime), "AUTOTEARDOWN": "1"}
    said = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    assert "rank 3/16" in said and "could not notify its peers of an eviction now" in said, said
