"""What is said of a fit when its recording begins, and what is checked before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lightning_pathkernel.capture.plan import compiled_modules
from lightning_pathkernel.configuration import digest_of
from lightning_pathkernel.fingerprint import describe_module
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import NodeBudget
from lightning_pathkernel.recorder import RecorderSettings
from lightning_pathkernel.trainer_checks import FitError

__all__ = ["check_forward", "check_not_compiled", "check_size", "description_of"]


def description_of(
    trainer: Any, module: Any, options: Any, settings: RecorderSettings, ids: Mapping[str, Any], probes: str | None
) -> dict[str, Any]:
    """What a recording says of its fit.

    Args:
        trainer: The Trainer.
        module: The module, before its first step.
        options: The callback's.
        settings: The recorder's.
        ids: How examples are told.
        probes: Digest of the validation examples that are followed.

    Returns:
        JSON-able facts. ``configuration`` is what a fit must have in common with the one that it goes on with.
    """
    described = describe_module(module)
    optimizers = [type(o).__name__ for o in trainer.optimizers]
    shared = {
        "sketch_dim": options.sketch_dim, "seed": options.seed, "sketch": options.sketch,
        "unattributed": options.unattributed, "positions": options.positions,
    }  # fmt: skip
    configuration = {
        **shared,
        "nodes": options.nodes,
        "tolerance": options.tolerance,
        "probes": options.probes,
        "probe_examples": probes,
        "optimizers": optimizers,
        "manual_optimization": settings.manual,
        "gradients_may_change_by": settings.changes,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "example_ids": dict(ids),
        "parameters": {n: f"{f['dtype']} {f['shape']}" for n, f in described["parameters"].items()},
        "buffers": {n: f"{f['dtype']} {f['shape']}" for n, f in described["buffers"].items()},
    }
    placed = asdict(settings.nodes) if isinstance(settings.nodes, NodeBudget) else list(settings.nodes)
    return {
        "module": described,
        "module_class": type(module).__name__,
        "optimizer": {"name": ", ".join(optimizers)},
        "settings": {**shared, "nodes": placed},
        "ranks": trainer.world_size,
        "ids": dict(ids),
        "configuration": configuration,
        "first_weights": digest_of(dict(sorted(module.state_dict().items()))),
    }


def check_size(ids: Sequence[Tensor], positions: int) -> None:
    """Refuse ids that are too large to be numbered by position.

    Args:
        ids: Of a batch, loader by loader.
        positions: Positions of every example; 0 for whole examples.

    Raises:
        FitError: If one is.
    """
    if positions and any(len(part) and int(part.max()) >= 2**53 // positions for part in ids):
        raise FitError(
            f"positions={positions} gives position j of example i the id i * {positions} + j, and an example's id is "
            "too large for that: string ids cannot be used with positions, integer ones must be small."
        )


def check_not_compiled(module: nn.Module) -> None:
    """Refuse compiled modules.

    Args:
        module: The module.

    Raises:
        FitError: Naming them.
    """
    names = compiled_modules(module)
    if names:
        raise FitError(
            f"PathKernelCallback does not support compiled modules, whose graphs do not call hooks: found "
            f"{', '.join(map(repr, names))}. Fit the module itself, without torch.compile."
        )


def check_forward(network: Network, probes: object) -> None:
    """Refuse a network whose outputs cannot be had.

    Args:
        network: The network.
        probes: A validation batch.

    Raises:
        FitError: With the error that it raised.
    """
    try:
        network.outputs(probes)
    except Exception as error:
        raise FitError(
            f"the network's outputs could not be had on a validation batch: {error}. Pass forward_fn=, a function "
            "(pl_module, batch) -> outputs [n, K]."
        ) from error
