"""Runs scenarios: the jobs of one side by side, so that they share the waiting, and one scenario after another."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoteardown.drills import processes
from autoteardown.drills.display import Display
from autoteardown.drills.job import Job
from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import Scenario

TICK = 0.02


def run(
    scenarios: Iterable[Scenario],
    protections: Sequence[str],
    ranks: int,
    grace: float,
    patience: float,
    folder: Path,
    display: Display,
) -> list[Outcome]:
    """Drill every scenario with every protection.

    Args:
        patience: longest wait for the jobs to get to where a scenario begins.
        folder: an empty one, for everything that the jobs write.
    """
    found: list[Outcome] = []
    for scenario in scenarios:
        jobs = [
            Job(scenario, protection, ranks, grace, folder / protection, display.say, len(protections) == 1)
            for protection in protections
        ]
        display.scenario(scenario, jobs)
        try:
            _drill(jobs, patience, display)
        finally:
            stubborn = processes.end_all()
            display.pause()
        outcomes = [job.outcome() for job in jobs]
        for outcome in outcomes:
            if stubborn:
                outcome.problems.append(f"could not be killed: {', '.join(map(str, sorted(stubborn)))}")
            display.outcome(outcome)
        found += outcomes
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
    return found


def _drill(jobs: Sequence[Job], patience: float, display: Display) -> None:
    deadline = time.monotonic() + patience
    for job in jobs:
        job.start()
    while any(job.state not in ("over", "failed") for job in jobs):
        for job in jobs:
            job.poll()
        late = time.monotonic() > deadline
        if not any(job.state == "starting" for job in jobs):
            # All of them now, none before: while one starts, it would take the processors from the others' teardown.
            for job in jobs:
                if job.state == "ready":
                    job.state = "going"
        for job in jobs:
            if late and job.state in ("starting", "ready", "going"):
                job.fail(f"not ready for an eviction after {patience:g} s")
        display.tick(jobs)
        time.sleep(TICK)
