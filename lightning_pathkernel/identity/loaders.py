"""The training loaders of a fit: where each one's part of a batch is, and where its dataset's ids begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pathkernel.identity.errors import REMEDY, UNKNOWN, IdentityError
from lightning_pathkernel.identity.sampling import refusal

__all__ = ["MODES", "Place", "find_places", "part_of", "tensors_in", "with_offsets"]

MODES = ("min_size", "max_size", "max_size_cycle")
"""Modes of a CombinedLoader that Lightning trains from; it evaluates in ``sequential`` mode only."""


class Place(NamedTuple):
    """One loader among the training loaders.

    Attributes:
        path: Its keys in the user's collection of loaders, and its part's in a batch; empty where there is one loader.
        loader: The loader.
        offset: Id of its dataset's first example.
        length: Length of its dataset; None where it has none.
    """

    path: tuple[Any, ...]
    loader: Any
    offset: int = 0
    length: int | None = None

    @property
    def name(self) -> str:
        """Its keys, joined by dots; empty where there is one loader."""
        return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in self.path)

    @property
    def called(self) -> str:
        """What an error calls it."""
        return f"training loader {self.name!r}" if self.path else "training loader"


def find_places(iterables: Any, flattened: list[Any]) -> list[Place]:
    """Where in the user's collection each loader is.

    Args:
        iterables: The collection: one loader, or dictionaries, lists and tuples of loaders.
        flattened: The loaders in it.

    Returns:
        One place for each, in the order of ``flattened``.
    """
    leaves = {id(loader) for loader in flattened}
    found, _ = pytree.tree_flatten_with_path(iterables, is_leaf=lambda node: id(node) in leaves)
    return [Place(tuple(path), loader) for path, loader in found]


def with_offsets(places: list[Place]) -> list[Place]:
    """Give every dataset a range of ids of its own: it begins where the datasets before it end.

    A dataset object that several loaders share counts once. With one loader, ids are the indices themselves.

    Args:
        places: The loaders, in order.

    Returns:
        The same with offsets and lengths.

    Raises:
        IdentityError: If a loader draws no indices, stands there twice, or is one of several whose dataset has no
            length; every loader that cannot be traced is named.
    """
    reasons = [(place, refusal(place.loader)) for place in places]
    refused = [f"{place.called}: {reason}" for place, reason in reasons if reason]
    if refused:
        raise IdentityError(f"{UNKNOWN}: {'; '.join(refused)}. {REMEDY}")
    if len({id(place.loader) for place in places}) < len(places):
        raise IdentityError(f"{UNKNOWN}: one DataLoader object stands in two places. Make a DataLoader for each.")
    offsets: dict[int, int] = {}
    out, end = [], 0
    for place in places:
        dataset = place.loader.dataset
        length = _length(dataset)
        if length is None and len(places) > 1:
            raise IdentityError(
                f"{UNKNOWN}: {place.called}: its {type(dataset).__name__} has no length, so ids of several datasets "
                f"cannot be kept apart. Give it a __len__. {REMEDY}"
            )
        if id(dataset) not in offsets:
            offsets[id(dataset)] = end
            end += length or 0
        out.append(place._replace(offset=offsets[id(dataset)], length=length))
    return out


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def part_of(batch: Any, place: Place) -> Any:
    """The part of a combined batch that one loader gave.

    Args:
        batch: The batch as it is trained on.
        place: The loader.

    Returns:
        Its part; None where an exhausted loader gave none.

    Raises:
        IdentityError: If the batch is not nested as the loaders are.
    """
    if not place.path:
        return batch
    try:
        return pytree.key_get(batch, place.path)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise IdentityError(
            f"{UNKNOWN}: the part of the {place.called} is not where it was collated, but in a {type(batch).__name__} "
            "of another structure. Keep the batch nested as the loaders are in on_before_batch_transfer, "
            "transfer_batch_to_device and on_after_batch_transfer."
        ) from error


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in a batch, nested as Lightning moves it between devices: mappings, sequences, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
