"""Tells whether a worker that has ended was evicted or failed, from the entry that it left in the node's registry.

1. The exit code is not enough: a program may exit with 143 for reasons of its own.
2. A rank that the agent ends writes its outcome and its exit code into its entry, and lets the entry stay while a
   marker is up. `autoteardown drain` reads these entries. A launcher puts up a marker for as long as it has workers.
3. A stop can have a failure behind it: a peer has vanished, or the program has died of an exception in the stop. The
   entry says so. That is for torchrun to report and to count, as without the agent.
4. An entry's name is the identity of its process. The names are taken while the workers run, so the entry of another
   process that had the same pid is never read.
5. Without a registry nothing is known, and a worker has failed as without the agent.
"""

from __future__ import annotations

import os

from autoteardown.node import entry, registry, safe_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Evidence:
    """The registry entries that the workers of one launcher leave behind."""

    def __init__(self, runtime_dir: str) -> None:
        self._path = safe_folder.absolute(runtime_dir)
        self._names: dict[int, str] = {}
        self._marker: registry.DrainMarker | None = None

    def gather(self) -> None:
        """Have ranks leave their entries from now on. The registry's folder may not exist yet."""
        try:
            os.close(safe_folder.open_own(self._path, create=True))
        except OSError:
            return
        self._marker = registry.DrainMarker(self._path)

    def expect(self, pids: Iterable[int]) -> None:
        """Remember the identities of these processes, which run or have not been waited for yet."""
        self._names.update((pid, entry.name_of(pid)) for pid in pids)

    def evicted(self, pid: int, code: int) -> bool:
        """Whether that process ended with this code because of an eviction, and not of a failure."""
        name = self._names.get(pid)
        if name is None:
            return False
        try:
            descriptor = safe_folder.open_own(self._path)
            try:
                found = entry.load(descriptor, name)
            finally:
                os.close(descriptor)
        except OSError:
            return False
        return (
            found is not None and found.outcome is not None and not found.failed and found.exit_code == code
        )

    def close(self) -> None:
        """Remove the marker: the last worker has ended."""
        if self._marker is None:
            return
        self._marker.close()
        self._marker = None
        registry.read(self._path)  # removes the entries of the dead, unless a drain wants them
