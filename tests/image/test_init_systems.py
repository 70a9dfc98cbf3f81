"""`doctor`'s findings on PID 1 of a container, for each init system, and whether the real one does that."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import SIGTERM, wait_until
from namespaces import in_pid_namespace

from autoteardown import settings
from autoteardown.cli.doctor import init_systems, surroundings

TERM_BIT = 1 << 14
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture
def pid_1(tmp_path):
    """Makes a root folder with this PID 1 in its /proc; what doctor says of it."""

    def say(command, comm="", child="", caught=0, environ="", **found):
        one = tmp_path / "proc" / "1"
        (one / "task" / "1").mkdir(parents=True)
        (tmp_path / "proc" / "self").mkdir()
        (tmp_path / "proc" / "self" / "stat").write_text("42 (python3) R 1 ...")
        (one / "cmdline").write_text("".join(f"{word}\0" for word in command.split()))
        (one / "comm").write_text(f"{comm}\n")
        (one / "status").write_text(f"SigBlk:\t{0:016x}\nSigCgt:\t{caught:016x}\n")
        (one / "environ").write_text(environ)
        if child:
            (one / "task" / "1" / "children").write_text("7 ")
            (tmp_path / "proc" / "7").mkdir()
            (tmp_path / "proc" / "7" / "cmdline").write_text("".join(f"{word}\0" for word in child.split()))
        given = {f"AUTOTEARDOWN_{name}": value for name, value in found.items()}
        findings = surroundings.check({**KUBERNETES, **given}, settings.load(given)[0], tmp_path)
        (finding,) = [each for each in findings if each.area == "PID 1"]
        return finding

    return say


@pytest.mark.parametrize(
    "command, comm, level, words, advice",
    [
        ("/sbin/tini -- torchrun train.py", "tini", "ok", "passes signals on", None),
        ("/dev/init -- torchrun train.py", "docker-init", "warning", "no handler for SIGTERM", "tini"),
        ("/sbin/docker-init -- torchrun train.py", "docker-init", "ok", "passes signals on", None),
        ("catatonit -- torchrun", "catatonit", "ok", "passes signals on", None),
        ("/usr/bin/dumb-init torchrun train.py", "dumb-init", "ok", "every process of the session", None),
        ("runsvdir -P /etc/service", "runsvdir", "warning", "ends at once", "tini or dumb-init"),
        ("s6-svscan /run/service", "s6-svscan", "warning", "gets no signal", "S6_KILL_GRACETIME=65000"),
        (
            "/usr/bin/python3 /usr/bin/supervisord -n",
            "supervisord",
            "warning",
            "returns 0",
            "stopwaitsecs=65",
        ),
        ("/sbin/init", "systemd", "warning", "executes itself again", "STOPSIGNAL SIGRTMIN+3"),
        ("/pause", "pause", "note", "shareProcessNamespace", "no shell"),
    ],
)
def test_init_systems(pid_1, command, comm, level, words, advice):
    finding = pid_1(command, comm, child="torchrun train.py", GRACE="60")
    assert (finding.level, words in finding.text) == (level, True), finding
    assert advice is None or advice in finding.advice, finding


@pytest.mark.parametrize("init", ["tini -g --", "dumb-init"])
def test_an_init_that_starts_a_shell(pid_1, init):
    finding = pid_1(f"{init} sh -c ./train.sh", child="sh -c ./train.sh")
    assert finding.level == "warning" and "to a shell (sh -c ./train.sh)" in finding.text
    assert "exec" in finding.advice


@pytest.mark.parametrize(
    "command, environ, caught, level",
    [
        ("/usr/bin/python3 /usr/local/bin/accelerate launch train.py", "", 0, "warning"),
        ("/usr/bin/python3 /usr/local/bin/accelerate launch train.py", "AUTOTEARDOWN=1\0", 0, "ok"),
        ("/usr/bin/python3 -m accelerate.commands.launch train.py", "", 0, "warning"),
        ("/usr/bin/python3 /usr/local/bin/deepspeed train.py", "A=b\0", 0, "warning"),
        ("/usr/bin/python3 /usr/local/bin/accelerate launch train.py", "", TERM_BIT, "ok"),  # it is torchrun
    ],
)
def test_a_launcher_that_passes_nothing_on(pid_1, command, environ, caught, level):
    finding = pid_1(command, environ=environ, caught=caught)
    assert finding.level == level, finding
    if level == "warning":
        assert "passes no signal on by itself" in finding.text and finding.advice.startswith("AUTOTEARDOWN=1")


# -- real ones --------------------------------------------------------------------------------------------------------

# Says what doctor's check finds, then waits for SIGTERM, works for three seconds, and says that it is done.
PROGRAM = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(Path(init_systems.__file__).parents[3])!r})
from pathlib import Path
from autoteardown import settings
from autoteardown.cli.doctor import surroundings
def stop(*_):
    time.sleep(3)
    Path("done").touch()
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
findings = surroundings.check({KUBERNETES!r}, settings.load({{}})[0])
Path("found.part").write_text(json.dumps([each for each in findings if each.area == "PID 1"][0]))
os.rename("found.part", "found")
time.sleep(100)
"""
SUPERVISORD = """
[supervisord]
nodaemon=true
logfile=/dev/null
pidfile={folder}/pid
[program:train]
command={python} {folder}/program.py
directory={folder}
stopwaitsecs={seconds}
"""
SHELL = '{python} program.py; echo "ended with $?"'


def commands(kind, folder):
    """The command line of one kind of PID 1 that runs the program, and the name of its own program."""
    python = sys.executable
    (folder / "program.py").write_text(PROGRAM)
    if kind.startswith("runsvdir"):
        service = folder / "services" / "train"
        service.mkdir(parents=True)
        (service / "run").write_text(f"#!/bin/sh\ncd {folder}\nexec {python} program.py\n")
        (service / "run").chmod(0o755)
        return ["runsvdir", str(folder / "services")]
    if kind.startswith("supervisord"):
        seconds = 0 if kind.endswith("killed") else 30
        (folder / "conf").write_text(SUPERVISORD.format(folder=folder, python=python, seconds=seconds))
        return ["supervisord", "-c", str(folder / "conf")]
    init, _, how = kind.partition(" ")
    options = {"tini": ["--"], "tini-g": ["-g", "--"], "dumb-init": []}[init]
    program = ["sh", "-c", SHELL.format(python=python)] if how == "shell" else [python, "program.py"]
    return [init.partition("-g")[0] if init == "tini-g" else init, *options, *program]


@pytest.mark.parametrize(
    "kind, level, done, code",
    [
        ("tini", "ok", True, 7),
        ("dumb-init", "ok", True, 7),
        ("tini shell", "warning", False, 143),
        ("tini-g shell", "warning", None, 143),
        ("dumb-init shell", "warning", None, 143),
        ("runsvdir", "warning", False, 0),
        ("supervisord", "warning", True, 0),
        ("supervisord killed", "warning", False, 0),
    ],
)
def test_a_real_one(tmp_path, kind, level, done, code):
    """What doctor says inside, and what really becomes of a program that needs three seconds after SIGTERM."""
    command = commands(kind, tmp_path)
    path = shutil.which(command[0]) or shutil.which(command[0], path="/usr/bin:/usr/sbin")
    if path is None:
        pytest.skip(f"{command[0]} is not installed")
    process = subprocess.Popen(
        [*in_pid_namespace(), path, *command[1:]],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: (tmp_path / "found").exists() or process.poll() is not None, "what doctor says")
        assert process.poll() is None
        area, said, text, _ = json.loads((tmp_path / "found").read_text())
        assert (area, said) == ("PID 1", level), text
        (first,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(first, SIGTERM)
        assert process.wait(60) == code
        time.sleep(4)  # whatever is left of the namespace would be done by now
        if done is not None:
            assert (tmp_path / "done").exists() == done
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
