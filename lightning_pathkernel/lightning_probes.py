"""Validation examples for the probes, taken without moving any random state."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_pathkernel.network import batch_size, take_rows

__all__ = ["collect_probes"]


def collect_probes(trainer: pl.Trainer, pl_module: pl.LightningModule, count: int) -> Any | None:
    """The first ``count`` examples of the first validation loader, as one batch on the module's device.

    Args:
        trainer: The trainer, with its validation loaders set up.
        pl_module: The module.
        count: How many; all there are, with a warning, if there are fewer.

    Returns:
        The batch, or None, with a warning, where there is no validation loader.
    """
    loaders = trainer.val_dataloaders
    loader = next(iter(pytree.tree_leaves(loaders)), None) if loaders is not None else None
    if count == 0:
        return None
    if loader is None:
        rank_zero_warn(
            "PathKernelCallback: there is no validation loader, so no fidelity is logged and the sketches are fitted "
            "without probes. Pass val_dataloaders to Trainer.fit."
        )
        return None
    states = _collect_rng_states()
    generator = getattr(loader, "generator", None)
    private = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        batch = _first_rows(loader, count)
    finally:
        _set_rng_states(states)
        if private is not None and isinstance(generator, torch.Generator):
            generator.set_state(private)
    found = batch_size(batch)
    if found < count:
        rank_zero_warn(f"probes={count}, but the validation set has {found} examples: all of them are followed.")
    return trainer.strategy.batch_to_device(batch)


def _first_rows(loader: Any, count: int) -> Any:
    """Concatenate leading batches of the loader until there are enough rows."""
    if isinstance(loader, DataLoader) and loader.num_workers:
        loader = DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    batches, rows = [], 0
    for batch in loader:
        batches.append(batch)
        rows += batch_size(batch)
        if rows >= count:
            break
    if not batches:
        raise ValueError("the validation loader is empty")
    return take_rows(_concatenated(batches), slice(count))


def _concatenated(batches: list[Any]) -> Any:
    leaves = [pytree.tree_flatten(batch)[0] for batch in batches]
    spec = pytree.tree_flatten(batches[0])[1]
    sizes = [batch_size(batch) for batch in batches]

    def join(values: tuple[Any, ...]) -> Any:
        first = values[0]
        rows = isinstance(first, torch.Tensor) and first.dim() > 0
        if rows and all(v.shape[0] == n for v, n in zip(values, sizes, strict=True)):
            return torch.cat(values)
        return first

    return pytree.tree_unflatten([join(values) for values in zip(*leaves, strict=True)], spec)
