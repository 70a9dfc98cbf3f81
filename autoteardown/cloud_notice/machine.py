"""Tells which cloud this machine is a VM of, by the strings that its firmware has (DMI).

The network is not asked: on a machine that is no VM of that cloud, the address of its metadata service may belong to
anything.
"""

from __future__ import annotations

import os

_AZURES_CHASSIS = (
    "7783-7084-3265-9085-8269-3286-77"  # the asset tag of every VM of Azure, and of no other Hyper-V
)


def cloud(root: str = "/sys") -> str:
    """`ec2`, `gce` or `azure`; empty if it is none of them, or unknown."""
    if "Amazon EC2" in (_dmi(root, "sys_vendor"), _dmi(root, "bios_vendor")):
        return "ec2"
    if "amazon" in _dmi(root, "bios_version").lower() or _read(root, "hypervisor/uuid").lower().startswith(
        "ec2"
    ):
        return "ec2"  # Xen
    if _dmi(root, "product_name") == "Google Compute Engine":
        return "gce"
    return "azure" if _dmi(root, "chassis_asset_tag") == _AZURES_CHASSIS else ""


def described(root: str = "/sys") -> str:
    """Vendor and product of this machine, as its firmware tells them; empty: it does not."""
    return " ".join(filter(None, (_dmi(root, "sys_vendor"), _dmi(root, "product_name"))))


def _dmi(root: str, name: str) -> str:
    return _read(root, f"class/dmi/id/{name}")


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            return "".join(letter for letter in file.read(200).strip() if letter.isprintable())
    except OSError:
        return ""
