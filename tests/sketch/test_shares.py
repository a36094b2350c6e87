"""Features are shared out over parameters by energy."""

from __future__ import annotations

import itertools

import pytest

from lightning_pathkernel.sketch.shares import SideEnergies, share_out

FLAT = SideEnergies([1.0] * 6, [1.0] * 6)
STEEP = SideEnergies([100.0, 1e-6, 1e-6], [100.0, 1e-6, 1e-6])
STRONG = SideEnergies([50.0, 40.0, 30.0, 20.0], [50.0, 40.0, 30.0, 20.0])
BIASED = SideEnergies([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], riders=1)


def cost(widths: list[tuple[int, int]], parameters: list[SideEnergies]) -> int:
    return sum(a * (b + each.riders) for (a, b), each in zip(widths, parameters, strict=True))


@pytest.mark.parametrize("features", [4, 10, 25, 40])
def test_no_more_features_than_there_are_to_share(features: int) -> None:
    parameters = [FLAT, BIASED]
    widths = share_out(parameters, features)
    assert cost(widths, parameters) <= features
    assert all(a >= 1 and b >= 1 for a, b in widths)


def test_more_features_never_narrow_a_parameter_whose_energy_is_flat() -> None:
    narrow, wide = (share_out([FLAT], features)[0] for features in (9, 25))
    assert wide[0] * wide[1] > narrow[0] * narrow[1]
    assert share_out([FLAT], 1000) == [(6, 6)]


def test_features_go_where_the_energy_is() -> None:
    (strong, flat) = share_out([STRONG, FLAT], 17)
    assert strong == (4, 4), strong
    assert flat == (1, 1), flat


def test_directions_that_show_nothing_get_nothing_while_others_do() -> None:
    (steep, flat) = share_out([STEEP, FLAT], 37)
    assert steep == (1, 1), steep
    assert flat == (6, 6), flat


def kept(widths: tuple[tuple[int, int], ...] | list[tuple[int, int]], parameters: list[SideEnergies]) -> float:
    return sum(sum(p.left[:a]) * sum(p.right[:b]) for p, (a, b) in zip(parameters, widths, strict=True))


@pytest.mark.parametrize("features", [3, 8, 14, 22])
def test_the_greedy_widths_keep_nearly_what_the_best_ones_do(features: int) -> None:
    parameters = [STRONG, BIASED]
    every = [list(itertools.product(range(1, 5), range(1, 5))) for _ in parameters]
    fitting = (widths for widths in itertools.product(*every) if cost(list(widths), parameters) <= features)
    best = max(kept(widths, parameters) for widths in fitting)
    assert kept(share_out(parameters, features), parameters) >= 0.9 * best


def test_riders_make_rows_dearer_than_columns() -> None:
    ridden = SideEnergies(FLAT.left, FLAT.right, riders=2)
    (rows, columns) = share_out([ridden], 30)[0]
    assert rows < columns
    assert rows * (columns + 2) <= 30
