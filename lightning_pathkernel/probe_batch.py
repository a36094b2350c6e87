"""Validation examples for the probes, taken without moving any random state."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_pathkernel.network import batch_size, take_rows

__all__ = ["collect_probes"]


def collect_probes(trainer: Any, count: int) -> Any | None:
    """The first ``count`` examples of the first validation loader, as one batch on the module's device.

    Args:
        trainer: The Trainer, with its validation loaders set up.
        count: How many; all there are, with a warning, if there are fewer.

    Returns:
        The batch, or None, with a warning, where there is no validation loader.
    """
    if count == 0:
        return None
    loaders = _validation_loaders(trainer)
    loader = next(iter(pytree.tree_leaves(loaders)), None) if loaders is not None else None
    if loader is None:
        warnings.warn(
            "PathKernelCallback: there is no validation loader, so no fidelity is logged and the sketches are fitted "
            "without probes. Pass val_dataloaders to Trainer.fit.",
            stacklevel=2,
        )
        return None
    with _random_states_kept(getattr(loader, "generator", None)):
        batch = _first_rows(loader, count, trainer.world_size > 1)
    found = batch_size(batch)
    if found < count:
        warnings.warn(
            f"probes={count}, but the validation set has {found} examples: all of them are followed.", stacklevel=2
        )
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _validation_loaders(trainer: Any) -> Any | None:
    """The validation loaders; set up now, as Lightning does, where its first validation is epochs away."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    return trainer.val_dataloaders


@contextmanager
def _random_states_kept(private: object) -> Iterator[None]:
    """Put Python's, NumPy's and torch's generators, and the loader's own, back as they were."""
    own = private if isinstance(private, torch.Generator) else None
    python, numpy, state = random.getstate(), np.random.get_state(), own.get_state() if own is not None else None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if own is not None and state is not None:
            own.set_state(state)


def _first_rows(loader: Any, count: int, shared_out: bool) -> Any:
    """Concatenate leading batches of the loader, the same on all processes, until there are enough rows."""
    if isinstance(loader, DataLoader) and (loader.num_workers or shared_out):
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
