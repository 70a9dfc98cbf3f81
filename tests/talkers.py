"""Processes with only a channel (`programs/talk.py`), and what they print."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from harness import PATIENCE, PROGRAMS, environment, stat, wait_until


class Talker:
    """One of them."""

    def __init__(self, folder, where, rank, world, prefix=(), **env):
        self.rank = rank
        self._file = Path(folder) / f"talker{rank}-{os.urandom(3).hex()}"
        self._at = {}  # by what is waited for: messages come while a command is answered
        with self._file.open("wb") as out, self._file.with_suffix(".err").open("wb") as err:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, str(PROGRAMS / "talk.py"), where, str(rank), str(world)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=environment("none", "talker", **{"GLOO_SOCKET_IFNAME": "", **env}),
            )
        self.pid = self._process.pid

    @property
    def events(self):
        """What it has said: lists of time, what, and more."""
        lines = self._file.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]

    @property
    def stderr(self):
        return self._file.with_suffix(".err").read_text()

    def heard(self, *kinds):
        """Kind and value of each message so far, or of those of these kinds."""
        return [
            event[2:4] for event in self.events if event[1] == "heard" and (not kinds or event[2] in kinds)
        ]

    def transcript(self):
        return f"talker {self.rank}: {self.events}\n{self.stderr}"

    def tell(self, *command):
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, *what, patience=PATIENCE):
        """Wait for the next event that begins so; return it. What it said before, of that sort, is left behind."""

        def look():
            found = self.events
            for at in range(self._at.get(what[0], 0), len(found)):
                if found[at][1 : 1 + len(what)] == list(what):
                    self._at[what[0]] = at + 1
                    return found[at]
            assert self._process.poll() is None or what[0] == "end", f"it has ended: {self.transcript()}"
            return None

        try:
            return wait_until(look, f"{what}", patience)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.transcript()}") from None

    def ask(self, command, *args, answer=None, patience=PATIENCE):
        """Give a command and return what it says to it."""
        self.tell(command, *args)
        return self.expect(answer or command, patience=patience)[2:]

    def kill(self):
        self._process.kill()
        self._process.wait(PATIENCE)

    def end(self):
        """As a program ends; return its exit code."""
        self.tell("end")
        self._process.stdin.close()
        return self._process.wait(PATIENCE)

    def freeze(self):
        """Every thread: on a busy machine, one that is about to run still does before another has taken the signal."""
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.pid}/task")
        wait_until(lambda: all(stat(self.pid, each.name)[0] == "T" for each in threads.iterdir()), "its stop")

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)

    def close(self):
        """Nothing of it is left after this."""
        self._process.kill()
        self._process.wait(PATIENCE)
        self._process.stdin.close()


def expect_lost(talker, rank, patience=PATIENCE):
    """Wait until it hears that this rank is lost."""
    assert talker.expect("heard", "lost", patience=patience)[3][0] == rank, talker.transcript()


class Talk:
    """The talkers of one test."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self._talkers = []

    def start(self, rank, world, where=None, prefix=(), **env):
        """Start one, without a channel."""
        if where is None:
            store = self.folder / "store"
            store.mkdir(exist_ok=True)
            where = f"py:{store}"
        talker = Talker(self.folder, where, rank, world, prefix, **env)
        self._talkers.append(talker)
        return talker

    def world(self, world, **options):
        """Start them all, and have them connected."""
        talkers = [self.start(rank, world, **options) for rank in range(world)]
        for talker in talkers:
            talker.expect("ready")
        for talker in talkers:
            talker.ask("open", answer="opened")
        for talker in talkers[1:]:
            talker.expect("heard", "up")
        return talkers

    def close(self):
        for talker in self._talkers:
            talker.close()
