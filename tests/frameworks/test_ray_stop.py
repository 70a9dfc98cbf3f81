"""`ray stop`: Ray's ranks of the machine are drained before it acts; other ranks are not signalled."""

import os
import subprocess
import sys
import textwrap

import pytest
from harness import AGENT, NONE, environment
from test_ray_node import RANK

from autoteardown.launchers import ray_stop

RAYLET = """
import os, subprocess, sys
rank = subprocess.Popen([sys.argv[1], "-c", os.environ["RANK_CODE"], sys.argv[2]])
rank.wait()
"""

RAY = """
import os, signal, sys
print("ray", *sys.argv[1:], len(os.listdir(os.environ["AUTOTEARDOWN_RUNTIME_DIR"])), "left")
"""


@pytest.fixture
def rank(job, tmp_path):
    """Start a rank whose parent is called so; Ray's workers are children of raylet."""
    started = []

    def start(parent, how):
        program = tmp_path / parent
        if not program.exists():
            program.symlink_to(os.path.realpath(sys.executable))  # the kernel names a process by its file
        env = environment(
            NONE, job.mark, AUTOTEARDOWN_RUNTIME_DIR=job.runtime, RANK_CODE=textwrap.dedent(RANK)
        )
        command = [str(program), "-c", RAYLET, sys.executable, how]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    job.runtime.mkdir(0o700, exist_ok=True)
    yield start
    for process in started:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.fixture
def stop(job, tmp_path):
    """Run `ray stop`, or what looks like it: it says what it finds when it acts."""

    def run(*args, **env):
        program = tmp_path / "ray"
        program.write_text(RAY)
        env = environment(AGENT, job.mark, AUTOTEARDOWN_RUNTIME_DIR=job.runtime, **env)
        command = [sys.executable, str(program), *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)

    return run


def test_its_ranks_are_drained_first(rank, stop):
    parent = rank("raylet", "clean")
    done = stop("stop")
    assert parent.wait(60) == 0
    assert done.stdout == "ray stop 0 left\n"
    first, last = done.stderr.splitlines()
    assert first.startswith("autoteardown: ray stop: rank=0/1 pid=")
    assert ": clean, exit 0 (" in first
    assert last == "autoteardown: ray stop: 1 of 1 left cleanly; Ray is stopped now"


def test_what_is_not_rays_is_left_alone(rank, stop):
    parent = rank("torchrun", "clean")
    done = stop("stop")
    assert (done.stdout, done.stderr) == ("ray stop 1 left\n", "")
    assert parent.poll() is None


@pytest.mark.parametrize("args", [("stop", "--force"), ("stop", "-f"), ("stop", "--help"), ("status",)])
def test_who_does_not_wait(rank, stop, args):
    parent = rank("raylet", "clean")
    done = stop(*args)
    assert (done.stdout, done.stderr) == (f"ray {' '.join(args)} 1 left\n", "")
    assert parent.poll() is None


def test_no_longer_than_its_grace_period(rank, stop):
    parent = rank("raylet", "stay")
    done = stop("stop", "-g", "1")
    assert done.stdout == "ray stop -g 1 1 left\n"
    assert "still running" in done.stderr
    assert parent.poll() is None


def test_without_ranks_nothing_is_said(rank, stop):
    done = stop("stop")
    assert (done.stdout, done.stderr, done.returncode) == ("ray stop 0 left\n", "", 0)


def test_quiet_is_quiet(rank, stop):
    parent = rank("raylet", "clean")
    done = stop("stop", AUTOTEARDOWN_LOG="quiet")
    assert parent.wait(60) == 0
    assert (done.stdout, done.stderr) == ("ray stop 0 left\n", "")


@pytest.mark.parametrize(
    "words, seconds",
    [
        ("", 16),
        ("-v", 16),
        ("-g 5", 5),
        ("-g5", 5),
        ("--grace-period=7", 7),
        ("--grace-period 7 -v", 7),
        ("-g", 0),
        ("-g x", 0),
        ("-g 5 --force", 0),
        ("-f", 0),
        ("--help", 0),
    ],
)
def test_the_time_that_it_gives(words, seconds):
    assert ray_stop.grace_period(words.split()) == seconds
