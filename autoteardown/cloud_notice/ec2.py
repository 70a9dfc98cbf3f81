"""Reads EC2's notices: spot interruption, and rebalance recommendation if asked for.

1. IMDSv2: a session token is put first, and sent with each request. It is renewed at half of its life, and at once
   when the service answers 401.
2. `spot/instance-action` is 404 until there is a notice, two minutes before the end (docs.aws.amazon.com, "Spot
   Instance interruption notices"). Hibernation begins at once.
3. A token's answer has a hop limit of 1 by default, so it does not reach a container with a network of its own.
"""

from __future__ import annotations

import json
import time
from typing import Optional

from autoteardown.cloud_notice import http
from autoteardown.cloud_notice.source import Notice, Source, iso_time, seconds_until, unexpected

NOTICE = 120.0
"""Seconds from the notice to the end, by the vendor's documentation."""
_TOKEN_LIFE = 21600
_TIMEOUT = 5.0
_ACTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_WORDS = {"stop": "stops", "hibernate": "hibernates", "terminate": "terminates"}


class EC2(Source):
    """The instance metadata service of EC2, version 2."""

    name = "ec2"
    address = "169.254.169.254"

    def __init__(self, where: tuple[str, int], rebalance: bool = False) -> None:
        super().__init__(where)
        self._rebalance = rebalance
        self._token = ""
        self._renew_at = 0.0

    def read(self, wait: float) -> tuple[Optional[Notice], bool]:
        """See `Source.read`."""
        return self._interruption() or (self._recommendation() if self._rebalance else None), False

    def _interruption(self) -> Optional[Notice]:
        answer = self._get(_ACTION)
        if answer is None:
            return None
        try:
            found = json.loads(answer.body)
            action, moment = str(found["action"]), found.get("time")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise http.Unavailable("its spot/instance-action is not what EC2 documents") from None
        if action not in _WORDS:
            raise http.Unavailable(f"its spot/instance-action has an unknown action, {action[:40]!r}")
        seconds = seconds_until(iso_time(moment), answer)
        if action == "hibernate" and seconds is None:
            seconds = 0.0  # it begins at once
        return Notice(f"{action} {moment}", f"EC2 {_WORDS[action]} this instance", seconds, NOTICE)

    def _recommendation(self) -> Optional[Notice]:
        answer = self._get(_REBALANCE)
        if answer is None:
            return None
        text = "EC2 recommends to leave this instance (rebalance)"
        return Notice(f"rebalance {answer.body.strip()[:100]}", text, None, NOTICE)

    def _get(self, path: str) -> Optional[http.Answer]:
        """The answer; None for 404."""
        for _ in range(2):
            if time.monotonic() >= self._renew_at:
                self._put_token()
            answer = http.request(self.where, path, {"X-aws-ec2-metadata-token": self._token}, _TIMEOUT)
            if answer.status != 401:
                break
            self._renew_at = 0.0  # the token has ended, or the instance was restored from a snapshot
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise unexpected(answer)
        return answer

    def _put_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE)}
        try:
            answer = http.request(self.where, "/latest/api/token", headers, _TIMEOUT, "PUT")
        except http.Unavailable as error:
            hint = "in a container, the instance's HttpPutResponseHopLimit must be 2"
            raise http.Unavailable(f"no token: {error} ({hint})") from None
        if answer.status == 403:
            raise http.Unavailable("no token: HTTP 403 (the instance's metadata service is off)")
        token = answer.body.strip()
        if answer.status != 200:
            raise unexpected(answer)
        if not token or not token.isascii() or not token.isprintable() or len(token) > 4096:
            raise http.Unavailable("its token is not what EC2 documents")
        self._token, self._renew_at = token, time.monotonic() + _TOKEN_LIFE / 2
