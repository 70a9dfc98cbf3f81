"""Runs scenarios one after another, and the jobs of each scenario in parallel."""

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
        scenarios: in this order.
        protections: a job for each runs in every scenario.
        ranks: number of ranks of each job.
        grace: seconds from the signal to SIGKILL.
        patience: longest wait, in seconds, until the jobs are ready for a scenario.
        folder: an empty folder for all files of the jobs.
        display: shows the progress.
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
            # All jobs now, and none earlier: a job that still starts would take processor time from another's teardown.
            for job in jobs:
                if job.state == "ready":
                    job.state = "going"
        for job in jobs:
            if late and job.state in ("starting", "ready", "going"):
                job.fail(f"not ready for an eviction after {patience:g} s")
        display.tick(jobs)
        time.sleep(TICK)
