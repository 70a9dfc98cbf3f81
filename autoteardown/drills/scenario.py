"""What a drill puts a job through, and by which measure it has come out well."""

from __future__ import annotations

from typing import NamedTuple

NONE, HAND_WRITTEN, AGENT = "none", "hand-written", "agent"

PROTECTIONS = {NONE: "no handler", HAND_WRITTEN: "hand-written", AGENT: "the agent"}
"""What a job has against an eviction, and how a person calls it."""


class Scenario(NamedTuple):
    """One way to lose a rank.

    Attributes:
        title: what happens, in a sentence.
        whole_pod: the launcher gets the signal, and passes it on to all ranks; else one rank gets it.
        stage: what a rank must have noted for the job to be where the scenario begins.
        least: the fewest ranks that it makes sense with.
    """

    name: str
    title: str
    whole_pod: bool = False
    stage: str = "step"
    least: int = 1

    def victim(self, ranks: int) -> int:
        """The rank that gets the signal where only one does."""
        return ranks - 1 if self.name in ("train", "save") else 0

    def lost(self, ranks: int) -> int | None:
        """The rank that is SIGKILLed beforehand."""
        return ranks - 1 if self.name == "peer-lost" else None

    def right_codes(self, signalled: bool) -> set[int]:
        """The exit codes that a rank of a job with the agent may leave with, at the default settings.

        torchrun sends SIGTERM to the rest as soon as one worker has failed, so that a rank which is already on its
        way out because of a peer may get a signal of its own. And gloo tells the peers of a dead rank at once: they
        may fail by themselves before they hear of any signal, and torchrun's may then hit them in their last moments.
        """
        codes = {0} if signalled and not self.whole_pod else {0, 143}
        if self.name == "peer-lost":
            codes |= {1} if signalled else {1, -15}
        return codes


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        # First what people know from their clusters: one rank goes, and the job hangs.
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
