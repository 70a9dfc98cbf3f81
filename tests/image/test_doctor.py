"""`autoteardown doctor`: it finds what is wrong, says what to do, and exits with 1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_startup import environ, python

from autoteardown import settings
from autoteardown.cli.doctor import configuration, surroundings, vehicles

ROOT = Path(__file__).parents[2]
INJECT = ROOT / "sitecustomize"
HOST = shutil.which("python3", path="/usr/bin")
needs_host = pytest.mark.skipif(
    HOST is None or Path(HOST).resolve() == Path(sys.executable).resolve(),
    reason="no system Python without the agent",
)
# Runs a doctor that is not installed.
FROM_SOURCE = (
    f"import sys; sys.path.append({str(ROOT)!r}); from autoteardown.cli import main; sys.exit(main())"
)


def examine(said="", **variables):
    """Exit status and report of this environment's doctor; what start-up says on stderr."""
    done = python("-m", "autoteardown", "doctor", "--json", timeout=150, **variables)
    assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def quick(tmp_path_factory):
    """A PYTHONPATH with a torch that is imported in no time and has just what the hooks and doctor look at."""
    package = tmp_path_factory.mktemp("quick") / "torch"
    files = {
        "__init__.py": "",
        "distributed/__init__.py": "import torch\nfrom .distributed_c10d import *\ndef is_available(): return True\n",
        "distributed/distributed_c10d.py": "def init_process_group(): pass\ndef destroy_process_group(): pass\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return str(package.parent)


def examine_host(*flags, **variables):
    """The same for an interpreter in which the package is not installed."""
    done = python(*flags, "-c", FROM_SOURCE, "doctor", "--json", executable=HOST, timeout=150, **variables)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def of(report, area, level):
    return [each for each in report["findings"] if (each["area"], each["level"]) == (area, level)]


def only(report, area, level):
    (found,) = of(report, area, level)
    return found


# -- The whole command -----------------------------------------------------------------------------------------------


def test_an_environment_in_which_all_is_well():
    status, report = examine(AUTOTEARDOWN="1")
    assert [each for each in report["findings"] if each["level"] == "problem"] == []
    assert (status, report["problems"]) == (0, 0)
    assert (report["active"], report["started_by"]) == (True, "autoteardown.pth")
    assert report["executable"] == sys.executable
    assert (
        only(report, "hook", "ok")["text"]
        == "the functions of `signal` are replaced, and init_process_group is wrapped"
    )
    assert "a wedged rank is released by " in only(report, "torch", "ok")["text"]
    assert report["settings"]["AUTOTEARDOWN_SIGNALS"] == {"given": None, "effective": "SIGTERM"}


@pytest.mark.parametrize(
    ("value", "words"), [(None, "is not set"), ("off", "switches it off"), ("maybe", "neither on")]
)
def test_not_switched_on(value, words):
    status, report = examine(
        "autoteardown: AUTOTEARDOWN='maybe'" if value == "maybe" else "", AUTOTEARDOWN=value
    )
    assert (status, report["active"]) == (1, False)
    found = only(report, "switch", "problem")
    assert words in found["text"]
    assert "AUTOTEARDOWN=1" in found["advice"]


def test_settings_that_are_wrong_misspelt_or_do_not_fit(quick):
    status, report = examine(
        PYTHONPATH=quick,
        AUTOTEARDOWN="1",
        AUTOTEARDOWN_LOG="loud",
        AUTOTEARDOWN_GRACE="13",
        AUTOTEARDOWN_GRACE_PERIOD="30",
        AUTOTEARDOWN_SIGNALS="USR1,TERM",
    )
    assert status == 1
    assert report["active"]  # a bad value never takes the protection away
    assert only(report, "settings", "problem")["text"].startswith(
        "AUTOTEARDOWN_LOG='loud' is not quiet, info or debug"
    )
    assert "AUTOTEARDOWN_GRACE_PERIOD" in only(report, "settings", "warning")["text"]
    assert "shortened to 50%" in only(report, "settings", "note")["text"]
    assert report["settings"]["AUTOTEARDOWN_STEP_TIMEOUT"] == {"given": None, "effective": 6.5}
    assert report["settings"]["AUTOTEARDOWN_SIGNALS"] == {
        "given": "USR1,TERM",
        "effective": "SIGUSR1,SIGTERM",
    }


def test_folders_that_cannot_be_used(tmp_path, quick):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    status, report = examine(
        PYTHONPATH=quick,
        AUTOTEARDOWN="1",
        AUTOTEARDOWN_REPORT_DIR=str(tmp_path / "file" / "reports"),
        AUTOTEARDOWN_RUNTIME_DIR=str(tmp_path / "open"),
    )
    assert status == 1
    assert f"{tmp_path / 'file'} is no folder" in only(report, "reports", "problem")["text"]
    assert "others can write to it" in only(report, "registry", "problem")["text"]


def test_it_creates_nothing(tmp_path, quick):
    variables = {
        name: str(tmp_path / name) for name in ("AUTOTEARDOWN_REPORT_DIR", "AUTOTEARDOWN_RUNTIME_DIR")
    }
    status, _ = examine(AUTOTEARDOWN="1", PYTHONPATH=quick, **variables)
    assert status == 0
    assert list(tmp_path.iterdir()) == []


def test_as_text(quick):
    variables = {"AUTOTEARDOWN": "1", "AUTOTEARDOWN_GRACE": "soon", "PYTHONPATH": quick}
    done = python("-m", "autoteardown", "doctor", **variables)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[1] == "New processes of this interpreter: ACTIVE, started by autoteardown.pth"
    assert any(line.startswith("PROBLEM  settings") and "AUTOTEARDOWN_GRACE='soon'" in line for line in lines)
    assert any(line.split()[:2] == ["AUTOTEARDOWN_EXIT_CODE", "0"] for line in lines)
    assert lines[-1].startswith("1 problem, ")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "autoteardown", "doctor"]
    done = subprocess.run(command, env=environ(), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# -- Why it is not active --------------------------------------------------------------------------------------------


def test_without_site():
    done = python("-S", "-c", FROM_SOURCE, "doctor", "--json", AUTOTEARDOWN="1", timeout=150)
    report = json.loads(done.stdout)
    assert (done.returncode, report["active"]) == (1, False)
    assert "runs with -S" in only(report, "start-up", "problem")["text"]


@needs_host
def test_not_installed():
    status, report = examine_host(AUTOTEARDOWN="1")
    assert (status, report["active"]) == (1, False)
    found = only(report, "start-up", "problem")
    assert "no autoteardown.pth in any site-packages folder" in found["text"]
    assert found["advice"] == f"pip install autoteardown, or: export PYTHONPATH={INJECT}"


@needs_host
def test_injected():
    _, report = examine_host(AUTOTEARDOWN="1", PYTHONPATH=str(INJECT))
    assert (report["active"], report["started_by"]) == (True, "sitecustomize")
    assert only(report, "vehicle", "ok")["text"] == f"injection by PYTHONPATH: {INJECT}"


@needs_host
def test_injected_into_an_interpreter_that_ignores_it():
    _, report = examine_host("-I", AUTOTEARDOWN="1", PYTHONPATH=str(INJECT))
    assert not report["active"]
    assert "-I or -E, which ignore PYTHONPATH" in only(report, "start-up", "problem")["text"]


@needs_host
def test_hidden_by_another_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("")
    _, report = examine_host(AUTOTEARDOWN="1", PYTHONPATH=os.pathsep.join([str(tmp_path), str(INJECT)]))
    assert not report["active"]
    found = only(report, "start-up", "problem")
    assert f"{tmp_path / 'sitecustomize.py'} hides the sitecustomize in {INJECT}" in found["text"]
    assert found["advice"] == f"export PYTHONPATH={INJECT}:{tmp_path}"


def test_a_start_up_that_fails(tmp_path):
    package = tmp_path / "autoteardown"
    shutil.copytree(ROOT / "autoteardown", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "import_hooks.py").write_text("raise RuntimeError('broken')\n")
    done = python(
        "-m", "autoteardown", "doctor", "--json", AUTOTEARDOWN="1", PYTHONPATH=str(tmp_path), timeout=150
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["active"]) == (1, False)
    texts = [each["text"] for each in of(report, "start-up", "problem")]
    assert any(
        "switched on, but not active: start-up failed: RuntimeError('broken')" in text for text in texts
    )


@pytest.mark.parametrize(
    ("body", "area", "words"),
    [
        (
            "raise OSError('no libcudart')",
            "hook",
            "torch.distributed cannot be imported: OSError('no libcudart')",
        ),
        (
            "import os; os._exit(7)",
            "hook",
            "importing torch.distributed in a new process failed: it ended with status 7",
        ),
    ],
)
def test_a_torch_that_cannot_be_imported(tmp_path, body, area, words):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(body + "\n")
    status, report = examine(AUTOTEARDOWN="1", PYTHONPATH=str(tmp_path))
    assert (status, report["active"]) == (1, True)
    assert only(report, area, "problem")["text"] == words


@pytest.mark.parametrize(
    ("version", "nccl", "words"),
    [
        ("2.5.1", True, "by the _shutdown() of their NCCL backends, an abort in torch 2.4 and 2.5"),
        ("2.6.0", True, "by the abort() of their NCCL backends (torch 2.6)"),
        ("2.6.0", False, "by its exit (no NCCL here)"),
        ("2.7.0", True, "by the abort() of its process groups"),
    ],
)
def test_what_releases_a_wedged_rank(quick, version, nccl, words):
    """As `backends.abort` does it (test_torch_versions.py) with the API of that version, whatever else that has."""
    shape = json.loads((ROOT / "tests" / "unit" / "torch_shapes.json").read_text())[version]
    lines = []
    for kind in ("ProcessGroup", "ProcessGroupNCCL")[: 1 + nccl]:
        lines += [f"class {kind}:", *(f"    def {name}(self): pass" for name in shape[kind].split())]
    c10d = "torch/distributed/distributed_c10d.py"
    lines += [f"def {name}(*args): pass" for name in shape[c10d].split()]
    (Path(quick) / c10d).write_text("\n".join(lines) + "\n")
    _, report = examine(AUTOTEARDOWN="1", PYTHONPATH=quick)
    assert f": a wedged rank is released {words}" in only(report, "torch", "ok")["text"]


def test_it_tells_of_no_store(quick):
    """Peers are told over connections of the agent's own: the kind of client that the store has does not matter."""
    _, report = examine(AUTOTEARDOWN="1", PYTHONPATH=quick)
    assert not [each for each in report["findings"] if "store" in each["text"]]


def test_callbacks_by_name_are_shown_as_they_are_written():
    _, report = examine(AUTOTEARDOWN="1", AUTOTEARDOWN_ON_TEARDOWN="a.b:c, d:e.f")
    assert report["settings"]["AUTOTEARDOWN_ON_TEARDOWN"]["effective"] == "a.b:c,d:e.f"


def test_a_hook_that_does_not_hold(tmp_path, quick):
    package = tmp_path / "autoteardown"
    shutil.copytree(ROOT / "autoteardown", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "rank" / "torch_hooks.py").write_text("def register(): pass\n")
    status, report = examine(AUTOTEARDOWN="1", PYTHONPATH=str(tmp_path))
    assert (status, report["active"]) == (1, True)
    assert (
        only(report, "hook", "problem")["text"] == "init_process_group is not wrapped once torch is imported"
    )


# -- Surroundings ----------------------------------------------------------------------------------------------------

SIGTERM_BIT = 1 << 14


@pytest.fixture
def machine(tmp_path):
    """Makes a root folder whose /proc shows this PID 1, and these signal sets."""

    def make(
        command="tini -- torchrun train.py",
        caught=SIGTERM_BIT,
        blocked=0,
        ignored=0,
        own_blocked=0,
        own_pid=42,
    ):
        proc = tmp_path / "proc"
        for pid, masks in (("1", (caught, blocked, 0)), ("self", (0, own_blocked, ignored))):
            (proc / pid).mkdir(parents=True)
            fields = zip(("SigCgt", "SigBlk", "SigIgn"), masks)
            (proc / pid / "status").write_text("".join(f"{name}:\t{mask:016x}\n" for name, mask in fields))
        (proc / "1" / "cmdline").write_text("".join(f"{word}\0" for word in command.split()))
        (proc / "self" / "stat").write_text(f"{own_pid} (python3) R 1 ...")
        return tmp_path

    return make


KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def surrounded(root, variables, **found):
    given = {f"AUTOTEARDOWN_{name}": value for name, value in found.items()}
    findings = surroundings.check({**variables, **given}, settings.load(given)[0], root)
    return {"findings": [finding._asdict() for finding in findings]}


@pytest.mark.parametrize("command", ["/bin/sh -c ./train.sh", "bash start.sh", "/usr/bin/dash", "-bash"])
def test_a_shell_as_pid_1(machine, command):
    found = only(surrounded(machine(command), KUBERNETES), "PID 1", "warning")
    assert found["text"].startswith(f"a shell ({command})")
    assert "exec" in found["advice"]


@pytest.mark.parametrize(
    ("caught", "blocked", "level"), [(SIGTERM_BIT, 0, "ok"), (0, SIGTERM_BIT, "ok"), (0, 0, "warning")]
)
def test_what_pid_1_does_with_the_signal(machine, caught, blocked, level):
    report = surrounded(machine("train", caught=caught, blocked=blocked), KUBERNETES)
    assert only(report, "PID 1", level)["text"].startswith("train")


def test_pid_1_must_hear_every_signal_that_means_eviction(machine):
    report = surrounded(machine("train"), KUBERNETES, SIGNALS="TERM,USR1")
    assert "no handler for SIGUSR1" in only(report, "PID 1", "warning")["text"]


def test_doctor_as_pid_1(machine):
    report = surrounded(machine("autoteardown doctor", caught=0, own_pid=1), KUBERNETES)
    assert only(report, "PID 1", "ok")["text"] == "this process itself"


def test_the_init_of_a_machine_is_none_of_our_business(machine):
    assert only(surrounded(machine("bash"), {}), "PID 1", "note")["text"].startswith(
        "no container recognised"
    )


def test_signals_that_were_inherited_ignored_or_blocked(machine):
    report = surrounded(machine(ignored=SIGTERM_BIT), {})
    assert only(report, "signals", "problem")["text"].startswith("SIGTERM ignored here")


def test_a_signal_that_really_is_ignored(quick):
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, '-m', 'autoteardown', 'doctor', '--json'])"
    )
    done = python("-c", code, AUTOTEARDOWN="1", PYTHONPATH=quick)
    assert done.returncode == 1
    assert "SIGTERM ignored here" in only(json.loads(done.stdout), "signals", "problem")["text"]


@pytest.mark.parametrize(
    ("variables", "code", "level", "words"),
    [
        ({}, "0", "note", "no launcher recognised"),
        (KUBERNETES, "0", "warning", "its Job is complete"),
        (KUBERNETES, "signal", "ok", "signal under Kubernetes"),
        (KUBERNETES, "143", "ok", "143 under Kubernetes"),
        ({**KUBERNETES, "RAY_CLUSTER_NAME": "c"}, "0", "ok", "has failed whatever the code"),
        ({"SLURM_JOB_ID": "1"}, "0", "warning", "requeues it after 143"),
        ({"SLURM_JOB_ID": "1", "TORCHELASTIC_RUN_ID": "x"}, "0", "ok", "it returns 1 after a SIGTERM"),
    ],
)
def test_the_exit_code_that_fits(machine, variables, code, level, words):
    assert words in only(surrounded(machine("train"), variables, EXIT_CODE=code), "exit code", level)["text"]


def test_a_folder_on_a_read_only_file_system(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((0,) * 8 + (os.ST_RDONLY, 0)))
    found = configuration._creatable("registry", Path("/tmp/x"), "AUTOTEARDOWN_RUNTIME_DIR")
    assert "/tmp is on a read-only file system" in found.text
    assert found.advice.startswith("export AUTOTEARDOWN_RUNTIME_DIR=")


def test_start_up_files_are_listed_in_the_order_in_which_they_run(tmp_path):
    first, second = tmp_path / "venv", tmp_path / "user"
    for folder, name, text in (
        (first, "b.pth", "import b"),
        (first, "a.pth", "import a"),
        (first, "paths.pth", "/only/a/path"),
        (second, "0.pth", "import zero"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    found = vehicles.start_up_files([first, tmp_path / "missing", second], "/x/sitecustomize.py")
    assert [Path(each).name for each in found] == ["a.pth", "b.pth", "0.pth", "sitecustomize.py"]


@pytest.mark.parametrize(
    "command", ["/opt/bin/torchrun train.py", "python -m torch.distributed.run train.py"]
)
def test_torchrun_as_pid_1_decides_what_the_pod_ends_with(machine, command):
    report = surrounded(machine(command), KUBERNETES)
    assert "it returns 1" in only(report, "exit code", "ok")["text"]
    assert "Kubeflow" in only(report, "exit code", "note")["text"]


@pytest.mark.parametrize(
    ("period", "grace", "level"),
    [("30", "25", "ok"), ("30", "31", "problem"), (None, None, "note"), ("x", "25", None)],
)
def test_the_grace_period_of_the_pod(machine, tmp_path, period, grace, level):
    variables = {**KUBERNETES, **({"TERMINATION_GRACE_PERIOD_SECONDS": period} if period else {})}
    given = {"GRACE": grace} if grace else {}
    report = surrounded(machine(), variables, TERMINATION_LOG="", **given)
    levels = [each["level"] for each in report["findings"] if each["area"] == "Kubernetes"]
    assert levels == ([level] if level else [])


def test_the_termination_log(machine, tmp_path):
    log = tmp_path / "log"
    report = surrounded(machine(), KUBERNETES, TERMINATION_LOG=str(log), GRACE="25")
    assert (
        only(report, "Kubernetes", "note")["text"] == f"no {log}: a teardown is not shown in the pod's status"
    )


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"PYTHONPATH": "/x/ddtrace/bootstrap:/y"}, "ddtrace"),
        ({"PYTHONPATH": "/x/opentelemetry/instrumentation/auto_instrumentation"}, "OpenTelemetry"),
        ({"COVERAGE_PROCESS_START": "/x/.coveragerc"}, "coverage"),
        ({"AUTOWRAPT_BOOTSTRAP": "x"}, "autowrapt"),
    ],
)
def test_other_agents(machine, variables, name):
    report = surrounded(machine(), variables)
    assert only(report, "agents", "note")["text"].startswith(f"{name} starts with this interpreter too")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.6.0a0+git12", (2, 6, 0)), ("1.14", (1, 14)), ("2.26.2", (2, 26, 2))],
)
def test_version_numbers(version, expected):
    assert configuration.numbers(version) == expected
