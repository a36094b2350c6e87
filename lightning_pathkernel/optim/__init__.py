"""Optimiser rules: the update as a linear map of per-example gradients."""

from lightning_pathkernel.optim import adam, adaptive, rprop, sgd  # noqa: F401  (they register their rules)
from lightning_pathkernel.optim.rules import (
    ForeseeableRule,
    OptimizerRule,
    ParameterUpdate,
    UnsupportedOptimizerError,
    optimizer_rule,
    optimizer_rules,
    register_optimizer_rule,
)

__all__ = [
    "ForeseeableRule",
    "OptimizerRule",
    "ParameterUpdate",
    "UnsupportedOptimizerError",
    "optimizer_rule",
    "optimizer_rules",
    "register_optimizer_rule",
]
