"""Builds the extension, once for each state of its sources and each torch, into a cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
NAME = "simulated_accelerator_extension"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoteardown-tests"


class CannotBuild(Exception):
    """Why the extension cannot be had on this machine."""


def sources():
    return sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])


def key():
    """What the result depends on."""
    import torch

    parts = [torch.__version__, sysconfig.get_config_var("SOABI") or sys.version]
    parts += [path.read_text() for path in sources()]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compiler():
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise CannotBuild("the simulated accelerator needs a C++ compiler, and there is none on the PATH")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise CannotBuild("the simulated accelerator needs the headers of Python")
    return found


def build(cache=CACHE):
    """Return the path of the extension for this torch; build it first if need be (about two minutes).

    Raises:
        CannotBuild: there is no compiler, or torch has no headers.
    """
    folder = cache / key()
    target = folder / f"{NAME}.so"
    if target.exists():
        return target
    command = compiler()
    import torch
    import torch.distributed

    if not hasattr(torch.distributed.ProcessGroup, "abort"):
        raise CannotBuild("the simulated accelerator needs torch 2.7, whose backends can be aborted")
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of several test processes, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
        if not any((Path(path) / "torch" / "library.h").exists() for path in includes):
            raise CannotBuild("this torch comes without its C++ headers")
        abi = int(torch.compiled_with_cxx11_abi())
        options = [
            "-O0",
            "-std=c++20",
            "-fPIC",
            "-w",
            f"-DTORCH_EXTENSION_NAME={NAME}",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        ]
        options += [option for path in includes for option in ("-isystem", path)]
        running = {}
        for path in HERE.glob("*.cpp"):
            made = folder / f"{path.stem}.o"
            arguments = [command, *options, "-c", str(path), "-o", str(made)]
            running[made] = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for each in running.values():
            said, _ = each.communicate()
            if each.returncode:
                raise RuntimeError(f"the simulated accelerator does not compile: {said[-6000:]}")
        libraries = [
            option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")
        ]
        names = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
        unfinished = folder / "unfinished.so"
        subprocess.run(
            [command, "-shared", *map(str, running), *libraries, *names, "-o", str(unfinished)], check=True
        )
        for made in running:
            made.unlink()
        unfinished.rename(target)
    return target


if __name__ == "__main__":
    print(build())
