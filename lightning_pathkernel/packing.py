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

__all__ = [
    "BLOCK",
    "Groups",
    "check_rows",
    "decode_rows",
    "pack_blocks",
    "pack_integers",
    "pack_logarithms",
    "pack_rows",
    "unpack",
    "unpack_rows",
]

Groups = dict[str, dict[str, Tensor]]
"""Group -> name -> tensor, as in a file of the store."""
BLOCK = 64
"""Numbers that share a scale."""
_HALF_TOP = 2.0**15
_STEPS, _OFFSET = 65534, 1 << 15


def _packable(value: Tensor) -> bool:
    return value.dtype is torch.float32 and bool(value.isfinite().all())


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
    """Sixteen bits per number that is 0 or more: 0, or one of 65,535 even steps in the logarithm.

    Of numbers over 27 octaves, as Adam's D has them, this keeps 14e-5 of each; bfloat16 would keep 4e-3.

    Args:
        kind: Group that the tensors belong to.
        values: Name -> tensor.
        groups: Filled in: ``kind`` and ``kind.scale``, log2 of the least number above 0, and the step.
    """
    for name, value in values.items():
        positive = value > 0
        if not _packable(value) or bool((value < 0).any()) or not bool(positive.any()):
            groups.setdefault(kind, {})[name] = value
            continue
        logarithms = value.double().clamp_min(2.0**-149).log2()
        least, greatest = (float(f(logarithms[positive])) for f in (torch.min, torch.max))
        scale = torch.tensor([least, (greatest - least) / _STEPS], dtype=torch.float64)
        steps = (logarithms - least) / max((greatest - least) / _STEPS, 1e-30)
        codes = torch.where(positive, steps.round().clamp(0, _STEPS) - _OFFSET + 1, torch.full_like(steps, -_OFFSET))
        groups.setdefault(kind, {})[name] = codes.to(torch.int16)
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
    count = -(-codes.numel() // BLOCK)
    if codes.dtype is not torch.int8 or exponents.dtype is not torch.int8 or exponents.shape != (count,):
        raise ValueError(f"{kind} of {name!r}: {codes.dtype} with exponents {tuple(exponents.shape)} {exponents.dtype}")
    each = exponents.repeat_interleave(BLOCK)[: codes.numel()]
    return from_grid(codes.reshape(1, -1), each).reshape(codes.shape)


def _from_logarithms(kind: str, name: str, codes: Tensor, scale: Tensor) -> Tensor:
    if codes.dtype is not torch.int16 or scale.dtype is not torch.float64 or scale.shape != (2,):
        raise ValueError(f"{kind} of {name!r}: {codes.dtype} with a scale {tuple(scale.shape)} {scale.dtype}")
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{kind} of {name!r}: a scale that is not finite")
    least, step = (float(x) for x in scale)
    values = torch.exp2(least + (codes.double() + _OFFSET - 1) * step)
    return torch.where(codes == -_OFFSET, torch.zeros_like(values), values).float()


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


def check_rows(stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bool:
    """Refuse parts of stored rows that do not fit together, by their types and shapes alone.

    Args:
        stored: Type and shape of ``rows`` and, where they are there, of ``exponents``, ``rest`` and ``row_exponents``.

    Returns:
        Whether the rows are packed.

    Raises:
        ValueError: If they do not fit together.
        KeyError: If packed rows have no rest.
    """
    (dtype, shape), exponents = stored["rows"], stored.get("exponents")
    if exponents is None:
        if not dtype.is_floating_point or stored.keys() & {"rest", "row_exponents"}:
            raise ValueError(f"rows of {dtype} without exponents")
        return False
    rest, each = stored["rest"], stored.get("row_exponents")
    if len(shape) != 2 or 0 in shape or dtype is not (torch.float16 if each is None else torch.int8):
        raise ValueError(f"rows {shape} of {dtype} with {'no ' if each is None else ''}row exponents")
    if exponents[0] is not torch.int8 or rest[0] is not torch.float32:
        raise ValueError(f"rows with exponents of {exponents[0]} and a rest of {rest[0]}")
    if not exponents[1] == rest[1] == shape[1:]:
        raise ValueError(f"rows {shape} with {exponents[1]} exponents, a rest {rest[1]}")
    if each is not None and (each[0] is not torch.int8 or each[1] != shape[:1]):
        raise ValueError(f"rows {shape} with {each[1]} row exponents of {each[0]}")
    return True


def decode_rows(codes: Tensor, exponents: Tensor, each: Tensor | None) -> Tensor:
    """Packed rows without their rest.

    Codes times powers of two have few digits: nothing is rounded, in whichever precision they are multiplied.

    Args:
        codes: Float16, or int8 where there are row exponents, ``[V, k]``.
        exponents: Of the columns, ``[k]``.
        each: Of the rows, ``[V]``.

    Returns:
        The rows in float32, ``[V, k]``.
    """
    columns = torch.exp2(exponents.double())
    if each is None:
        return codes.float().mul_(columns.float())
    # two powers of two, of which the first alone may lead out of float32
    return (codes.double() * columns * torch.exp2(each.double()).unsqueeze(1)).float()


def unpack_rows(stored: Mapping[str, Tensor]) -> Tensor:
    """Rows as `pack_rows` stored them.

    Args:
        stored: ``rows`` and, where they are packed, ``exponents`` and ``rest``.

    Returns:
        The rows, ``[V, k]``.

    Raises:
        ValueError: If codes and exponents do not fit together.
    """
    parts = ("rows", "exponents", "rest", "row_exponents")
    if not check_rows({name: (stored[name].dtype, tuple(stored[name].shape)) for name in parts if name in stored}):
        return stored["rows"]
    out = decode_rows(stored["rows"], stored["exponents"], stored.get("row_exponents"))
    at = int(out.abs().amax(1).argmax())
    out[at] = (out[at].double() + stored["rest"].double()).float()
    return out


def pack_integers(values: Tensor) -> Tensor:
    """Integers in 32 bits where they all fit."""
    fits = not len(values) or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)
    return values.to(torch.int32) if fits else values
