"""Measures a Python start from outside: the whole of `python -c pass` and of `python -c "import torch"`.

Each environment is a fresh venv with what its name says and nothing else; torch and the rest come from the environment
that runs this, by a line in a `.pth`. All variants take turns, in another order every round, and each is compared with
its baseline within the round. Processor time is the child's own: it does not see what else the machine is doing.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import common
from benchmarks.common import ROOT, middle, table

# What the others document for every process of an image.
TOOLS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "coverage": (["coverage"], {"COVERAGE_PROCESS_START": "{venv}/coveragerc"}, ""),
    "OpenTelemetry": (
        ["opentelemetry-distro", "opentelemetry-exporter-otlp-proto-http"],
        dict.fromkeys(("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"), "none"),
        "opentelemetry/instrumentation/auto_instrumentation",
    ),
    "ddtrace": (
        ["ddtrace"],
        {"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"},
        "ddtrace/bootstrap",
    ),
}


class Variant(NamedTuple):
    name: str
    baseline: str | None
    argv: list[str]
    env: dict[str, str]


class Venv:
    """An environment of its own."""

    def __init__(self, path: Path, *packages: str) -> None:
        self.path = path
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        self.python = path / "bin" / "python"
        self.site = next(path.glob("lib/*/site-packages"))
        if packages:
            pip = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, *packages], check=True, capture_output=True, text=True)

    def variant(self, name: str, code: str, baseline: str | None = None, **env: str) -> Variant:
        base = {
            key: value for key, value in os.environ.items() if not key.startswith(("AUTOTEARDOWN", "PYTHON"))
        }
        return Variant(name, baseline, [str(self.python), "-c", code], {**base, **env})


def once(variant: Variant) -> tuple[float, float]:
    """Wall and processor milliseconds of one start."""
    start = time.perf_counter()
    pid = os.posix_spawn(variant.argv[0], variant.argv, variant.env)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{variant.name}: exit status {status}")
    return wall * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def compare(title: str, variants: list[Variant], rounds: int) -> None:
    """Print a table of them."""
    walls: Mapping[str, list[float]] = {variant.name: [] for variant in variants}
    cpus: Mapping[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in random.sample(variants, len(variants)):
            wall, cpu = once(variant)
            if number:  # the first round reads the disk
                walls[variant.name].append(wall)
                cpus[variant.name].append(cpu)
    rows = []
    for name, baseline, *_ in variants:
        more, share = "", ""
        if baseline is not None:
            differences = [mine - its for mine, its in zip(walls[name], walls[baseline])]
            more = middle(differences, 2)
            share = f"{statistics.median(differences) / statistics.median(walls[baseline]):+.1%}"
        rows.append([name, middle(walls[name], 2), middle(cpus[name], 2), more, share])
    table([title, "wall, ms", "processor, ms", "more than its baseline, ms", ""], rows)
    print()


def tool(folder: Path, name: str) -> Variant | None:
    packages, env, bootstrap = TOOLS[name]
    try:
        venv = Venv(folder / name, *packages)
    except subprocess.CalledProcessError as error:
        print(f"({name} left out: {(error.stderr or str(error)).strip().splitlines()[-1]})")
        return None
    if name == "coverage":
        (venv.path / "coveragerc").write_text("[run]\nparallel = true\ndata_file = /dev/null\n")
        (venv.site / "cover.pth").write_text("import coverage; coverage.process_startup()\n")
    env = {key: value.format(venv=venv.path) for key, value in env.items()}
    if bootstrap:
        env["PYTHONPATH"] = str(venv.site / bootstrap)
    return venv.variant(f"{name}, on", "pass", "nothing installed", **env)


def run(quick: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        bare = Venv(folder / "bare")
        ours = Venv(folder / "ours", str(ROOT))
        on = {"AUTOTEARDOWN": "1"}
        variants = [
            bare.variant("nothing installed", "pass"),
            bare.variant("nothing installed, once more", "pass", "nothing installed"),
            ours.variant("autoteardown, switch unset", "pass", "nothing installed"),
            ours.variant("autoteardown, AUTOTEARDOWN=0", "pass", "nothing installed", AUTOTEARDOWN="0"),
            ours.variant("autoteardown, on", "pass", "nothing installed", **on),
            bare.variant("import signal, nothing installed", "import signal"),
            ours.variant("import signal, on", "import signal", "import signal, nothing installed", **on),
        ]
        other = common.beside
        theirs = Venv(folder / "theirs", str(other.wheel)) if other else None
        if other and theirs:
            signals = "import signal, nothing installed"
            variants += [
                theirs.variant(f"{other.name}, switch unset", "pass", "nothing installed"),
                theirs.variant(f"{other.name}, on", "pass", "nothing installed", **on),
                theirs.variant(f"import signal, {other.name} on", "import signal", signals, **on),
            ]
        tools = [tool(folder, name) for name in TOOLS]
        compare("`python -c pass`", variants + [each for each in tools if each], 10 if quick else 100)
        for venv in filter(None, (bare, ours, theirs)):
            (venv.site / "rest.pth").write_text(sysconfig.get_path("purelib"))
        code = "import torch.distributed"
        variants = [
            bare.variant("torch, nothing installed", code),
            ours.variant("torch, switch unset", code, "torch, nothing installed"),
            ours.variant("torch, on", code, "torch, nothing installed", **on),
        ]
        if other and theirs:
            name = f"torch, {other.name} on"
            variants.append(theirs.variant(name, code, "torch, nothing installed", **on))
        compare("`python -c 'import torch.distributed'`", variants, 2 if quick else 15)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
