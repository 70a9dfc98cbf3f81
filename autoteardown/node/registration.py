"""Writes and removes this process's own entry in the node's registry of armed ranks."""

from __future__ import annotations

import json
import os
import time

from autoteardown import unpatched
from autoteardown.node import procfs, registry, safe_folder
from autoteardown.node.entry import own_name, plain

TYPE_CHECKING = False  # typing costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from autoteardown.node.registry import Problem

    Defer = Callable[[Callable[[], object]], object]


_LOOK, _PATIENCE = 0.005, 40  # seconds between looks at the threads that write, and how many: 0.2 s


class Registration:
    """This process's own entry. Any thread may call any method at any time; none raises, none locks."""

    __slots__ = ("_defer", "_fields", "_final", "_path", "_pid", "_removed", "_writing", "name")

    def __init__(self, path: str, name: str, fields: Mapping[str, object], defer: Defer) -> None:
        """Use `enter`."""
        self.name = name
        self._defer = defer
        self._path = path
        self._pid = os.getpid()
        self._final = False  # the fields do not change any more
        self._removed = False  # and the file must not exist any more
        self._writing: list[int] = []  # the threads that are publishing
        self._fields = {key: plain(value) for key, value in fields.items()}

    def update(self, **fields: object) -> None:
        """Change fields, and publish the entry."""
        if self._final or os.getpid() != self._pid:  # a forked child has inherited its parent's entry
            return
        self._fields.update({key: plain(value) for key, value in fields.items()})
        self._defer(self._try_to_publish)

    def _try_to_publish(self) -> None:
        try:
            self._publish()
        except Exception:
            pass

    def leave(self, outcome: str | None = None, exit_code: int | None = None, **fields: object) -> None:
        """Remove the entry, or leave it with the outcome if a drain waits for it.

        Args:
            outcome: None: the rank is disarmed; else the process is about to exit with this outcome. May be called
                again: the last outcome counts.
            exit_code: the exit code that the process is about to return.
            fields: what else the entry is to say then.
        """
        if os.getpid() != self._pid or (outcome is None and "outcome" in self._fields):
            return
        self._final = True
        try:
            descriptor = safe_folder.open_own(self._path)
        except Exception:
            self._removed = True  # another thread may still create it
            return
        try:
            try:
                if outcome is None or not registry.markers(descriptor):
                    # Set first: a thread that is publishing the entry checks this afterwards.
                    self._removed = True
                    self._wait_for_others()
                    safe_folder.remove(descriptor, self.name)
                    return
            finally:
                os.close(descriptor)
            self._removed = False  # a drain of this node will read it
            fields = {"outcome": outcome, "exit_code": exit_code, **fields, "state": "left"}
            self._fields.update({key: plain(value) for key, value in fields.items()})
            self._wait_for_others()
            self._publish()
        except Exception:
            pass

    def _wait_for_others(self) -> None:
        """Let threads end that are publishing what was true before: the process ends before they could look again."""
        for _ in range(_PATIENCE):
            if all(ident == unpatched.get_ident() for ident in list(self._writing)):
                return
            unpatched.sleep(_LOOK)

    def time_left(self) -> float | None:
        """Seconds until the drain of this process kills it; None if no drain has announced that. Reads a few files."""
        return min((seconds for seconds, _ in self.times_left()), default=None)

    def times_left(self) -> list[tuple[float, bool]]:
        """What each drain of this process has announced: seconds until the kill, and whether it has all of them."""
        try:
            descriptor = safe_folder.open_own(self._path)
            try:
                announced = [
                    registry.kill_time(descriptor, marker, self.name)
                    for marker in registry.markers(descriptor)
                ]
            finally:
                os.close(descriptor)
            now = unpatched.monotonic()
            return [(each[0] - now, each[1]) for each in announced if each is not None]
        except Exception:
            return []

    def begin(self, runtime_dir: str, problem: Problem | None = None) -> bool:
        """Publish the entry for the first time.

        Args:
            runtime_dir: the registry's folder, for the message.
            problem: called with one line on a failure.

        Returns:
            Whether it worked. After a failure the entry is never tried again.
        """
        try:
            descriptor = safe_folder.open_own(self._path, create=True)
            try:
                registry.sweep(descriptor)
            finally:
                os.close(descriptor)
            self._publish()
        except Exception as error:
            self._final = True
            registry.notify(problem, _unlisted(runtime_dir, error))
            return False
        return True

    def _publish(self) -> None:
        if self._removed:
            return
        ident = unpatched.get_ident()
        self._writing.append(ident)
        try:
            self._write()
        finally:
            self._writing.remove(ident)

    def _write(self) -> None:
        # Two threads may publish at once, and the slower one would replace the newer content with the older. So each
        # thread checks after its own rename whether the fields have changed meanwhile, and then publishes again.
        descriptor = safe_folder.open_own(
            self._path, create=True
        )  # a cleaner of /tmp may have removed the folder
        try:
            for _ in range(5):
                snapshot = dict(self._fields)
                safe_folder.replace(descriptor, self.name, json.dumps(snapshot).encode("ascii"))
                if self._removed:
                    safe_folder.remove(descriptor, self.name)
                    return
                if snapshot == self._fields:
                    return
        finally:
            os.close(descriptor)


def enter(
    runtime_dir: str,
    fields: Mapping[str, object],
    problem: Problem | None = None,
    defer: Defer | None = None,
) -> Registration | None:
    """Register this process. Never raises.

    Args:
        runtime_dir: the registry's folder.
        fields: the entry's content, besides state, time and image.
        problem: called with one line on a failure, on the thread that writes.
        defer: calls a function, possibly on another thread, which then writes the files. None: this thread writes.

    Returns:
        The registration; None on a failure. With `defer` it is returned even if the files cannot be written later.
    """
    try:
        image = procfs.image(os.getpid())
        fields = {"state": "armed", "armed_at": time.time(), "image": image, **fields}
        entry = Registration(safe_folder.absolute(runtime_dir), own_name(), fields, defer or _now)
    except Exception as error:
        registry.notify(problem, _unlisted(runtime_dir, error))
        return None
    if defer is None:
        return entry if entry.begin(runtime_dir, problem) else None
    defer(lambda: entry.begin(runtime_dir, problem))
    return entry


def _now(function: Callable[[], object]) -> None:
    function()


def _unlisted(runtime_dir: str, error: Exception) -> str:
    return f"{registry.reason(runtime_dir, error)}; `autoteardown ps` and `drain` will not see this rank"
