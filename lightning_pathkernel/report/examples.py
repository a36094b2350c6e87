"""The training examples of a machine, looked up by id in whatever the user has them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pathkernel.report.items import Shown, show_item

__all__ = ["ExampleSource", "Label"]

Label = int | float | str
_LABELS_READ = 20_000
"""Items of a dataset that are read for nothing but their labels."""


class ExampleSource:
    """Training examples and their labels, by id.

    Args:
        examples: A tensor or array with a row per id, a torch Dataset or any sequence indexed by id, a data frame, or a
            mapping from id or name; None for ids alone. An item ``(input, label)`` brings its label along.
        labels: Labels by id, as a tensor, array, sequence or mapping; None for those of ``examples``.
        columns: Names of the columns of table rows.
        names: The user's string ids, as in `KernelMachine.example_names`.
        positions: Rows of every example in the machine, as in the callback; 0 for one.
        show: Turns an item into a string, an image or a mapping, where it does not show itself.
    """

    def __init__(
        self, examples: Any = None, labels: Any = None, columns: Sequence[str] | None = None,
        names: Mapping[int, str] | None = None, positions: int = 0, show: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self._frame = hasattr(examples, "iloc")
        self._examples, self._labels = examples, labels if labels is not None else labels_of(examples)
        self._columns = columns
        self._names, self._positions, self._show = dict(names or {}), positions, show

    def name(self, example: int) -> str:
        """What the page calls an example."""
        if example in self._names:
            return self._names[example]
        if self._positions:
            return f"{example // self._positions}, position {example % self._positions}"
        return str(example)

    def look(self, example: int) -> Shown:
        """How an example is shown.

        Args:
            example: Its id.

        Returns:
            What is shown.

        Raises:
            ValueError: If the user's examples do not have it.
        """
        item = self.item(example)
        if self._show is not None and item is not None:
            return show_item(self._show(item))
        return show_item(item, self._columns)

    def item(self, example: int) -> Any:
        """An example as the user has it, without its label; None where there are no examples."""
        return None if self._examples is None else self._split(self._item(example))[0]

    def label(self, example: int) -> Label | None:
        """The label of an example; None where none is known."""
        if self._labels is not None:
            return _scalar(self._pick(self._labels, example, "labels"))
        if self._examples is None or self._frame or isinstance(self._examples, Tensor | np.ndarray):
            return None
        return self._split(self._item(example))[1]

    def label_vector(self, ids: Tensor) -> list[Label] | None:
        """Labels of all these ids, or None where one is missing or too many items would have to be read for them."""
        if self._labels is None and (self._examples is None or len(ids) > _LABELS_READ):
            return None
        found = [self.label(int(i)) for i in ids]
        return None if any(each is None for each in found) else [each for each in found if each is not None]

    def _item(self, example: int) -> Any:
        if self._frame:
            row = self._examples.iloc[self._key(example)]
            return {str(name): row[name] for name in self._examples.columns}
        return self._pick(self._examples, example, "examples")

    def _key(self, example: int) -> int:
        return example // self._positions if self._positions else example

    def _pick(self, table: Any, example: int, what: str) -> Any:
        key = self._key(example)
        if isinstance(table, Mapping):
            for each in (self._names.get(example), key):
                if each in table:
                    return table[each]
            raise ValueError(f"{what} has no {self.name(example)!r}, an example that the machine was trained on")
        if example in self._names:
            raise ValueError(
                f"the machine's examples have names, such as {self.name(example)!r}: pass {what} as a mapping from name"
            )
        if not 0 <= key < len(table):
            raise ValueError(
                f"{what} has {len(table)} rows, but the machine was trained on example {key}: pass the training set, "
                "indexed as in training"
            )
        found = table[key]
        if what == "labels" and self._positions and isinstance(found, Tensor | np.ndarray) and found.ndim:
            return found[example % self._positions]
        return found

    def _split(self, item: Any) -> tuple[Any, Label | None]:
        """An item as ``(input, label)``."""
        if isinstance(item, tuple | list) and len(item) >= 2 and self._labelled(item):
            return item[0], _scalar(item[1])
        return item, None

    @staticmethod
    def _labelled(item: Sequence[Any]) -> bool:
        return isinstance(item[0], Tensor | np.ndarray | str | dict) or hasattr(item[0], "getbands")


def labels_of(dataset: Any) -> Any:
    """All labels of a dataset where it holds them as a whole: ``targets``, ``labels``, or a TensorDataset's second."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, torch.utils.data.TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) > 1 else None
        return found if found is not None and found.dim() == 1 else None
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, Tensor | np.ndarray | list) and len(found) == len(dataset):
            return found
    return None


def _scalar(value: Any) -> Label | None:
    """A label as a plain number or string; None for anything else."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item() if math.prod(value.shape) == 1 else None
    return value if isinstance(value, int | float | str) else None
