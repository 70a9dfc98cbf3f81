"""Makes the environment variables of a drilled job."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def environment(folder: Path, grace: float, agent: bool) -> dict[str, str]:
    """This process's environment, without the variables of an agent or a launcher around it.

    Args:
        folder: for the reports and the registry.
        grace: the grace period in seconds.
        agent: whether the agent is on.
    """
    foreign = ("AUTOTEARDOWN", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_", "MASTER_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    if env.get("PYTHONPATH"):  # the job runs in another folder
        env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, env["PYTHONPATH"].split(os.pathsep)))
    env.setdefault("OMP_NUM_THREADS", "1")
    if any(name == "lo" for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # so that gloo works if the host name does not resolve
    if agent:
        env.update(AUTOTEARDOWN="1", **settings(folder, grace))
    return env


def settings(folder: Path, grace: float) -> dict[str, str]:
    """The agent's settings in a drilled job."""
    return {
        "AUTOTEARDOWN_GRACE": f"{grace:g}",
        "AUTOTEARDOWN_REPORT_DIR": str(folder / "reports"),
        "AUTOTEARDOWN_RUNTIME_DIR": str(folder / "runtime"),
        "AUTOTEARDOWN_TERMINATION_LOG": "",
    }
