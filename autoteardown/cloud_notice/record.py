"""Records each notice that was acted on in a file beside the reports, for metrics."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import datetime, timezone
from typing import Optional

from autoteardown.cloud_notice.decisions import Step
from autoteardown.node import drain, safe_folder

SUFFIX = ".notice"


def write(
    folder: Optional[str], source: str, step: Step, seconds: Optional[float], ranks: list[drain.Drained]
) -> None:
    """Write the record, if reports are written at all. Never raises: the drain is more important.

    Args:
        folder: `AUTOTEARDOWN_REPORT_DIR`.
        source: what announced the end.
        step: the decision to drain.
        seconds: what the ranks got; None: their own grace period.
        ranks: how they ended.
    """
    if not folder:
        return
    host = socket.gethostname()
    content = {
        "schema": 1,
        "host": host,
        "source": source,
        "notice": step.notice.text,
        "received_at": datetime.now(timezone.utc).isoformat(),
        "seconds": step.left,
        "seconds_for_ranks": seconds,
        "ranks": len(ranks),
        "clean": sum(rank.clean for rank in ranks),
    }
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = safe_folder.open_any(folder)
        try:
            name = f"{host}-{os.getpid()}-{time.time_ns()}{SUFFIX}"
            safe_folder.create(descriptor, name, json.dumps(content).encode("ascii"), 0o644)
        finally:
            os.close(descriptor)
    except OSError:
        pass
