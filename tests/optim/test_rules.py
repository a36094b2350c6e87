"""Every optimiser rule, step by step, against the displacement torch makes."""

from __future__ import annotations

import pytest
import torch

from lightning_pathkernel.optim import UnsupportedOptimizerError, optimizer_rule, optimizer_rules
from lightning_pathkernel.testing import assert_optimizer_rule

OPTIONS = {
    torch.optim.SGD: [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1},
        {"maximize": True, "momentum": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "foreach": True},
    ],
    torch.optim.Adam: [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}, {"fused": True}],
    torch.optim.NAdam: [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"momentum_decay": 0.1, "betas": (0.8, 0.9)},
        {"maximize": True, "foreach": True},
    ],
    torch.optim.RAdam: [
        {},
        {"betas": (0.8, 0.7)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"foreach": True, "eps": 1e-3},
    ],
    torch.optim.Adamax: [{}, {"weight_decay": 0.1}, {"betas": (0.8, 0.7)}, {"maximize": True, "foreach": True}],
    torch.optim.Adagrad: [
        {},
        {"lr_decay": 0.3},
        {"weight_decay": 0.1, "initial_accumulator_value": 0.5},
        {"maximize": True, "foreach": True},
        {"fused": True},
    ],
    torch.optim.RMSprop: [
        {},
        {"alpha": 0.5, "eps": 1e-3},
        {"centered": True},
        {"weight_decay": 0.1, "centered": True, "maximize": True},
        {"foreach": True},
    ],
    torch.optim.AdamW: [{}, {"weight_decay": 0.1}, {"amsgrad": True, "betas": (0.8, 0.9)}, {"eps": 1e-3}],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_sum_over_examples_plus_decay_is_the_displacement(kind: type, options: dict) -> None:
    assert_optimizer_rule(lambda p: kind(p, lr=0.05, **options), rtol=1e-5)


def test_every_registered_rule_has_cases() -> None:
    assert set(OPTIONS) == set(optimizer_rules())


def test_an_optimiser_without_a_rule_is_refused_by_name() -> None:
    optimizer = torch.optim.Rprop([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(
        UnsupportedOptimizerError, match=r"No optimiser rule for Rprop\. Supported: Adagrad, Adam, AdamW, Adamax, NAdam"
    ):
        optimizer_rule(optimizer)


def test_a_subclass_has_no_rule() -> None:
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(UnsupportedOptimizerError, match="Mine"):
        optimizer_rule(Mine([torch.nn.Parameter(torch.zeros(1))], lr=0.1))


def test_momentum_in_rmsprop_is_refused_with_the_remedy() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "momentum": m} for m in (0.0, 0.9)]
    with pytest.raises(UnsupportedOptimizerError, match=r"group 1 has momentum=0\.9.*Use momentum=0, or NAdam"):
        optimizer_rule(torch.optim.RMSprop(groups, lr=0.1))
