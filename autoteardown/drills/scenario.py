"""The scenarios of a drill: which processes are signalled in which state of the job, and which exit codes are right."""

from __future__ import annotations

from typing import NamedTuple

NONE, HAND_WRITTEN, AGENT = "none", "hand-written", "agent"

PROTECTIONS = {NONE: "no handler", HAND_WRITTEN: "hand-written", AGENT: "the agent"}
"""The protections of a job against an eviction, with their labels."""


class Scenario(NamedTuple):
    """One kind of eviction.

    Attributes:
        title: what happens, in a sentence.
        whole_pod: the launcher gets the signal, and passes it on to all ranks; else one rank gets it.
        stage: the line that a rank has written when the job is ready for the scenario.
        least: the smallest number of ranks.
    """

    name: str
    title: str
    whole_pod: bool = False
    stage: str = "step"
    least: int = 1

    def victim(self, ranks: int) -> int:
        """The rank that gets the signal, if only one does."""
        return ranks - 1 if self.name in ("train", "save") else 0

    def lost(self, ranks: int) -> int | None:
        """The rank that is SIGKILLed before the signal; None in most scenarios."""
        return ranks - 1 if self.name == "peer-lost" else None

    def right_codes(self, signalled: bool) -> set[int]:
        """The exit codes that are right for a rank with the agent, at the default settings.

        1. torchrun sends SIGTERM to the other workers as soon as one has failed. So a rank that already stops because
           of a peer may get a signal of its own.
        2. gloo reports a dead rank to its peers at once. They may fail by themselves before they get any signal, and
           torchrun's signal may arrive while they exit.
        """
        codes = {0} if signalled and not self.whole_pod else {0, 143}
        if self.name == "peer-lost":
            codes |= {1} if signalled else {1, -15}
        return codes


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        # First what users know from their clusters: one rank is evicted, and the job hangs.
        Scenario(
            "stuck",
            "rank 0 waits in a collective that the others never join, and gets SIGTERM",
            stage="waiting",
            least=2,
        ),
        Scenario("train", "one rank gets SIGTERM in the middle of training"),
        Scenario("save", "the same, and the job has given on_teardown() a function that saves"),
        Scenario(
            "pod",
            "torchrun gets SIGTERM while rank 0 writes a checkpoint, and passes it on to all ranks",
            whole_pod=True,
        ),
        Scenario(
            "init",
            "the ranks wait in init_process_group for one that never comes; torchrun gets SIGTERM",
            whole_pod=True,
            stage="joining",
        ),
        Scenario(
            "peer-lost",
            "one rank is SIGKILLed, and at the same moment rank 0 gets SIGTERM",
            least=2,
        ),
    )
}
