"""Reads Azure's scheduled events that end this VM: Preempt, Terminate, Reboot, Redeploy.

1. The document lists the events of all VMs of a scale set or an availability set, so `Resources` must name this VM.
2. `NotBefore` is when the event can start, and empty once it has started. The vendor gives at least 30 s for Preempt, 5
   to 15 minutes for Terminate, 15 minutes for Reboot and 10 for Redeploy. A Freeze is a pause of seconds: no end.
3. The first request turns the service on for this VM, which may take two minutes.
4. An event that is acknowledged starts at once: only after the drain, and only if asked for, as other programs of this
   VM may still need their time.
"""

from __future__ import annotations

import json
from typing import Any, Optional

from autoteardown.cloud_notice import http
from autoteardown.cloud_notice.source import Notice, Source, iso_time, seconds_until, unexpected

NOTICE = 30.0
"""Seconds from the shortest notice to the end, by the vendor's documentation."""
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_HEADERS = {"Metadata": "true"}
_FIRST = 125.0
_TIMEOUT = 10.0
_WORDS = {"Preempt": "evicts", "Terminate": "deletes", "Reboot": "reboots", "Redeploy": "moves"}


class Azure(Source):
    """The metadata service of Azure."""

    name = "azure"
    address = "169.254.169.254"

    def __init__(self, where: tuple[str, int]) -> None:
        super().__init__(where)
        self._vm = ""
        self._timeout = _FIRST

    def read(self, wait: float) -> tuple[Optional[Notice], bool]:
        """See `Source.read`."""
        if not self._vm:
            self._vm = self._get(_NAME, _TIMEOUT).body.strip()
            if not self._vm:
                raise http.Unavailable("it does not tell the name of this VM")
        answer = self._get(_EVENTS, self._timeout)
        self._timeout = _TIMEOUT
        try:
            events = json.loads(answer.body)["Events"]
            found = [self._notice(event, answer) for event in events if self._concerns(event)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise http.Unavailable("its scheduled events are not what Azure documents") from None
        return min(
            found, key=lambda each: NOTICE if each.seconds is None else each.seconds, default=None
        ), False

    def _concerns(self, event: Any) -> bool:
        named = [str(name).lower() for name in event.get("Resources") or []]
        return event["EventType"] in _WORDS and self._vm.lower() in named

    def _notice(self, event: Any, answer: http.Answer) -> Notice:
        moment = event.get("NotBefore") or ""
        when = http.http_date(moment) or iso_time(moment)
        text = f"Azure {_WORDS[event['EventType']]} this VM ({event['EventType']})"
        return Notice(str(event["EventId"]), text, seconds_until(when, answer), NOTICE)

    def acknowledge(self, key: str) -> None:
        """See `Source.acknowledge`."""
        body = json.dumps({"StartRequests": [{"EventId": key}]})
        headers = {**_HEADERS, "Content-Type": "application/json"}
        answer = http.request(self.where, _EVENTS, headers, _TIMEOUT, "POST", body)
        if answer.status != 200:
            raise unexpected(answer)

    def _get(self, path: str, seconds: float) -> http.Answer:
        answer = http.request(self.where, path, _HEADERS, seconds)
        if answer.status != 200:
            raise unexpected(answer)
        return answer
