"""Reports on a cloud's VM whether a process watches for the announcement of its end."""

from __future__ import annotations

from pathlib import Path

from autoteardown.cli.doctor.finding import NOTE, OK, Finding
from autoteardown.cloud_notice import machine

_NAMES = {"ec2": "EC2", "gce": "Compute Engine", "azure": "Azure"}
_AREA = "cloud"


def check(root: Path = Path("/")) -> list[Finding]:
    """One finding on a VM of a known cloud; none elsewhere."""
    cloud = machine.cloud(str(root / "sys"))
    if not cloud:
        return []
    watcher = _watcher(root / "proc")
    if watcher is not None:
        return [
            Finding(
                _AREA, OK, f"a VM of {_NAMES[cloud]}; process {watcher} watches for the notice of its end"
            )
        ]
    text = f"a VM of {_NAMES[cloud]}, and no process of this pid namespace watches for the notice of its end"
    advice = "autoteardown watch -- torchrun ..., or autoteardown watch as a service: docs/clouds.md"
    return [Finding(_AREA, NOTE, text, advice)]


def _watcher(proc: Path) -> int | None:
    """The pid of a running `autoteardown watch`."""
    for folder in sorted(proc.glob("[0-9]*")):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")[:8]
        except OSError:
            continue
        for command, option in zip(words, words[1:]):
            if option == b"watch" and command.rpartition(b"/")[2] == b"autoteardown":
                return int(folder.name)
    return None
