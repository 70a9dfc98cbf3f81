"""What `doctor` says in a job of SLURM, by what `scontrol` answers. `tests/slurm` asks a real one."""

import pytest

from autoteardown import settings
from autoteardown.cli.doctor import slurm, surroundings

STEP = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_PARTITION": "low"}


@pytest.fixture
def asked(tmp_path):
    """Doctor's findings where `scontrol` is this script."""

    def ask(script, grace=25, **environ):
        tool = tmp_path / "scontrol"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        given = {"AUTOTEARDOWN_GRACE": str(grace)}
        environ = {**STEP, "PATH": f"{tmp_path}:/usr/bin:/bin", **given, **environ}
        return slurm.check(environ, settings.load(given)[0])

    return ask


def answers(kill_wait, grace_time):
    """As SLURM 22.05 writes them."""
    return f"""case "$*" in
'show config') echo 'KillOnBadExit           = 0'; echo 'KillWait                = {kill_wait} sec' ;;
'show partition low') echo '   DefaultTime=00:30:00 ExclusiveUser=NO GraceTime={grace_time} Hidden=NO' ;;
*) exit 1 ;;
esac"""


@pytest.mark.parametrize(
    ("kill_wait", "grace_time", "grace", "level", "words", "advice"),
    [
        (30, 0, 25, "ok", "KillWait is 30 s, and AUTOTEARDOWN_GRACE is 25: it fits", None),
        (30, 60, 25, "ok", "KillWait is 30 s", None),
        (30, 20, 25, "problem", "GraceTime of the partition is 20 s: SLURM kills", "export AUTOTEARDOWN_GRACE=15"),
        (30, 0, 110, "problem", "AUTOTEARDOWN_GRACE=110, and KillWait is 30 s", "export AUTOTEARDOWN_GRACE=25"),
        (120, 0, 25, "ok", "AUTOTEARDOWN_GRACE is 25: it fits", "export AUTOTEARDOWN_GRACE=115 for all of it"),
        (4, 0, 25, "problem", "KillWait is 4 s", "export AUTOTEARDOWN_GRACE=2"),
    ],
)  # fmt: skip
def test_the_shortest_of_what_slurm_may_give(asked, kill_wait, grace_time, grace, level, words, advice):
    (found,) = asked(answers(kill_wait, grace_time), grace)
    assert (found.level, found.advice) == (level, advice)
    assert words in found.text


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60", "echo what?"])
def test_where_scontrol_says_nothing(asked, script, monkeypatch):
    monkeypatch.setattr(slurm, "_PATIENCE", 0.5)
    (found,) = asked(script)
    assert found.level == "note" and "30 s by default (scontrol cannot be asked)" in found.text
    (found,) = asked(script, grace=110)
    assert (found.level, found.advice) == ("warning", "export AUTOTEARDOWN_GRACE=25")


def test_where_there_is_no_scontrol(asked):
    (found,) = asked("exit 1", PATH="/nowhere")
    assert "scontrol cannot be asked" in found.text


def test_a_batch_script_is_not_a_step(asked):
    assert len(asked(answers(30, 0))) == 1
    environ = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    found = slurm.check({**environ, "PATH": ""}, settings.load({})[0])
    assert [each.advice for each in found] == [None, "start the ranks with srun"]


def test_outside_of_slurm(asked):
    assert slurm.check({"PATH": "/usr/bin"}, settings.load({})[0]) == []


@pytest.mark.parametrize(("above", "level"), [("slurmstepd", "note"), ("containerd-shim", "warning")])
def test_pid_1_matters_only_where_no_step_daemon_is_above(tmp_path, above, level):
    """`bash` as PID 1 hands no signal on; a step daemon does not need it to."""
    for pid, name, parent in (
        ("self", "python3", 7),
        ("7", "bash (1)", 5),
        ("5", above, 1),
        ("1", "bash", 0),
    ):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "stat").write_text(f"9 ({name}) S {parent} 1 1")
    (tmp_path / "proc" / "1" / "cmdline").write_text("bash\0/start.sh\0")
    found = surroundings.check({**STEP, "container": "podman", "PATH": ""}, settings.load({})[0], tmp_path)
    assert [each.level for each in found if each.area == "PID 1"] == [level]
