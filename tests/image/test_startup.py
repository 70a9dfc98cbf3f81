"""The start-up switch: on and off, in every way to start a Python process, and without harm to any of them.

Every test runs real interpreters of this environment, in which the package has to be installed (editable or not).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipapp
from importlib import metadata
from pathlib import Path

import pytest

import autoteardown

PACKAGE = Path(autoteardown.__file__).parent
SOURCE = Path(__file__).parents[2]
GATE = ["autoteardown", "autoteardown.startup", "autoteardown.switch"]
ON = [*GATE, "autoteardown.import_hooks"]

# Says what a process looks like from inside. Imports only what start-up has imported anyway, but for json, last.
PROBE = """
import sys, os
modules = sorted(sys.modules)
ours = [name for name in modules if name.partition(".")[0] == "autoteardown"]
finders = sum(type(finder).__module__ == "autoteardown.import_hooks" for finder in sys.meta_path)
startup = sys.modules.get("autoteardown.startup")
descriptors = sorted(os.listdir("/proc/self/fd"))[:-1]
threads = len(os.listdir("/proc/self/task"))
import _signal, json
print(json.dumps(dict(
    ours=ours, finders=finders, active=startup is not None and startup.active(), descriptors=descriptors,
    threads=threads, costly=[name for name in modules if name in ("wrapt", "signal", "enum", "re", "typing", "torch")],
    started_by=startup and startup.started_by, why_off=startup and startup.why_off,
    default=_signal.getsignal(_signal.SIGTERM) == _signal.SIG_DFL,
    wakeup_fd=_signal.set_wakeup_fd(-1), prefix=sys.prefix,
)))
"""


def environ(**variables):
    """This environment without what would make the agent start, or start differently; then `variables`."""
    base = {
        name: value for name, value in os.environ.items() if not name.startswith(("AUTOTEARDOWN", "PYTHON"))
    }
    return {**base, **{name: value for name, value in variables.items() if value is not None}}


def python(*words, executable=sys.executable, cwd=None, timeout=120, **variables):
    return subprocess.run(
        [str(executable), *map(str, words)],
        env=environ(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def probe(*words, **options):
    """What PROBE says; it must be all that the process says."""
    done = python(*(words or ("-c", PROBE)), **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(PROBE)
    return path


@pytest.fixture
def broken(tmp_path):
    """A copy of the package, ahead of the installed one on the path, to break modules in."""
    shutil.copytree(
        PACKAGE, tmp_path / "broken" / "autoteardown", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "broken"


@pytest.fixture
def fake_torch(tmp_path):
    """A folder with a `torch` that says when its code runs, and imports no real torch."""
    package = tmp_path / "fake" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sys\nsaw_wrapt = 'wrapt' in sys.modules\n")
    (package / "part.py").write_text("")
    return package.parent


# -- Off -------------------------------------------------------------------------------------------------------------


def test_without_the_switch_there_is_no_trace_of_us():
    found = probe()
    assert (found["ours"], found["finders"]) == ([], 0)
    assert found["descriptors"] == ["0", "1", "2"]
    assert (found["threads"], found["default"], found["wakeup_fd"]) == (1, True, -1)


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF", " 0 "])
def test_switched_off_only_the_gate_is_imported(value):
    found = probe(AUTOTEARDOWN=value)
    assert (found["ours"], found["finders"], found["active"]) == (GATE, 0, False)
    assert found["descriptors"] == ["0", "1", "2"]
    assert (found["threads"], found["default"], found["wakeup_fd"]) == (1, True, -1)
    assert found["why_off"] == "switched off"


def test_a_value_that_is_neither_on_nor_off_is_off_and_says_so_once():
    done = python("-c", "print('ran')", AUTOTEARDOWN="maybe")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("autoteardown: AUTOTEARDOWN='maybe' is neither on (1, true, yes, on)")


def test_a_process_that_cannot_be_told_anything_is_not_harmed():
    closed = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])"
    assert python("-c", closed, AUTOTEARDOWN="maybe").stdout == "1\n"


# -- On --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_switched_on_a_process_without_torch_imports_a_finder_and_nothing_that_costs(value):
    found = probe(AUTOTEARDOWN=value)
    assert found["active"]
    assert sorted(found["ours"]) == sorted(ON)
    # Twice in site's own loop over the .pth files of a venv before 3.14 (python/cpython#75723), but one finder.
    assert found["finders"] == 1
    assert found["costly"] == probe("-c", PROBE)["costly"]
    assert found["descriptors"] == ["0", "1", "2"]
    assert (found["threads"], found["default"], found["wakeup_fd"]) == (1, True, -1)


SAFE_PATH = [["-P"]] if sys.version_info >= (3, 11) else []


@pytest.mark.parametrize("flags", [["-I"], ["-E"], ["-s"], ["-I", "-B", "-u"], *SAFE_PATH], ids=" ".join)
def test_interpreter_flags_that_do_not_stop_it(flags):
    assert probe(*flags, "-c", PROBE, AUTOTEARDOWN="1")["started_by"] == "autoteardown.pth"


def test_without_site_it_is_inert_and_silent():
    assert probe("-S", "-c", PROBE, AUTOTEARDOWN="1")["ours"] == []


def test_started_as_a_script(script):
    assert probe(script, AUTOTEARDOWN="1")["active"]


def test_started_from_stdin(script):
    with script.open() as stdin:
        done = subprocess.run(
            [sys.executable],
            env=environ(AUTOTEARDOWN="1"),
            stdin=stdin,
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(done.stdout)["active"]


def test_started_as_a_module(script):
    assert probe("-m", "train", cwd=script.parent, AUTOTEARDOWN="1")["active"]


def test_started_from_a_zipapp(tmp_path):
    source = tmp_path / "app"
    source.mkdir()
    (source / "__main__.py").write_text(PROBE)
    zipapp.create_archive(source, tmp_path / "app.pyz")
    assert probe(tmp_path / "app.pyz", AUTOTEARDOWN="1")["active"]


def test_started_as_a_console_script(tmp_path, script):
    command = tmp_path / "train-console"
    command.write_text(f"#!{sys.executable}\n" + PROBE)
    command.chmod(0o755)
    done = subprocess.run(
        [command], env=environ(AUTOTEARDOWN="1"), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["active"]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_children_of_multiprocessing(tmp_path, method):
    program = tmp_path / "train.py"
    program.write_text(
        f"import multiprocessing as mp\n"
        f"def child(queue):\n"
        f"    from autoteardown import startup\n"
        f"    queue.put((startup.active(), startup.started_by))\n"
        f"if __name__ == '__main__':\n"
        f"    context = mp.get_context({method!r})\n"
        f"    queue = context.Queue()\n"
        f"    process = context.Process(target=child, args=(queue,)); process.start()\n"
        f"    print(*queue.get()); process.join()\n"
    )
    done = python(program, AUTOTEARDOWN="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True autoteardown.pth\n", "")


def test_the_line_of_the_start_file_names_a_callable_that_needs_nothing():
    # What Python 3.15 does with it (PEP 829).
    (entry,) = (SOURCE / "startup_files" / "autoteardown.start").read_text().split()
    start = (
        f"import sys, pkgutil; sys.path.append({str(PACKAGE.parent)!r}); pkgutil.resolve_name({entry!r})()"
    )
    found = probe("-S", "-c", start + PROBE, AUTOTEARDOWN="1")
    assert (found["active"], found["started_by"]) == (True, "autoteardown.start")


def test_the_pth_is_one_line_without_exec():
    text = (SOURCE / "startup_files" / "autoteardown.pth").read_text()
    assert text.count("\n") == 1 and text.startswith("import os;")
    assert "exec" not in text


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("del os.fork", "this platform has no fork or no signal wake-up fd"),
        (
            "sys._is_gil_enabled = lambda: False",
            "this Python runs without the GIL, which the agent needs (PYTHON_GIL=1)",
        ),
    ],
)
def test_an_unsupported_platform_stays_off_and_says_so(lacks, says):
    code = (
        f"import os, sys; sys.path.append({str(PACKAGE.parent)!r}); {lacks}\n"
        "from autoteardown import startup\n"
        "startup.start(); startup.start(); print(startup.active(), startup.why_off)"
    )
    done = python("-S", "-c", code, AUTOTEARDOWN="1")
    assert done.stdout == f"False {says}\n"
    assert done.stderr == f"autoteardown: {says}: off\n"


def test_switched_on_from_code():
    code = "from autoteardown import startup; print(startup.activate(), startup.active(), startup.started_by)"
    assert python("-c", code).stdout == "True True autoteardown.arm()\n"
    assert python("-c", code, AUTOTEARDOWN="1").stdout == "True True autoteardown.pth\n"
    assert python("-c", code, AUTOTEARDOWN="0").stdout == "False False autoteardown.pth\n"


# -- Nothing escapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", ["SystemExit(3)", "KeyboardInterrupt", "MemoryError", "RuntimeError('ours')"]
)
def test_whatever_start_up_raises_the_program_runs(broken, error):
    (broken / "autoteardown" / "import_hooks.py").write_text(f"raise {error}\n")
    done = python("-c", "print('ran')", AUTOTEARDOWN="1", PYTHONPATH=str(broken))
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.startswith(f"autoteardown: start-up failed: {error.partition('(')[0]}(")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", ["SystemExit(3)", "RuntimeError('ours')"])
@pytest.mark.parametrize(
    ("module", "trigger"), [("signals/interception", "signal"), ("rank/torch_hooks", "torch")]
)
def test_whatever_a_hook_raises_the_import_succeeds(broken, fake_torch, error, module, trigger):
    (broken / "autoteardown" / f"{module}.py").write_text(f"raise {error}\n")
    code = f"import {trigger}; print({trigger}.__spec__.loader.name)"
    done = python("-c", code, AUTOTEARDOWN="1", PYTHONPATH=f"{broken}{os.pathsep}{fake_torch}")
    assert (done.returncode, done.stdout) == (0, f"{trigger}\n")
    assert done.stderr.startswith(f"autoteardown: hook on {trigger} failed: {error.partition('(')[0]}(")


# -- The finder ------------------------------------------------------------------------------------------------------


def run_on(code, *folders):
    """The output of a program in a process that is switched on, with these folders on its path."""
    done = python("-c", code, AUTOTEARDOWN="1", PYTHONPATH=os.pathsep.join(map(str, folders)))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_signal_is_intercepted_when_it_has_been_imported_and_its_loader_is_its_own():
    code = (
        "import signal, _signal, importlib.machinery as machinery\n"
        "from autoteardown.signals import interception\n"
        "assert interception.interceptor is not None\n"
        "loaders = {type(signal.__loader__), type(signal.__spec__.loader)}\n"
        "print(loaders == {machinery.SourceFileLoader}, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    assert run_on(code) == "True True"


def test_asking_whether_a_module_exists_is_not_importing_it(fake_torch):
    code = (
        "import sys, importlib.util as util\n"
        "found = [util.find_spec(name) for name in ('signal', 'torch')]\n"
        "print([spec.loader.get_filename() == spec.origin for spec in found], 'wrapt' in sys.modules)\n"
        "import torch, signal\n"
        "from autoteardown.signals import interception\n"
        "print(torch.saw_wrapt, interception.interceptor is not None)"
    )
    assert run_on(code, fake_torch).split("\n") == ["[True, True] False", "True True"]


def test_what_others_put_on_the_loader_that_they_find(fake_torch):
    """ddtrace replaces `get_code` on the loader of what it watches: it is called, and can be taken away again."""
    code = (
        "import importlib.util as util, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = util.find_spec(name)\n"
        "        own = spec.loader.get_code\n"
        "        spec.loader.get_code = lambda name: print('asked for', name) or own(name)\n"
        "        spec.loader.mark = 1\n"
        "        del spec.loader.mark\n"
        "        assert not hasattr(spec.loader, 'mark')\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import torch; print('wrapt' in sys.modules)"
    )
    assert run_on(code, fake_torch).split("\n") == ["asked for torch", "True"]


def test_what_find_spec_returns_can_be_copied_pickled_and_compared(fake_torch):
    code = (
        "import copy, pickle, importlib.util as util\n"
        "for name in ('signal', 'torch'):\n"
        "    spec = util.find_spec(name)\n"
        "    copies = [copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), util.find_spec(name)]\n"
        "    assert all(each == spec and each.loader == spec.loader for each in copies), name\n"
        "    assert len({each.loader for each in copies}) == 1\n"
        "    assert type(pickle.loads(pickle.dumps(spec.loader))).__module__ == '_frozen_importlib_external'\n"
        "import signal, torch\n"
        "from autoteardown.signals import interception\n"
        "print(torch.saw_wrapt, interception.interceptor is not None)"
    )
    assert run_on(code, fake_torch) == "True True"


def test_a_finder_ahead_of_ours_cannot_hide_torch(fake_torch):
    code = (
        "import sys, importlib.machinery as machinery\n"
        "class First:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return machinery.PathFinder.find_spec(name, path) if name == 'torch' else None\n"
        "sys.meta_path.insert(0, First())\n"
        "import torch; print('autoteardown.rank.torch_hooks' in sys.modules)\n"
        "import torch.part; print('autoteardown.rank.torch_hooks' in sys.modules)\n"
        "print(type(torch.part.__spec__.loader).__name__)"
    )
    assert run_on(code, fake_torch).split() == ["False", "True", "SourceFileLoader"]


def test_torch_imported_before_the_agent_is_hooked_late(fake_torch):
    code = (
        "import sys, torch, signal\n"
        "from autoteardown import startup\n"
        "assert 'autoteardown.rank.torch_hooks' not in sys.modules\n"
        "startup.activate()\n"
        "from autoteardown.signals import interception\n"
        "print('autoteardown.rank.torch_hooks' in sys.modules, interception.interceptor is not None)"
    )
    assert python("-c", code, PYTHONPATH=str(fake_torch)).stdout == "True True\n"


def test_importing_torch_in_one_thread_does_not_block_the_imports_of_another(fake_torch):
    # Imports of ours in find_spec, which importlib calls with its global lock held, would be a deadlock here:
    # the hook waits for `shared`, which the other thread is importing, which waits for the global lock.
    (fake_torch / "shared.py").write_text("import meeting; meeting.go.wait(); import leaf")
    (fake_torch / "meeting.py").write_text("import threading; go = threading.Event()")
    (fake_torch / "leaf.py").write_text("")
    (fake_torch / "wrapt.py").write_text(
        "import meeting; meeting.go.set(); import shared\ndef register_post_import_hook(*a): pass"
    )
    code = (
        "import meeting, threading, sys\n"
        "thread = threading.Thread(target=__import__, args=('shared',)); thread.start()\n"
        "while 'shared' not in sys.modules: pass\n"
        "import torch; thread.join(); print('done')"
    )
    assert run_on(code, fake_torch) == "done"


def test_our_exit_callback_runs_after_the_programs_own():
    code = (
        "import atexit, sys, types\n"
        "sys.modules['autoteardown.rank.guard'] = types.SimpleNamespace(at_exit=lambda: print('ours'))\n"
        "atexit.register(print, 'the program')"
    )
    assert run_on(code).split("\n") == ["the program", "ours"]


def test_the_api_does_nothing_and_imports_no_torch_while_the_agent_is_off():
    code = (
        "import sys, autoteardown\n"
        "with autoteardown.protect(): pass\n"
        "autoteardown.on_teardown(print); autoteardown.disarm()\n"
        "print(autoteardown.status()['active'], 'torch' in sys.modules, 'wrapt' in sys.modules)"
    )
    assert python("-c", code).stdout == "False False False\n"


def test_the_package_names_its_version_and_nothing_that_is_not_there():
    assert autoteardown.__version__ == metadata.version("autoteardown")
    assert set(autoteardown.__all__) <= set(dir(autoteardown))
    with pytest.raises(AttributeError):
        _ = autoteardown.teardown_everything


# -- Skipped programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        ("train.py", True),
        ("train", False),
        ("*.py", True),
        ("other.py, train.*", True),
        ("*/train.py", True),
        ("t[ar]*", True),
        ("Train.py", False),
        ("", False),
        (",,", False),
    ],
)
def test_skip_by_script(script, patterns, skipped):
    found = probe(script, "--flag", AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP=patterns)
    assert found["active"] != skipped
    assert (found["why_off"] == "AUTOTEARDOWN_SKIP matches train.py") == (
        skipped and patterns != "*/train.py"
    )


def test_skip_by_a_relative_scripts_absolute_path(script):
    assert not probe("train.py", cwd=script.parent, AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP=str(script))["active"]


@pytest.mark.parametrize(
    "flags", [["-m", "pkg.train"], ["-um", "pkg.train"], ["-W", "ignore", "-X", "utf8", "-mpkg.train"]]
)
@pytest.mark.parametrize(("patterns", "skipped"), [("pkg.train", True), ("pkg.*", True), ("train", False)])
def test_skip_by_module(tmp_path, flags, patterns, skipped):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text(PROBE)
    found = probe(*flags, "--arg", cwd=tmp_path, AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP=patterns)
    assert found["active"] != skipped


def test_skip_by_console_script(tmp_path):
    command = tmp_path / "torchrun-like"
    command.write_text(f"#!{sys.executable} -u\n" + PROBE)
    command.chmod(0o755)
    variables = environ(AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP="torchrun-*")
    done = subprocess.run([command, "train.py"], env=variables, capture_output=True, text=True, check=True)
    assert not json.loads(done.stdout)["active"]


def test_code_on_the_command_line_has_no_name_to_match():
    assert probe("-c", PROBE, "train.py", AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP="train.py,-c")["active"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_a_skipped_program_spawns_is_skipped_with_it(tmp_path, method):
    program = tmp_path / "train.py"
    program.write_text(
        f"import multiprocessing as mp\n"
        f"def child(queue, depth):\n"
        f"    from autoteardown import startup\n"
        f"    queue.put(startup.active())\n"
        f"    if depth:\n"
        f"        process = mp.get_context({method!r}).Process(target=child, args=(queue, depth - 1))\n"
        f"        process.start(); process.join()\n"
        f"if __name__ == '__main__':\n"
        f"    queue = mp.get_context({method!r}).Queue()\n"
        f"    process = mp.get_context({method!r}).Process(target=child, args=(queue, 1)); process.start()\n"
        f"    print(queue.get(), queue.get()); process.join()\n"
    )
    assert python(program, AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP="train.py").stdout == "False False\n"
    assert python(program, AUTOTEARDOWN="1", AUTOTEARDOWN_SKIP="other.py").stdout == "True True\n"


# -- What the host notices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [None, "0", "1"])
def test_a_process_that_is_no_rank_dies_of_sigterm_as_ever(switch):
    code = "import signal, sys, time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environ(AUTOTEARDOWN=switch), stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "expected"), [(["ray", "start", "--block"], True), (["ray", "status"], False)]
)
def test_only_ray_start_gets_the_hook_that_drains_its_node(tmp_path, words, expected):
    command = tmp_path / words[0]
    command.write_text(
        f"#!{sys.executable}\nimport signal\nprint(signal.signal.__code__.co_filename.endswith('ray_start.py'))\n"
    )
    command.chmod(0o755)
    done = subprocess.run(
        [command, *words[1:]], env=environ(AUTOTEARDOWN="1"), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
