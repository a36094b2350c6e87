"""Features go to the directions that bring most energy for each of them, within what is to be given out."""

from __future__ import annotations

import itertools

import pytest

from lightning_pathkernel.sketch.shares import SideEnergies, share_out

FALLING = SideEnergies([8.0, 4.0, 2.0, 1.0], [9.0, 3.0, 1.0])
FLAT = SideEnergies([1.0] * 4, [1.0] * 4)


def cost(parameters: list[SideEnergies], widths: list[tuple[int, int]]) -> int:
    return sum(a * (b + p.riders) for p, (a, b) in zip(parameters, widths, strict=True))


def kept(parameters: list[SideEnergies], widths: list[tuple[int, int]]) -> float:
    return sum(sum(p.left[:a]) * sum(p.right[:b]) for p, (a, b) in zip(parameters, widths, strict=True))


def best(parameters: list[SideEnergies], budget: int) -> float:
    """By looking at all widths there are."""
    choices = [list(itertools.product(range(1, len(p.left) + 1), range(1, len(p.right) + 1))) for p in parameters]
    return max(
        kept(parameters, list(widths))
        for widths in itertools.product(*choices)
        if cost(parameters, list(widths)) <= budget
    )


@pytest.mark.parametrize("budget", [2, 5, 9, 14, 20, 28])
def test_greedy_widths_keep_nearly_what_the_best_ones_do(budget: int) -> None:
    parameters = [FALLING, FLAT]
    widths = share_out(parameters, budget, budget, 0.0)
    assert cost(parameters, widths) <= budget
    assert kept(parameters, widths) >= 0.9 * best(parameters, budget)


def test_nothing_is_left_out_where_all_of_it_fits() -> None:
    assert share_out([FALLING, FLAT], 1000, 1000, 0.0) == [(4, 3), (4, 4)]


def test_every_parameter_keeps_one_direction() -> None:
    assert share_out([FALLING, FLAT, FALLING], 1, 1, 1.0) == [(1, 1)] * 3


def test_features_follow_the_energy() -> None:
    weak = SideEnergies([1e-6 * x for x in FALLING.left], FALLING.right)
    strong, poor = share_out([FALLING, weak], 10, 10, 0.0)
    assert strong[0] * strong[1] >= 8
    assert poor[0] * poor[1] <= 2


def test_more_than_the_least_is_given_out_only_while_more_energy_is_missing_than_may_be() -> None:
    parameters = [FLAT] * 4
    total = 4 * 16.0
    for loss in (0.5, 0.25, 0.1):
        widths = share_out(parameters, 8, 64, loss)
        assert total - kept(parameters, widths) <= loss * total
        assert cost(parameters, widths) < 64
    assert cost(parameters, share_out(parameters, 8, 64, 1.0)) == 8
    assert cost(parameters, share_out(parameters, 8, 40, 0.0)) == 40


def test_a_rider_costs_one_feature_for_each_direction_of_the_rows() -> None:
    alone = SideEnergies([1.0] * 6, [1.0] * 6)
    ridden = SideEnergies(alone.left, alone.right, riders=2)
    (rows, columns) = share_out([ridden], 30, 30, 0.0)[0]
    assert cost([ridden], [(rows, columns)]) <= 30
    assert rows < columns
    assert share_out([alone], 30, 30, 0.0) in ([(5, 6)], [(6, 5)])
