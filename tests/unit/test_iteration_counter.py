"""The iteration counter on the step sequences of real programs. `|` stands where an iteration ends."""

from __future__ import annotations

import random

import pytest

from autoteardown.training.iterations import IterationCounter


def marked(steps: str, forwards: str = "", clock: IterationCounter | None = None) -> tuple[str, int]:
    """The sequence with the ends of iterations in it, and how many have been counted.

    `forwards` has a letter for each step: `.` where no forward pass came before it.
    """
    clock = clock or IterationCounter()
    out = ""
    for place, who in enumerate(steps):
        fresh = not forwards or forwards[place % len(forwards)] != "."
        out += who + "|" * clock.step(who, fresh)
    return out, clock.count


def ends(steps: str, forwards: str = "") -> set[str]:
    """What the iterations look like once the clock knows them."""
    pieces = marked(steps, forwards)[0].split("|")
    return set(pieces[len(pieces) // 2 : -1])


@pytest.mark.parametrize(
    ("iteration", "forwards"),
    [
        ("A", ""),
        ("MA", ""),  # Muon beside AdamW
        ("MA", "f."),
        ("DG", "ff"),  # a GAN
        ("DDDDDG", ""),  # D five times for each G
        ("GDDDDD", ""),
        ("AAGBB", ""),
        ("IZ", "f."),  # a ZeroRedundancyOptimizer steps a local one
        ("ABCDEFGHIJ", "f" + "." * 9),
    ],
)
def test_a_cycle_that_stays_as_it_is(iteration, forwards):
    assert ends(iteration * 12, forwards) == {iteration}
    assert marked(iteration * 12, forwards)[1] == 12


def test_ranks_with_different_optimizers_count_the_same():
    one, two, gan = IterationCounter(), IterationCounter(), IterationCounter()
    for _ in range(50):
        assert one.count == two.count == gan.count or one.count < 3
        marked("A", clock=one)
        marked("MA", "f.", two)
        marked("DDG", clock=gan)
    assert one.count == two.count == gan.count == 50


def test_an_optimizer_that_joins_in_late_ends_up_before_the_next_forward_pass():
    clock = IterationCounter()
    marked("A" * 10, clock=clock)
    text, _ = marked("MA" * 6, "f.", clock)
    assert text.endswith("MA|MA|MA|")


def test_an_optimizer_that_is_frozen_in_mid_training():
    clock = IterationCounter()
    marked("MA" * 10, "f.", clock)
    assert marked("A" * 16, clock=clock)[0].endswith("A|A|A|A|")
    clock = IterationCounter()
    marked("DG" * 10, clock=clock)
    before = clock.count
    assert marked("G" * 20, clock=clock)[0].endswith("G|G|G|G|")
    assert before + 19 <= clock.count <= before + 21


def test_a_rare_optimizer_does_not_make_an_iteration_of_a_hundred():
    assert max(map(len, ends(("A" * 99 + "AC") * 4))) <= 3


def test_d_as_often_as_it_takes():
    chance = random.Random(1)
    text = "".join("D" * chance.randint(3, 7) + "G" for _ in range(30))
    assert all(piece.endswith("G") for piece in ends(text))


def test_nothing_is_learned_anew_while_a_stop_is_agreed_on():
    clock = IterationCounter()
    marked("D" * 10, clock=clock)
    clock.frozen = True
    before = clock.count
    marked("DDDG" * 6, clock=clock)
    assert before + 17 <= clock.count <= before + 18  # it still counts D's, one of which may not be over


def test_the_first_iteration_is_not_over_before_the_second_shows_it():
    clock = IterationCounter()
    assert not clock.begun
    assert marked("A", clock=clock) == ("A", 0)
    assert clock.begun and not clock.learned
    assert marked("A", clock=clock) == ("A|", 2)
