"""Which training examples are in a batch: dataset indices, noted where the batch sampler hands them out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["IdentityError", "IndexRecorder", "LoaderIndices", "check_loader"]

REMEDY = "Pass example_ids=, a function batch -> LongTensor [n] that reads the ids from the batch."


class IdentityError(RuntimeError):
    """The examples of a batch cannot be told."""


class IndexRecorder:
    """A batch sampler that remembers, in order, the batches it handed out.

    Args:
        inner: The loader's own batch sampler.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.batches: deque[Tensor] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Hand out batches; a new pass forgets what the last one prefetched and nobody trained on."""
        self.batches.clear()
        for batch in self.inner:
            self.batches.append(_indices(batch))
            yield batch

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the inner sampler's (``batch_size``, ``drop_last``, ``sampler``, ``set_epoch``)."""
        if name in ("inner", "batches"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _indices(batch: Any) -> Tensor:
    try:
        found = np.array(batch)
    except ValueError:  # rows of several lengths
        found = np.array(None)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        drawn = str(batch)[:60]
        raise IdentityError(
            f"Cannot tell which examples are in a batch: the sampler drew {drawn}, no integers. {REMEDY}"
        )
    return torch.from_numpy(found.astype(np.int64))


def check_loader(loader: object) -> None:
    """Refuse a loader whose batches cannot be traced to dataset indices.

    Args:
        loader: What the user trains from.

    Raises:
        IdentityError: Saying why, and what to do.
    """
    reason = None
    if not isinstance(loader, DataLoader):
        reason = f"the training loader is a {type(loader).__name__}, not a DataLoader"
    elif isinstance(loader.dataset, IterableDataset):
        reason = "the training set is an IterableDataset, which has no indices"
    elif loader.batch_sampler is None:
        reason = "the training loader has batch_size=None, so it draws no batches of indices"
    elif not getattr(loader, "in_order", True):
        reason = "the training loader has in_order=False, so batches may overtake one another"
    if reason:
        raise IdentityError(f"Cannot tell which examples are in a batch: {reason}. {REMEDY}")


class LoaderIndices:
    """Dataset indices of one loader's batches, in the order in which they are trained on.

    Args:
        loader: The training loader; its batch sampler is wrapped until `restore`.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        check_loader(loader)
        self.loader = loader
        self._original = loader.batch_sampler
        self._recorder = IndexRecorder(self._original)
        # DataLoader forbids assigning batch_sampler after construction; its __dict__ does not
        loader.__dict__["batch_sampler"] = self._recorder

    def restore(self) -> None:
        """Give the loader its own batch sampler back."""
        self.loader.__dict__["batch_sampler"] = self._original

    def pop(self) -> Tensor:
        """Indices of the batch that is trained on now.

        Returns:
            Dataset indices, ``[n]``.

        Raises:
            IdentityError: If there are none left: the batch did not come from this loader.
        """
        if not self._recorder.batches:
            raise IdentityError(f"A batch arrived that the training loader did not hand out. {REMEDY}")
        return self._recorder.batches.popleft()


def user_ids(example_ids: Callable[[Any], Tensor], batch: Any, n: int) -> Tensor:
    """Ids by the user's function, checked.

    Args:
        example_ids: The function.
        batch: The batch.
        n: Its number of rows.

    Returns:
        The ids, ``[n]``, on the CPU.

    Raises:
        IdentityError: If it does not return one integer per example.
    """
    ids = example_ids(batch)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != (n,):
        found = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise IdentityError(f"example_ids must return a LongTensor of shape ({n},), found {found}")
    return ids.detach().to("cpu", torch.long)
