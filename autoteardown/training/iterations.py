"""Counts iterations: decides which of a program's optimizer steps ends one.

Calls of `Optimizer.step` are no common clock for the ranks: the first stage of a pipeline steps two optimizers where
the others step one, a GAN steps two in turn, some programs step one optimizer for each parameter inside backward. An
iteration is over when everything that steps in it has stepped, and nothing says at that moment whether another step
follows. So the counter learns the cycle that the last iterations went through, and says of a step whether it is the
last of its cycle.

1. The *anchor* is the optimizer that steps least often, hence once in a cycle; the first such one if there are
   several.
2. A cycle begins with the *origin*, the optimizer that stepped first of all: where D steps five times before each G,
   an iteration ends with G; where G's step is first, it ends with the fifth D.
3. No cycle ends between two steps with no forward pass between them. That finds the phase of an optimizer that joins
   late, and keeps a ZeroRedundancyOptimizer together with the local one that it steps.

Pure: steps in, boundaries out. `optimizer_hooks.py` says what a step is; docs/how-it-works.md what was rejected.
"""

from __future__ import annotations

_LONGEST = 32  # steps in a cycle; an optimizer that is rarer (every hundredth iteration) is no anchor


class IterationCounter:
    """Counts the iterations of one rank. Called by the program's own threads, one at a time."""

    def __init__(self) -> None:
        self.count = 0
        """Iterations that are over."""
        self.learned = False
        """Whether a whole cycle has been seen."""
        self.frozen = False
        """Set while a stop is being agreed on: counts must not change their meaning then."""
        self._index = 0  # of the next step
        self._anchor: object = None
        self._origin: object = None
        self._period = 1  # steps in the last cycle
        self._after = 0  # how many of them came after the anchor's, up to the last one
        self._ended = True  # whether this cycle's boundary has been passed
        self._since: list[
            tuple[object, bool]
        ] = []  # steps since the anchor's: whose, and whether a forward came first
        self._last: dict[object, int] = {}  # when each optimizer stepped last
        self._base: dict[object, int] = {}  # `count` when it stepped for the first time

    @property
    def begun(self) -> bool:
        """Whether any optimizer has stepped."""
        return self._index > 0

    def step(self, who: object, fresh: bool = True) -> bool:
        """Count one optimizer step that has returned.

        Args:
            who: tells the optimizers apart.
            fresh: whether a forward pass lies between the last step and this one.

        Returns:
            Whether the step ends an iteration.
        """
        index, self._index = self._index, self._index + 1
        if who == self._anchor and self._period == 1 and not self._since and self.learned:
            self._last[who] = index  # most programs: one optimizer, and each of its steps is an iteration
            self.count += 1
            return True
        before = self._last.get(who)
        self._last[who] = index
        if before is None:
            self._base[who] = 0 if index < _LONGEST else self.count
        if index == 0:
            self._anchor = self._origin = who
            return False
        if who == self._anchor:
            self._next_cycle(index, fresh)
        elif len(self._since) < 4 * _LONGEST:
            self._since.append((who, fresh))
            if not self.frozen and before is not None:
                self._elect(who, index - before)
        if self.learned and not self._ended and len(self._since) >= self._after:
            self._ended = True
            self.count += 1
            return True
        return False

    def _next_cycle(self, index: int, fresh: bool) -> None:
        """The anchor has stepped again."""
        if not self._ended or not self.learned:
            self.count += 1  # the first cycle, or one that was shorter than the one before it
        self._period = len(self._since) + 1
        self._after = self._last_of_cycle([*self._since, (self._anchor, fresh)])
        self._since, self._ended, self.learned = [], False, True

    def _last_of_cycle(self, following: list[tuple[object, bool]]) -> int:
        """How many steps after the anchor's the cycle ended, by the steps that followed it up to its next one."""
        period = len(following)
        after = next((place for place, step in enumerate(following) if step[0] == self._origin), period - 1)
        for place in range(after, after + period):
            if following[place % period][1]:
                return place % period
        return after  # no forward pass at all: nothing to learn from

    def _elect(self, who: object, gap: int) -> None:
        """Make this optimizer the anchor if it steps less often, or if the anchor steps no more (it is frozen)."""
        if self.learned and self._period < gap <= _LONGEST:
            self.count = self._base[who] + 1
            following = self._since[-gap:]
        elif len(self._since) > 3 * self._period + 2:
            self.count += len(self._since) // gap - self._ended
            self._origin, following = who, self._since[-gap:]
        else:
            return
        self._anchor, self._period = who, gap
        self._after = self._last_of_cycle(following) if len(following) == gap else 0
        self._since, self._ended, self.learned = [], False, True
