"""Looks up which loaded library, and which function in it, an address belongs to (`dladdr`).

Imports ctypes, as `import torch` does; so it is never imported at start-up.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Optional


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


_dladdr = getattr(ctypes.CDLL(None), "dladdr", None)


class Location(NamedTuple):
    """Where an address lies in memory."""

    library: Optional[int]
    """The address at which the library, or the program, was loaded."""
    function: Optional[int]
    """The address of the exported function that contains the address; None if none does."""


def locate(address: Optional[int]) -> Optional[Location]:
    """The library and function at this address; None if there is none, or the C library cannot tell."""
    found = _DlInfo()
    if _dladdr is None or not _dladdr(ctypes.c_void_p(address), ctypes.byref(found)):
        return None
    return Location(found.base, found.address)
