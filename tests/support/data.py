"""Training data of the table: how batches are drawn, and how their examples are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler


@dataclass(frozen=True)
class DataRow:
    """A kind of training loader.

    Attributes:
        what: How the page calls it.
        loader: Makes it out of a dataset and a batch size.
        example_ids: What the callback is told; None where it finds out by itself.
        steps: Optimiser steps of the fit.
    """

    what: str
    loader: Callable[[Any, int], DataLoader]
    example_ids: Callable[[Any], Any] | None = None
    steps: int = 6


class Stream(IterableDataset):
    """Examples in their order, without indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset[i] for i in range(len(self.dataset)))


def _weighted(dataset: Any, n: int) -> DataLoader:
    weights = torch.linspace(0.1, 3.0, len(dataset))
    return DataLoader(dataset, n, sampler=WeightedRandomSampler(weights, len(dataset), replacement=True))


def _batches(dataset: Any, n: int) -> DataLoader:
    return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), n, drop_last=False))


DATA = {
    "in order": DataRow("a `DataLoader` in order, its last batch short", DataLoader),
    "last batch dropped": DataRow(
        "shuffled, the last batch dropped", lambda d, n: DataLoader(d, n, shuffle=True, drop_last=True), steps=5
    ),
    "single examples": DataRow("batches of one", lambda d, n: DataLoader(d, 1, shuffle=True), steps=22),
    "weighted": DataRow("a weighted sampler that draws an example more than once", _weighted),
    "batch sampler": DataRow("a batch sampler of your own", _batches),
    "workers": DataRow("worker processes", lambda d, n: DataLoader(d, n, shuffle=True, num_workers=1)),
    "own ids": DataRow("ids of your own (`example_ids=`)", DataLoader, lambda batch: batch[2]),
    "strings": DataRow(
        "ids that are strings (`example_ids=`)", DataLoader, lambda batch: [f"example {i}" for i in batch[2].tolist()]
    ),
    "stream": DataRow(
        "an `IterableDataset` with `example_ids=` and `max_steps`",
        lambda d, n: DataLoader(Stream(d), n),
        lambda b: b[2],
    ),
}
