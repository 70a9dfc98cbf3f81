"""The batch script and the epilog, run as they are: only `srun` and `scontrol` are stand-ins, of a few lines.

What a real SLURM does beside (when it sends which signal to whom) is in its manual, and not shown here.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAMS, free_port, wait_until

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "docker" / "slurm"

# Starts the tasks on this machine, hands a SIGTERM on to all of them as SLURM's step daemon does, and ends with the
# largest of their codes.
SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = int(os.environ["SLURM_NTASKS"])
started = [
    subprocess.Popen(sys.argv[1:], env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(tasks)
]
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda signum, frame: [task.send_signal(signum) for task in started])
codes = [task.wait() for task in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.fixture
def cluster(tmp_path, job):
    """Runs a script with two tasks, in a folder of its own; gives the process."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("python", "autoteardown"):
        (tools / name).write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent / name} "$@"\n')
        (tools / name).chmod(0o755)
    started = []

    def run(*words, **environ):
        env = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(PROGRAMS),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "4711",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SCONTROL_LOG": str(tmp_path / "scontrol"),
            "AUTOTEARDOWN_RUNTIME_DIR": str(job.runtime),
            "TEST_MARK": job.mark,
            **environ,
        }
        with (tmp_path / "out").open("ab") as out:
            process = subprocess.Popen(
                list(map(str, words)), env=env, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def script(tmp_path):
    """The batch script with a port that is free here."""
    text = (SLURM / "train.sbatch").read_text()
    changed = text.replace("MASTER_PORT=29500", f"MASTER_PORT={free_port()}")
    assert changed != text
    path = tmp_path / "train.sbatch"
    path.write_text(changed)
    return path


def said(tmp_path):
    return (tmp_path / "out").read_text(errors="replace")


def test_the_batch_script_is_a_script():
    for path in SLURM.iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "USR1" not in (SLURM / "train.sbatch").read_text()


def test_evicted_by_the_early_signal_it_requeues_itself(cluster, tmp_path):
    process = cluster("bash", script(tmp_path), TRAIN=str(PROGRAMS / "train.py"))
    wait_until(
        lambda: (
            {"0", "1"} <= set(re.findall(r"^rank (\d) .* step ", said(tmp_path), re.M))
            or process.poll() is not None
        ),
        "two ranks",
    )
    (srun,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(srun), signal.SIGTERM)
    assert process.wait(60) == 143, said(tmp_path)
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert len(list((tmp_path / "reports-4711").glob("*.json"))) == 2
    assert len(re.findall("done: clean", said(tmp_path))) == 2, said(tmp_path)


def test_a_job_that_fails_by_itself_is_not_requeued(cluster, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    process = cluster("bash", script(tmp_path), TRAIN=str(tmp_path / "broken.py"))
    assert process.wait(60) == 3, said(tmp_path)
    assert not (tmp_path / "scontrol").exists()


def test_torchrun_dies_of_the_early_signal(cluster, tmp_path):
    """Why nobody is told to use SIGUSR1: SLURM signals torchrun, too, which has no handler for it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    process = cluster(
        *torchrun, PROGRAMS / "train.py", AUTOTEARDOWN="1", AUTOTEARDOWN_SIGNALS="SIGTERM,SIGUSR1"
    )
    wait_until(lambda: " step " in said(tmp_path) or process.poll() is not None, "a rank")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == -signal.SIGUSR1  # 138 for a shell


def test_the_epilog_drains_the_jobs_ranks_and_nobody_elses(cluster, tmp_path, job):
    ours = cluster(sys.executable, PROGRAMS / "train.py", **world("4711"))
    theirs = cluster(sys.executable, PROGRAMS / "train.py", **world("4712"))
    wait_until(
        lambda: len(set(re.findall(r"^rank 0 pid (\d+) step ", said(tmp_path), re.M))) == 2, "two ranks"
    )
    epilog = cluster("bash", SLURM / "epilog.sh")
    assert epilog.wait(60) == 0, said(tmp_path)
    assert ours.wait(30) == 0
    assert theirs.poll() is None


def test_the_epilog_never_fails(cluster, tmp_path):
    """SLURM puts a node whose epilog does into the state DRAIN."""
    epilog = cluster("bash", SLURM / "epilog.sh", AUTOTEARDOWN_RUNTIME_DIR="/etc/passwd")
    assert epilog.wait(60) == 0
    assert "is not used" in said(tmp_path)


def test_the_epilog_hands_a_search_path_on(tmp_path):
    """SLURM gives it none."""
    path = tmp_path / "epilog.sh"
    path.write_text("command() { true; }; autoteardown() { env; }\n" + (SLURM / "epilog.sh").read_text())
    env = {"SLURM_JOB_ID": "4711"}
    run = subprocess.run(["/bin/bash", path], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and re.search("^PATH=/.*/bin", run.stdout, re.M), run.stdout + run.stderr


def world(job):
    return {
        "AUTOTEARDOWN": "1",
        "SLURM_JOB_ID": job,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
