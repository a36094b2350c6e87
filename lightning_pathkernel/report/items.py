"""What an example looks like: an image, a text, or a row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_pathkernel.report.numbers import MINUS
from lightning_pathkernel.report.png import data_uri

__all__ = ["Shown", "as_pixels", "show_item"]

IMAGE_SIDE = 96
"""Longest side of an image in the page, in pixels; larger ones are scaled down."""
TEXT_LENGTH = 400
CELLS = 12
_PIXELATED = 40
"""Up to this side an image is enlarged pixel by pixel."""


@dataclass(frozen=True)
class Shown:
    """One example or query, ready for the page.

    Attributes:
        kind: ``image``, ``text``, ``row`` or ``none``.
        src: An image's data URI.
        pixelated: Whether an image is enlarged pixel by pixel.
        text: A text, cut where it is long.
        cells: A table row's columns and values.
        left_out: Characters of a text, or columns of a row, that are not shown.
    """

    kind: str = "none"
    src: str = ""
    pixelated: bool = False
    text: str = ""
    cells: tuple[tuple[str, str], ...] = ()
    left_out: int = 0


def show_item(item: Any, columns: Sequence[str] | None = None) -> Shown:
    """How to show one example.

    Args:
        item: A string; an image: a tensor or array ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` of any range, or a PIL
            image; a table row: a mapping, or ``[F]`` numbers; None for nothing.
        columns: Names of a row's F columns; with them, ``[F]`` is always a row.

    Returns:
        What is shown; for anything else its `repr`, as a text.

    Raises:
        ValueError: If there is not one name for each column.
    """
    if item is None:
        return Shown()
    if isinstance(item, str):
        return _text(item)
    if isinstance(item, dict):
        return _row([str(key) for key in item], list(item.values()))
    if hasattr(item, "getbands"):  # PIL
        item = np.array(item.convert("RGBA" if "A" in item.getbands() else "RGB"))
    values = _array(item)
    if values is None or values.dim() == 0:
        return _text(str(item) if isinstance(item, int | float) or values is not None else repr(item))
    pixels = as_pixels(values)
    if pixels is not None:
        return Shown("image", src=data_uri(pixels), pixelated=max(pixels.shape[:2]) <= _PIXELATED)
    if values.dim() == 1 and (columns is not None or values.is_floating_point()):
        names = list(columns) if columns is not None else [f"x{i}" for i in range(len(values))]
        if len(names) != len(values):
            raise ValueError(f"columns has {len(names)} names, but the row has {len(values)} values")
        return _row(names, values.tolist())
    return _text(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.flatten()[:400].tolist()))


def _array(item: Any) -> Tensor | None:
    if isinstance(item, Tensor):
        return item.detach().cpu()
    if isinstance(item, np.ndarray | np.generic | list | tuple):
        try:
            return torch.as_tensor(np.array(item))
        except (TypeError, ValueError):
            return None
    return None


def _text(text: str) -> Shown:
    cut = text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return Shown("text", text=cut, left_out=max(0, len(text) - TEXT_LENGTH))


def _row(names: Sequence[str], values: Sequence[Any]) -> Shown:
    texts = [f"{v:.4g}".replace("-", MINUS) if isinstance(v, float) else str(v)[:80] for v in values[:CELLS]]
    return Shown("row", cells=tuple(zip(names, texts, strict=False)), left_out=max(0, len(values) - CELLS))


def as_pixels(values: Tensor) -> NDArray[np.uint8] | None:
    """A tensor as an image for the page, its longest side at most `IMAGE_SIDE`.

    Args:
        values: ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``. What lies in [0, 1], or is uint8, is taken as it is; any
            other range is stretched from its least to its greatest value. What is not finite is drawn as the least.

    Returns:
        ``[H, W, C]`` with 1, 3 or 4 channels (the mean where there is another number of them), or None where it has no
        such shape.
    """
    planes = _planes(values)
    if planes is None:
        return None
    planes = planes.double() / (255 if values.dtype == torch.uint8 else 1)
    finite = planes.isfinite()
    low, high = (float(planes[finite].min()), float(planes[finite].max())) if bool(finite.any()) else (0.0, 0.0)
    planes = torch.where(finite, planes, low)
    if low < 0 or high > 1:
        planes = (planes - low) / max(high - low, 1e-30)
    if planes.shape[0] not in (1, 3, 4):
        planes = planes.mean(0, keepdim=True)
    factor = IMAGE_SIDE / max(planes.shape[1:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in planes.shape[1:]]
        planes = F.interpolate(planes[None], size=size, mode="area")[0]
    found: NDArray[np.uint8] = (planes * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return found


def _planes(values: Tensor) -> Tensor | None:
    """``[C, H, W]``, or None where this is no image."""
    if values.dtype.is_complex or values.numel() == 0:
        return None
    if values.dim() == 2 and min(values.shape) > 1:
        return values[None]
    if values.dim() != 3:
        return None
    last = values.shape[0] not in (1, 3, 4) and values.shape[2] in (1, 3, 4)
    return values.permute(2, 0, 1) if last else values
