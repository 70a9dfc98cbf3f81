"""The code that calls torch, against the API shapes of torch 2.4 to the newest, and against every wrapt.

`torch_shapes.json` is read out of torch's own wheels by `torch_shapes.py`; a fake is a module with those names. What
the functions do is what the sources of that version do with the groups of a process.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from harness import wait_until

from autoteardown.process_groups import operations

SHAPES = json.loads((Path(__file__).parent / "torch_shapes.json").read_text())
VERSIONS = sorted(SHAPES, key=lambda version: [int(part) for part in version.split(".")])
C10D = "torch/distributed/distributed_c10d.py"
ROOT = Path(__file__).parents[2]


def has(version, where, name):
    return name in SHAPES[version][where].split()


class Fake:
    """A torch of that version, with these groups: {name: backend config}."""

    def __init__(self, version, groups):
        self.version = version
        self.events = []
        self.together = threading.Barrier(
            sum("nccl" in config for config in groups.values()) or 1, timeout=20
        )
        self.c10d = ModuleType("torch.distributed.distributed_c10d")
        self.groups = {name: self._group(name, config) for name, config in groups.items()}
        self.c10d._world = SimpleNamespace(
            pg_names={group: name for name, group in self.groups.items()},
            pg_backend_config={group: groups[name] for name, group in self.groups.items()},
        )
        self.c10d.GroupMember = SimpleNamespace(WORLD=next(iter(self.groups.values())))
        answers = {"get_rank": 1, "get_world_size": 4, "get_backend": "nccl", "_get_default_store": "store"}
        for name in SHAPES[version][C10D].split():
            setattr(self.c10d, name, getattr(self, name, lambda *args, name=name: answers[name]))
        self.torch = ModuleType("torch")
        self.torch.device = lambda name: name
        self.torch._C = SimpleNamespace()

    def _group(self, name, config):
        backend = self._methods("ProcessGroupNCCL", name, {"abort": "aborted", "_shutdown": "aborted"})

        def get_backend(device):
            if "nccl" not in config:
                raise RuntimeError(f"No backend type associated with device type {device}")
            return backend

        group = self._methods("ProcessGroup", name, {"abort": "aborted", "shutdown": "shut down"})
        if has(self.version, "ProcessGroup", "_get_backend"):
            group._get_backend = get_backend
        return group

    def _methods(self, kind, name, meanings):
        """An object with the methods that the class has in this version, and that write down what they do."""

        def record(event):
            def method():
                if event == "aborted":
                    self.together.wait()  # NCCL: returns when all are being aborted (pytorch/pytorch#119797)
                self.events.append((event, name))

            return method

        found = {each: record(event) for each, event in meanings.items() if has(self.version, kind, each)}
        # A class of its own: a SimpleNamespace cannot be hashed.
        return type(kind, (), {"__init__": lambda self: self.__dict__.update(found)})()

    def is_initialized(self):
        return bool(self.c10d._world.pg_names)

    def destroy_process_group(self, group=None):
        for each in sorted(self.c10d._world.pg_names.values(), reverse=True):
            self.events.append(("destroyed", each))
        self.c10d._world.pg_names.clear()

    def _shutdown_backend(self, group):
        raise AssertionError("torch's own business")

    def _abort_process_group(self, group=None):
        raise AssertionError("takes every group for the default one, and empties the tables of _world")


@pytest.fixture
def fake(monkeypatch):
    """Makes a fake torch the one that is imported."""

    def make(version, **groups):
        made = Fake(version, groups or {"0": "cpu:gloo,cuda:nccl"})
        monkeypatch.setitem(sys.modules, "torch", made.torch)
        monkeypatch.setitem(sys.modules, "torch.distributed.distributed_c10d", made.c10d)
        return made

    return make


@pytest.mark.parametrize("version", VERSIONS)
def test_what_every_version_must_have(version):
    """What the agent uses without asking whether it is there."""
    shape = SHAPES[version]
    needed = {
        C10D: "init_process_group destroy_process_group is_initialized get_rank get_world_size get_backend"
        " _get_default_store",
        "_World": "pg_names pg_backend_config",
        "torch/optim/optimizer.py": "register_optimizer_step_post_hook",
        "torch/serialization.py": "save",
        "torch/distributed/checkpoint/state_dict_saver.py": "save async_save",
        "torch/utils/data/_utils/signal_handling.py": "_set_worker_signal_handlers",
        "torch/cuda/__init__.py": "is_initialized synchronize device_count",
        "Store": "add set get compare_set set_timeout",
        "TCPStore": "host port",
        "PrefixStore": "underlying_store",
    }
    missing = {where: set(names.split()) - set(shape[where].split()) for where, names in needed.items()}
    assert not any(missing.values()), missing


def test_the_shapes_of_the_installed_torch_are_the_recorded_ones():
    """What was read from sources and stubs is what there is at run time."""
    torch = pytest.importorskip("torch")
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    version = torch.__version__.partition("+")[0]
    if version not in SHAPES:
        pytest.skip(f"no shape of torch {version} is recorded: add it with torch_shapes.py")
    for name in ("_abort_process_group", "_shutdown_backend", "_get_default_store"):
        assert hasattr(distributed_c10d, name) == has(version, C10D, name)
    for name in ("abort", "shutdown"):
        assert hasattr(dist.ProcessGroup, name) == has(version, "ProcessGroup", name)
    for name in SHAPES[version]["Store"].split():
        assert hasattr(dist.Store, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_world(fake, version):
    made = fake(version)
    assert operations.world() == (1, 4, "nccl", "store", "")
    made.c10d._get_default_store = lambda: 1 / 0
    assert operations.world().store is None
    made.destroy_process_group()
    assert operations.world() is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "config, expected",
    [("nccl", True), ("cuda:nccl", True), ("cpu:gloo,cuda:nccl", True), ("gloo", False), ("cpu:gloo", False)],
)
def test_whether_there_is_something_to_abort(fake, version, config, expected):
    fake(version, a=config)
    assert operations.can_abort() is expected


@pytest.mark.parametrize("version", VERSIONS)
def test_abort(fake, version):
    """Every group's communicators once, children's too, all at the same time; torch's tables are left alone."""
    made = fake(version, **{"0": "cpu:gloo,cuda:nccl", "1": "nccl", "2": "gloo", "3": "cuda:nccl"})
    done = []
    operations.abort(done.append)
    wait_until(lambda: done, "the aborts", 20)
    assert done == [None]
    assert sorted(made.events) == [("aborted", "0"), ("aborted", "1"), ("aborted", "3")]
    assert made.is_initialized()


@pytest.mark.parametrize("version", VERSIONS)
def test_destroy(fake, version):
    made = fake(version, **{"0": "nccl", "1": "nccl"})
    assert operations.destroy(made.c10d.destroy_process_group) is None
    assert made.events == [("destroyed", "1"), ("destroyed", "0")]
    assert operations.destroy(lambda: 1 / 0) is None, "the program was faster"
    made.c10d._world.pg_names["group"] = "0"
    assert "ZeroDivisionError" in operations.destroy(lambda: 1 / 0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("contexts", [None, {0, 2}, set()])
def test_drain(fake, version, contexts):
    """Only what is initialised, and of that only the devices that have a context, where that can be asked."""
    made, synchronized = fake(version), []
    made.torch.cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 4, synchronize=synchronized.append
    )
    made.torch.xpu = SimpleNamespace(is_initialized=lambda: False, synchronize=lambda device: 1 / 0)
    if contexts is not None:
        made.torch._C._cuda_hasPrimaryContext = contexts.__contains__
    assert operations.drain() is None
    assert synchronized == (sorted(contexts) if contexts else [None])


# -- wrapt -----------------------------------------------------------------------------------------------------------

OLDEST, NEWEST = "wrapt==1.14.0", "wrapt<3"  # the range in pyproject.toml


def environment_with(folder, wrapt, python, *packages):
    """An environment with that wrapt and this package, installed as users do; its python, and how to run pytest."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    executable = folder / "bin" / "python"
    pip = [executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, wrapt, *packages], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", ROOT], check=True)
    return executable


def suite_passes(executable, *tests):
    command = [executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # Away from the source tree, which would be imported instead of what is installed.
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wrapt", [OLDEST, NEWEST])
def test_both_ends_of_the_range_of_wrapt(tmp_path, wrapt):
    """With this torch: everything that goes through a hook on an import."""
    executable = environment_with(
        tmp_path / "venv", wrapt, sys.executable, "hatchling", "hatch-fancy-pypi-readme"
    )
    # torch, pytest and the rest come from here; what is installed there comes first.
    (next((tmp_path / "venv").glob("lib/*/site-packages")) / "rest.pth").write_text(
        sysconfig.get_path("purelib")
    )
    suite_passes(executable, "image/test_startup.py", "processes/test_checkpoint.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wrapt", [OLDEST, NEWEST])
@pytest.mark.parametrize("minor", [9, 10, 11, 12, 13, 14, 15])
def test_every_python_at_hand(tmp_path, minor, wrapt):
    """Without torch: the gate, the interceptor, the hooks on a torch that is a few lines long."""
    python = shutil.which(f"python3.{minor}")
    # A version manager's shim may be there without the Python that it stands for.
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python3.{minor} on the PATH")
    needs = ("hatchling", "hatch-fancy-pypi-readme", "pytest", "pytest-timeout", "hypothesis")
    executable = environment_with(tmp_path / "venv", wrapt, python, *needs)
    suite_passes(
        executable,
        *(
            "image/test_startup.py",
            "unit/test_settings.py",
            "unit/test_registry.py",
            "unit/test_torch_versions.py",
        ),
    )
