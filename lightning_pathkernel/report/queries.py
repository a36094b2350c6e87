"""Each query's explanation, ready for the page; and what all queries say about classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pathkernel.network import batch_size, take_rows
from lightning_pathkernel.report.classes import HeatMap, class_name, class_table, heat_map, ordered, sums_by_class
from lightning_pathkernel.report.examples import ExampleSource, Label
from lightning_pathkernel.report.items import Shown, show_item
from lightning_pathkernel.report.numbers import decimals_for, plain, signed
from lightning_pathkernel.report.options import ReportOptions
from lightning_pathkernel.report.waterfall import Step, waterfall

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

__all__ = ["ExampleRow", "QueryPart", "QueryView", "query_part"]

MOST_CLASSES = 500
_CHUNK = 64
"""Queries whose contributions to all examples are held at once."""


@dataclass(frozen=True)
class ExampleRow:
    """A training example beside a query: its contribution with text and bar, in percent of the side's scale."""

    id: int
    name: str
    shown: Shown
    label: str
    value: float
    text: str
    width: float


@dataclass(frozen=True)
class QueryView:
    """One query.

    Attributes:
        number: Its row in ``x``.
        name: What the page calls it.
        shown: How it is shown.
        label: Its true label, or nothing.
        predicted: The network's decision, or its output where there is one only.
        right: Whether that is the label; None where unknown.
        output: What is explained.
        prediction: The machine's value of it, as text.
        network: The network's, as text.
        steps: The waterfall.
        zero: Where 0 lies in it, in percent.
        positive: Examples for.
        negative: Examples against.
        sketch: The ledger's sketch term, as text.
    """

    number: int
    name: str
    shown: Shown
    label: str
    predicted: str
    right: bool | None
    output: str
    prediction: str
    network: str
    steps: list[Step]
    zero: float
    positive: list[ExampleRow]
    negative: list[ExampleRow]
    sketch: str


@dataclass(frozen=True)
class QueryPart:
    """All that the page says of queries.

    Attributes:
        views: Those shown one by one.
        count: How many there are.
        fidelity: The machine against its network on all of them.
        heat: Classes by classes; None where there are no classes.
        heat_missing: Why there is none.
    """

    views: list[QueryView]
    count: int
    fidelity: dict[str, float]
    heat: HeatMap | None
    heat_missing: str


def query_part(
    machine: KernelMachine, x: Any, target: Tensor | None, source: ExampleSource, labels: Sequence[Label] | None,
    options: ReportOptions,
) -> QueryPart:  # fmt: skip
    """Explain queries.

    Args:
        machine: The machine.
        x: The queries.
        target: What is explained of each; None for the predicted class, or the only output.
        source: The training examples.
        labels: Their labels in the order of ``machine.example_ids``, or None.
        options: What the user asked for.

    Returns:
        What the page says of them.

    Raises:
        ValueError: If there is not one target, name, item or label for each query.
    """
    outputs = machine.network_outputs(x)
    chosen = outputs.argmax(1) if target is None else torch.as_tensor(target)
    count, classes = len(outputs), outputs.shape[1]
    if chosen.shape != (count,):
        raise ValueError(f"target must have shape ({count},), found {tuple(chosen.shape)}")
    shown = min(count, options.max_queries)
    if classes == 1 or (labels is not None and len(set(labels)) > MOST_CLASSES):
        labels = None
    signs, sums = _sums(machine, x, chosen, labels, shown, options)
    views = _views(machine, x, chosen[:shown], outputs[:shown], signs, source, options)
    heat, missing = None, _why_no_heat(classes, labels)
    if labels is not None and sums is not None:
        heat = heat_map(class_table(sums, chosen.tolist(), labels, options.class_names))
    return QueryPart(views, count, machine.fidelity([x]), heat, missing)


def _why_no_heat(classes: int, labels: Sequence[Label] | None) -> str:
    if classes == 1:
        return "A single output has no classes to compare."
    if labels is not None:
        return ""
    return (
        f"Classes are compared where the labels of all training examples are known (labels=), {MOST_CLASSES} at most."
    )


def _sums(
    machine: KernelMachine, x: Any, target: Tensor, labels: Sequence[Label] | None, shown: int, options: ReportOptions
) -> tuple[Tensor, np.ndarray[Any, np.dtype[np.float64]] | None]:
    """Positive and negative sums of the first queries ``[shown, 2]``; sums by training class of all ``[Q, C]``."""
    codes = None
    if labels is not None:
        place = {label: k for k, label in enumerate(ordered(labels))}
        codes = torch.tensor([place[label] for label in labels])
    signs, sums = [], []
    for start in range(0, len(target) if codes is not None else shown, _CHUNK):
        rows = slice(start, start + _CHUNK)
        found = machine.contributions(take_rows(x, rows), target[rows], options.output_fn).double()
        signs.append(torch.stack([found.clamp_min(0).sum(1), found.clamp_max(0).sum(1)], 1))
        if codes is not None:
            sums.append(sums_by_class(found, codes, len(place)))
    return torch.cat(signs)[:shown], torch.cat(sums).numpy() if codes is not None else None


def _views(
    machine: KernelMachine, x: Any, target: Tensor, outputs: Tensor, signs: Tensor, source: ExampleSource,
    options: ReportOptions,
) -> list[QueryView]:  # fmt: skip
    part = take_rows(x, slice(len(target)))
    why = machine.explain(part, target, options.top_k, options.output_fn, options.complete)
    items, labels = _items(part, options), _labels(x, options)
    names = options.query_names if options.query_names is not None else [str(q) for q in range(len(target))]
    if len(names) < len(target):
        raise ValueError(f"query_names has {len(names)} entries for {len(target)} queries")
    views = []
    for q in range(len(target)):
        ledger = {name: float(value[q]) for name, value in why.ledger.items()}
        steps, zero = waterfall(ledger, *signs[q].tolist())
        decimals = decimals_for([step.value for step in steps if step.total])
        pairs = list(zip(why.example_ids[q].tolist(), why.contributions[q].tolist(), strict=True))
        sides = _sides(pairs, source, options)
        label, predicted = labels[q], int(outputs[q].argmax()) if outputs.shape[1] > 1 else None
        views.append(
            QueryView(
                q, names[q], show_item(items[q], options.columns),
                class_name(label, options.class_names),
                plain(float(outputs[q]), decimals) if predicted is None else class_name(predicted, options.class_names),
                None if predicted is None or label is None else predicted == label,
                _output_name(int(target[q]), predicted is None, options),
                plain(float(why.prediction[q]), decimals), steps[-1].text, steps, zero, *sides,
                signed(ledger["sketch"], decimals),
            )
        )  # fmt: skip
    return views


def _output_name(target: int, single: bool, options: ReportOptions) -> str:
    if options.output_name is not None:
        return options.output_name
    if options.output_fn is not None:
        return "the scalar of output_fn"
    return "the output" if single else f"the output of class {class_name(target, options.class_names)}"


def _items(x: Any, options: ReportOptions) -> Sequence[Any]:
    """What each query looks like."""
    if options.query_items is not None:
        if len(options.query_items) < batch_size(x):
            raise ValueError(f"query_items has {len(options.query_items)} entries for {batch_size(x)} queries")
        return options.query_items
    first = x[0] if isinstance(x, tuple | list) else x
    leaf = next(leaf for leaf in pytree.tree_leaves(first) if isinstance(leaf, Tensor) and leaf.dim())
    return list(leaf) if options.show is None else [options.show(row) for row in leaf]


def _labels(x: Any, options: ReportOptions) -> list[Label | None]:
    count, found = batch_size(x), options.query_labels
    if found is None and isinstance(x, tuple | list) and len(x) > 1 and isinstance(x[1], Tensor):
        integers = x[1].dim() == 1 and not x[1].is_floating_point() and len(x[1]) == count
        found = x[1] if integers else None
    if found is None:
        return [None] * count
    if len(found) < count:
        raise ValueError(f"query_labels has {len(found)} entries for {count} queries")
    return [value.item() if hasattr(value, "item") else value for value in found]


def _sides(
    pairs: Sequence[tuple[int, float]], source: ExampleSource, options: ReportOptions
) -> tuple[list[ExampleRow], list[ExampleRow]]:
    """Examples for and against: those of the right sign, none twice."""
    half = len(pairs) // 2
    kept = [(i, c) for i, c in pairs[:half] if c > 0], [(i, c) for i, c in pairs[half:] if c < 0]
    largest = max((abs(c) for side in kept for _, c in side), default=1.0)
    decimals = decimals_for([largest])
    first, second = (list(_rows(side, largest, decimals, source, options)) for side in kept)
    return first, second


def _rows(
    pairs: Sequence[tuple[int, float]], largest: float, decimals: int, source: ExampleSource, options: ReportOptions
) -> Iterator[ExampleRow]:
    for example, value in pairs:
        label = class_name(source.label(example), options.class_names)
        width = 100 * abs(value) / largest
        yield ExampleRow(
            example, source.name(example), source.look(example), label, value, signed(value, decimals), width
        )
