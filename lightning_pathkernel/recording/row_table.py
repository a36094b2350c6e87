"""The open chord's rows as plain values and tensors: where every slot of the arena is, and what it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from lightning_pathkernel.capture.held import HeldGradients
from lightning_pathkernel.recording.arena import Arena, Slot
from lightning_pathkernel.recording.rows import CarriedRows, Rows, StepRows

__all__ = ["RowTable"]


class RowTable:
    """Numbers rows, each object once, however many steps and optimisers share it.

    Args:
        arena: Where their numbers are kept; it is saved as a whole, so that a slot is four integers.
    """

    def __init__(self, arena: Arena) -> None:
        self._blocks = {id(block): i for i, block in enumerate(arena.blocks())}
        self._objects: list[Rows] = []
        self._layouts: dict[str, int] = {}
        self._slots: list[list[int]] = []
        self._held = HeldGradients()
        self._table: list[dict[str, Any]] = []
        self.places: dict[int, int] = {}

    def add(self, rows: Rows) -> int:
        """Put rows into the table, if they are not there.

        Args:
            rows: The rows.

        Returns:
            Their number.
        """
        if id(rows) not in self.places:
            self.places[id(rows)] = len(self._table)
            self._objects.append(rows)
            self._table.append(self._of_step(rows) if isinstance(rows, StepRows) else self._carried(rows))
        return self.places[id(rows)]

    @staticmethod
    def _carried(rows: Rows) -> dict[str, Any]:
        assert isinstance(rows, CarriedRows)
        return {"ids": rows.ids, "parts": rows.parts}

    def _of_step(self, rows: StepRows) -> dict[str, Any]:
        layout = json.dumps(rows._uses)
        slots = [*rows._slots, *([rows._ids] if isinstance(rows._ids, Slot) else [])]
        self._slots += [[self._blocks[id(s.block)], s.start, s.n, s.k] for s in slots]
        held = {name: [self._held.add(use) for use in uses] for name, uses in rows.held.items()}
        return {
            "layout": self._layouts.setdefault(layout, len(self._layouts)), "slots": len(slots), "room": rows._room,
            "ids": None if isinstance(rows._ids, Slot) else rows._ids, **({"held": held} if held else {}),
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The table."""
        slots = torch.tensor(self._slots, dtype=torch.int64).reshape(-1, 4)
        layouts = [json.loads(layout) for layout in self._layouts]
        return {"layouts": layouts, "slots": slots, "held": self._held.table, "rows": self._table}

    @staticmethod
    def restored(state: Mapping[str, Any], arena: Arena) -> list[Rows]:
        """The rows of a table, in its order, their numbers in an arena that is restored already."""
        blocks = arena.blocks()
        slots = [Slot(blocks[block], start, n, k) for block, start, n, k in state["slots"].tolist()]
        layouts = [[(str(name), tuple(use)) for name, use in layout] for layout in state["layouts"]]
        held = HeldGradients.restored(state["held"])
        out: list[Rows] = []
        at = 0
        for stored in state["rows"]:
            if "parts" in stored:
                out.append(CarriedRows(stored["ids"], dict(stored["parts"])))
                continue
            own = slots[at : at + stored["slots"]]
            at += stored["slots"]
            ids: torch.Tensor | Slot = stored["ids"] if stored["ids"] is not None else own.pop()
            rows = StepRows(ids, arena, int(stored["room"]))
            rows._slots, rows._uses = own, list(layouts[stored["layout"]])
            rows.held = {name: [held[i] for i in uses] for name, uses in stored.get("held", {}).items()}
            out.append(rows)
        return out
