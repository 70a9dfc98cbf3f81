"""What docs/security.md promises: what the agent touches and writes, and what others and their input can do to it.

The registry's own tests (test_registry.py, test_drain.py) have the rest of it.
"""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import AGENT, LOG_LINE, NONE, environment, free_port, wait_until

from autoteardown.stop import report
from autoteardown.timeline import reports

NOBODY = 65534
# What a name must not do: begin a line, look like fields of ours, steer a terminal, leave its folder, break an encoder.
HOSTILE = "n\n4711 0/1 gloo +0.1s done: clean\r\x1b[2J\u202e\u2028\ud800/../x"
PROGRAM = """
    import socket, sys, time
    import torch.distributed as dist
    {before}
    dist.init_process_group("gloo")
    {after}
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def program(before="", after=""):
    return PROGRAM.format(before=before, after=after)


def lines_of(text):
    """The lines of a text that is fit for a terminal."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(letter.isprintable() for line in lines for letter in line), lines
    return lines


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


# -- start-up ------------------------------------------------------------------------------------------------------

# What site.py runs is seen by a hook that is there before it.
WATCHED_START = """
import sys

def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.")):
        print(event, *args)
    if event == "open" and isinstance(args[2], int) and args[2] & 3:
        print("writes", args[0])
    if event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.chmod"):
        print(event, *args)

sys.dont_write_bytecode = True
sys.addaudithook(watch)
import site
site.main()
import signal
from autoteardown import startup
print("active" if startup.active() else "not active")
"""


def test_start_up_reads_and_nothing_else():
    """No network, no other program, nothing written: with the agent on, in a process that is no rank."""
    command = [sys.executable, "-S", "-c", WATCHED_START]
    run = subprocess.run(command, env=environment(AGENT, ""), capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("active\n", "")


def test_the_start_up_files_are_one_line_without_exec():
    files = Path(__file__).parents[2] / "startup_files"
    texts = {path.name: path.read_text() for path in files.iterdir()}
    assert sorted(texts) == ["autoteardown.pth", "autoteardown.start"]
    for text in texts.values():
        assert len(text.splitlines()) == 1
        assert not re.search(r"exec|eval|compile|base64|urllib|socket", text)


LOOK = """
import os, sys, types, warnings
warnings.simplefilter("ignore")
import signal
import torch, torch.distributed, torch.distributed.checkpoint, torch.optim, torch.utils.data
import autoteardown

ours = os.path.dirname(autoteardown.__file__)

def look(names):
    for value in list(names.values()):
        if type(value) is types.FunctionType and value.__code__.co_filename.startswith(ours):
            print(f"{value.__module__}.{value.__qualname__}")
        elif type(value).__name__ == "Builtin":  # a stand-in for a function in C
            print(f"{value.__module__}.{value.__name__}")

for name, module in list(sys.modules.items()):
    if name != "__main__" and name.split(".")[0] != "autoteardown":
        look(vars(module))
        for each in list(vars(module).values()):
            if isinstance(each, type):
                look(vars(each))
"""


INIT = (
    "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)"
)


SHRINKS = hasattr(dist.distributed_c10d, "shrink_group")
ELASTIC = ("PContext.start", "PContext.wait", "PContext.close", "_terminate_process_handler")


@pytest.mark.parametrize("armed", [False, True])
def test_what_is_patched_is_what_the_page_says(armed, tmp_path):
    program = LOOK.replace("import autoteardown\n", f"import autoteardown\n{INIT if armed else ''}\n")
    env = {**environment(AGENT, ""), "AUTOTEARDOWN_RUNTIME_DIR": str(tmp_path / "runtime")}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.stderr == ""
    assert set(run.stdout.split()) == {
        *(["_thread.interrupt_main", "posix.kill"] if armed else []),
        *(f"torch.distributed.elastic.multiprocessing.api.{name}" for name in ELASTIC),
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError.__init__",
        "torch.distributed.elastic.agent.server.api.SimpleElasticAgent._restart_workers",
        "signal.signal",
        "signal.getsignal",
        "_signal.set_wakeup_fd",
        "torch.distributed.distributed_c10d.init_process_group",
        "torch.distributed.distributed_c10d.destroy_process_group",
        "torch.distributed.distributed_c10d._new_process_group_helper",
        *(["torch.distributed.distributed_c10d.shrink_group"] if SHRINKS else []),
        "torch.serialization.save",
        "torch.distributed.checkpoint.state_dict_saver.save",
        "torch.distributed.checkpoint.state_dict_saver.save_state_dict",
        "torch.distributed.checkpoint.state_dict_saver.async_save",
        "torch._C._set_worker_signal_handlers",
    }


# -- what is written -----------------------------------------------------------------------------------------------


def test_what_is_written_and_with_which_mode(job):
    """A rank whose umask takes nothing away, in folders that are all its own: these files, and no others."""
    homes = {name: job.folder / name for name in ("home", "tmp", "cwd")}
    for folder in homes.values():
        folder.mkdir()
    log = job.folder / "termination-log"
    log.touch(0o600)
    rank = job.start(
        program(before="import os; os.umask(0); os.chdir(os.environ['HOME'] + '/../cwd')"),
        fresh=True,
        HOME=homes["home"],
        TMPDIR=homes["tmp"],
        AUTOTEARDOWN_RUNTIME_DIR="",
        AUTOTEARDOWN_REPORT_DIR=job.folder / "made" / "reports",
        AUTOTEARDOWN_TERMINATION_LOG=log,
        RANK=0,
        WORLD_SIZE=1,
        MASTER_PORT=free_port(),
        PYTHONDONTWRITEBYTECODE=1,
    )
    rank.wait_for("ready")
    runtime = homes["tmp"] / f"autoteardown-{os.getuid()}"
    (entry,) = wait_until(lambda: list(runtime.glob("*.json")), "the entry, which is written on the side")
    assert (mode_of(runtime), mode_of(entry)) == (0o700, 0o600)
    assert rank.evict() == 0, rank.transcript()
    (written,) = (job.folder / "made" / "reports").iterdir()
    assert (mode_of(written.parent), mode_of(written)) == (0o755, 0o644)
    assert mode_of(log) == 0o600
    assert log.read_text().startswith("autoteardown: rank 0 of 1")
    left = [path for folder in homes.values() for path in folder.rglob("*")]
    assert left == [runtime]
    assert sorted(path.name for path in job.folder.iterdir()) == sorted(
        ["process0", "made", "reports", "termination-log", *homes]
    )


def test_a_report_holds_no_values(job):
    """Stacks name files, lines and functions; what the program, its arguments or its environment hold stays there."""
    ranks = job.world("stuck.py", 2, "--token=5ecre7", PASSWORD="5ecre7")
    ranks[0].wait_blocked("ready")
    assert ranks[0].evict() == 0, ranks[0].transcript()
    assert "stuck.py" in json.dumps(ranks[0].report()["stuck"])
    assert "5ecre7" not in json.dumps(ranks[0].report())


# -- links and others' files ---------------------------------------------------------------------------------------


def test_a_report_does_not_go_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "node-1.json").symlink_to(precious)
    assert report.write_report(str(folder), "node-1.json", {"schema": 1}) is None
    assert precious.read_text() == "precious"
    assert json.loads((folder / "node-1-2.json").read_text()) == {"schema": 1}


def test_nor_does_its_temporary_file(tmp_path, monkeypatch):
    """Its name cannot be known; a user who guesses it keeps the report from being written, and gains nothing else."""
    names = set()

    def spy(path, flags, mode=0o777, *, dir_fd=None, open=os.open):
        if flags & os.O_CREAT:
            names.add(path)
        return open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", spy)
    folder, precious = tmp_path / "reports", tmp_path / "precious"
    for _ in range(5):
        assert report.write_report(str(folder), "node-1.json", {}) is None
    assert len(names) == 5
    assert [path.name for path in folder.iterdir()] == ["node-1.json"]
    precious.write_text("precious")
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    assert report.write_report(str(folder), "node-1.json", {}) is None
    (guessed,) = (folder / name for name in names if name.endswith("00" * 8))
    guessed.symlink_to(precious)
    assert "not written" in report.write_report(str(folder), "node-1.json", {"changed": True})
    assert precious.read_text() == "precious"
    assert json.loads((folder / "node-1.json").read_text()) == {}


@pytest.mark.parametrize("name", [f"{HOSTILE}-1.json".replace("/", "_"), "-1.json", "..-1.json", "\0-1.json"])
def test_a_report_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "reports"
    assert report.write_report(str(folder), name, {}) is None
    (path,) = folder.iterdir()
    assert path.name.isprintable() and path.name.endswith("-1.json")


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "device"])
def test_the_termination_log_is_a_plain_file_or_none(tmp_path, kind):
    path, precious = tmp_path / "termination-log", tmp_path / "precious"
    precious.write_text("precious")
    reader = None
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "fifo":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/full")
    report.write_termination_log(str(path), "text\n")
    assert precious.read_text() == "precious"
    if reader is not None:
        assert os.read(reader, 100) == b""
        os.close(reader)


def test_the_termination_log_is_replaced_and_whole_letters(tmp_path):
    path = tmp_path / "termination-log"
    path.write_text("x" * 9000)
    report.write_termination_log(str(path), "a" + "é" * 3000)
    assert path.read_bytes().decode() == "a" + "é" * 2047


# -- what others can do --------------------------------------------------------------------------------------------


def as_user(uid, code, *words, **env):
    """Run code as another user. Its imports come first: that user may not get at this Python's files."""
    imports = "import argparse, os, signal, sys\nfrom autoteardown.stop import report\n"
    imports += "from autoteardown.cli import drain, ps\n"
    become = f"os.setgroups([])\nos.setgid({uid})\nos.setuid({uid})\n"
    return subprocess.run(
        [sys.executable, "-c", imports + become + code, *map(str, words)],
        env=environment(NONE, "", **env),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def others():
    """A folder in which other users find their way, as they do in /tmp."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


ATTACK = """
runtime, entry, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
own = os.path.join(os.path.dirname(runtime), "own")
open(own, "w").close()
path = os.path.join(runtime, entry)
for name, act in {
    "list": lambda: os.listdir(runtime),
    "read": lambda: open(path).read(),
    "write": lambda: open(path, "w"),
    "plant": lambda: open(os.path.join(runtime, "x"), "w"),
    "replace": lambda: os.replace(own, path),
    "remove": lambda: os.remove(path),
    "move": lambda: os.rename(runtime, runtime + "2"),
    "open up": lambda: os.chmod(runtime, 0o777),
    "signal": lambda: os.kill(pid, signal.SIGTERM),
}.items():
    try:
        act()
    except PermissionError:
        continue
    print(name, "worked")
"""


def test_another_user_and_a_rank(job, others):
    """Neither by hand nor with our own commands can another user see, change or end it."""
    runtime = others / "runtime"
    (rank,) = job.world("train.py", 1, AUTOTEARDOWN_RUNTIME_DIR=runtime)
    rank.wait_for("step 3$")
    (entry,) = runtime.iterdir()
    before = entry.read_bytes()
    run = as_user(NOBODY, ATTACK, runtime, entry.name, rank.pid)
    assert (run.stdout, run.stderr) == ("", "")
    for command in ("ps", "drain"):
        options = "json=False, timeout=None, job=None, pid=[], dry_run=False"
        code = f"sys.exit({command}.run(argparse.Namespace({options})))"
        run = as_user(NOBODY, code, AUTOTEARDOWN_RUNTIME_DIR=runtime)
        assert (run.returncode, run.stdout) == (1, "")
        assert "not used" in run.stderr and run.stderr.count("\n") == 1
    assert rank.running
    assert entry.read_bytes() == before
    assert rank.evict() == 0, rank.transcript()


@pytest.mark.parametrize("how", ["folder", "open folder", "link", "file", "fifo"])
def test_another_user_was_there_before(job, others, how):
    """Whatever lies under the name of the runtime folder costs the registry and nothing else, and is not touched."""
    plant = {
        "folder": "os.mkdir(path, 0o700)",
        "open folder": "os.mkdir(path); os.chmod(path, 0o777)",
        "link": "os.symlink(sys.argv[2], path)",
        "file": "open(path, 'w')",
        "fifo": "os.mkfifo(path)",
    }[how]
    path, own = others / f"autoteardown-{os.getuid()}", others / "own"
    own.mkdir(mode=0o700)
    planted = as_user(NOBODY, f"path = sys.argv[1]; {plant}", path, own)
    assert planted.returncode == 0, planted.stderr
    (rank,) = job.world("train.py", 1, TMPDIR=others, AUTOTEARDOWN_RUNTIME_DIR="")
    rank.wait_for("step 3$")
    said = [line for line in rank.log_lines if "not used" in line]
    assert len(said) == 1 and str(path) in said[0], rank.stderr
    assert rank.evict() == 0, rank.transcript()
    assert path.lstat().st_uid == NOBODY
    assert not path.is_dir() or list(path.iterdir()) == []


@pytest.mark.parametrize("sticky", [True, False])
def test_another_user_in_the_report_folder(others, sticky):
    """Where all may write, a planted link stays where it is; it is never followed."""
    precious = others / "precious"
    precious.write_text("precious")
    precious.chmod(0o666)
    folder = others / "reports"
    folder.mkdir()
    folder.chmod(0o1777 if sticky else 0o777)
    planted = as_user(NOBODY, "os.symlink(*sys.argv[1:])", precious, folder / "node-1.json")
    assert planted.returncode == 0, planted.stderr
    run = as_user(NOBODY - 1, "print(report.write_report(*sys.argv[1:], {}))", folder, "node-1.json")
    assert (run.stdout, run.stderr) == ("None\n", "")
    assert precious.read_text() == "precious"
    found = sorted((path.name, path.is_symlink()) for path in folder.iterdir())
    assert found == [("node-1-2.json", False), ("node-1.json", True)]


# -- what words can do ---------------------------------------------------------------------------------------------


def test_hostile_names(job):
    """A host, a program and a source file of that name: in the log, the reports, `ps` and the timeline."""
    log = job.folder / "termination-log"
    log.touch()
    names = f"name = {HOSTILE!r}; socket.gethostname = lambda: name; sys.argv[0] = name"
    bad = "import autoteardown; autoteardown.on_teardown(lambda: (_ for _ in ()).throw(ValueError(name)))"
    loop = "print('ready', flush=True); exec(compile('while True: time.sleep(0.01)', name, 'exec'))"
    peer, rank = job.world(program(before=names, after=f"{bad}; {loop}"), AUTOTEARDOWN_TERMINATION_LOG=log)
    for each in (peer, rank):
        each.wait_for("ready")
    env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(job.runtime)}
    command = [sys.executable, "-m", "autoteardown"]
    shown = subprocess.run([*command, "ps"], env=env, capture_output=True, text=True)
    assert len(lines_of(shown.stdout)) == 3
    assert rank.evict() == 0, rank.transcript()
    assert peer.outlast() == 143, peer.transcript()
    for each in (peer, rank):
        lines = lines_of(each.stderr)
        assert all(LOG_LINE.match(line) for line in lines), lines
        assert {LOG_LINE.match(line)["pid"] for line in lines} == {str(each.pid)}
        assert "on_teardown callback failed: ValueError: n?4711" in " ".join(each.log_lines)
        assert each.log_lines[-1].startswith("done: ")
        assert each.report()["host"] == HOSTILE
        assert each.report()["program"] == HOSTILE
    assert peer.report()["origin"]["pid"] == rank.pid
    lines = lines_of(log.read_text())
    assert not [line for line in lines if line.startswith("4711")]
    drawn = subprocess.run([*command, "timeline", "reports"], cwd=job.folder, capture_output=True, text=True)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert len(lines_of(drawn.stdout)) == 3
    page = (job.folder / "timeline.html").read_text()
    assert "\x1b" not in page and "\u202e" not in page


def test_hostile_settings(job):
    """What is said of a bad value stays one line, however it looks and however long it is."""
    settings = {
        "AUTOTEARDOWN_LOG": HOSTILE,
        "AUTOTEARDOWN_GRACE": "9\n" * 5000,
        "AUTOTEARDOWN_YIELD": "\x1b[2J",
    }
    settings = {name: os.fsencode(value.replace("\ud800", "\udcff")) for name, value in settings.items()}
    env = {
        **os.environb,
        **{os.fsencode(name): value for name, value in settings.items()},
        b"AUTOTEARDOWN": b"1",
    }
    code = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env={**env, b"AUTOTEARDOWN_SIGNALS": b"\x1b"}, capture_output=True, text=True
    )
    lines = lines_of(run.stderr)
    for name in (*settings, "AUTOTEARDOWN_SIGNALS"):
        assert len([line for line in lines if f" {name}=" in line]) == 1, (name, lines)
    assert len(lines) == 4
    doctor = [sys.executable, "-m", "autoteardown", "doctor"]
    hostile = {
        **env,
        b"AUTOTEARDOWN_SKIP": b"\x1b[2J\n*",
        b"AUTOTEARDOWN_\x1b[2J": b"",
        b"AUTOTEARDOWN_GRACE": b"9\x1b",
    }
    lines_of(subprocess.run(doctor, env=hostile, capture_output=True, text=True).stdout)
    hostile[b"AUTOTEARDOWN"] = b"\x1b[2J\n"
    run = subprocess.run(doctor, env=hostile, capture_output=True, text=True)
    lines_of(run.stdout)
    assert len(lines_of(run.stderr)) == 1


# -- what another rank says ----------------------------------------------------------------------------------------

# Who has the group's token can say anything. This program says one thing, as a rank would.
SAYS = """
import os, json
if dist.get_rank() == 1:
    from autoteardown.rank import guard
    channel = guard.guard.channel
    while not channel.connected:
        time.sleep(0.01)
    channel.post(*json.loads(os.environ["SAYS"]))
print("said", flush=True)
while True:
    time.sleep(0.01)
"""
NOTICES = {
    "nothing": None,
    "number": 7,
    "list": ["rank"],
    "text": "\x1b[2J",
    "deep": [[[[[[[[[[]]]]]]]]]],
    "wrong types": {"rank": "0", "host": ["x"], "pid": {}, "left": "soon"},
    "no time": {"left": -1e9},
    "for ever": {"left": 1e300},
    "hostile": {"rank": 10**30, "host": HOSTILE * 99, "pid": True, "advance": HOSTILE},
}


@pytest.mark.parametrize("notice", NOTICES.values(), ids=NOTICES)
def test_a_notice_that_makes_no_sense(job, notice):
    """It stops the ranks, as any notice does: cleanly, in time, and what it says forges nothing."""
    ranks = job.world(program(after=f"exec({SAYS!r})"), SAYS=json.dumps(["tell", notice]))
    for rank in ranks:
        assert rank.outlast() == 143, rank.transcript()
        assert all(LOG_LINE.match(line) for line in lines_of(rank.stderr)), rank.stderr
        assert rank.report()["outcome"] == "clean", rank.transcript()
        origin = rank.report()["origin"]
        assert set(origin) == {"rank", "host", "pid"}
        assert origin["host"].isprintable() and len(origin["host"]) <= 1000
        assert {type(origin["rank"]), type(origin["pid"])} == {type(None)}
    assert not [line for line in reports.read(job.reports)[1] if "left out" in line or "drawn" in line]


def evicted_all_the_same(ranks, victim):
    """In time, with the right codes, and not a line that is not the agent's, when all that is to be said has been."""
    for rank in ranks:
        rank.wait_for("said")
    victim.signal()
    for rank in ranks:
        rank.signalled = victim.signalled
        assert rank.outlast() == (0 if rank is victim else 143), "".join(each.transcript() for each in ranks)
        assert all(LOG_LINE.match(line) for line in lines_of(rank.stderr)), rank.stderr
        assert "internal error" not in rank.stderr, rank.stderr


NONSENSE = [
    ("answer", None),
    ("answer", ["x", {}, []]),
    ("answer", [-3, False, False]),
    ("at", [9, "0", []]),
    ("stalled", [True, 0, {"g": "x"}]),
    ("no_such_kind", HOSTILE),
    ("ready", HOSTILE),
    ("saving", HOSTILE),
]


@pytest.mark.parametrize(("kind", "value"), NONSENSE, ids=lambda each: ascii(each)[:20])
def test_other_nonsense(job, kind, value):
    """Every rank is out in time with the right code, whatever one says where the protocol expects something else."""
    ranks = job.world(program(after=f"exec({SAYS!r})"), SAYS=json.dumps([kind, value]))
    evicted_all_the_same(ranks, ranks[0])


# And so can a hub. This one says a lot to rank 1 alone.
HUB_SAYS = """
import os, json
if dist.get_rank() == 0:
    from autoteardown.rank import guard
    hub = guard.guard.channel._end
    while not (1 in hub._members and hub._members[1].peer):
        time.sleep(0.01)
    def say():
        for kind, value in json.loads(os.environ["SAYS"]):
            hub._log.add(1, kind, value)
        hub._broadcast()
    if os.environ["WHEN"] == "before":
        hub._loop.call(say)
    else:
        hear = hub._coordination.handle
        def happened(rank, kind, value):
            if kind == "tell":
                say()
            hear(rank, kind, value)
        hub._coordination.handle = happened
print("said", flush=True)
while True:
    time.sleep(0.01)
"""
KINDS = [
    "plan",
    "advance",
    "aligned",
    "halt",
    "busy",
    "owners_done",
    "quiet",
    "departed",
    "lost",
    "back",
    "all_left",
    "up",
    "down",
]
KINDS += [
    "note",
    "tick",
    "joined",
    "tell",
    "answer",
    "signal",
    "exits",
    "ended",
    "parked",
    "drained",
    "no_such_kind",
]


@pytest.mark.parametrize(
    "value",
    [None, 7, -1, 10**40, HOSTILE, [HOSTILE], {}, {"stop": HOSTILE, "until": 5, "round": []}],
    ids=ascii,
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_hub_that_makes_no_sense(job, value, when):
    """Out in time with the right code, and no word of its forges a line."""
    says = json.dumps([[kind, value] for kind in KINDS])
    ranks = job.world(program(after=f"exec({HUB_SAYS!r})"), SAYS=says, WHEN=when)
    evicted_all_the_same(ranks, ranks[1])
