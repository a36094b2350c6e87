"""Every optimiser rule, step by step, against the displacement torch makes."""

from __future__ import annotations

import inspect

import pytest
import torch

from lightning_pathkernel.optim import UnsupportedOptimizerError, optimizer_rule, optimizer_rules
from lightning_pathkernel.testing import assert_optimizer_rule

DECAY = {"weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
OPTIONS = {
    torch.optim.SGD: [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, **DECAY},
        DECAY,
        {"maximize": True, "momentum": 0.5, **DECAY},
        {"momentum": 0.9, "foreach": True},
        {"momentum": 0.9, "dampening": 0.4, "fused": True, **DECAY},
    ],
    torch.optim.Adam: [
        {},
        DECAY,
        DECOUPLED,
        {"amsgrad": True},
        {"betas": (0.0, 0.9), "eps": 1e-3},
        {"maximize": True},
        {"foreach": True, "amsgrad": True, "maximize": True, **DECAY},
        {"fused": True, "amsgrad": True, "maximize": True, **DECAY},
    ],
    torch.optim.AdamW: [
        {},
        DECAY,
        {"amsgrad": True, "betas": (0.8, 0.9)},
        {"eps": 1e-3},
        {"maximize": True, **DECAY},
        {"foreach": True, **DECAY},
        {"fused": True, **DECAY},
    ],
    torch.optim.NAdam: [
        {},
        DECAY,
        DECOUPLED,
        {"momentum_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3},
        {"maximize": True, "foreach": True},
    ],
    torch.optim.RAdam: [
        {},
        {"betas": (0.8, 0.7)},
        {"betas": (0.0, 0.7)},
        DECAY,
        {"maximize": True, **DECOUPLED},
        {"foreach": True, "eps": 1e-3},
    ],
    torch.optim.Adamax: [
        {},
        DECAY,
        {"betas": (0.8, 0.7), "eps": 1e-3},
        {"maximize": True, "foreach": True},
    ],
    torch.optim.Adagrad: [
        {},
        {"lr_decay": 0.3},
        {"initial_accumulator_value": 0.5, "eps": 1e-3, **DECAY},
        {"maximize": True, "foreach": True},
        {"fused": True, "maximize": True, "lr_decay": 0.1, **DECAY},
    ],
    torch.optim.RMSprop: [
        {},
        {"alpha": 0.5, "eps": 1e-3},
        {"alpha": 1.0, "eps": 0.5},
        {"centered": True},
        {"centered": True, "maximize": True, **DECAY},
        {"foreach": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "alpha": 0.5, "centered": True, **DECAY},
        {"momentum": 0.5, "maximize": True, "foreach": True, **DECAY},
    ],
    torch.optim.Adadelta: [
        {},
        DECAY,
        {"rho": 0.5, "eps": 1e-2},
        {"rho": 0.0},
        {"rho": 1.0, "eps": 0.1},
        {"maximize": True, **DECAY},
        {"foreach": True, "maximize": True, "rho": 0.5, **DECAY},
    ],
    torch.optim.Rprop: [
        {},
        {"etas": (0.2, 3.0)},
        {"step_sizes": (0.04, 0.06)},
        {"maximize": True},
        {"foreach": True, "maximize": True},
    ],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]
ELSEWHERE = {
    "lr": "every case sets it, and changes it midway",
    "capturable": "torch refuses it on a CPU",
    "differentiable": "a step that is differentiated through",
}


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_sum_over_examples_plus_decay_is_the_displacement(kind: type, options: dict) -> None:
    assert_optimizer_rule(lambda p: kind(p, lr=0.05, **options))


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_that_torch_documents_has_a_case(kind: type) -> None:
    documented = set(inspect.signature(kind).parameters) - {"params"} - set(ELSEWHERE)
    assert documented <= {option for options in OPTIONS[kind] for option in options}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_learning_rate_may_be_a_tensor(kind: type) -> None:
    decay = {} if kind is torch.optim.Rprop else DECAY
    assert_optimizer_rule(lambda p: kind(p, lr=torch.tensor(0.05, dtype=torch.float64), **decay))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_betas_may_be_tensors(kind: type) -> None:
    """In a group too, where torch leaves what a user puts there."""

    def make(parameters: list) -> torch.optim.Optimizer:
        optimizer = kind(parameters, lr=0.05, betas=(torch.tensor(0.8), torch.tensor(0.9)), foreach=False)
        optimizer.param_groups[0]["betas"] = (torch.tensor(0.8), torch.tensor(0.9))
        return optimizer

    assert_optimizer_rule(make)


def test_groups_have_options_of_their_own() -> None:
    def make(parameters: list) -> torch.optim.Optimizer:
        first, *others = parameters
        groups = [{"params": others, "momentum": 0.0, "centered": True}, {"params": first, "lr": 0.1, **DECAY}]
        return torch.optim.RMSprop(groups, lr=0.05, momentum=0.9)

    assert_optimizer_rule(make)


def test_parameters_with_equal_scalars_may_have_made_different_numbers_of_steps() -> None:
    """After 100 steps the bias correction of beta1 is 1 to the last bit, and tells nothing of that of beta2."""
    assert_optimizer_rule(lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.999)), steps=100)


def test_every_registered_rule_has_cases() -> None:
    assert set(OPTIONS) == set(optimizer_rules())


def test_an_optimiser_without_a_rule_is_refused_by_name() -> None:
    optimizer = torch.optim.ASGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(
        UnsupportedOptimizerError,
        match=r"No optimiser rule for ASGD\. Supported: Adadelta, Adagrad, Adam, AdamW, Adamax",
    ):
        optimizer_rule(optimizer)


def test_a_subclass_has_no_rule() -> None:
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(UnsupportedOptimizerError, match="Mine"):
        optimizer_rule(Mine([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
