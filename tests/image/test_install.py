"""Installed for real: wheel, editable, and injected from a folder, into new environments of every Python found here."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from test_startup import PROBE, environ, probe, python

ROOT = Path(__file__).parents[2]
HOST = shutil.which(
    "python3", path="/usr/bin"
)  # Debian's, with a sitecustomize of its own in the stdlib folder


def pythons(oldest, before=(4,)):
    """This Python and those that pyenv and the system have, of these versions; one for each minor version."""
    found = {sys.version_info[:2]: Path(sys.executable)}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*versions.glob("*/bin/python"), *([Path(HOST)] if HOST else [])]
    for path in sorted(candidates):
        says = subprocess.run(
            [path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
        )
        if says.returncode == 0:
            found.setdefault(tuple(map(int, says.stdout.strip("()\n").split(","))), path)
    return [
        pytest.param(path, id=".".join(map(str, version)))
        for version, path in sorted(found.items())
        if oldest <= version < before
    ]


def pip(*words):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words)], env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A folder with our wheel and a wrapt for any Python."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, env=environ(), check=True, capture_output=True)
    anywhere = ("--only-binary=:all:", "--platform=any", "--abi=none", "--implementation=py")
    pip("download", "-q", "--no-deps", *anywhere, "-d", folder, "wrapt>=1.14,<3")
    return folder


@pytest.fixture(scope="session")
def wheel(wheels):
    (path,) = wheels.glob("autoteardown-*.whl")
    return path


@pytest.fixture(scope="session")
def editable_wheel(tmp_path_factory):
    """What pip has a build backend make for `pip install -e`."""
    folder = tmp_path_factory.mktemp("editable")
    code = "import sys, hatchling.build as build; build.build_editable(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, env=environ(), check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    return path


class Environment:
    """A fresh virtual environment without pip: the one that runs the tests installs into it."""

    def __init__(self, folder, executable):
        self.folder = folder
        self.python = folder / "bin" / "python"
        subprocess.run([executable, "-m", "venv", "--without-pip", folder], check=True, env=environ())

    def install(self, wheel, wheels):
        pip("--python", self.python, "install", "-q", "--no-index", "--find-links", wheels, wheel)

    def uninstall(self):
        pip("--python", self.python, "uninstall", "-q", "-y", "autoteardown", "wrapt")

    def files(self):
        return {
            path.relative_to(self.folder)
            for path in self.folder.rglob("*")
            if "__pycache__" not in path.parts
        }

    def run(self, *words, **variables):
        done = python(*words, executable=self.python, cwd=self.folder, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def command(self, *words):
        """The console script; cwd is not the source tree."""
        command = [self.folder / "bin" / "autoteardown", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environ(), capture_output=True, text=True, check=True
        ).stdout

    @property
    def site_packages(self):
        (folder,) = self.folder.glob("lib/python*/site-packages")
        return folder


@pytest.fixture
def fresh(tmp_path):
    """Makes an environment of a given Python."""
    return partial(Environment, tmp_path / "env")


def test_the_wheel_has_the_startup_files_on_top_and_the_injection_folder_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    on_top = {name for name in names if "/" not in name}
    assert on_top == {"autoteardown.pth", "autoteardown.start"}
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {*on_top, "autoteardown"}
    assert {"autoteardown/_inject/sitecustomize.py", "autoteardown/py.typed"} <= names


@pytest.mark.parametrize("executable", pythons((3, 9)))
def test_wheel(executable, fresh, wheel, wheels):
    env = fresh(executable)
    before = env.files()
    env.install(wheel, wheels)

    off = json.loads(env.run("-c", PROBE))
    assert (off["ours"], off["finders"], off["default"]) == ([], 0, True)
    assert off["prefix"] == str(env.folder)
    for flags in ([], ["-I"], ["-E"]):
        on = json.loads(env.run(*flags, "-c", PROBE, AUTOTEARDOWN="1"))
        assert (on["active"], on["finders"], on["costly"]) == (True, 1, off["costly"])
        assert on["started_by"] in ("autoteardown.pth", "autoteardown.start")
    assert json.loads(env.run("-S", "-c", PROBE, AUTOTEARDOWN="1"))["ours"] == []
    # Nobody without torch pays for wrapt, not even those that try to import it.
    attempt = "try: import torch\nexcept ImportError: pass\nimport sys, signal; print('wrapt' in sys.modules)"
    assert env.run("-c", attempt, AUTOTEARDOWN="1") == "False\n"

    inject = Path(env.command("path").removesuffix("\n"))
    assert inject == env.site_packages / "autoteardown" / "_inject"
    assert (inject / "sitecustomize.py").is_file()
    assert env.run("-m", "autoteardown", "path") == f"{inject}\n"

    env.uninstall()
    assert env.files() == before


def test_editable(fresh, editable_wheel, wheels):
    env = fresh(sys.executable)
    before = env.files()
    env.install(editable_wheel, wheels)
    assert json.loads(env.run("-I", "-c", PROBE, AUTOTEARDOWN="1"))["active"]
    assert json.loads(env.run("-c", PROBE))["ours"] == []
    assert env.run("-c", "import autoteardown; print(autoteardown.__file__)").startswith(f"{ROOT}{os.sep}")
    assert env.command("path") == f"{ROOT / 'sitecustomize'}\n"
    env.uninstall()
    assert env.files() == before


@pytest.mark.parametrize("switch", [None, "1", "nonsense"])
def test_uv_can_still_inspect_the_interpreter(fresh, wheel, wheels, tmp_path, switch):
    env = fresh(sys.executable)
    env.install(wheel, wheels)
    uv = Path(sys.executable).parent / "uv"
    variables = environ(AUTOTEARDOWN=switch, UV_CACHE_DIR=str(tmp_path / "cache"), UV_OFFLINE="1")
    for words in (["python", "find", env.python], ["pip", "list", "--python", env.python]):
        done = subprocess.run([uv, *words], env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "autoteardown" in done.stdout


# -- Injected --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def volume(wheel, wheels, tmp_path_factory):
    """What an init container leaves behind: `pip install --target`."""
    folder = tmp_path_factory.mktemp("volume") / "agent"
    pip("install", "-q", "--no-index", "--find-links", wheels, "--target", folder, wheel)
    return folder


@pytest.fixture
def inject(volume):
    return str(volume / "autoteardown" / "_inject")


@pytest.fixture
def image(tmp_path):
    """The environment of an image in which we are not installed; with a torch that costs nothing to import."""
    env = Environment(tmp_path / "image", sys.executable)
    (env.site_packages / "torch.py").write_text("")
    return env


WHERE_WRAPT = "import torch, wrapt, sys; print(wrapt.__file__); print(sys.path[-1])"


@pytest.mark.parametrize("executable", pythons((3, 9)))
def test_injected_with_nothing_but_its_folder_on_the_path(executable, fresh, inject, volume):
    env = fresh(executable)
    found = json.loads(env.run("-c", PROBE, AUTOTEARDOWN="1", PYTHONPATH=inject))
    assert (found["active"], found["finders"], found["started_by"]) == (True, 1, "sitecustomize")
    off = json.loads(env.run("-c", PROBE, PYTHONPATH=inject))
    assert (off["ours"], off["finders"]) == ([], 0)
    assert str(volume) not in env.run("-c", "import sys; print(sys.path)", PYTHONPATH=inject).split("'")
    # These ignore PYTHONPATH: nothing can be done, and nothing may break.
    for flag in ("-I", "-E", "-S"):
        assert json.loads(env.run(flag, "-c", PROBE, AUTOTEARDOWN="1", PYTHONPATH=inject))["ours"] == []


def test_what_came_with_us_goes_last_on_the_path(image, inject, volume):
    wrapt, last = image.run("-c", WHERE_WRAPT, AUTOTEARDOWN="1", PYTHONPATH=inject).splitlines()
    assert (Path(wrapt).parent.parent, Path(last)) == (volume, volume)


def test_the_images_own_wrapt_wins(image, inject, wheels, volume):
    pip("--python", image.python, "install", "-q", "--no-index", "--find-links", wheels, "wrapt")
    wrapt, last = image.run("-c", WHERE_WRAPT, AUTOTEARDOWN="1", PYTHONPATH=inject).splitlines()
    assert (Path(wrapt).parent.parent, Path(last)) == (image.site_packages, volume)


def test_injected_into_an_image_that_has_us_installed_starts_once(fresh, inject, wheel, wheels):
    env = fresh(sys.executable)
    env.install(wheel, wheels)
    found = json.loads(env.run("-c", PROBE, AUTOTEARDOWN="1", PYTHONPATH=inject))
    assert (found["active"], found["finders"], found["started_by"]) == (True, 1, "autoteardown.pth")


@pytest.mark.parametrize("switch", [None, "1"])
@pytest.mark.parametrize(
    "body",
    [
        "import sys; print('mine', __file__, sys.modules[__name__].__file__); answer = 42",
        "import sys; sys.path.insert(0, '/added'); print('mine')",
        "raise RuntimeError('mine')",
        "import missing_module",
        "raise ImportError('mine')",
        "raise SystemExit('mine')",
    ],
)
def test_the_sitecustomize_that_it_hides_runs_as_if_we_were_not_there(image, inject, tmp_path, body, switch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(body + "\n")
    code = (
        "import sys; customize = sys.modules.get('sitecustomize')\n"
        f"print([entry for entry in sys.path if entry not in ({inject!r}, {str(Path(inject).parent.parent)!r})])\n"
        "print(getattr(customize, '__file__', None), getattr(customize, 'answer', None))"
    )
    run = partial(python, "-c", code, executable=image.python, cwd=tmp_path)
    without = run(PYTHONPATH=str(other))
    with_us = run(PYTHONPATH=os.pathsep.join([inject, str(other)]), AUTOTEARDOWN=switch)
    assert with_us.returncode == without.returncode
    assert with_us.stdout == without.stdout
    # A fatal error shows the frames that led to it, which are ours too.
    assert with_us.stderr.splitlines()[-1:] == without.stderr.splitlines()[-1:]


def test_its_own_folder_stays_on_the_path_for_children(image, inject):
    code = "import sys; print(sys.path.index(" + repr(inject) + "), 'sitecustomize' in sys.modules)"
    for switch in (None, "1"):
        assert image.run("-c", code, PYTHONPATH=inject, AUTOTEARDOWN=switch) == "1 True\n"


def test_two_injected_copies_do_not_chase_each_other(image, inject, tmp_path):
    copy = shutil.copytree(inject, tmp_path / "copy")
    both = os.pathsep.join([inject, str(copy)])
    assert json.loads(image.run("-c", PROBE, AUTOTEARDOWN="1", PYTHONPATH=both))["finders"] == 1


@pytest.mark.skipif(
    HOST is None or not list(Path("/usr/lib").glob("python3*/sitecustomize.py")), reason="not Debian"
)
def test_debians_own_sitecustomize_runs_too(inject):
    code = "import sys; print(sys.modules['sitecustomize'].__file__)" + PROBE
    done = python("-c", code, executable=HOST, AUTOTEARDOWN="1", PYTHONPATH=inject)
    assert (done.returncode, done.stderr) == (0, "")
    customize, found = done.stdout.splitlines()
    assert customize.startswith("/usr/lib/python3")
    assert json.loads(found)["started_by"] == "sitecustomize"


@pytest.mark.parametrize("executable", pythons((2, 7), before=(3, 9)))
def test_injected_into_an_old_python_it_says_so_and_stays_out(executable, inject, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stdout.write('chained ')\n")
    path = os.pathsep.join([inject, str(tmp_path)])
    for switch, said in ((None, ""), ("1", "autoteardown: Python older than 3.9 is not supported: off\n")):
        done = python("-c", "print('ran')", executable=executable, AUTOTEARDOWN=switch, PYTHONPATH=path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "chained ran\n", said)


def test_a_damaged_volume_does_not_stop_the_program(image, volume, tmp_path):
    damaged = shutil.copytree(volume, tmp_path / "damaged")
    (damaged / "autoteardown" / "startup.py").write_text("raise SystemExit(9)\n")
    path = str(damaged / "autoteardown" / "_inject")
    done = python("-c", "print('ran')", executable=image.python, AUTOTEARDOWN="1", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "autoteardown: start-up failed: SystemExit(9)\n"


def test_the_source_tree_can_be_injected_too():
    found = probe(
        "-c",
        PROBE,
        executable=HOST or sys.executable,
        AUTOTEARDOWN="1",
        PYTHONPATH=str(ROOT / "sitecustomize"),
    )
    assert found["active"]
