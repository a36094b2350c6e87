"""Nodes placed by a drift: within the budget, never ahead of the schedule, and with few looks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from lightning_pathkernel.path import DriftController, NodeBudget, node_schedule

Drift = Callable[[int, int], float]
"""Drift between a node and a later step."""


def placed(budget: NodeBudget, drift: Drift, steps: int) -> tuple[list[int], int]:
    """Where chords begin, and how often the drift was looked at."""
    controller, nodes, looks = DriftController(budget), [0], 0
    for step in range(1, steps):
        if controller.looks(step):
            looks += 1
            if controller.closes(step, drift(nodes[-1], step)):
                nodes.append(step)
    return nodes, looks


def steady(speed: float) -> Drift:
    return lambda node, step: speed * (step - node)


@pytest.mark.parametrize(("total", "count"), [(160, 24), (1000, 32), (10, 10), (7, 20), (50, 1)])
def test_a_tolerance_that_is_always_exceeded_gives_the_schedule(total: int, count: int) -> None:
    nodes, _ = placed(NodeBudget(1e-9, count, total), steady(1.0), total)
    scheduled = node_schedule(total, count)[:-1]
    assert len(nodes) == len(scheduled)
    for found, expected in zip(nodes, scheduled, strict=True):
        assert abs(found - expected) <= 1, f"{found} for {expected}"


@pytest.mark.parametrize("speed", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("total", [None, 1000])
def test_the_budget_is_kept(speed: float, total: int | None) -> None:
    nodes, _ = placed(NodeBudget(0.05, 24, total), steady(speed), 1000)
    assert len(nodes) <= 24


def test_a_drift_that_is_never_reached() -> None:
    nodes, looks = placed(NodeBudget(0.05, 24), steady(0.0), 10_000)
    assert nodes == [0]
    assert looks <= 16, "intervals double while nothing drifts"
    nodes, looks = placed(NodeBudget(0.05, 20, 10_000), steady(0.0), 10_000)
    assert nodes == [0, 2000, 4000, 6000, 8000], "no chord is longer than twice the schedule's last one"
    assert looks <= 30


def test_nodes_go_where_the_path_moves() -> None:
    """Ten times faster in the second half: the schedule has 17 of 24 nodes in the first."""
    place = [0.0002 * min(s, 500) + 0.002 * max(s - 500, 0) for s in range(1001)]
    nodes, _ = placed(NodeBudget(0.05, 24, 1000), lambda a, s: place[s] - place[a], 1000)
    assert sum(n < 500 for n in nodes) <= 4
    assert sum(n >= 500 for n in nodes) >= 15
    for a, b in itertools.pairwise(nodes):
        assert place[b] - place[a] >= 0.05 or b - a == pytest.approx(4 * 1000 / 24, abs=1)


def test_what_is_left_is_never_spread_thinner_than_the_schedule_spreads_it() -> None:
    """Everything happens early, and the tolerance is far too small: later chords are no longer than the schedule's."""
    nodes, _ = placed(NodeBudget(1e-3, 24, 1000), steady(0.01), 1000)
    longest = max(b - a for a, b in itertools.pairwise(node_schedule(1000, 24)))
    assert max(b - a for a, b in itertools.pairwise([*nodes, 1000])) <= longest + 1


def test_without_an_end_the_tolerance_rises_as_the_budget_goes() -> None:
    budget = NodeBudget(0.05, 8)
    thresholds = [budget.threshold(closed) for closed in range(8)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == pytest.approx(0.05 * 8 / 7)
    assert thresholds[-1] == math.inf
    nodes, _ = placed(budget, steady(0.01), 100_000)
    lengths = [b - a for a, b in itertools.pairwise(nodes)]
    assert lengths == sorted(lengths)
    assert lengths[-1] >= 5 * lengths[0]


def test_looks_are_few_and_miss_the_tolerance_by_little() -> None:
    nodes, looks = placed(NodeBudget(0.05, 24), steady(1e-4), 3000)
    assert len(nodes) > 3
    assert looks <= 9 * len(nodes)
    budget = NodeBudget(0.05, 24)
    for closed, (a, b) in enumerate(itertools.pairwise(nodes)):
        assert 1e-4 * (b - a) <= 1.08 * budget.threshold(closed)


def test_the_last_chord_ends_with_the_path() -> None:
    """As the schedule's does: whoever records needs no word that the fit is over."""
    controller = DriftController(NodeBudget(0.05, 24, 100))
    ends = [step for step in range(1, 101) if controller.looks(step) and controller.closes(step, 1e-6)]
    assert ends[-1] == 100


def test_a_drift_that_is_no_number_ends_the_chord() -> None:
    controller = DriftController(NodeBudget(0.05, 24, 100))
    assert controller.looks(1)
    assert controller.closes(1, math.nan)


@pytest.mark.parametrize("wrong", [(0.0, 8, 10), (math.nan, 8, 10), (math.inf, 8, 10), (0.1, 0, 10), (0.1, 8, 0)])
def test_numbers_that_make_no_sense(wrong: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        NodeBudget(*wrong)
