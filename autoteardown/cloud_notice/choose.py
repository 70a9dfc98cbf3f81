"""Makes the source that `--source` names."""

from __future__ import annotations

from autoteardown.cloud_notice import azure, ec2, file, gce, http, machine
from autoteardown.cloud_notice.source import Source

CLOUDS: dict[str, type[Source]] = {each.name: each for each in (ec2.EC2, gce.GCE, azure.Azure)}
ALLOWED = "auto, ec2, gce, azure or file:PATH"


class Nothing(Exception):
    """There is nothing to watch on this machine; the text says why."""


def source(name: str, endpoint: tuple[str, int] | None, rebalance: bool) -> Source:
    """The source of that name; `auto`: that of the cloud that this machine is a VM of.

    Raises:
        Nothing: `auto`, on a machine that is no VM of these clouds.
    """
    if name.startswith("file:"):
        return file.File(name[5:])
    if name == "auto":
        name = machine.cloud()
        if not name:
            what = machine.described()
            raise Nothing(
                f"this machine is no VM of EC2, Compute Engine or Azure ({what or 'its firmware names no vendor'}), so "
                "no notice can be expected; --source names a cloud, or file:PATH"
            )
    where = endpoint or http.address(CLOUDS[name].address)
    return ec2.EC2(where, rebalance) if name == "ec2" else CLOUDS[name](where)
