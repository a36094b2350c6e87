"""The table of support: optimisers, features of training loops, and networks, with what is true of each."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import nn

from lightning_pathkernel.reference_optimizers import (
    ReferenceAdadelta,
    ReferenceAdagrad,
    ReferenceAdam,
    ReferenceAdamax,
    ReferenceNAdam,
    ReferenceOptimizer,
    ReferenceRAdam,
    ReferenceRMSprop,
    ReferenceRprop,
    ReferenceSGD,
)
from tests import networks
from tests.support import learners
from tests.support.rows import FeatureRow, NetworkRow, OptimizerRow


def _optimizer(
    what: str, name: str, reference: Any, unattributed: float = 0.0, divides: bool = False, **options: Any
) -> OptimizerRow:
    fixed: dict[str, Any] = {"decoupled": name == "AdamW"} if issubclass(reference, ReferenceAdam) else {}
    spec: ReferenceOptimizer = reference(**options, **fixed)
    return OptimizerRow(what, getattr(torch.optim, name), options, spec, unattributed, divides)


OPTIMIZERS = {
    "sgd": _optimizer("`SGD`", "SGD", ReferenceSGD, lr=0.1),
    "sgd momentum": _optimizer("`SGD` with momentum", "SGD", ReferenceSGD, lr=0.1, momentum=0.9),
    "sgd nesterov": _optimizer(
        "`SGD` with Nesterov momentum and weight decay", "SGD", ReferenceSGD, lr=0.1, momentum=0.8, nesterov=True,
        weight_decay=0.05,
    ),
    "sgd dampened": _optimizer(
        "`SGD` with momentum, dampening and weight decay, maximising", "SGD", ReferenceSGD, lr=0.05, momentum=0.8,
        dampening=0.3, weight_decay=0.05, maximize=True,
    ),
    "adam": _optimizer("`Adam` with weight decay", "Adam", ReferenceAdam, lr=0.01, weight_decay=0.05),
    "adamw": _optimizer("`AdamW`", "AdamW", ReferenceAdam, lr=0.01, weight_decay=0.05),
    "amsgrad": _optimizer(
        "`AdamW` with `amsgrad`", "AdamW", ReferenceAdam, lr=0.01, weight_decay=0.05, amsgrad=True, betas=(0.8, 0.9)
    ),
    "nadam": _optimizer("`NAdam`", "NAdam", ReferenceNAdam, lr=0.01, weight_decay=0.05),
    "radam": _optimizer("`RAdam`", "RAdam", ReferenceRAdam, lr=0.01, betas=(0.8, 0.7)),
    "adamax": _optimizer("`Adamax`", "Adamax", ReferenceAdamax, lr=0.01, weight_decay=0.05),
    "rmsprop": _optimizer("`RMSprop`", "RMSprop", ReferenceRMSprop, lr=0.01, alpha=0.8, weight_decay=0.05),
    "rmsprop centred": _optimizer("`RMSprop`, centred", "RMSprop", ReferenceRMSprop, lr=0.01, alpha=0.8, centered=True),
    "rmsprop momentum": _optimizer(
        "`RMSprop` with momentum", "RMSprop", ReferenceRMSprop, lr=0.005, alpha=0.8, momentum=0.9,
        unattributed=0.61,
    ),
    "adagrad": _optimizer("`Adagrad`", "Adagrad", ReferenceAdagrad, lr=0.02, lr_decay=0.1,
                          weight_decay=0.05),
    "adadelta": _optimizer("`Adadelta`", "Adadelta", ReferenceAdadelta, lr=1.0, eps=1e-4, weight_decay=0.05),
    "rprop": _optimizer("`Rprop`", "Rprop", ReferenceRprop, divides=True, lr=0.01),
}  # fmt: skip

_BF16 = {"precision": "bf16-mixed"}
FEATURES = {
    "plain": FeatureRow("a plain loop"),
    "accumulation": FeatureRow(
        "accumulation, the last window of an epoch short",
        {"accumulate_grad_batches": 4, "max_epochs": 2}, steps=4,
    ),
    "accumulation that changes": FeatureRow(
        "accumulation that changes between epochs", {"max_epochs": 2},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 3})], steps=5,
    ),
    "clipping by norm": FeatureRow("clipping by norm", {"gradient_clip_val": 0.2}, max_norm=0.2),
    "clipped accumulation": FeatureRow(
        "accumulation and clipping by norm", {"gradient_clip_val": 0.2, "accumulate_grad_batches": 2, "max_epochs": 2},
        max_norm=0.2,
    ),
    "clipping by value": FeatureRow(
        "clipping by value", {"gradient_clip_val": 0.15, "gradient_clip_algorithm": "value"}, rounding=float("inf"),
        unattributed={"sgd momentum": 0.69, "adamw": 0.48},
    ),
    "schedule": FeatureRow("a rate that changes at every step, warm-up included", learner=learners.WarmUp),
    "schedule by epoch": FeatureRow("a rate that changes after every epoch", learner=learners.ByEpoch),
    "groups": FeatureRow("parameter groups, each with its own rate and decay", learner=learners.Groups),
    "several losses": FeatureRow("several losses and a penalty on the outputs", learner=learners.SeveralLosses),
    "manual": FeatureRow("manual optimisation", learner=learners.Manual),
    "manual clipping": FeatureRow(
        "manual optimisation, clipped by `clip_gradients`", learner=learners.ManualClipping, max_norm=0.2
    ),
    "manual accumulation": FeatureRow(
        "manual optimisation, accumulating", learner=learners.ManualAccumulation, steps=3
    ),
    "several steps": FeatureRow(
        "manual optimisation, two steps on every batch", {"limit_train_batches": 3}, learners.SeveralSteps
    ),
    "zeroed in place": FeatureRow("gradients zeroed in place (`set_to_none=False`)", learner=learners.InPlace),
    "two optimisers": FeatureRow(
        "two optimisers in turn (manual optimisation)", {"limit_train_batches": 3}, learners.TwoOptimizers
    ),
    "bfloat16": FeatureRow("`precision=\"bf16-mixed\"`", _BF16, tolerance=5e-2, rounding=5e-2, network="mlp"),
    "float16": FeatureRow(
        "`precision=\"16-mixed\"` with a step that overflows and is skipped", learner=learners.Overflowing,
        callbacks=list, tolerance=1e-2, rounding=1e-2, network="mlp", steps=5,
        trainer={"plugins": learners.half_precision},
    ),
    "single precision": FeatureRow(
        "`precision=\"32-true\"`", {"precision": "32-true"}, tolerance=1e-3, rounding=1e-4, network="mlp"
    ),
    "max_steps": FeatureRow("`max_steps`", {"max_steps": 4, "max_epochs": -1}, steps=4),
    "overfit_batches": FeatureRow("`overfit_batches`", {"overfit_batches": 3, "max_epochs": 2}),
    "limit_train_batches": FeatureRow("`limit_train_batches`", {"limit_train_batches": 4}, steps=4),
    "val_check_interval": FeatureRow("validation within an epoch (`val_check_interval`)", {"val_check_interval": 2}),
    "reloading": FeatureRow(
        "loaders made anew (`reload_dataloaders_every_n_epochs`)",
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2, "limit_train_batches": 3},
    ),
    "stopped early": FeatureRow("a fit that stops early", {"max_epochs": 3}, callbacks=lambda: [learners.StopEarly()]),
    "early stopping": FeatureRow(
        "`EarlyStopping`", {"max_epochs": 9, "limit_train_batches": 3}, steps=6,
        callbacks=lambda: [EarlyStopping("loss", min_delta=99.0, patience=1, check_on_train_epoch_end=True)],
    ),
    "detect_anomaly": FeatureRow("`detect_anomaly`", {"detect_anomaly": True}),
    "two loaders": FeatureRow("two loaders", learner=learners.TwoLoaders),
    "unfreezing": FeatureRow(
        "layers unfrozen in mid-training (`BaseFinetuning`)", {"max_epochs": 2, "limit_train_batches": 3},
        callbacks=lambda: [learners.Thaw()], network="mlp",
    ),
    "checkpointing": FeatureRow("activation checkpointing", learner=learners.Recomputing),
}  # fmt: skip


def _frozen_base() -> nn.Module:
    net = networks.perceptron(nn.Identity())
    net[0].requires_grad_(False)
    return net


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


_SHARED = "rows share batch statistics"
_RANDOM = "the mask is drawn in training"
_OWN = {
    "mlp": NetworkRow("fully connected layers", _mlp, networks.vectors),
    "cnn": NetworkRow("convolutions", lambda: networks.cnn(nn.GELU()), networks.images),
    "layer norm": NetworkRow(
        "`LayerNorm`", lambda: networks.perceptron(nn.Identity(), nn.LayerNorm(12)), networks.vectors
    ),
    "group norm": NetworkRow("`GroupNorm`", lambda: networks.cnn(nn.GroupNorm(2, 4), nn.GELU()), networks.images),
    "frozen base": NetworkRow("a frozen base", _frozen_base, networks.vectors),
}
_WHAT = {
    "cnn with batch norm": ("convolutions with `BatchNorm2d`", _SHARED),
    "residual net": ("a residual net with `BatchNorm2d` and `GroupNorm`", _SHARED),
    "perceptron with dropout": ("dropout", _RANDOM),
    "weight norm": ("`weight_norm` (parametrisation)", ""),
    "spectral norm": (
        "`spectral_norm` (parametrisation)", "its vectors move with every batch"
    ),
    "orthogonal": ("`orthogonal` (parametrisation)", ""),
    "tied weights": ("an embedding tied to the output layer", ""),
    "adapters of bare parameters": ("LoRA of bare parameters", ""),
    "adapters of linear layers": ("LoRA of linear layers over a frozen base", ""),
    "lstm": ("`LSTM`", ""),
    "lstm, time first": ("`LSTM` with `batch_first=False`", ""),
    "gru": ("`GRU`", ""),
    "vision transformer": ("a vision transformer of `TransformerEncoder`", ""),
    "vision transformer with dropout": ("the same with dropout", _RANDOM),
    "language model": ("a causal language model with tied embeddings", ""),
    "no rule for any layer": ("`Bilinear`, complex filters, `PReLU`, bare parameters", ""),
}  # fmt: skip
# biases of keys, which softmax takes no notice of; biases before a batch norm
_IDLE = ("vision transformer", "vision transformer with dropout", "language model", "cnn with batch norm")
NETWORKS = _OWN | {
    name: NetworkRow(what, networks.NETWORKS[name].make, networks.NETWORKS[name].data,
                     networks.NETWORKS[name].forward_fn, inexact, name in _IDLE)
    for name, (what, inexact) in _WHAT.items()
}  # fmt: skip
