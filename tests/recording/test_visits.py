"""The weights of visits, against the double sum over steps that defines them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from lightning_pathkernel.optim import ParameterUpdate
from lightning_pathkernel.recording.visits import VisitWeights

NAMES = ["a", "b", "c"]
Step = dict[str, ParameterUpdate]
"""Who moved in one step, and by which scalars."""


def sgd(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, sign: float = 1.0) -> Callable:
    def update(count: int, rate: float) -> ParameterUpdate:
        if not momentum:
            return ParameterUpdate(rate, sign=sign)
        inject = 1.0 if count == 0 else 1.0 - dampening
        blend = (momentum, 1.0) if nesterov else (1.0, 0.0)
        return ParameterUpdate(rate, momentum, inject, *blend, sign)

    return update


def adam(beta1: float = 0.9) -> Callable:
    return lambda count, rate: ParameterUpdate(rate, beta1, 1 - beta1, 1 / (1 - beta1 ** (count + 1)), 0.0)


RULES = {
    "sgd": sgd(),
    "momentum": sgd(0.9),
    "dampening": sgd(0.8, 0.5),
    "nesterov": sgd(0.9, nesterov=True),
    "maximize": sgd(0.7, 0.2, sign=-1.0),
    "maximize, nesterov": sgd(0.7, nesterov=True, sign=-1.0),
    "adam": adam(),
}


def history(rule: Callable, steps: int, moves: float, seed: int = 0) -> list[Step]:
    """Every parameter has its own count of steps and learning rate, and moves in a step with probability ``moves``."""
    rng = np.random.default_rng(seed)
    counts, out = dict.fromkeys(NAMES, 0), []
    for _ in range(steps):
        step = {}
        for j, name in enumerate(NAMES):
            if rng.random() < moves:
                step[name] = rule(counts[name], float(rng.uniform(0.1, 1)) if j else 0.5)
                counts[name] += 1
        out.append(step)
    return out


def share(steps: list[Step], r: int, s: int, name: str) -> float:
    """Share of step r's gradient in the momentum buffer after step s, by multiplying up what every step keeps."""
    if name not in steps[r]:
        return 0.0
    value = steps[r][name].inject * steps[r][name].sign
    for t in range(r + 1, s + 1):
        value *= steps[t][name].keep if name in steps[t] else 1.0
    return value


def weight(steps: list[Step], r: int, chord: range, name: str) -> float:
    """``sum_{s in chord, s >= r} rate_s kappa_{s, r}``."""
    total = 0.0
    for s in chord:
        if s < r or name not in steps[s]:
            continue
        u = steps[s][name]
        total += u.rate * u.from_buffer * share(steps, r, s, name)
        if s == r:
            total += u.rate * u.from_gradient * u.sign
    return total


def table(value: Callable[[int, str], float], rows: list[int]) -> npt.NDArray[np.float64]:
    return np.array([[value(r, name) for name in NAMES] for r in rows]).reshape(len(rows), len(NAMES))


def follow(visits: VisitWeights, steps: list[Step], chord: range, rows: list[int]) -> list[int]:
    """Run a chord; the steps that the rows of the weights stand for."""
    for s in chord:
        grouped: dict[ParameterUpdate, list[str]] = {}
        for name, update in steps[s].items():
            grouped.setdefault(update, []).append(name)
        visits.step(grouped)
    return [*rows, *chord]


def closed(visits: VisitWeights) -> npt.NDArray[np.intp]:
    """End a chord; the steps that go on."""
    alive = visits.alive()
    visits.keep(alive, chord_closed=True)
    return alive


CHORDS = [range(1), range(1, 6), range(6, 45), range(45, 50)]
"""One of a single step, and one that outgrows the arrays."""


@pytest.mark.parametrize("moves", [1.0, 0.6])
@pytest.mark.parametrize("name", RULES)
def test_weights_are_the_double_sum(name: str, moves: float) -> None:
    steps = history(RULES[name], 50, moves)
    visits, rows = VisitWeights(NAMES, horizon=0.0), list[int]()
    for chord in CHORDS:
        rows = follow(visits, steps, chord, rows)
        assert visits.weights.shape == (len(rows), 3)
        expected = table(lambda r, p, chord=chord: weight(steps, r, chord, p), rows)
        np.testing.assert_allclose(visits.weights, expected, rtol=1e-12, atol=1e-15)
        if name != "sgd":
            held = table(lambda r, p, last=chord[-1]: share(steps, r, last, p), rows)
            np.testing.assert_allclose(visits.buffered, held, rtol=1e-12, atol=1e-15)
        rows = [rows[i] for i in closed(visits)]


def test_a_parameter_that_sits_out_a_step_has_weight_zero_there_and_keeps_its_buffer() -> None:
    rule = sgd(0.9)
    both, one = {n: rule(1, 0.5) for n in NAMES}, {"a": rule(1, 0.5)}
    visits = VisitWeights(NAMES)
    follow(visits, [both, one, one], range(3), [])
    np.testing.assert_allclose(visits.weights[:, 0], [0.5 * 2.71, 0.5 * 1.9, 0.5])
    np.testing.assert_allclose(visits.weights[:, 1], [0.5, 0, 0])
    np.testing.assert_allclose(visits.buffered[:, 1], [1, 0, 0])
    assert closed(visits).tolist() == [0, 1, 2]


def test_closing_starts_from_zero_and_lets_go_of_what_no_buffer_holds() -> None:
    visits = VisitWeights(NAMES)
    follow(visits, history(sgd(), 5, 1.0), range(5), [])
    assert closed(visits).tolist() == []
    assert visits.weights.shape == (0, 3)
    steps = history(sgd(0.9), 5, 1.0)
    follow(visits, steps, range(5), [])
    assert closed(visits).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(visits.weights, np.zeros((5, 3)))


@pytest.mark.parametrize("name", ["momentum", "dampening", "adam"])
def test_the_horizon_lets_go_of_less_than_it_says(name: str) -> None:
    horizon = 1e-3
    steps = history(RULES[name], 200, 1.0)
    visits = VisitWeights(NAMES, horizon)
    rows: list[int] = []
    for chord in (range(60), range(60, 80), range(80, 120), range(120, 200)):
        rows = follow(visits, steps, chord, rows)
        expected = table(lambda r, p, chord=chord: weight(steps, r, chord, p), rows)
        np.testing.assert_allclose(visits.weights, expected, rtol=1e-12)
        kept = [rows[i] for i in closed(visits)]
        for r in rows:
            held = share(steps, r, chord[-1], "a") / share(steps, r, r, "a")
            assert (r in kept) == (held > horizon), (r, held)
        rows = kept
    assert len(rows) < 70


def test_a_step_stays_as_long_as_one_parameter_holds_it() -> None:
    rule = sgd(0.5)
    first, later = {n: rule(1, 0.5) for n in NAMES}, {n: rule(1, 0.5) for n in ("a", "b")}
    visits = VisitWeights(NAMES)
    steps = [first, *[later] * 30]
    follow(visits, steps, range(31), [])
    assert 0 in closed(visits), "c has not moved since step 0"
    assert visits.buffered[0].tolist() == [0.5**30, 0.5**30, 1.0]


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_steps_that_are_let_go_of_within_a_chord_had_their_final_weight(name: str) -> None:
    steps = history(RULES[name], 150, 1.0)
    whole, parts = VisitWeights(NAMES), VisitWeights(NAMES)
    follow(whole, steps, range(150), [])
    rows: list[int] = []
    final = np.zeros((150, 3))
    for chord in (range(80), range(80, 130), range(130, 150)):
        rows = follow(parts, steps, chord, rows)
        for at, r in enumerate(rows):
            final[r] = parts.weights[at]
        alive = parts.alive()
        parts.keep(alive, chord_closed=False)
        rows = [rows[i] for i in alive]
    assert len(rows) < 70
    np.testing.assert_allclose(final, whole.weights, rtol=2e-3)


def test_a_parameter_that_comes_later_has_weight_zero_before() -> None:
    visits, rule = VisitWeights(["a"]), sgd(0.9)
    visits.step({rule(0, 0.5): ["a"]})
    visits.extend(["b"])
    visits.step({rule(1, 0.5): ["a", "b"]})
    np.testing.assert_allclose(visits.weights, [[0.95, 0], [0.5, 0.5]])
    assert visits.newest() == {"a": 1.0, "b": 1.0}
