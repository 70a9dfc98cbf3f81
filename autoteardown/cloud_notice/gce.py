"""Reads Compute Engine's notices: preemption, and host maintenance that terminates the VM.

1. `instance/preempted` is FALSE until the VM is preempted. `wait_for_change` holds the request until the value changes,
   so a preemption is known at once; the vendor gives 30 s from then on, and up to 120 s more before that where the VM
   was made with a preemption notice (`preemptionNoticeDuration`), which the metadata do not tell.
2. `instance/maintenance-event` is NONE, MIGRATE_ON_HOST_MAINTENANCE (the VM runs on) or TERMINATE_ON_HOST_MAINTENANCE,
   60 s or more before it.
3. Every request and every answer carries `Metadata-Flavor: Google`; an answer without it is not the metadata server's.
"""

from __future__ import annotations

from typing import Optional
from urllib.parse import quote

from autoteardown.cloud_notice import http
from autoteardown.cloud_notice.source import Notice, Source, unexpected

PREEMPTION = 30.0
MAINTENANCE = 60.0
"""Seconds from the notices to the end, by the vendor's documentation."""
_TIMEOUT = 5.0
_LONGEST = 60.0
_HEADER = "Metadata-Flavor"


class GCE(Source):
    """The metadata server of Compute Engine."""

    name = "gce"
    address = "169.254.169.254"

    def __init__(self, where: tuple[str, int]) -> None:
        super().__init__(where)
        self._etag = ""

    def read(self, wait: float) -> tuple[Optional[Notice], bool]:
        """See `Source.read`."""
        wait = min(wait, _LONGEST)
        waits = bool(self._etag) and wait >= 1
        query = (
            f"?wait_for_change=true&timeout_sec={int(wait)}&last_etag={quote(self._etag)}" if waits else ""
        )
        value = self._get("preempted", query, _TIMEOUT + (wait if waits else 0.0))
        if value == "TRUE":
            return Notice("preempted", "Compute Engine preempts this VM", None, PREEMPTION), False
        if value != "FALSE":
            self._etag = ""
            raise http.Unavailable(f"its instance/preempted is {value[:40]!r}, neither TRUE nor FALSE")
        event = self._get("maintenance-event", "", _TIMEOUT)
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            text = "Compute Engine terminates this VM for host maintenance"
            return Notice("maintenance", text, None, MAINTENANCE), waits
        return None, waits

    def _get(self, key: str, query: str, seconds: float) -> str:
        path = f"/computeMetadata/v1/instance/{key}{query}"
        try:
            answer = http.request(self.where, path, {_HEADER: "Google"}, seconds)
            if answer.status == 404 and key == "maintenance-event":
                return "NONE"
            if answer.status != 200:
                raise unexpected(answer)
            if answer.headers.get(_HEADER) != "Google":
                raise http.Unavailable(f"its answer has no {_HEADER}: Google: this is another server")
        except http.Unavailable:
            self._etag = ""  # the next request does not wait: what has changed meanwhile is known at once
            raise
        if key == "preempted":
            etag = answer.headers.get("ETag") or ""
            self._etag = etag if etag.isascii() and len(etag) < 200 else ""
        return answer.body.strip()
