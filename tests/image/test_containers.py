"""Builds both Dockerfiles with docker or podman, and evicts the built images with the engine's own `stop`.

1. Where the engine can pull, the images are built from their real bases. AUTOTEARDOWN_TEST_BASE_IMAGE names another
   image with torch, which may be smaller than the default of `docker/Dockerfile`.
2. Where podman cannot pull, a stand-in has the names of the bases: an empty root whose /usr, Python and site-packages
   are folders of this machine, mounted while the image is built and while it runs. What the Dockerfiles install goes
   into the image. One Python then compiles for all versions. docker cannot mount folders into a build: skipped.
3. `stop` is what a kubelet does: SIGTERM to process 1, and SIGKILL after the grace period.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from harness import wait_until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
DOCKERFILE, INJECT = ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.inject"
_FROM = re.compile(r"^FROM ([a-z]\S+)", re.M)
_DEFAULT_BASE = re.search(r"^ARG BASE_IMAGE=(\S+)", DOCKERFILE.read_text(), re.M).group(1)
_TORCHRUN = ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]

# A second in which only this rank's checkpoint is incomplete: long enough for a process 1 that does not wait.
_CHECKPOINT = """
import os, sys, time, torch
def save():
    main = sys.modules["__main__"]
    time.sleep(1)
    torch.save({"step": main.step, "model": main.model.state_dict()}, f"/job/checkpoint-{os.environ['RANK']}.pt")
"""


class Engine:
    """docker, or podman with all that it stores in a folder of the test."""

    def __init__(self, folder):
        self.folder = folder
        self.name = f"autoteardown-test-{uuid.uuid4().hex[:8]}"
        self.train, self.inject = f"{self.name}-train", f"{self.name}-inject"
        self.base = os.environ.get("AUTOTEARDOWN_TEST_BASE_IMAGE", _DEFAULT_BASE)
        self.building, self.running, self.containers = [], [], []
        no_docker = self._why_not("docker", "version")
        self.words = self._podman(no_docker) if no_docker else ["docker"]

    @staticmethod
    def _why_not(*words):
        """None if this succeeds; else the last line of what the engine says."""
        try:
            result = subprocess.run(words, capture_output=True, text=True, timeout=100)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if result.returncode == 0 else result.stderr.strip().rpartition("\n")[2]

    def _podman(self, no_docker):
        around = []
        if os.path.ismount("/sys/fs/cgroup/unified"):  # crun refuses both hierarchies at once
            hidden = 'umount /sys/fs/cgroup/unified; exec "$@"'
            around = ["unshare", "--mount", "sh", "-c", hidden, "sh"]
        registries = self.folder / "registries.conf"
        registries.write_text('unqualified-search-registries = ["docker.io"]\nshort-name-mode = "permissive"\n')
        os.environ["CONTAINERS_REGISTRIES_CONF"] = str(registries)
        places = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        words = [*around, "podman", *places, "--cgroup-manager=cgroupfs"]
        no_podman = self._why_not(*words, "info")
        if no_podman:
            pytest.skip(f"no container engine here: {no_docker}; {no_podman}")
        # podman's own defaults are more than a root without CAP_SYS_RESOURCE may set.
        self.running += ["--ulimit=nofile=1024", "--ulimit=nproc=4096"]
        return words

    def __call__(self, *words, timeout=100):
        result = subprocess.run([*self.words, *words], capture_output=True, text=True, timeout=timeout)
        assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
        return result.stdout.strip()

    def build(self):
        """Both images, from the real bases or from the stand-in."""
        cannot_pull = self._why_not(*self.words, "pull", "busybox:1.37.0")
        if cannot_pull:
            if self.words == ["docker"]:
                pytest.skip(f"docker can mount no stand-in into a build, and pulls nothing here: {cannot_pull}")
            self._stand_in()
        for path, image in ((DOCKERFILE, self.train), (INJECT, self.inject)):
            words = ["--build-arg", f"BASE_IMAGE={self.base}"] if path == DOCKERFILE else []
            if self.words != ["docker"]:  # which finds it; podman 4 looks in the root of the context only
                words.append(f"--ignorefile={path}.dockerignore")
            self("build", *self.building, *words, "--tag", image, "--file", str(path), str(ROOT), timeout=1500)

    def _stand_in(self):
        """An image with the names of all bases: links into the folders of this machine, and a venv."""
        packages = Path(sysconfig.get_path("purelib"))
        pips = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
        named = {Path(each) for each in re.findall(r"(?:file://)?(/[^\s']+)", pips.stdout)}
        real = [Path(each) for each in ("/usr", sys.base_prefix, packages)]
        shared = {each for each in real if not any(other in each.parents for other in real)}
        building = {Path("/etc"), *shared, *(each for each in named if each.exists() and each.parts[1] != "etc")}
        self.running += [f"--volume={each}:{each}:ro" for each in shared]
        self.building = [f"--volume={each}:{each}:ro" for each in building] + ["--isolation=chroot", "--network=host"]

        root = self.folder / "stand-in"
        for name in ("etc", "proc", "sys", "dev", "run", *(str(each)[1:] for each in building)):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o1777)
        for each in Path("/").iterdir():
            if each.is_symlink():  # /bin, /lib, ...
                (root / each.name).symlink_to(os.readlink(each))
        venv = [sys.executable, "-m", "venv", "--symlinks", "--without-pip", str(root / "python")]
        subprocess.run(venv, check=True, timeout=100)
        (site,) = root.glob("python/lib/python3.*/site-packages")
        for each in packages.iterdir():
            if not re.match(r"_?_?(autoteardown|editable)|.*\.pth$|wrapt", each.name):
                (site / each.name).symlink_to(each)
        pip = "".join(f"ENV {name}={value}\n" for name, value in os.environ.items() if name.startswith("PIP_"))
        file = self.folder / "Containerfile"
        file.write_text(f"FROM scratch\nCOPY . /\nENV PATH=/python/bin:/usr/bin:/bin\n{pip}")
        self("build", "--tag", self.base, "--file", str(file), str(root))
        for path in (DOCKERFILE, INJECT):
            for name in _FROM.findall(path.read_text()):
                self("tag", self.base, name)

    def start(self, job, command, *options, image=None, **env):
        """Start a container in the background, with the folder `job` in it as /job. Its name."""
        name = f"{self.name}-{len(self.containers)}"
        self.containers.append(name)
        job.mkdir()
        (job / "checkpoint.py").write_text(_CHECKPOINT)
        env = {
            "PYTHONPATH": "/job",
            "AUTOTEARDOWN_ON_TEARDOWN": "checkpoint:save",
            "AUTOTEARDOWN_REPORT_DIR": "/job/reports",
            "AUTOTEARDOWN_EXIT_CODE": "signal",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        words = [word for item in env.items() for word in ("--env", "=".join(item))]
        entry = [f"--entrypoint={command[0]}"] if command else []
        words += ["--detach", "--network=none", f"--volume={job}:/job", *self.running, *entry, *options]
        self("run", "--name", name, *words, image or self.train, *command[1:])
        return name

    def evict(self, name, grace=40):
        """SIGTERM to process 1 once the job trains, SIGKILL `grace` seconds later. The exit code and the output."""

        def look():
            log = self.log(name)
            assert self("inspect", "--format={{.State.Running}}", name) == "true", log
            time.sleep(0.3)
            return "step 100 " in log

        wait_until(look, "a job that trains", 120)
        self("stop", "--time", str(grace), name)
        return int(self("inspect", "--format={{.State.ExitCode}}", name)), self.log(name)

    def log(self, name):
        words = [*self.words, "logs", name]
        return subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
        ).stdout

    def close(self):
        for name in self.containers:
            subprocess.run([*self.words, "rm", "--force", name], capture_output=True, timeout=100)
        subprocess.run([*self.words, "rmi", "--force", self.train, self.inject], capture_output=True, timeout=100)
        if self.words != ["docker"]:
            subprocess.run([*self.words, "rmi", "--all", "--force"], capture_output=True, timeout=100)
            del os.environ["CONTAINERS_REGISTRIES_CONF"]
            shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(Path(tempfile.mkdtemp(prefix="at-")))  # podman wants a short path
    try:
        engine.build()
        yield engine
    finally:
        engine.close()


def _check(job, log, ranks):
    """A checkpoint of each rank, after the same iteration, and reports that call the stop clean."""
    reports = [json.loads(path.read_text()) for path in (job / "reports").glob("*.json")]
    assert sorted((report["rank"], report["outcome"]) for report in reports) == [
        (rank, "clean") for rank in range(ranks)
    ], log
    assert len({report["steps"]["stopped_at"] for report in reports}) == 1, log
    assert {path.name for path in job.glob("*.pt")} == {f"checkpoint-{rank}.pt" for rank in range(ranks)}, log
    return reports


def _nothing_saved(job):
    return not list(job.glob("*.pt")) and not list(job.glob("reports/*.json"))


@pytest.mark.parametrize("options", [(), ("--tty",)], ids=["plain", "tty"])
def test_torchrun_is_process_1(engine, tmp_path, options):
    name = engine.start(tmp_path / "job", _TORCHRUN, *options)
    code, log = engine.evict(name)
    _check(tmp_path / "job", log, 2)
    assert code == 143 and "2 of 2 workers have left" in log, log


def test_the_entrypoint_is_process_1(engine, tmp_path):
    code, log = engine.evict(engine.start(tmp_path / "job", []))
    (report,) = _check(tmp_path / "job", log, 1)
    assert (report["pid"], code) == (1, 143), log


def test_control_without_the_agent(engine, tmp_path):
    code, log = engine.evict(engine.start(tmp_path / "job", _TORCHRUN, AUTOTEARDOWN="0"))
    assert _nothing_saved(tmp_path / "job") and code == 1 and "SignalException" in log, log


_COMMAND = " ".join(_TORCHRUN)
_TRAP = f"trap 'kill -TERM $pid' TERM; {_COMMAND} & pid=$!; wait $pid"


@pytest.mark.parametrize(
    "shell, script, saves, code",
    [
        ("sh", _COMMAND, False, 137),  # after the whole grace period
        ("sh", f"exec {_COMMAND}", True, 143),
        ("bash", _COMMAND, True, 143),
        ("sh", _TRAP, False, 143),  # at once: the kernel kills the ranks when process 1 ends
        ("sh", f"{_TRAP}; wait $pid", True, 143),
    ],
    ids=["sh", "sh-exec", "bash", "trap-and-wait", "trap-and-two-waits"],
)
def test_a_shell_is_process_1(engine, tmp_path, shell, script, saves, code):
    """What docs/kubernetes.md says of shells."""
    words = ["--rm", *engine.running, "--entrypoint=readlink", engine.train, "-f", "/bin/sh"]
    if shell == "sh" and not engine("run", *words).endswith("dash"):
        pytest.skip("the image's sh is not dash")
    name = engine.start(tmp_path / "job", [shell, "-c", script])
    found, log = engine.evict(name, grace=40 if saves else 5)
    assert found == code, log
    if saves:
        _check(tmp_path / "job", log, 2)
    else:
        assert _nothing_saved(tmp_path / "job"), log


def test_the_injected_agent(engine, tmp_path):
    """The init container fills a volume; the base image, which has no agent, trains with it."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    engine("run", "--rm", *engine.running, f"--volume={volume}:/autoteardown", engine.inject)
    assert (volume / "autoteardown" / "_inject" / "sitecustomize.py").exists()
    options = (f"--volume={volume}:/autoteardown:ro", f"--volume={ROOT / 'docker'}:/app:ro", "--workdir=/app")
    path = "/autoteardown/autoteardown/_inject:/job"
    name = engine.start(
        tmp_path / "job", _TORCHRUN, *options, image=engine.base, PYTHONPATH=path, AUTOTEARDOWN="1"
    )
    code, log = engine.evict(name)
    _check(tmp_path / "job", log, 2)
    assert code == 143, log
