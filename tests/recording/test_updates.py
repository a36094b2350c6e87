"""What is noted of an optimiser's steps where not everything is looked at in every step, against looking always."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.optim import ForeseeableRule, optimizer_rule, optimizer_rules
from lightning_pathkernel.recording.displacement import LOOSENESS, ChordDisplacement
from lightning_pathkernel.recording.updates import OptimizerUpdates

SHAPES = {"a": (6, 5), "b": (7,)}
FORESEEABLE = [kind for kind, rule in optimizer_rules().items() if isinstance(rule, ForeseeableRule)]
OPTIONS: list[dict] = [{}, {"weight_decay": 0.3}, {"betas": (0.9, 0.9)}, {"betas": (0.5, 0.99)}]


class Run:
    """An optimiser on random gradients of very different sizes, most coordinates at rest in most steps."""

    def __init__(self, kind: type[torch.optim.Optimizer], **options: object) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.module = nn.Module()
        for name, shape in SHAPES.items():
            self.module.register_parameter(name, nn.Parameter(self._normal(shape)))
        self.parameters = dict(self.module.named_parameters())
        self.optimizer = kind(list(self.parameters.values()), lr=0.02, **options)  # type: ignore[call-arg]
        self.rule = optimizer_rule(self.optimizer)
        names = {id(p): name for name, p in self.parameters.items()}
        self.updates = OptimizerUpdates(self.module, names, self.optimizer, self.rule)
        self.displacement = ChordDisplacement(self.weights())
        self.decay = {name: torch.zeros_like(w) for name, w in self.weights().items()}
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in SHAPES}

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def gradients(self, silent: tuple[str, ...] = ()) -> None:
        for name, parameter in self.parameters.items():
            rare = torch.rand(SHAPES[name], generator=self.generator) < 0.7
            size = 10 ** (0.5 * self._normal(SHAPES[name]))
            parameter.grad = None if name in silent else (self._normal(SHAPES[name]) * size).masked_fill(rare, 0)

    def preconditioner(self, name: str) -> tuple[Tensor, Tensor]:
        """D now, and where a weight has moved."""
        state = self.optimizer.state[self.parameters[name]]
        group = self.optimizer.param_groups[0]
        return 1 / self.rule.denominators(group, [state], [state["exp_avg"]])[0], self.rule.moved(group, state)

    def step(self, silent: tuple[str, ...] = (), between: Callable[[], None] = lambda: None) -> None:
        self.gradients(silent)
        self.updates.expect_decay(self.displacement, self.parameters)
        between()
        before, group = self.weights(), self.optimizer.param_groups[0]
        self.optimizer.step()
        self.updates.take(self.displacement, {})
        for name in SHAPES:
            if name not in silent:
                self.decay[name] -= group["lr"] * group["weight_decay"] * before[name]
                self.seen[name].append(self.preconditioner(name))

    def bounds(self, name: str) -> tuple[Tensor, Tensor]:
        """The least D of all steps, and the greatest of those since a weight first moved, 0 where it has not."""
        every, moved = (torch.stack(found) for found in zip(*self.seen[name], strict=True))
        return every.amin(0), (every * moved).amax(0)


def test_there_are_foreseeable_rules() -> None:
    assert torch.optim.AdamW in FORESEEABLE
    assert len(FORESEEABLE) >= 5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", FORESEEABLE)
def test_a_preconditioner_rises_by_no_more_than_its_rule_foresees(kind: type, options: dict) -> None:
    run, closest = Run(kind, **options), 0.0
    for _ in range(60):
        run.gradients()
        earlier = {name: run.preconditioner(name) for name in SHAPES} if run.optimizer.state else {}
        foreseen = {
            name: run.rule.rise(run.optimizer.param_groups[0], run.optimizer.state[p])
            for name, p in run.parameters.items()
            if earlier
        }
        run.optimizer.step()
        for name, before in earlier.items():
            ratio = (run.preconditioner(name)[0] / before[0])[before[1]]
            assert float(ratio.max()) <= foreseen[name] * (1 + 1e-9), f"{name}: {ratio.max()} > {foreseen[name]}"
            closest = max(closest, float(ratio.max()) / foreseen[name])
    assert closest > 0.99, "a bound that nothing comes near says nothing"


@pytest.mark.parametrize("silent", [(), ("b",)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", FORESEEABLE)
def test_looking_away_loosens_the_bounds_by_the_stated_factor(
    kind: type, options: dict, silent: tuple[str, ...]
) -> None:
    """Every third step leaves some parameters out, so that buckets change; sums may be asked for at any time."""
    run = Run(kind, **options)
    for _ in range(3):
        start = run.weights()
        for step in range(25):
            run.step(silent if step % 3 == 2 else ())
            if step == 11:
                run.updates.settle(run.displacement)
                run.displacement.parts(run.weights())
        run.updates.settle(run.displacement)
        parts = run.displacement.parts(run.weights())
        for name in SHAPES:
            low, high = run.bounds(name)
            secant, moved = parts.preconditioner[name], high > 0
            assert bool((secant[moved] >= low[moved] / LOOSENESS * (1 - 1e-9)).all())
            assert bool((secant[moved] <= high[moved] * LOOSENESS * (1 + 1e-9)).all())
            assert bool((secant[~moved] == 0).all())
            whole = parts.examples[name] * secant + parts.decay.get(name, 0) + parts.residual[name]
            torch.testing.assert_close(whole, run.weights()[name] - start[name], rtol=1e-9, atol=1e-12)
        run.updates.end_chord()
        run.displacement = ChordDisplacement(run.weights(), run.displacement)
        run.seen = {name: [] for name in SHAPES}


def test_most_steps_are_not_looked_at() -> None:
    run, looks = Run(torch.optim.AdamW), 0
    denominators = run.rule.denominators

    def counted(*args: object) -> list[Tensor]:
        nonlocal looks
        looks += 1
        return denominators(*args)  # type: ignore[arg-type]

    run.rule.denominators = counted  # type: ignore[method-assign]
    try:
        for _ in range(300):
            run.gradients()
            run.optimizer.step()
            run.updates.take(run.displacement, {})
    finally:
        del run.rule.denominators
    assert 5 < looks < 20


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
def test_decoupled_decay_is_that_of_the_steps_that_were_made(kind: type) -> None:
    """The loss scaler may leave a step out after its gradients were complete, more than once and at the end."""
    run = Run(kind, weight_decay=0.5, **({"decoupled_weight_decay": True} if kind is torch.optim.NAdam else {}))
    for step in range(12):
        if step % 4 == 1:
            for _ in range(step):
                run.gradients()
                run.updates.expect_decay(run.displacement, run.parameters)
        run.optimizer.param_groups[0]["lr"] = 0.02 * (1 + step % 3)
        run.step(("b",) if step % 5 == 4 else ())
    run.gradients()
    run.updates.expect_decay(run.displacement, run.parameters)
    run.updates.settle(run.displacement)
    parts = run.displacement.parts(run.weights())
    for name in SHAPES:
        torch.testing.assert_close(parts.decay[name], run.decay[name], rtol=1e-9, atol=1e-12)


def test_a_learning_rate_changed_at_the_last_moment_is_the_one_that_counts() -> None:
    """By a hook after ours: the weights after the step stand for those before it, for the difference of the rates."""
    run = Run(torch.optim.AdamW, weight_decay=0.5)
    for step in range(10):
        rate = 0.02 * (1 + 0.1 * (step % 3))
        run.step(between=lambda rate=rate: run.optimizer.param_groups[0].update(lr=rate))
    parts = run.displacement.parts(run.weights())
    for name in SHAPES:
        torch.testing.assert_close(parts.decay[name], run.decay[name], rtol=0.02, atol=1e-4)
        wrong = -0.01 * sum(run.weights()[name] for _ in range(10))
        assert (parts.decay[name] - run.decay[name]).norm() < 0.1 * (wrong - run.decay[name]).norm()
