"""Weights & Biases: marks the active run as preempting at an eviction.

1. W&B shows such a run as preempted, and a sweep queues it again, if its process does not end with 0.
2. The call hands the mark to wandb's own process and waits until that has it. It runs on a thread of its own, and
   nothing waits for that thread.
3. Nothing is imported: where the program has not imported wandb, there is no run.
"""

from __future__ import annotations

import sys

from autoteardown.fail_open import fail_open
from autoteardown.spare_threads import start


@fail_open
def mark_preempting() -> None:
    """Mark the active run of this process, if there is one. Returns at once."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        start(fail_open(run.mark_preempting))
