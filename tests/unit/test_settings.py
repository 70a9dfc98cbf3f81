"""Reads settings from the environment: valid values, refused ones, and what is then in force."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoteardown import settings

TIMEOUTS = ("step_timeout", "drain_timeout", "destroy_timeout", "abort_timeout", "exit_timeout")


def load(**variables):
    return settings.load({f"AUTOTEARDOWN_{name}": value for name, value in variables.items()})


def fine(**variables):
    found, problems = load(**variables)
    assert problems == []
    return found


def refused(name, value):
    """Settings with a bad value: said in one line that names variable and value, and the default is in force."""
    found, problems = load(**{name: value})
    variable = f"AUTOTEARDOWN_{name}"
    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}={value!r} is not ")
    assert "\n" not in problems[0]
    assert found.sources[variable] == (value, fine().sources[variable][1])
    return found


def test_an_empty_environment_gives_the_defaults_of_the_contract():
    found = fine()
    assert found.signals == (signal.SIGTERM,)
    assert (found.grace, found.hard) == (25.0, 24.0)
    assert (found.exit_code, found.peer_exit_code) == (0, 143)
    assert (found.peers, found.stop_at) == (True, "step")
    assert [getattr(found, name) for name in TIMEOUTS] == [13.0, 5.0, 5.0, 3.0, 3.0]
    assert found.scaled == 1.0
    assert found.yield_seconds == 18.0
    assert (found.log, found.report_dir) == ("info", None)
    assert found.termination_log == "/dev/termination-log"
    assert os.path.basename(found.runtime_dir) == f"autoteardown-{os.geteuid()}"


def test_every_variable_is_documented_and_recorded():
    names = [name for name, _, _ in settings.VARIABLES]
    assert len(set(names)) == len(names) >= 18
    assert set(fine().sources) == set(names)
    assert all(settings.known(name) for name in [*names, "AUTOTEARDOWN", "AUTOTEARDOWN_SKIP"])
    assert not settings.known("AUTOTEARDOWN_GRACE_PERIOD")


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        ({"AUTOTEARDOWN_JOB": "llama-7b", "SLURM_JOB_ID": "4711"}, "llama-7b"),
        ({"AUTOTEARDOWN_JOB": " ", "SLURM_JOB_ID": "4711"}, "4711"),  # a downward API label that is not there
        ({"TORCHELASTIC_RUN_ID": "run-1", "SLURM_JOB_ID": "4711", "RAY_JOB_ID": "01000000"}, "run-1"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "4711"}, "4711"),  # torchrun's default is no name
        (
            {"TORCHELASTIC_RUN_ID": "c6f1b1c0-4a25-4f6b-8a44-0c0f0d4a4b11", "SLURM_JOB_ID": "4711"},
            "4711",
        ),  # --standalone
        (
            {"TORCHELASTIC_RUN_ID": "c6f1b1c0-4a25-4f6b-8a44-0c0f0d4a4b11"},
            "c6f1b1c0-4a25-4f6b-8a44-0c0f0d4a4b11",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "llama-sft-a-b-c-and-more-of-such-names", "SLURM_JOB_ID": "4711"},
            "llama-sft-a-b-c-and-more-of-such-names",
        ),
        ({"RAY_JOB_ID": "01000000"}, "01000000"),
        ({"AUTOTEARDOWN_JOB": "x" * 300}, "x" * 200),
    ],
)
def test_the_job_is_named_by_its_owner_or_its_launcher(environ, job):
    found, problems = settings.load(environ)
    assert (found.job, problems) == (job, [])
    assert found.sources["AUTOTEARDOWN_JOB"] == (environ.get("AUTOTEARDOWN_JOB"), job)


def test_the_format_of_log_lines():
    assert fine().log_format == "text"
    assert fine(LOG_FORMAT="JSON").log_format == "json"
    assert refused("LOG_FORMAT", "logfmt").log_format == "text"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("SIGTERM", (15,)),
        ("term", (15,)),
        ("15", (15,)),
        (" SIGUSR1 , sigterm", (10, 15)),
        ("USR1,USR1,10", (10,)),
        ("SIGRTMIN", (signal.SIGRTMIN,)),
        ("int", (2,)),
    ],
)
def test_signals_by_name_or_number(text, numbers):
    assert fine(SIGNALS=text).signals == numbers


@pytest.mark.parametrize(
    "text",
    [
        "SIGFOO",
        "SIGKILL",
        "STOP",
        "9",
        "SIGTERM,KILL",
        "SIGSEGV",
        "0",
        "-15",
        "64000",
        "SIG_DFL",
        "SIGTERM,",
        "32",
    ],
)
def test_signals_that_mean_nothing_or_cannot_be_handled_are_refused(text):
    assert refused("SIGNALS", text).signals == (signal.SIGTERM,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRACE", "1.9"),
        ("GRACE", "0"),
        ("GRACE", "-25"),
        ("GRACE", "inf"),
        ("GRACE", "nan"),
        ("GRACE", "25s"),
        ("GRACE", "1e300"),
        ("EXIT_CODE", "256"),
        ("EXIT_CODE", "-1"),
        ("EXIT_CODE", "SIGTERM"),
        ("EXIT_CODE", "1.0"),
        ("PEER_EXIT_CODE", "signal"),
        ("PEER_EXIT_CODE", "x"),
        ("PEERS", "maybe"),
        ("STOP_AT", "epoch"),
        ("LOG", "verbose"),
        ("YIELD", "-1"),
        ("YIELD", "inf"),
        ("YIELD", "on"),
        *(
            (f"{name}_TIMEOUT", bad)
            for name in ("STEP", "DRAIN", "DESTROY", "ABORT", "EXIT")
            for bad in ("nan", "-1")
        ),
        ("STEP_TIMEOUT", "infinity"),
        ("STEP_TIMEOUT", "five"),
    ],
)
def test_a_bad_value_is_named_and_the_default_used(name, value):
    refused(name, value)


def test_each_bad_value_gets_its_own_line_and_spoils_no_other():
    found, problems = load(GRACE="soon", LOG="loud", EXIT_CODE="7")
    assert [line.split("=")[0] for line in problems] == ["AUTOTEARDOWN_GRACE", "AUTOTEARDOWN_LOG"]
    assert found.exit_code == 7


@pytest.mark.parametrize("name", [name.removeprefix("AUTOTEARDOWN_") for name, _, _ in settings.VARIABLES])
@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_value_is_an_unset_one(name, nothing):
    found = fine(**{name: nothing})
    if name == "TERMINATION_LOG":
        assert found.termination_log is None  # the one to which empty means off
    else:
        assert found.sources[f"AUTOTEARDOWN_{name}"] == (nothing, fine().sources[f"AUTOTEARDOWN_{name}"][1])


@pytest.mark.parametrize(
    ("code", "signum", "expected"),
    [
        ("0", 15, 0),
        ("signal", 15, 143),
        ("SIGNAL", 10, 138),
        ("17", 15, 17),
        ("17", None, 99),
        ("signal", None, 99),
    ],
)
def test_exit_codes(code, signum, expected):
    assert fine(EXIT_CODE=code, PEER_EXIT_CODE="99").exit_code_for(signum) == expected


@pytest.mark.parametrize(
    ("text", "grace", "seconds"),
    [
        ("auto", "25", 18),
        ("auto", "5", 0),
        ("off", "25", 0),
        ("10", "25", 10),
        ("100", "25", 24),
        ("0", "25", 0),
    ],
)
def test_yield(text, grace, seconds):
    assert fine(YIELD=text, GRACE=grace).yield_seconds == seconds


def test_time_outs_are_scaled_down_together_to_fit_the_grace_period():
    found = fine(GRACE="13", STEP_TIMEOUT="8")
    assert found.scaled == 0.5
    assert [getattr(found, name) for name in TIMEOUTS] == [4.0, 2.5, 2.5, 1.5, 1.5]
    assert found.sources["AUTOTEARDOWN_STEP_TIMEOUT"] == ("8", 4.0)


@pytest.mark.parametrize(
    ("grace", "step", "scaled"), [("25", 13.0, 1.0), ("60", 48.0, 1.0), ("110", 98.0, 1.0), ("13", 6.5, 0.5)]
)
def test_an_iteration_has_what_the_grace_period_leaves(grace, step, scaled):
    found = fine(GRACE=grace)
    assert (found.step_auto, found.scaled) == (True, scaled)
    assert found.step_timeout == pytest.approx(step)
    assert found.drain_timeout == pytest.approx(5.0 * scaled)
    assert found.sources["AUTOTEARDOWN_STEP_TIMEOUT"] == (None, found.step_timeout)
    assert fine(GRACE=grace, STEP_TIMEOUT="AUTO").step_timeout == found.step_timeout


def test_one_endless_time_out_does_not_starve_the_others():
    found = fine(STEP_TIMEOUT="86400")
    assert found.step_timeout == pytest.approx(14.4)
    assert found.drain_timeout == pytest.approx(3.0)


def test_time_outs_of_zero_are_allowed():
    found = fine(**{name.upper(): "0" for name in TIMEOUTS})
    assert [getattr(found, name) for name in TIMEOUTS] == [0.0] * 5
    assert found.scaled == 1.0


def test_long_time_outs_in_a_long_grace_period_stay_as_they_are():
    assert fine(GRACE="3600", STEP_TIMEOUT="900").step_timeout == 900.0


def test_paths_are_absolute_and_stay_when_the_program_changes_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    found = fine(REPORT_DIR="reports", TERMINATION_LOG="~/log", RUNTIME_DIR="<tmp>/ranks")
    assert found.report_dir == str(tmp_path / "reports")
    assert found.termination_log == "/home/somebody/log"
    assert os.path.isabs(found.runtime_dir) and found.runtime_dir.endswith("/ranks")


def test_the_runtime_folder_follows_tmpdir_where_that_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert fine().runtime_dir == str(tmp_path / f"autoteardown-{os.geteuid()}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert fine().runtime_dir == f"/tmp/autoteardown-{os.geteuid()}"


@given(st.dictionaries(st.sampled_from([name for name, _, _ in settings.VARIABLES]), st.text(max_size=12)))
def test_whatever_the_environment_says_the_result_is_usable(environ):
    found, problems = settings.load(environ)
    assert len(problems) <= len(environ)
    assert all("\n" not in line for line in problems)
    assert 2 <= found.grace <= 86400
    assert found.hard == found.grace - 1
    # Under `auto` the time for an iteration counts on either a destroy or an abort.
    names = [name for name in TIMEOUTS if not (found.step_auto and name == "destroy_timeout")]
    assert sum(getattr(found, name) for name in names) <= found.hard * (1 + 1e-9)
    assert all(getattr(found, name) >= 0 for name in TIMEOUTS)
    assert 0 <= found.yield_seconds <= found.hard
    assert 0 <= found.exit_code_for(15) <= 255
    assert found.signals
    for number in found.signals:
        assert signal.Signals(number) not in (signal.SIGKILL, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("text", "on"),
    [("1", True), ("TRUE", True), (" yes ", True), ("On", True), ("0", False), ("no", False), ("", False)],
)
def test_the_switch(text, on):
    assert settings.switch({"AUTOTEARDOWN": text}) == (on, None)


def test_a_switch_that_says_neither_is_off_and_says_so():
    on, problem = settings.switch({"AUTOTEARDOWN": "2"})
    assert not on
    assert problem.startswith("AUTOTEARDOWN='2' is neither on (1, ")


def test_signal_names():
    assert settings.signal_name(15) == "SIGTERM"
    assert settings.signal_name(44) == "44"


def test_reading_the_settings_imports_next_to_nothing():
    code = (
        "import sys; before = set(sys.modules); from autoteardown import settings; settings.load({});"
        "print(*sorted(set(sys.modules) - before))"
    )
    environ = {"PATH": os.environ["PATH"]}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [
        "__future__",
        "autoteardown",
        "autoteardown.settings",
        "autoteardown.switch",
        "autoteardown.variables",
    ]
