"""The commands with bad input: a clear line, an exit status, and nothing lost."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import sample_reports as sample

from autoteardown import settings
from autoteardown.cli import drain, main

COMMAND = [sys.executable, "-m", "autoteardown"]
NOBODY = 65534


@pytest.fixture
def run(tmp_path):
    """Runs a command in an empty folder."""

    def run(*words, shell="", **environ):
        env = {**os.environ, "AUTOTEARDOWN_RUNTIME_DIR": str(tmp_path / "runtime"), **environ}
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *COMMAND, *map(str, words)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def reports(tmp_path):
    return sample.write(tmp_path / "reports", sample.job(2))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "COMMAND"),
        (["nosuch"], 2, "'nosuch'"),
        (["timeline"], 2, "DIR"),
        (["timeline", "nosuch"], 1, "nosuch: not a folder"),
        (["timeline", "."], 1, "no reports"),
        (["timeline", ".", "--grace", "abc"], 2, "--grace: 'abc' is not a number of seconds above 0"),
        (["timeline", ".", "--grace", "nan"], 2, "--grace: 'nan' is not a number of seconds above 0"),
        (["timeline", ".", "--format", "pdf"], 2, "--format: invalid choice: 'pdf'"),
        (["drain", "--timeout", "x"], 2, "--timeout: 'x' is not a number of seconds from 0 to 86400"),
        (["drain", "--pid", "x"], 2, "--pid: 'x' is not a process id, a whole number above 0"),
        (["drain", "--pid", "0"], 2, "--pid: '0' is not a process id, a whole number above 0"),
        (["drain", "--pid=-7"], 2, "--pid: '-7' is not a process id, a whole number above 0"),
        (["drill", "--ranks", "0"], 2, "--ranks: '0' is not a whole number from 1 to 64"),
        (["drill", "--grace", "1"], 2, "--grace: '1' is not a number of seconds from 2 to 3600"),
        (["drill", "--scenario", "x"], 2, "--scenario: 'x' is not a scenario; allowed are "),
        (["drill", "--html", "nosuch/x"], 2, "--html 'nosuch/x': not a file in a folder that exists"),
        (["drill", "--", "nosuch"], 2, "COMMAND 'nosuch': no such program"),
        (["ps", "x"], 2, "unrecognized arguments: x"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_cannot_be_meant(run, words, status, said):
    found = run(*words)
    assert (found.returncode, found.stdout) == (status, "")
    assert said in found.stderr.splitlines()[-1], found.stderr


@pytest.mark.parametrize("command", ["ps", "drain", "path", "timeline reports"])
@pytest.mark.parametrize("how", ["closed", "full", "closed stderr", "ascii"])
def test_wherever_the_output_goes(run, reports, command, how):
    """No traceback; the exit status is the command's own, or 1 where the output is lost."""
    expected = run(*command.split())
    assert expected.stdout
    shell = {"closed": ">&-", "full": "> /dev/full", "closed stderr": "2>&-", "ascii": ""}[how]
    found = run(*command.split(), shell=shell, **({"PYTHONIOENCODING": "ascii"} if how == "ascii" else {}))
    assert "Traceback" not in found.stderr
    if how == "full":
        assert found.returncode == 1
        assert f"autoteardown {command.split()[0]}: " in found.stderr.splitlines()[-1]
    else:
        assert found.returncode == expected.returncode, found.stderr
    if command[:8] == "timeline":
        assert (reports.parent / "timeline.html").exists()
    if how == "ascii":
        assert found.stdout.isascii() and found.stdout.count("\n") == expected.stdout.count("\n")


def test_a_reader_that_goes_away(run, reports):
    found = run("timeline", "reports", "-o", "-", shell="| head -c 5")
    assert (found.returncode, found.stdout, found.stderr) in [(141, "<!doc", ""), (0, "<!doc", "")]


def test_a_page_on_stdout_is_utf_8_whatever_the_locale(run, reports):
    page = run("timeline", "reports", "-o", "-", PYTHONIOENCODING="ascii").stdout
    assert 'charset="utf-8"' in page and not page.isascii()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
def test_what_may_not_be_read():
    """A folder that this user may not list is not an empty one."""
    code = (
        "import argparse, os, pathlib, sys; from autoteardown.cli import timeline;"
        "args = argparse.Namespace(dir=pathlib.Path(sys.argv[1]), output='-', format='svg', grace=None);"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); sys.exit(timeline.run(args))"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as secret:  # mode 0700
        found = subprocess.run([sys.executable, "-c", code, secret], capture_output=True, text=True, cwd="/")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"autoteardown timeline: {secret}: Permission denied\n"


def test_a_drain_says_which_settings_it_could_not_use(run):
    found = run("drain", "--json", AUTOTEARDOWN_GRACE="soon", AUTOTEARDOWN_SIGNALS="9")
    assert found.returncode == 0 and json.loads(found.stdout)["ranks"] == []
    assert [line.partition("=")[0] for line in found.stderr.splitlines()] == [
        "autoteardown: AUTOTEARDOWN_SIGNALS",
        "autoteardown: AUTOTEARDOWN_GRACE",
    ]


def test_a_name_that_is_longer_than_what_is_kept_of_it(monkeypatch, capsys):
    """`drain --job "$NAME"` means the ranks that were given that name."""
    name = "n" * 300
    kept = settings.load({"AUTOTEARDOWN_JOB": name})[0].job
    asked = []
    monkeypatch.setattr(drain.drain, "would_signal", lambda folder, which, problem: asked.append(which) or [])
    assert main(["drain", "--dry-run", "--job", name]) == 0
    assert asked[0].job == kept
