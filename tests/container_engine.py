"""docker or podman: builds the images of both Dockerfiles, runs jobs in them, and evicts the containers.

1. The images are built from their real bases where the engine has them or can pull them. AUTOTEARDOWN_TEST_BASE_IMAGE
   names another image with torch, which may be smaller than the default of `docker/Dockerfile`.
2. Where podman cannot pull, a stand-in has the names of the bases: an empty root whose /usr, Python and site-packages
   are folders of this machine, mounted while the image is built and while it runs. What the Dockerfiles install goes
   into the image. One Python then compiles for all versions. It needs root.
   docker cannot mount folders into a build: skipped.
3. `stop` does what a kubelet does: SIGTERM to process 1, and SIGKILL after the grace period.
"""

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

ROOT = Path(__file__).parents[1]
DOCKERFILE, INJECT = ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.inject"
_BASE = "AUTOTEARDOWN_TEST_BASE_IMAGE"
_OWN_BASE = re.search(r"^ARG BASE_IMAGE=(\S+)", DOCKERFILE.read_text("utf-8"), re.M).group(1)
_OTHER_BASES = {
    name
    for path in (DOCKERFILE, INJECT)
    for name in re.findall(r"^FROM ([^$\s]+)", path.read_text("utf-8"), re.M)
}

# The second makes sure that a process 1 that does not wait ends before the checkpoint is there.
_CHECKPOINT = """
import os, sys, time, torch
def save():
    main = sys.modules["__main__"]
    time.sleep(1)
    torch.save({"step": main.step, "model": main.model.state_dict()}, f"/job/checkpoint-{os.environ['RANK']}.pt")
"""


class Engine:
    """A container engine of this machine. What podman stores is in a folder of the test's own."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="at-"))  # podman wants a short path
        self.name = f"autoteardown-test-{uuid.uuid4().hex[:8]}"
        self.train, self.inject = f"{self.name}-train", f"{self.name}-inject"
        self.base = os.environ.get(_BASE, _OWN_BASE)
        self.building, self.running, self.containers = [], [], []
        self.env = {**os.environ, "DOCKER_BUILDKIT": "1"}
        self.words = ["docker"]

    def _run(self, *words, timeout=100):
        command = [*self.words, *words]
        return subprocess.run(
            command,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def __call__(self, *words, timeout=100):
        """Run the engine's command; what it prints."""
        result = self._run(*words, timeout=timeout)
        assert result.returncode == 0, f"{words}\n{result.stdout}"
        return result.stdout.strip()

    def _why_not(self, *words, timeout=100):
        """None if this command succeeds; else its last line."""
        try:
            result = self._run(*words, timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if result.returncode == 0 else result.stdout.strip().rpartition("\n")[2]

    def _podman(self):
        around = []
        if os.path.ismount("/sys/fs/cgroup/unified"):  # crun refuses to run with both kinds of cgroups
            around = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified; exec "$@"', "sh"]
        places = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        self.words = [*around, "podman", *places, "--cgroup-manager=cgroupfs"]
        registries = self.folder / "registries.conf"
        registries.write_text('unqualified-search-registries=["docker.io"]\nshort-name-mode="permissive"\n')
        self.env["CONTAINERS_REGISTRIES_CONF"] = str(registries)
        # The defaults of podman are more than a root without CAP_SYS_RESOURCE may set.
        self.running = ["--ulimit=nofile=1024", "--ulimit=nproc=4096"]

    def build(self):
        """Both images, with the engine that is here, from the real bases or from the stand-in."""
        no_docker = self._why_not("version")
        if no_docker:
            self._podman()
            no_podman = self._why_not("info")
            if no_podman:
                pytest.skip(f"no container engine here: {no_docker}; {no_podman}")
        for base in sorted({self.base, *_OTHER_BASES}):
            why_not = self._why_not("image", "inspect", base) and self._why_not("pull", base, timeout=1200)
            if why_not:
                if self.words == ["docker"] or _BASE in os.environ or os.geteuid():
                    pytest.skip(f"cannot pull {base}: {why_not}")
                self._stand_in()
                break
        for path, image in ((DOCKERFILE, self.train), (INJECT, self.inject)):
            words = [*self.building, f"--tag={image}", f"--file={path}"]
            if path == DOCKERFILE:
                words.append(f"--build-arg=BASE_IMAGE={self.base}")
            if self.words != [
                "docker"
            ]:  # docker finds the file; podman 4 looks in the root of the context only
                words.append(f"--ignorefile={path}.dockerignore")
            self("build", *words, str(ROOT), timeout=1200)

    def _stand_in(self):
        """An image with the names of all bases: links into folders of this machine, and a venv."""
        packages = Path(sysconfig.get_path("purelib"))
        config = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True
        )
        of_pip = {Path(each) for each in re.findall(r"(?:file://)?(/[^\s']+)", config.stdout)}
        places = {Path("/usr"), Path(sys.base_prefix), packages}
        build_places = {Path("/etc"), *places, *(each for each in of_pip if each.exists())}
        self.running += _volumes(places)
        self.building = [*_volumes(build_places), "--isolation=chroot", "--network=host"]

        root = self.folder / "stand-in"
        for place in (*build_places, *map(Path, ("/proc", "/sys", "/dev", "/run", "/tmp"))):
            (root / str(place)[1:]).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for link in (each for each in Path("/").iterdir() if each.is_symlink()):  # /bin, /lib, ...
            (root / link.name).symlink_to(os.readlink(link))
        venv = [sys.executable, "-m", "venv", "--symlinks", "--without-pip", str(root / "python")]
        subprocess.run(venv, check=True, timeout=100)
        (site,) = root.glob("python/lib/python3.*/site-packages")
        for each in packages.iterdir():
            if not re.match(r"_?_?(autoteardown|editable)|.*\.pth$|wrapt", each.name):
                (site / each.name).symlink_to(each)
        env = {
            "PATH": "/python/bin:/usr/bin:/bin",
            **{k: v for k, v in os.environ.items() if k.startswith("PIP_")},
        }
        file = self.folder / "Containerfile"
        file.write_text("FROM scratch\nCOPY . /\n" + "".join(f'ENV {k}="{v}"\n' for k, v in env.items()))
        self("build", f"--tag={self.base}", f"--file={file}", str(root))
        for name in _OTHER_BASES:
            self("tag", self.base, name)

    def start(self, job, command, *options, image=None, **env):
        """Start a container in the background; `job` becomes its folder /job. The container's name."""
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
        # A name that resolves without a network: docker has no line for the container in its /etc/hosts then.
        words = ["--detach", f"--name={name}", "--network=none", "--hostname=localhost"]
        words += [f"--volume={job}:/job", *self.running, *options]
        words += [f"--env={key}={value}" for key, value in env.items()]
        words += [f"--entrypoint={command[0]}"] if command else []
        self("run", *words, image or self.train, *command[1:])
        return name

    def evict(self, name, grace=40):
        """Stop the container once its job trains. The exit code and the log."""

        def trains():
            time.sleep(0.3)
            log = self("logs", name)
            assert self("inspect", "--format={{.State.Running}}", name) == "true", log
            return "step 100 " in log

        wait_until(trains, "a job that trains", 300)
        self("stop", f"--time={grace}", name, timeout=grace + 100)
        return int(self("inspect", "--format={{.State.ExitCode}}", name)), self("logs", name)

    def close(self):
        """Remove containers, built images and, with podman, everything else."""
        for words in (("rm", "--force", *self.containers), ("rmi", "--force", self.train, self.inject)):
            self._why_not(*words)
        if self.words != ["docker"]:
            self._why_not("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def _volumes(places):
    """Mount these folders read-only, and none that is inside another."""
    outermost = [each for each in places if not any(other in each.parents for other in places)]
    return [f"--volume={each}:{each}:ro" for each in outermost]
