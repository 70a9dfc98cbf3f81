"""Shared by the benchmarks: medians with their spread, tables, and the line that names the machine."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import shutil
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# c10d looks the name of every client of a store up, on the server's only thread: a lost packet is a time-out.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # harness: real ranks, forked from a process that has torch imported


class Other(NamedTuple):
    """Another version of the agent."""

    name: str
    wheel: Path
    folder: Path  # its packages: in front of a PYTHONPATH it takes the place of the installed one


beside: Other | None = None
"""What `--beside` has named."""


def unpacked(wheel: str) -> Other:
    """The version in that wheel."""
    path = Path(wheel)
    folder = Path(tempfile.mkdtemp(prefix="bench-beside-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(path) as content:
        content.extractall(folder)
    return Other(f"autoteardown {path.name.split('-')[1]}", path.absolute(), folder)


def middle(values: Iterable[float], digits: int = 1) -> str:
    """`12.3 (11.9 to 14.0)`: the median and the quartiles."""
    values = sorted(values)
    if not values:
        return "-"
    low, high = (values[0], values[-1]) if len(values) < 4 else statistics.quantiles(values, n=4)[::2]
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under headers; Markdown, aligned."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(len(row[at]) for row in [list(headers), *rows]) for at in range(len(headers))]
    for row in [list(headers), ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |", flush=True)


def machine() -> str:
    """One line: cores, load, versions."""
    import torch

    import autoteardown

    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return (
        f"{os.cpu_count()} cores, {load}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, autoteardown {autoteardown.__version__}"
    )


class Ranks:
    """Jobs of real ranks, one after another; see `tests/harness.py`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._servers: dict[str, Any] = {}
        self._count = 0

    @contextlib.contextmanager
    def job(self) -> Iterator[Any]:
        """A job, ended and cleared away afterwards."""
        import harness

        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        job = harness.Job(folder, self._server)
        try:
            yield job
        finally:
            job.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _server(self, mode: str) -> Any:
        import harness

        if mode not in self._servers:
            self._servers[mode] = harness.ForkServer(mode)
        return self._servers[mode]

    def close(self) -> None:
        """End the fork servers."""
        for server in self._servers.values():
            server.close()
        shutil.rmtree(self._folder, ignore_errors=True)
