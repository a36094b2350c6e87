"""A chord's displacement split into its parts, on real optimisers, against sums made in the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.optim import ParameterUpdate, optimizer_rule
from lightning_pathkernel.recording.displacement import ChordDisplacement, DisplacementParts
from lightning_pathkernel.recording.visits import VisitWeights

SHAPES = {"a": (4, 3), "b": (5,)}
NEVER = {"a": (0, 0), "b": (2,)}
"""Coordinates whose gradient is always 0."""
Parts = dict[str, Tensor]


@dataclass
class Chord:
    """What the package says of one chord, and what the test found itself."""

    parts: DisplacementParts
    attributed: Parts
    """``sum_s rate_s (from_buffer b_s + from_gradient g_s)`` of gradients alone, without D."""
    coupled: Parts
    """The same of coupled weight decay."""
    decoupled: Parts
    """``sum_s decay_rate_s w_s``."""
    secants: dict[str, list[Tensor]] = field(default_factory=lambda: {n: [] for n in SHAPES})
    """D of every step, NaN where the coordinate did not move."""
    weighted: Parts = field(default_factory=dict)
    """``sum_r weight_r g_r``, by `VisitWeights`."""

    def bounds(self, name: str) -> tuple[Tensor, Tensor]:
        every = torch.stack(self.secants[name])
        low = torch.where(every.isnan(), torch.inf, every).amin(0)
        return low, torch.where(every.isnan(), -torch.inf, every).amax(0)


def zeros() -> Parts:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


class Run:
    """An optimiser on random gradients, followed as the recorder follows it and once more literally."""

    def __init__(self, make: Callable, moves: float = 1.0) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = {name: nn.Parameter(self._normal(shape)) for name, shape in SHAPES.items()}
        self.optimizer = make(list(self.parameters.values()))
        self.rule = optimizer_rule(self.optimizer)
        self.moves = moves
        self.silent: set[str] = set()
        self.seen: set[str] = set()
        self.visits = VisitWeights(list(SHAPES), horizon=0.0)
        self.gradients: list[Parts] = []
        self.displacement = ChordDisplacement(self._weights())
        self.gradient_buffers, self.decay_buffers = zeros(), zeros()

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _weights(self) -> Parts:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _set_gradients(self) -> Parts:
        """Every second coordinate moves rarely; a parameter may sit the step out."""
        for name, parameter in self.parameters.items():
            gradient = self._normal(SHAPES[name]) * 10 ** float(self._normal(()))
            rare = torch.arange(gradient.numel()).reshape(gradient.shape) % 2 == 1
            gradient[rare & (torch.rand(gradient.shape, generator=self.generator) < 0.8)] = 0
            gradient[NEVER[name]] = 0
            sits_out = float(torch.rand((), generator=self.generator)) >= self.moves
            parameter.grad = None if sits_out or name in self.silent else gradient
        return {n: torch.zeros(SHAPES[n]).double() if p.grad is None else p.grad for n, p in self.parameters.items()}

    def step(self, chord: Chord) -> None:
        group = self.optimizer.param_groups[0]
        self.gradients.append(self._set_gradients())
        if self.displacement.remembers or group.get("weight_decay"):
            self.displacement.remember(self.parameters)
        before = self._weights()
        self.optimizer.step()
        buckets: dict[ParameterUpdate, list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                update = self.rule.update(group, self.optimizer.state[parameter], name not in self.seen)
                buckets.setdefault(update, []).append(name)
                self.seen.add(name)
        for update, names in buckets.items():
            if self.displacement.decays(update):
                self.displacement.step_decay(names, update)
            if self.rule.diagonal:
                states = [self.optimizer.state[self.parameters[name]] for name in names]
                buffers = [state["exp_avg"] for state in states if "exp_avg" in state]
                gradients = [self.gradients[-1][name] for name in names]
                directions, factor = self.displacement.directions(names, update, buffers, gradients)
                denominators = self.rule.denominators(group, states, directions)
                for name, d in zip(names, denominators, strict=True):
                    pulled = update.sign * self.gradients[-1][name] + update.coupled_decay * before[name]
                    m = update.from_gradient * pulled
                    if buffers:
                        m += update.from_buffer * self.optimizer.state[self.parameters[name]]["exp_avg"]
                    chord.secants[name].append(torch.where(m == 0, torch.nan, 1 / d))
                self.displacement.step_preconditioned(names, update.rate * factor, directions, denominators)
            for name in names:
                self._literally(chord, name, update, before[name])
        self.visits.step(buckets)

    def _literally(self, chord: Chord, name: str, u: ParameterUpdate, before: Tensor) -> None:
        pulls = (u.sign * self.gradients[-1][name], u.coupled_decay * before)
        for buffers, sums, pulled in zip(
            (self.gradient_buffers, self.decay_buffers), (chord.attributed, chord.coupled), pulls, strict=True
        ):
            buffers[name] = u.keep * buffers[name] + u.inject * pulled
            sums[name] = sums[name] + u.rate * (u.from_buffer * buffers[name] + u.from_gradient * pulled)
        chord.decoupled[name] = chord.decoupled[name] + u.decay_rate * before

    def chord(self, steps: int) -> Chord:
        chord = Chord(DisplacementParts({}, {}, {}, {}, {}), zeros(), zeros(), zeros())
        for _ in range(steps):
            self.step(chord)
            self.displacement.parts(self._weights())
        chord.parts = self.displacement.parts(self._weights())
        for j, name in enumerate(SHAPES):
            rows = zip(self.visits.weights[:, j].tolist(), self.gradients, strict=True)
            chord.weighted[name] = sum((w * g[name] for w, g in rows), torch.zeros(SHAPES[name], dtype=torch.float64))
        alive = self.visits.alive()
        self.gradients = [self.gradients[i] for i in alive]
        self.visits.keep(alive, chord_closed=True)
        self.displacement = ChordDisplacement(self._weights(), self.displacement)
        return chord


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def sgd(**options: float) -> Callable:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.05, **options})


def adam(kind: type = torch.optim.AdamW, **options: object) -> Callable:
    return lambda parameters: kind(parameters, **{"lr": 0.02, **options})


SGD = {
    "plain": sgd(),
    "maximize": sgd(maximize=True),
    "decay": sgd(weight_decay=0.3),
    "momentum": sgd(momentum=0.9),
    "momentum, decay": sgd(momentum=0.9, weight_decay=0.3),
    "dampening, decay": sgd(momentum=0.8, dampening=0.5, weight_decay=0.3),
    "nesterov, decay": sgd(momentum=0.9, nesterov=True, weight_decay=0.3),
    "maximize, decay": sgd(momentum=0.5, maximize=True, weight_decay=0.3),
}
ADAM = {
    "adam": adam(torch.optim.Adam),
    "adam, coupled decay": adam(torch.optim.Adam, weight_decay=0.3),
    "adamw": adam(),
    "adamw, strong decay": adam(weight_decay=2.0),
    "adamw, amsgrad": adam(amsgrad=True, betas=(0.8, 0.9)),
    "nadam": adam(torch.optim.NAdam),
    "nadam, decay": adam(torch.optim.NAdam, weight_decay=0.3, decoupled_weight_decay=True),
    "nadam, coupled decay": adam(torch.optim.NAdam, weight_decay=0.3),
    "radam": adam(torch.optim.RAdam, betas=(0.9, 0.8)),
    "adamax": adam(torch.optim.Adamax),
    "adagrad": adam(torch.optim.Adagrad, lr_decay=0.1),
    "adagrad, coupled decay": adam(torch.optim.Adagrad, weight_decay=0.1),
    "adadelta": adam(torch.optim.Adadelta, lr=0.5, rho=0.8),
    "adadelta, coupled decay": adam(torch.optim.Adadelta, lr=0.5, weight_decay=0.1),
    "rmsprop": adam(torch.optim.RMSprop, alpha=0.8),
    "rmsprop, centred": adam(torch.optim.RMSprop, alpha=0.8, centered=True),
    "adam, maximize": adam(torch.optim.Adam, maximize=True, weight_decay=0.1),
}


@pytest.mark.parametrize("moves", [1.0, 0.7])
@pytest.mark.parametrize("name", SGD)
def test_sgd_is_attributed_plus_decay(name: str, moves: float) -> None:
    run = Run(SGD[name], moves)
    for steps in (6, 1, 9):
        chord = run.chord(steps)
        assert not chord.parts.preconditioner
        assert not chord.parts.residual
        assert bool(chord.parts.decay) == ("decay" in name)
        for p in SHAPES:
            close(chord.weighted[p], chord.attributed[p])
            decay = chord.parts.decay.get(p, torch.zeros(SHAPES[p], dtype=torch.float64))
            close(decay, -chord.coupled[p])
            close(chord.parts.delta[p], decay - chord.attributed[p])


@pytest.mark.parametrize("moves", [1.0, 0.7])
@pytest.mark.parametrize("name", ADAM)
def test_adam_is_attributed_plus_decay_plus_residual(name: str, moves: float) -> None:
    run, unclipped = Run(ADAM[name], moves), 0
    for steps in (6, 2, 9, 9, 9, 9):
        chord = run.chord(steps)
        parts = chord.parts
        for p in SHAPES:
            D = parts.preconditioner[p]
            close(chord.weighted[p], chord.attributed[p])
            decay = parts.decay.get(p, torch.zeros(SHAPES[p], dtype=torch.float64))
            close(decay, -D * chord.coupled[p] - chord.decoupled[p])
            close(parts.delta[p], -D * chord.attributed[p] + decay + parts.residual[p])
            low, high = chord.bounds(p)
            inside = (low * (1 + 1e-9) < D) & (high * (1 - 1e-9) > D)
            unclipped += int(inside.sum())
            assert bool((parts.residual[p][inside].abs() < 1e-12).all())
    assert unclipped > 10


@pytest.mark.parametrize("name", ADAM)
def test_the_secant_lies_between_the_least_and_the_greatest_preconditioner(name: str) -> None:
    run = Run(ADAM[name])
    for steps in (6, 2, 9):
        chord = run.chord(steps)
        for p in SHAPES:
            low, high = chord.bounds(p)
            D, moved = chord.parts.preconditioner[p], low.isfinite()
            assert bool((D[moved] >= low[moved] * (1 - 1e-12)).all())
            assert bool((D[moved] <= high[moved] * (1 + 1e-12)).all())
            assert bool((D[~moved] == 0).all())
            if "coupled" not in name and "maximize" not in name:
                assert not moved[NEVER[p]]


def test_a_chord_of_one_step_has_that_steps_preconditioner_and_no_residual() -> None:
    run = Run(adam(weight_decay=0.5))
    run.chord(4)
    chord = run.chord(1)
    for p in SHAPES:
        low, high = chord.bounds(p)
        moved = low.isfinite()
        close(low[moved], high[moved])
        close(chord.parts.preconditioner[p][moved], low[moved])
        close(chord.parts.residual[p], torch.zeros(SHAPES[p], dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_coordinate_that_never_moved_has_no_preconditioner(decay: float) -> None:
    """Decoupled decay moves it all the same: that is decay, and must not turn up as a secant."""
    chord = Run(adam(weight_decay=decay)).chord(7)
    for p, at in NEVER.items():
        assert chord.parts.preconditioner[p][at] == 0
        assert (chord.parts.delta[p][at] != 0) == (decay > 0)
        close(chord.parts.delta[p][at], -chord.decoupled[p][at])
        assert abs(chord.parts.residual[p][at]) < 1e-14


@pytest.mark.parametrize("nesterov", [False, True])
def test_decay_that_a_momentum_buffer_still_holds_is_decay_in_the_next_chord(nesterov: bool) -> None:
    run = Run(sgd(momentum=0.9, weight_decay=0.4, nesterov=nesterov))
    run.chord(5)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    chord = run.chord(5)
    for p in SHAPES:
        assert chord.coupled[p].norm() > 0.1
        close(chord.parts.decay[p], -chord.coupled[p])
        close(chord.parts.delta[p], -chord.coupled[p] - chord.attributed[p])


def test_decoupled_decay_does_not_reach_the_next_chord() -> None:
    run = Run(adam(weight_decay=0.4))
    run.chord(5)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    assert not run.chord(5).parts.decay


def test_a_schedule_of_learning_rate_and_momentum() -> None:
    """As OneCycleLR does it: all scalars change in mid-chord."""
    run = Run(sgd(momentum=0.9, weight_decay=0.3))
    for _ in range(3):
        chord = Chord(DisplacementParts({}, {}, {}, {}, {}), zeros(), zeros(), zeros())
        for j in range(4):
            run.optimizer.param_groups[0].update(lr=0.02 * (j + 1), momentum=0.95 - 0.05 * j)
            run.step(chord)
        parts = run.displacement.parts(run._weights())
        run.displacement = ChordDisplacement(run._weights(), run.displacement)
        for p in SHAPES:
            close(parts.decay[p], -chord.coupled[p])
            close(parts.delta[p], -chord.coupled[p] - chord.attributed[p])


def test_a_parameter_that_sat_out_the_chord_stands_still() -> None:
    run = Run(adam(weight_decay=0.1))
    run.chord(2)
    run.silent.add("b")
    chord = run.chord(3)
    assert set(chord.parts.preconditioner) == set(chord.parts.residual) == set(chord.parts.decay) == {"a"}
    assert bool((chord.parts.delta["b"] == 0).all())
