"""Ids by a function of the user's: integers as they are, strings by a hash that is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pathkernel.identity.errors import IdentityError

__all__ = ["UserIds", "string_id"]

_EXPECTED = "expected one id per row: a LongTensor [n], an integer array [n], or a list of n integers or n strings"
_REMEDY = "Change example_ids so that it returns one id for each example of the batch."


def string_id(name: str) -> int:
    """The integer that stands for a string id: the first 53 bits of the 64-bit BLAKE2b of its UTF-8 text.

    The same in every process and every run, so ranks need not agree on it; 53 bits, so that any JSON parser keeps it.
    Among a million strings the chance that any two collide is 6e-5; it is noticed and refused.

    Args:
        name: The string.

    Returns:
        An integer from 0 to ``2**53 - 1``.
    """
    return int.from_bytes(blake2b(name.encode("utf-8"), digest_size=8).digest(), "big") >> 11


class UserIds:
    """Calls the user's function and checks what it returns.

    Args:
        function: ``batch -> ids``; with several loaders, ``batch -> [ids of each part]``.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._names: dict[int, str] = {}
        self._new: dict[int, str] = {}
        self._kind: str | None = None

    def new_names(self, peek: bool = False) -> dict[int, str]:
        """String ids met since the last call, by the integer that stands for them; ``peek`` is no such call."""
        if peek:
            return dict(self._new)
        found, self._new = self._new, {}
        return found

    def state(self) -> dict[str, Any]:
        """The names met since `new_names`, and which kind ids are of."""
        return {"new": {str(key): name for key, name in self._new.items()}, "kind": self._kind}

    def restore(self, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
        """Become the one whose `state` this was; ``names`` are those it had given away."""
        self._new = {int(key): str(name) for key, name in state["new"].items()}
        self._names = {**names, **self._new}
        self._kind = state["kind"]

    def __call__(self, batch: Any, loaders: Sequence[str], several: bool) -> list[Tensor]:
        """Ids of a batch.

        Args:
            batch: The batch.
            loaders: What errors call the loaders that gave a part of it.
            several: Whether training draws from several loaders, so that there is one entry for each part.

        Returns:
            Ids of each part, ``[n]`` each, on the CPU.

        Raises:
            IdentityError: If the function does not return ids.
        """
        found = self._function(batch)
        if not several:
            return [self._convert(found, "")]
        if not isinstance(found, list | tuple) or len(found) != len(loaders):
            raise IdentityError(
                f"example_ids returned {_describe(found)}, expected a list of {len(loaders)} entries: training draws "
                f"from several loaders, so there is one entry for the part of each: {', '.join(loaders)}. {_REMEDY}"
            )
        return [self._convert(ids, f" for the {where}") for ids, where in zip(found, loaders, strict=True)]

    def _convert(self, found: Any, where: str) -> Tensor:
        if isinstance(found, Tensor | np.ndarray) and found.ndim != 1:
            raise _wrong(_describe(found), where)
        if isinstance(found, Tensor):
            if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
                raise _wrong(_describe(found), where)
            self._settle("integers", where)
            return found.detach().to("cpu", torch.long)
        values = found.tolist() if isinstance(found, np.ndarray) else found
        if not isinstance(values, list | tuple):
            raise _wrong(_describe(found), where)
        kind = _kind(values, where)
        if kind is not None:
            self._settle(kind, where)
        ids = [self._by_name(value) if isinstance(value, str) else int(value) for value in values]
        large = next((number for number in ids if not -(2**63) <= number < 2**63), None)
        if large is not None:
            raise _wrong(f"the integer {large}, which does not fit into 64 bits", where)
        return torch.tensor(ids, dtype=torch.long)

    def _settle(self, kind: str, where: str) -> None:
        """Strings once, strings for ever: an integer could be the one that stands for a string."""
        if self._kind not in (None, kind):
            raise _wrong(f"{kind} in this batch after {self._kind} in an earlier one", where)
        self._kind = kind

    def _by_name(self, name: str) -> int:
        try:
            found = string_id(name)
        except UnicodeEncodeError as error:
            raise IdentityError(f"example_ids returned {name!r}, which is no text: {error}. {_REMEDY}") from error
        known = self._names.setdefault(found, str(name))
        if known != name:
            raise IdentityError(
                f"the string ids {known!r} and {name!r} collide: both hash to {found}. Rename one of them, or return "
                "integers from example_ids."
            )
        self._new[found] = known
        return found


def _kind(values: Sequence[Any], where: str) -> str | None:
    """Whether these are integers or strings; None where there are none."""
    first: dict[str, int] = {}
    for position, value in enumerate(values):
        if isinstance(value, str):
            first.setdefault("strings", position)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            first.setdefault("integers", position)
        else:
            raise _wrong(f"a {type(value).__name__} at position {position}", where)
    if len(first) > 1:
        both = " and ".join(f"{kind} (position {position})" for kind, position in first.items())
        raise _wrong(f"a mixture of {both}", where)
    return next(iter(first), None)


def _wrong(found: str, where: str) -> IdentityError:
    return IdentityError(f"example_ids returned {found}{where}, {_EXPECTED}. {_REMEDY}")


def _describe(found: Any) -> str:
    if isinstance(found, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(found, Tensor) else "an array"
        return f"{kind} {tuple(found.shape)} of {found.dtype}"
    if isinstance(found, list | tuple):
        return f"a {type(found).__name__} of {len(found)}"
    return "None" if found is None else f"a {type(found).__name__}"
