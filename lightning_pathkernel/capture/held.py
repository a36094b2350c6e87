"""Per-example gradients as plain values and tensors, for those that wait for a sketch while a checkpoint is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_pathkernel.capture.conv_gradients import ConvGradient, ConvScratch
from lightning_pathkernel.capture.gradients import (
    BiasGradient,
    DenseGradient,
    FactoredGradient,
    IndexedGradient,
    OuterGradient,
    PerExampleGradient,
    VectorGradient,
)
from lightning_pathkernel.capture.windows import ConvGeometry

__all__ = ["HeldGradients"]

_FIELDS: dict[type, tuple[str, ...]] = {
    DenseGradient: ("gradients",),
    VectorGradient: ("values",),
    OuterGradient: ("left", "right"),
    FactoredGradient: ("left", "right", "_sums"),
    IndexedGradient: ("indices", "right", "rows"),
}
_KINDS = {kind.__name__: kind for kind in _FIELDS}


class HeldGradients:
    """A table of gradients, each once, however many share it; a bias goes on reading its weight's."""

    def __init__(self) -> None:
        self._objects: list[PerExampleGradient] = []
        self._places: dict[int, int] = {}
        self.table: list[dict[str, Any]] = []

    def add(self, gradient: PerExampleGradient) -> int:
        """Put a gradient into the table, if it is not there.

        Args:
            gradient: The gradient.

        Returns:
            Its number.

        Raises:
            TypeError: If it is of a kind that a rule of the user's brought.
        """
        if id(gradient) in self._places:
            return self._places[id(gradient)]
        made: dict[str, Any]
        if isinstance(gradient, BiasGradient):
            assert isinstance(gradient._weight, ConvGradient | FactoredGradient)
            made = {"kind": "BiasGradient", "weight": self.add(gradient._weight)}
        elif isinstance(gradient, ConvGradient):
            made = {
                "kind": "ConvGradient", "inputs": gradient.inputs, "grad_outputs": gradient.grad_outputs,
                "geometry": asdict(gradient.geometry), "sums": gradient._sums,
            }  # fmt: skip
        elif type(gradient) in _FIELDS:
            made = {"kind": type(gradient).__name__}
            made |= {name: getattr(gradient, name) for name in _FIELDS[type(gradient)]}
        else:
            raise TypeError(
                f"a {type(gradient).__name__} of a layer rule of yours waits for its chord's first step and cannot be "
                "saved: save checkpoints when no gradients wait (at the end of an accumulation)."
            )
        self._objects.append(gradient)
        self.table.append(made)
        self._places[id(gradient)] = len(self.table) - 1
        return self._places[id(gradient)]

    @staticmethod
    def restored(table: list[Mapping[str, Any]]) -> list[PerExampleGradient]:
        """The gradients of a `table`, in its order."""
        out: list[PerExampleGradient] = []
        for stored in table:
            fields = dict(stored)
            kind = fields.pop("kind")
            if kind == "BiasGradient":
                weight = out[fields["weight"]]
                assert isinstance(weight, ConvGradient | FactoredGradient)
                out.append(BiasGradient(weight))
            elif kind == "ConvGradient":
                geometry = ConvGeometry(**{name: tuple(value) for name, value in fields["geometry"].items()})
                arguments = fields["inputs"], fields["grad_outputs"], geometry, ConvScratch(), fields["sums"]
                out.append(ConvGradient(*arguments))
            else:
                out.append(_KINDS[kind](**fields))
        return out
