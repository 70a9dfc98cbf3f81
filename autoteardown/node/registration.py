"""This process's own entry in the registry of its node, as an armed rank keeps it."""

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

    Soon = Callable[[Callable[[], object]], object]


class Registration:
    """This process's own entry. Any thread may call any method at any time; none raises, none locks."""

    __slots__ = ("_fields", "_gone", "_over", "_path", "_pid", "_soon", "name")

    def __init__(self, path: str, name: str, fields: Mapping[str, object], soon: Soon) -> None:
        """Use `enter`."""
        self.name = name
        self._soon = soon
        self._path = path
        self._pid = os.getpid()
        self._over = False  # nothing more is to be told
        self._gone = False  # and it is to be there no more
        self._fields = {key: plain(value) for key, value in fields.items()}

    def update(self, **fields: object) -> None:
        """Change fields, and have the entry published."""
        if self._over or os.getpid() != self._pid:  # a forked child has inherited its parent's entry
            return
        self._fields.update({key: plain(value) for key, value in fields.items()})
        self._soon(self._try_to_publish)

    def _try_to_publish(self) -> None:
        try:
            self._publish()
        except Exception:
            pass

    def leave(self, outcome: str | None = None, exit_code: int | None = None) -> None:
        """Disarmed; or, with an outcome, about to exit. May be called again: the last outcome counts."""
        if os.getpid() != self._pid or (outcome is None and "outcome" in self._fields):
            return
        self._over = True
        try:
            descriptor = safe_folder.open_own(self._path)
        except Exception:
            self._gone = True  # it may yet be made
            return
        try:
            try:
                if outcome is None or not registry.markers(descriptor):
                    self._gone = True  # first: who publishes it just now looks afterwards
                    safe_folder.remove(descriptor, self.name)
                    return
            finally:
                os.close(descriptor)
            self._gone = False  # for those who drain this node
            self._fields.update(state="left", outcome=plain(outcome), exit_code=plain(exit_code))
            self._publish()
        except Exception:
            pass

    def time_left(self) -> float | None:
        """Seconds until whoever drains this process kills it; None: nobody has said so. Reads a file or two."""
        try:
            descriptor = safe_folder.open_own(self._path)
            try:
                told = [
                    registry.told(descriptor, marker, self.name) for marker in registry.markers(descriptor)
                ]
            finally:
                os.close(descriptor)
            known = [until for until in told if until is not None]
            return min(known) - unpatched.monotonic() if known else None
        except Exception:
            return None

    def begin(self, runtime_dir: str, problem: Problem | None = None) -> bool:
        """Publish it for the first time. On a failure: False, one line to `problem`, and nothing is tried again."""
        try:
            descriptor = safe_folder.open_own(self._path, create=True)
            try:
                registry.sweep(descriptor)
            finally:
                os.close(descriptor)
            self._publish()
        except Exception as error:
            self._over = True
            registry.say(problem, _unlisted(runtime_dir, error))
            return False
        return True

    def _publish(self) -> None:
        if self._gone:
            return
        # Two threads may be here at once, and the slower one would put back what the faster one has replaced:
        # whoever finds, after its own rename, that more is known by now sets it right.
        descriptor = safe_folder.open_own(self._path, create=True)  # a cleaner of /tmp may have been there
        try:
            for _ in range(5):
                snapshot = dict(self._fields)
                safe_folder.replace(descriptor, self.name, json.dumps(snapshot).encode("ascii"))
                if self._gone:
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
    soon: Soon | None = None,
) -> Registration | None:
    """List this process. On any failure: None, and one line to `problem`; never raises.

    Args:
        runtime_dir: the registry's folder.
        fields: what is known of it.
        problem: called with the line, on the thread that writes.
        soon: calls a function, maybe on another thread: that writes the files, and there is an entry even if it cannot.
            None: this thread writes.
    """
    try:
        image = procfs.image(os.getpid())
        fields = {"state": "armed", "armed_at": time.time(), "image": image, **fields}
        entry = Registration(safe_folder.absolute(runtime_dir), own_name(), fields, soon or _now)
    except Exception as error:
        registry.say(problem, _unlisted(runtime_dir, error))
        return None
    if soon is None:
        return entry if entry.begin(runtime_dir, problem) else None
    soon(lambda: entry.begin(runtime_dir, problem))
    return entry


def _now(function: Callable[[], object]) -> None:
    function()


def _unlisted(runtime_dir: str, error: Exception) -> str:
    return f"{registry.reason(runtime_dir, error)}; `autoteardown ps` and `drain` will not see this rank"
