"""Starts real ranks for the tests, waits for their lines, signals them, and collects their results.

Three kinds of protection are compared (`mode`): the `agent`, the `handwritten` handler that scripts carry, and
`none`. A rank is forked from a server that has imported torch (`ForkServer`, some 0.3 s a test) or, with
`fresh=True`, started as a process of its own, which takes the whole way from the `.pth` file on.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from importlib import metadata
from pathlib import Path

import pytest
from schema import validate_report

TESTS = Path(__file__).parent
PROGRAMS = TESTS / "programs"
AGENT, HANDWRITTEN, NONE = "agent", "handwritten", "none"
SIGTERM = signal.SIGTERM

# Long enough for a busy machine: reached only by a test that fails.
PATIENCE = 120.0
TICK = 0.005

# A platform that gives little time: everything of ours is scaled down to it, and the tests with it.
GRACE = 6.0
# What shows that a hand-written handler is stuck for good: it would be so after any time.
SHORT = 1.0

LOG_LINE = re.compile(
    r"^autoteardown rank=(?P<rank>\d+|\?)/(?P<world>\d+|\?) pid=(?P<pid>\d+) host=(?P<host>\S+) "
    r"\+(?P<seconds>\d+\.\d+)s (?P<text>.+)$"
)


TORCH = tuple(int(part) for part in metadata.version("torch").split(".")[:2])


def needs_torch(major, minor, why):
    """A mark that skips a test with an older torch."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"torch before {major}.{minor}: {why}")


FSDP2_ON_CPUS = needs_torch(2, 6, "FSDP2 needs a GPU")


def wait_until(condition, what, patience=PATIENCE):
    """Return the first true value of `condition()`."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience:.0f} s for {what}")
        time.sleep(TICK)


def free_port():
    """A port outside of the range that the kernel gives to outgoing connections (gloo opens plenty)."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(mode, mark, **changes):
    """The environment of a rank: this one's, without what a surrounding agent or launcher has put into it."""
    foreign = ("AUTOTEARDOWN", "TORCHELASTIC", "MASTER_", "GROUP_", "ROLE_", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    env.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", TEST_MARK=mark)
    if mode == AGENT:
        env["AUTOTEARDOWN"] = "1"
    env.update({name: str(value) for name, value in changes.items()})
    return env


def marked(mark):
    """Pids of the live processes that were started with this mark in their environment, or descend from one."""
    found = []
    needle = f"TEST_MARK={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if needle in (entry / "environ").read_bytes().split(b"\0") and stat(int(entry.name))[0] != "Z":
                found.append(int(entry.name))
    return found


def stat(pid, thread=None):
    """The fields of /proc/<pid>/stat from the third (state) on, of a process or of one of its threads."""
    path = f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat"
    return Path(path).read_text().rpartition(")")[2].split()


def alive(pid):
    """Whether there is such a process, and not only what its parent has yet to reap."""
    try:
        return stat(pid)[0] != "Z"
    except OSError:
        return False


class Rank:
    """A process under test: what it printed, how it ended. Made by a `Job`."""

    def __init__(self, pid, folder):
        self.pid = pid
        self.folder = folder
        self.code = None
        self.signalled = None  # when the test sent its first signal
        self.ended = None

    def _reap(self):
        raise NotImplementedError

    @property
    def running(self):
        if self.code is None:
            self.code = self._reap()
            if self.code is not None:
                self.ended = time.monotonic()
        return self.code is None

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()

    def count(self, text):
        """How often its processes have printed this: of several, unbuffered, lines run into each other."""
        return len(re.findall(rf"{text}(?!\d)", self.stdout))

    @property
    def log_lines(self):
        """The agent's own lines, without their prefix."""
        return [match["text"] for match in map(LOG_LINE.match, self.stderr.splitlines()) if match]

    @property
    def noise(self):
        """What stderr holds beside the agent's lines."""
        return [line for line in self.stderr.splitlines() if not LOG_LINE.match(line)]

    def transcript(self):
        """Everything known, for a failure message."""
        state = "runs" if self.running else f"ended with {self.code}"
        return f"pid {self.pid} {state}\n--- stdout\n{self.stdout[-2000:]}\n--- stderr\n{self.stderr[-6000:]}"

    def wait_for(self, text, patience=PATIENCE, stream="stdout"):
        """Wait until a line that matches `text` (a regular expression) is in that stream; return the match."""
        pattern = re.compile(text, re.MULTILINE)

        def look():
            running = self.running  # asked first: what it printed last must be looked at too
            match = pattern.search(getattr(self, stream))
            assert match or running, f"ended without saying {text!r}: {self.transcript()}"
            return match

        try:
            return wait_until(look, repr(text), patience)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.transcript()}") from None

    def wait_blocked(self, text):
        """Wait until the main thread has said `text` and has then been asleep for a while (in C, if it said so)."""
        self.wait_for(text)
        seen, times = None, 0
        while times < 8:
            now = stat(self.pid, self.pid)
            times = times + 1 if now[0] == "S" and now == seen else 0
            seen = now
            time.sleep(2 * TICK)

    def signal(self, signum=SIGTERM):
        """Send a signal; the first one starts the clock."""
        assert self.running, self.transcript()
        self.signalled = self.signalled or time.monotonic()
        os.kill(self.pid, signum)

    def wait(self, patience=PATIENCE):
        """Wait for its end; return its exit code, or minus the signal that ended it."""
        try:
            wait_until(lambda: not self.running, "its end", patience)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.transcript()}") from None
        return self.code

    def evict(self, grace=GRACE, signum=SIGTERM):
        """What a platform does: the signal, the grace period, SIGKILL. Return the exit code (-9: it was late)."""
        if not self.signalled:
            self.signal(signum)
        return self.outlast(grace)

    def outlast(self, grace=GRACE):
        """The rest of an eviction, for a rank that has its signal already (its own, or a peer's)."""
        start = self.signalled or time.monotonic()
        while self.running:
            if time.monotonic() > start + grace:
                os.kill(self.pid, signal.SIGKILL)
                return self.wait()
            time.sleep(TICK)
        return self.code

    @property
    def seconds(self):
        """From the signal to the end."""
        return self.ended - self.signalled

    def report(self):
        """The JSON report that it left."""
        found = list((self.folder.parent / "reports").glob(f"*-{self.pid}-*Z.json"))
        assert len(found) == 1, f"{len(found)} reports: {self.transcript()}"
        report = json.loads(found[0].read_text())
        validate_report(report)
        return report

    def phase(self, name):
        """One phase of its report; None if it did not take place."""
        return next((phase for phase in self.report()["phases"] if phase["name"] == name), None)


class Started(Rank):
    """A rank with an interpreter of its own."""

    def __init__(self, argv, folder, env, cwd):
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        super().__init__(self._process.pid, folder)

    def _reap(self):
        return self._process.poll()


class Forked(Rank):
    """A rank forked from the server."""

    def __init__(self, server, request, folder):
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        super().__init__(server.fork(request), folder)
        self._server = server

    def _reap(self):
        return self._server.poll(self.pid)


class ForkServer:
    """The test's end of `forkserver.py`: one process with the agent active, or one without."""

    def __init__(self, mode):
        self.mark = uuid.uuid4().hex
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "forkserver.py"), str(theirs.fileno())],
            env=environment(mode, self.mark),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.pid = self._process.pid
        self._channel = ours
        self._buffer = b""
        self._codes = {}

    def _receive(self, block):
        self._channel.settimeout(PATIENCE if block else 0)
        with contextlib.suppress(BlockingIOError):
            received = self._channel.recv(65536)
            if not received:
                raise AssertionError("the fork server has ended")
            self._buffer += received
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def _take(self, block):
        """Read what has come; return the pid of a child just forked, if it is there."""
        forked = None
        for message in self._receive(block):
            if "code" in message:
                self._codes[message["pid"]] = message["code"]
            else:
                forked = message["pid"]
        return forked

    def fork(self, request):
        """Have a child forked; return its pid."""
        self._channel.settimeout(None)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            pid = self._take(block=True)
            if pid:
                self._codes.pop(pid, None)  # an earlier child's that had the same
                return pid

    def poll(self, pid):
        """The exit code of a child; None while it runs."""
        if pid not in self._codes:
            self._take(block=False)
        return self._codes.get(pid)

    def close(self):
        """End it."""
        self._channel.close()
        self._process.wait(PATIENCE)


class Job:
    """The ranks of one test, and their folder. The `job` fixture makes it, and ends what is left at the end."""

    def __init__(self, folder, server):
        self.folder = folder
        self.reports = folder / "reports"
        self.runtime = folder / "runtime"
        self.mark = uuid.uuid4().hex
        self.ranks = []
        self._server = server  # mode -> ForkServer
        self._servers = set()
        self._folders = []

    def public_folder(self):
        """A folder with a short path, for sockets, and for other users: pytest's own are closed to them."""
        self._folders.append(tempfile.TemporaryDirectory(prefix="test-", dir="/tmp"))
        path = Path(self._folders[-1].name)
        path.chmod(0o777)
        return path

    # -- starting ---------------------------------------------------------------------------------------------

    def start(self, program, *args, mode=AGENT, fresh=False, python=(), launcher=(), host=None, **env):
        """Start one process: `program` is the name of a file in `programs`, or source text.

        `host`: one of `network/hosts.py`, in whose network it runs.
        """
        folder = self.folder / f"process{len(self.ranks)}"
        folder.mkdir()
        argv = [str(self._script(program, folder)), *map(str, args)]
        env = {
            "AUTOTEARDOWN_REPORT_DIR": str(self.reports),
            "AUTOTEARDOWN_RUNTIME_DIR": str(self.runtime),
            "AUTOTEARDOWN_TERMINATION_LOG": "",
            "AUTOTEARDOWN_GRACE": GRACE,
            **env,
        }
        self.reports.mkdir(exist_ok=True)
        if fresh or python or launcher:
            if mode == HANDWRITTEN:
                argv = [str(PROGRAMS / "handwritten.py"), *argv]
            env = environment(mode, self.mark, **{"PYTHONPATH": str(PROGRAMS), **env})
            argv = [*(host.prefix if host else ()), *launcher, sys.executable, *python, *argv]
            rank = Started(argv, folder, env, cwd=self.folder)
        else:
            server = self._server(NONE if mode == HANDWRITTEN else mode)
            self._servers.add(server)
            request = {
                "argv": argv,
                "env": {name: str(value) for name, value in env.items()},
                "cwd": str(self.folder),
                "stdout": str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
                "handwritten": mode == HANDWRITTEN,
                "network": f"/run/netns/{host.name}" if host else None,
            }
            rank = Forked(server, request, folder)
        self.ranks.append(rank)
        return rank

    def world(self, program, ranks=2, *args, each=None, missing=(), **options):
        """Start a world.

        Args:
            each: further options of single ranks, `{rank: {option: value}}`; `args` replaces the arguments.
            missing: ranks that the others wait for, and that never come.
        """
        port = free_port()
        started = []
        for rank in range(ranks):
            if rank not in missing:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, **options}
                own = {"MASTER_ADDR": "127.0.0.1", **own, **(each or {}).get(rank, {})}
                own_args = own.pop("args", args)
                started.append(self.start(program, *own_args, **own))
        return started

    def torchrun(self, program, *args, ranks=2, nodes=(), **options):
        """Start a torchrun agent: a launcher of its own, real workers. `nodes`: its rendezvous options."""
        where = nodes or ("--standalone",)
        python = ("-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}")
        return self.start(program, *args, fresh=True, python=python, **options)

    def _script(self, program, folder):
        if "\n" not in program:
            return PROGRAMS / program
        path = folder / "program.py"
        path.write_text(textwrap.dedent(program))
        return path

    # -- afterwards -------------------------------------------------------------------------------------------

    def survivors(self):
        """Pids of all processes of this job that are alive, orphans included."""
        pids = marked(self.mark)
        for server in self._servers:
            pids += [pid for pid in marked(server.mark) if pid != server.pid]
        return pids

    def all_reports(self):
        """Reports by rank."""
        reports = [json.loads(path.read_text()) for path in self.reports.glob("*Z.json")]
        return {report["rank"]: report for report in reports}

    def close(self):
        """End whatever still runs."""
        deadline = time.monotonic() + PATIENCE
        while True:
            pids = self.survivors()
            if not pids:
                break
            assert time.monotonic() < deadline, f"cannot be killed: {pids}"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(TICK)
        for rank in self.ranks:
            rank.wait()
        for folder in self._folders:
            folder.cleanup()
