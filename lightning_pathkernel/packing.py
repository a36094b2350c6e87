"""Formats of numbers in an artifact: what rounds them, and what reads them back.

Only float32 is packed; tensors of other types, and those with numbers that are not finite, are stored as they are.
Every format stores its codes under the tensor's own name, and scales beside them in a group of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_pathkernel.network import Tensors
from lightning_pathkernel.sketch import from_grid, to_grid

__all__ = ["BLOCK", "Groups", "pack_blocks", "pack_integers", "pack_logarithms", "pack_rows", "unpack", "unpack_rows"]

Groups = dict[str, dict[str, Tensor]]
"""Group -> name -> tensor, as in a file of the store."""
BLOCK = 64
"""Numbers that share a scale."""
_HALF_TOP = 2.0**15
_STEPS = 254


def _packable(value: Tensor) -> bool:
    return value.dtype is torch.float32 and bool(value.isfinite().all())


def _exponent_count(numbers: int) -> int:
    return -(-numbers // BLOCK)


def pack_blocks(kind: str, values: Tensors, groups: Groups) -> None:
    """Eight bits per number, whole multiples of a power of two that `BLOCK` numbers share.

    Args:
        kind: Group that the tensors belong to.
        values: Name -> tensor.
        groups: Filled in: ``kind`` and ``kind.exponents``.
    """
    for name, value in values.items():
        if not _packable(value):
            groups.setdefault(kind, {})[name] = value
            continue
        flat = value.detach().flatten()
        filled = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK))
        multiples, exponents = to_grid(filled.reshape(-1, BLOCK).T)
        groups.setdefault(kind, {})[name] = multiples.T.flatten()[: len(flat)].reshape(value.shape)
        groups.setdefault(f"{kind}.exponents", {})[name] = exponents


def pack_logarithms(kind: str, values: Tensors, groups: Groups) -> None:
    """Eight bits per number that is 0 or more: 0, or one of 255 even steps in the logarithm.

    Args:
        kind: Group that the tensors belong to.
        values: Name -> tensor.
        groups: Filled in: ``kind`` and ``kind.scale``, logarithm to base 2 of the least number above 0, and the step.
    """
    for name, value in values.items():
        positive = value > 0
        if not _packable(value) or bool((value < 0).any()) or not bool(positive.any()):
            groups.setdefault(kind, {})[name] = value
            continue
        logarithms = value.double().clamp_min(2.0**-149).log2()
        least, greatest = (float(f(logarithms[positive])) for f in (torch.min, torch.max))
        scale = torch.tensor([least, (greatest - least) / _STEPS], dtype=torch.float32)
        steps = (logarithms - scale[0].double()) / scale[1].double().clamp_min(1e-30)
        codes = torch.where(positive, steps.round().clamp(0, _STEPS) + 1, torch.zeros_like(steps))
        groups.setdefault(kind, {})[name] = codes.to(torch.uint8)
        groups.setdefault(f"{kind}.scale", {})[name] = scale


def unpack(kind: str, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `pack_blocks` and `pack_logarithms` packed, or tensors stored as they were.

    Args:
        kind: Their group.
        groups: A file's groups.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: If codes and scales do not fit together.
    """
    exponents, scales = groups.get(f"{kind}.exponents", {}), groups.get(f"{kind}.scale", {})
    values = groups.get(kind, {})
    if not (exponents.keys() | scales.keys()) <= values.keys() or exponents.keys() & scales.keys():
        raise ValueError(f"scales of {kind} for no codes")
    out = {}
    for name, value in values.items():
        if name in exponents:
            out[name] = _from_blocks(kind, name, value, exponents[name])
        elif name in scales:
            out[name] = _from_logarithms(kind, name, value, scales[name])
        else:
            out[name] = value
    return out


def _from_blocks(kind: str, name: str, codes: Tensor, exponents: Tensor) -> Tensor:
    count = _exponent_count(codes.numel())
    if codes.dtype is not torch.int8 or exponents.dtype is not torch.int8 or exponents.shape != (count,):
        raise ValueError(f"{kind} of {name!r}: {codes.dtype} with exponents {tuple(exponents.shape)} {exponents.dtype}")
    each = exponents.repeat_interleave(BLOCK)[: codes.numel()]
    return from_grid(codes.reshape(1, -1), each).reshape(codes.shape)


def _from_logarithms(kind: str, name: str, codes: Tensor, scale: Tensor) -> Tensor:
    if codes.dtype is not torch.uint8 or scale.dtype is not torch.float32 or scale.shape != (2,):
        raise ValueError(f"{kind} of {name!r}: {codes.dtype} with a scale {tuple(scale.shape)} {scale.dtype}")
    least, step = (float(x) for x in scale)
    values = torch.exp2(least + (codes.double() - 1) * step)
    return torch.where(codes == 0, torch.zeros_like(values), values).float()


def pack_rows(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """Rows ``[V, k]`` in 8 or 16 bits per number, their sum as it is.

    In 16, float16 under a power of two per column, so that none overflows and no column is subnormal. In 8, whole
    multiples of a power of two per row, over another one per column. Rows mostly cancel in their sum, where the
    rounding of thousands would add up: with 8 bits each one therefore takes over, column by column, what rounding left
    of those before it, from the smallest row to the largest. What is left in the end is stored in float32 and belongs
    to the largest row.

    Args:
        rows: The rows.
        bits: 8 or 16.

    Returns:
        ``rows``; where they are packed ``exponents`` and ``rest``, ``[k]`` each, and with 8 bits ``row_exponents [V]``.
    """
    if not _packable(rows) or not rows.numel():
        return {"rows": rows}
    values = rows.double()
    columns = _exponents(values.abs().amax(0), _HALF_TOP) if bits == 16 else _exponents(values.square().mean(0).sqrt())
    scaled = values / torch.exp2(columns)
    stored = {"exponents": columns.to(torch.int8), "rest": rows.new_zeros(rows.shape[1])}
    if bits == 16:
        stored["rows"] = scaled.half()
    else:
        each = _exponents(scaled.abs().amax(1), 127.0)
        stored["rows"], stored["row_exponents"] = _rounded_in_turn(scaled, torch.exp2(each)), each.to(torch.int8)
    stored["rest"] = (values.sum(0) - unpack_rows(stored).double().sum(0)).float()
    return stored


def _exponents(largest: Tensor, top: float = 1.0) -> Tensor:
    return torch.ceil(torch.log2(largest.clamp_min(1e-300) / top)).clamp(-126, 113)


def _rounded_in_turn(rows: Tensor, steps: Tensor) -> Tensor:
    values, step = rows.cpu().numpy(), steps.cpu().numpy()
    out = np.empty(values.shape, dtype=np.int8)
    left = np.zeros(values.shape[1])
    for i in np.argsort(step, kind="stable"):
        wanted = values[i] + left
        multiples = np.clip(np.rint(wanted / step[i]), -127, 127)
        left = wanted - multiples * step[i]
        out[i] = multiples
    return torch.from_numpy(out).to(rows.device)


def unpack_rows(stored: Mapping[str, Tensor]) -> Tensor:
    """Rows as `pack_rows` stored them.

    Args:
        stored: ``rows`` and, where they are packed, ``exponents`` and ``rest``.

    Returns:
        The rows, ``[V, k]``.

    Raises:
        ValueError: If codes and exponents do not fit together.
    """
    rows, exponents = stored["rows"], stored.get("exponents")
    if exponents is None:
        if not rows.is_floating_point():
            raise ValueError(f"rows of {rows.dtype} without exponents")
        return rows
    rest, each = stored["rest"], stored.get("row_exponents")
    if rows.dim() != 2 or not rows.numel() or rows.dtype is not (torch.float16 if each is None else torch.int8):
        raise ValueError(f"rows {tuple(rows.shape)} of {rows.dtype} with {'no ' if each is None else ''}row exponents")
    if exponents.dtype is not torch.int8 or rest.dtype is not torch.float32:
        raise ValueError(f"rows with exponents of {exponents.dtype} and a rest of {rest.dtype}")
    if not exponents.shape == rest.shape == rows.shape[1:]:
        raise ValueError(
            f"rows {tuple(rows.shape)} with {tuple(exponents.shape)} exponents, a rest {tuple(rest.shape)}"
        )
    out = rows.double() * torch.exp2(exponents.double())
    if each is not None:
        if each.dtype is not torch.int8 or each.shape != rows.shape[:1]:
            raise ValueError(f"rows {tuple(rows.shape)} with {tuple(each.shape)} row exponents of {each.dtype}")
        out *= torch.exp2(each.double()).unsqueeze(1)
    out[int(out.abs().amax(1).argmax())] += rest.double()
    return out.float()


def pack_integers(values: Tensor) -> Tensor:
    """Integers in 32 bits where they all fit."""
    fits = not len(values) or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)
    return values.to(torch.int32) if fits else values
