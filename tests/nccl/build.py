"""Builds the libraries that stand for NVIDIA's, once for each state of their sources and each torch, into a cache.

Each has the SONAME, the symbol version and every exported name of the library that it stands for. A name that the
sources do not define becomes a function that returns an error, and says so in the journal ("NOT THERE ...").

    python build.py SITE_PACKAGES      builds for the torch that is installed there, and prints what LD_PRELOAD needs
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "libraries"
SHARED = Path(__file__).parents[1] / "simulated_accelerator"  # journal.h and peers.h
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoteardown-tests"
OPTIONS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-fvisibility=hidden"]


class CannotBuild(Exception):
    """Why there are no libraries on this machine."""


class Library(NamedTuple):
    soname: str
    stands_for: str  # the wheel's own, under site-packages
    sources: tuple
    prefix: str  # of the names that it exports
    version: str  # of its symbols
    otherwise: int  # what a function returns that the sources do not define
    quiet: bool = False


CUDART = "libcudart.so.13"
LIBRARIES = [
    Library(
        CUDART,
        "nvidia/cu13/lib/libcudart.so.13",
        (
            *(
                "device",
                "capture",
                "memory",
                "cudart_device",
                "cudart_memory",
                "cudart_graph",
                "cudart_kernels",
            ),
            *("compute_elementwise", "compute_reduction", "compute_foreach", "compute_copies"),
        ),
        r"(__)?cuda",
        CUDART,
        801,  # cudaErrorNotSupported
    ),
    Library("libcuda.so.1", "", ("driver",), r"cu[A-Z]", "", 801),
    Library("libnvidia-ml.so.1", "", ("nvml",), r"nvml[A-Z]", "", 3),
    Library(
        "libnccl.so.2",
        "nvidia/nccl/lib/libnccl.so.2",
        ("communicator", "group", "nccl_communicators", "nccl_collectives"),
        r"nccl[A-Z]",
        "",
        5,  # ncclInvalidUsage
    ),
    Library(
        "libcublas.so.13",
        "nvidia/cu13/lib/libcublas.so.13",
        ("cublas",),
        "cublas",
        "libcublas.so.13",
        0,
        True,
    ),
    Library(
        "libcublasLt.so.13",
        "nvidia/cu13/lib/libcublasLt.so.13",
        ("cublaslt",),
        "cublas",
        "libcublasLt.so.13",
        0,
        True,
    ),
]


def _symbols(path, *options):
    said = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in said.splitlines() if line}


def _names(library, site):
    """Every name that the library has to export."""
    if library.stands_for:
        found = _symbols(site / library.stands_for, "-D", "--defined-only")
    else:  # what comes with the GPU and its driver: a header and what torch asks for tell the names
        header = (site / "nvidia/cu13/include/cuda.h").read_text()
        found = set(re.findall(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(", header))
        found |= set(re.findall(r"#define\s+cu\w+\s+(cu\w+)\s*$", header, re.MULTILINE))
        found |= _symbols(site / "torch/lib/libcaffe2_nvrtc.so", "-D", "--undefined-only")
    return {name for name in found if re.match(library.prefix, name) and name.isidentifier()}


def _missing(names, library):
    """Source text of the functions that the sources do not define."""
    said = "" if library.quiet else ' static int said; if (!said++ && tell) tell("NOT THERE " name);'
    yield "__attribute__((weak)) void simulated_tell(const char* text);"
    yield "#define tell simulated_tell"
    yield (
        '#define MISSING(id, name) __attribute__((visibility("default"))) '
        f"int id(void) {{{said} return {library.otherwise}; }}"
    )
    for name in sorted(names):
        yield f'MISSING({name}, "{name}")'


def _run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-6000:]}")


def _link(library, objects, folder, site):
    own = set().union(*(_symbols(each, "-g", "--defined-only") for each in objects))
    missing = folder / f"{library.soname}.missing.c"
    missing.write_text("\n".join(_missing(_names(library, site) - own, library)) + "\n")
    script = folder / f"{library.soname}.map"
    script.write_text(f"{library.version} {{ global: *; }};\n")
    _run(["gcc", "-fPIC", "-fno-builtin", "-w", "-c", missing, "-o", f"{missing}.o"])
    needed = (
        []
        if (not library.version and not library.stands_for) or library.soname == CUDART
        else [folder / CUDART]
    )
    command = ["g++", "-shared", f"-Wl,-soname,{library.soname}", f"-Wl,--version-script={script}", *objects]
    _run([*command, f"{missing}.o", *needed, "-o", folder / library.soname, "-lpthread", "-ldl"])


def key(site):
    """What the result depends on."""
    sources = [*SOURCES.iterdir(), SHARED / "journal.h", SHARED / "peers.h", Path(__file__)]
    parts = [path.read_text() for path in sorted(sources)]
    parts.append((site / "torch" / "version.py").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def folder_of(site):
    return CACHE / f"nccl-{key(site)}"


def preload(folder):
    """The value of LD_PRELOAD: in this order, each finds what it needs of those before it."""
    return ":".join(str(folder / library.soname) for library in LIBRARIES)


def build(site):
    """Return the folder with the libraries for the torch in `site`; build them first if need be (about a minute).

    Raises:
        CannotBuild: this torch has no CUDA 13, or there is no compiler.
    """
    if not (site / LIBRARIES[0].stands_for).exists():
        raise CannotBuild(f"there is no torch for CUDA 13 in {site}")
    folder = folder_of(site)
    if (folder / "whole").exists():
        return folder
    for tool in ("g++", "gcc", "nm"):
        if not shutil.which(tool):
            raise CannotBuild(
                f"the libraries that stand for CUDA and NCCL need {tool}, and there is none on the PATH"
            )
    includes = ["nvidia/cu13/include", "nvidia/nccl/include", "triton/backends/nvidia/include"]
    options = [*OPTIONS, *(f"-I{site / path}" for path in includes)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of several test processes, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "whole").exists():
            return folder
        objects = {library: [folder / f"{source}.o" for source in library.sources] for library in LIBRARIES}
        commands = [
            ["g++", *options, "-c", SOURCES / f"{made.stem}.cpp", "-o", made]
            for each in objects.values()
            for made in each
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        for library, made in objects.items():
            _link(library, made, folder, site)
        (folder / "whole").touch()
    return folder


if __name__ == "__main__":
    print(preload(build(Path(sys.argv[1]))))
