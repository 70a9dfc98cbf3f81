"""Other code that starts with the interpreter works beside the agent in one image, in either order.

Each test evicts a rank and looks for what shows that the other agent was at work in that very process. It runs in an
environment that has no start-up file but those that the test puts there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness import AGENT, NONE, PROGRAMS, SIGTERM

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
INJECT = str(ROOT / "sitecustomize")
LIBRARY = Path(sysconfig.get_paths()["purelib"])
START = 240.0

# World size 1: whether peers are told does not depend on who else runs at start-up.
PROGRAM = """
    import sys, time
    import torch, torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def at_work():
        if "coverage" in sys.modules and sys.modules["coverage"].Coverage.current():
            yield "coverage"
        for name in ("sitecustomize", "ddtrace.bootstrap.sitecustomize"):
            if getattr(sys.modules.get(name), "loaded", False):
                yield "ddtrace"
        if "opentelemetry.trace" in sys.modules:
            provider = sys.modules["opentelemetry.trace"].get_tracer_provider()
            if type(provider).__module__.startswith("opentelemetry.sdk"):
                yield "opentelemetry"
        if hasattr(dist.distributed_c10d, "hooked_by_autowrapt"):
            yield "autowrapt"

    print("at work:", *sorted(set(at_work())), "", flush=True)
    while True:
        weight.grad = torch.ones(1)
        dist.all_reduce(weight.grad)
        optimizer.step()
        time.sleep(0.01)
    """


class Image:
    """An environment in which torch and the other agents can be imported, and nothing starts by itself."""

    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self._site_packages,) = folder.glob("lib/python*/site-packages")

    def start_up_files(self, *files):
        """Put these there, to run in this order, instead of those of the last test."""
        for path in self._site_packages.glob("*.pth"):
            path.unlink()
        # A folder named in a .pth goes on the path; .pth files in it are not read.
        (self._site_packages / "0.pth").write_text(f"{LIBRARY}\n")
        for number, path in enumerate(files, 1):
            shutil.copy(path, self._site_packages / f"{number}.pth")
            if path == OURS:
                (self._site_packages / "0.pth").write_text(f"{LIBRARY}\n{ROOT}\n")


OURS = ROOT / "startup_files" / "autoteardown.pth"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image") / "env")


class Agents:
    """The other agents of one test: what each needs to start."""

    def __init__(self, folder):
        self.folder = folder

    def pth(self, name):
        pytest.importorskip(name)
        (path,) = LIBRARY.glob(f"*{name}*.pth")
        return path

    def path(self, name):
        """What it puts on PYTHONPATH."""
        module = pytest.importorskip(name if name == "ddtrace" else "opentelemetry.instrumentation")
        folder = Path(module.__path__[0])
        return str(folder / ("bootstrap" if name == "ddtrace" else "auto_instrumentation"))

    def variables(self, *names):
        return {name: value for each in names for name, value in getattr(self, f"_{each}")().items()}

    def _coverage(self):
        pytest.importorskip("coverage")
        config = self.folder / "coverage.ini"
        config.write_text(f"[run]\nparallel = true\ndata_file = {self.folder}/data\npatch = subprocess\n")
        return {"COVERAGE_PROCESS_START": config}

    def _ddtrace(self):
        return {
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
            "DD_TRACE_ENABLED": "false",
            "DD_UNLOAD_MODULES_FROM_SITECUSTOMIZE": "0",  # else it does where gevent is installed, as here
        }

    def _opentelemetry(self):
        return {f"OTEL_{what}_EXPORTER": "none" for what in ("TRACES", "METRICS", "LOGS")}

    def _autowrapt(self):
        """A hook of ours on the module that the agent hooks, too."""
        pytest.importorskip("autowrapt")
        about = self.folder / "probe-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[probe]\ntorch.distributed.distributed_c10d = probe:hook\n")
        (self.folder / "probe.py").write_text(
            "def hook(module):\n    module.hooked_by_autowrapt = True\n", encoding="ascii"
        )
        return {"AUTOWRAPT_BOOTSTRAP": "probe"}


@pytest.fixture
def agents(tmp_path):
    folder = tmp_path / "agents"
    folder.mkdir()
    return Agents(folder)


@pytest.fixture
def evicted(job, image, agents, monkeypatch):
    """Run and evict a rank in that image; return it, with what was at work in it."""

    def run(*names, path=(), launcher=(), mode=AGENT, **variables):
        monkeypatch.setattr(sys, "executable", str(image.python))
        whole = os.pathsep.join([*path, str(PROGRAMS), str(agents.folder)])
        rank = job.start(
            PROGRAM,
            mode=mode,
            fresh=True,
            launcher=("env", f"PYTHONPATH={whole}", *launcher),
            **{**agents.variables(*names), **variables},
            AUTOTEARDOWN_GRACE=20,
        )
        at_work = rank.wait_for("^at work: (.*)$", START)[1].split()
        code = rank.evict(20)
        assert "Traceback" not in rank.stderr, rank.transcript()
        if mode == AGENT:
            assert code == 0, rank.transcript()
            # ddtrace has a handler: what the program did in its time, and when it stopped, is not agreed upon.
            expected = "partial" if "ddtrace" in names else "clean"
            assert rank.report()["outcome"] == expected, rank.transcript()
        else:
            assert code == -SIGTERM, rank.transcript()
        return at_work

    return run


def measured(folder):
    """The files of which coverage has saved something."""
    import coverage

    found = set()
    for path in folder.glob("data.*"):
        data = coverage.CoverageData(path)
        data.read()
        found |= {Path(name).name for name in data.measured_files()}
    return found


@pytest.mark.parametrize("order", ["first", "last", "injected"])
@pytest.mark.parametrize("name", ["coverage", "autowrapt"])
def test_another_pth(evicted, image, agents, name, order):
    """coverage's and autowrapt's .pth, before and after ours, and with us on PYTHONPATH. Coverage keeps its data."""
    theirs = agents.pth(name)
    image.start_up_files(*{"first": [OURS, theirs], "last": [theirs, OURS], "injected": [theirs]}[order])
    assert evicted(name, path=[INJECT] if order == "injected" else []) == [name]
    if name == "coverage":
        assert "program.py" in measured(agents.folder)


@pytest.mark.parametrize("order", ["pth", "injected first", "injected last"])
def test_ddtrace(evicted, image, agents, order):
    """Its sitecustomize and ours import each other, whichever is first; our .pth comes before both.

    It has a SIGTERM handler, too, which flushes, puts the default back and raises the signal again.
    """
    image.start_up_files(*[OURS] if order == "pth" else [])
    theirs = agents.path("ddtrace")
    path = {"pth": [theirs], "injected first": [INJECT, theirs], "injected last": [theirs, INJECT]}[order]
    assert evicted("ddtrace", path=path) == ["ddtrace"]


@pytest.mark.parametrize("order", ["pth", "injected first"])
def test_ddtrace_that_unloads_modules(evicted, image, agents, order):
    """With gevent in the image it throws most modules away after its start-up, and programs import new copies of them.

    Injected behind it (`ddtrace-run` puts itself first) its SIGTERM handler has a copy of `signal` that we never see,
    and with that ends the process: the limit that the documentation names.
    """
    theirs = agents.path("ddtrace")
    image.start_up_files(*[OURS] if order == "pth" else [])
    launcher = [str(Path(sys.executable).parent / "ddtrace-run")] if order == "pth" else []
    path = [] if order == "pth" else [INJECT, theirs]
    unload = {"DD_UNLOAD_MODULES_FROM_SITECUSTOMIZE": "1"}
    assert evicted("ddtrace", path=path, launcher=launcher, **unload) == ["ddtrace"]


@pytest.mark.parametrize("order", ["pth", "injected first"])
def test_opentelemetry(evicted, image, agents, order):
    """Its sitecustomize imports no other one, so ours must be first; our .pth comes before both."""
    image.start_up_files(*[OURS] if order == "pth" else [])
    theirs = agents.path("opentelemetry")
    path = [theirs] if order == "pth" else [INJECT, theirs]
    assert evicted("opentelemetry", path=path) == ["opentelemetry"]


def test_opentelemetry_instrument(evicted, image, agents):
    """Its command puts its own folder first, for good. With our .pth that is no matter."""
    agents.path("opentelemetry")
    image.start_up_files(OURS)
    launcher = [str(Path(sys.executable).parent / "opentelemetry-instrument")]
    assert evicted("opentelemetry", launcher=launcher) == ["opentelemetry"]


@pytest.mark.parametrize("order", ["pth first", "pth last", "injected"])
def test_all_of_them(evicted, image, agents, order):
    """The image that has everything."""
    names = ("autowrapt", "coverage", "ddtrace", "opentelemetry")
    variables = [agents.path("ddtrace"), agents.path("opentelemetry")]
    theirs = [agents.pth("coverage"), agents.pth("autowrapt")]
    files = {"pth first": [OURS, *theirs], "pth last": [*theirs, OURS], "injected": theirs}
    image.start_up_files(*files[order])
    path = [INJECT, *variables] if order == "injected" else variables
    assert evicted(*names, path=path) == list(names)
    assert "program.py" in measured(agents.folder)


def test_control_all_of_them(evicted, image, agents):
    """Without us: all at work, and the rank dies of the signal."""
    names = ("autowrapt", "coverage", "ddtrace", "opentelemetry")
    image.start_up_files(agents.pth("coverage"), agents.pth("autowrapt"))
    path = [agents.path("ddtrace"), agents.path("opentelemetry")]
    assert evicted(*names, path=path, mode=NONE) == list(names)
