"""A batch sampler that remembers, pass by pass, what it handed out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_pathkernel.identity.errors import REMEDY, UNKNOWN, IdentityError

__all__ = ["IndexPass", "IndexRecorder", "refusal"]

_OWN = ("inner", "loader", "recent", "moment")


class IndexPass:
    """One pass over a batch sampler: an iterator that keeps each batch of indices until it was trained on.

    Workers draw ahead, several passes over one loader may be open at once (validation on the training loader, a user's
    own loop), and a pass may be given up before its end; so batches are kept with the pass that drew them.

    Args:
        recorder: The sampler that this is a pass of.
        born: What `IndexRecorder.moment` said when the pass began.
    """

    def __init__(self, recorder: IndexRecorder, born: object) -> None:
        self.recorder = recorder
        self.inner = iter(recorder.inner)
        self.drawn = 0
        self._born = None if born is None else weakref.ref(born)
        self._kept: deque[Tensor | IdentityError] = deque()

    def __iter__(self) -> IndexPass:
        return self

    def __next__(self) -> Any:
        if self not in self.recorder.recent:
            self.recorder.recent.append(self)
        batch = next(self.inner)
        self._kept.append(_indices(batch))
        self.drawn += 1
        return batch

    def born_in(self, moment: object) -> bool:
        """Whether the pass began while `IndexRecorder.moment` was this."""
        return self._born is not None and self._born() is moment

    def entry(self, position: int) -> Tensor:
        """Indices of one batch; those before it are forgotten.

        Args:
            position: The batch's place in the pass, never lower than in the call before.

        Returns:
            Dataset indices, ``[n]``.

        Raises:
            IdentityError: If no such batch was drawn, or it was not drawn as integers.
        """
        while self._kept and self.drawn - len(self._kept) < position:
            self._kept.popleft()
        if not self._kept or self.drawn - len(self._kept) != position:
            raise IdentityError(f"{UNKNOWN}: it arrived, but the training loader did not draw it. {REMEDY}")
        found = self._kept[0]
        if isinstance(found, IdentityError):
            raise found
        return found


class IndexRecorder:
    """Stands in a loader's place of its batch sampler; everything but iteration is the inner sampler's.

    Args:
        loader: The training loader; its batch sampler is wrapped until `restore`.
        moment: Called when a pass begins, to know later what it began in.
    """

    def __init__(self, loader: DataLoader[Any], moment: Callable[[], object]) -> None:
        self.inner: Any = loader.batch_sampler
        self.loader = loader
        self.moment = moment
        self.recent: deque[IndexPass] = deque(maxlen=2)
        # DataLoader forbids assigning batch_sampler after construction; its __dict__ does not
        loader.__dict__["batch_sampler"] = self

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass, drawing nothing yet."""
        return IndexPass(self, self.moment())

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        """``batch_size``, ``drop_last``, ``sampler``, ``set_epoch`` and whatever else the inner sampler has."""
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        """What a user changes is changed where the inner sampler looks for it."""
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def find(self, drawing: object) -> IndexPass | None:
        """This sampler's pass, of which ``drawing`` is the outermost: another recorder may have wrapped this one."""
        while isinstance(drawing, IndexPass) and drawing.recorder is not self:
            drawing = drawing.inner
        return drawing if isinstance(drawing, IndexPass) else None

    def restore(self) -> None:
        """Give the loader its own batch sampler back, whoever wrapped it after us."""
        outer = self.loader.__dict__.get("batch_sampler")
        if outer is self:
            self.loader.__dict__["batch_sampler"] = self.inner
        while isinstance(outer, IndexRecorder):
            if outer.inner is self:
                outer.inner = self.inner
            outer = outer.inner


def _indices(batch: Any) -> Tensor | IdentityError:
    try:
        found = np.array(batch)
    except (ValueError, TypeError):  # rows of several lengths
        found = np.array(None)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (len(found) and found.min() < 0):
        drawn = str(batch)[:60]
        return IdentityError(f"{UNKNOWN}: the sampler drew {drawn}, no list of integers from 0 on. {REMEDY}")
    return torch.from_numpy(found.astype(np.int64, copy=False))  # a copy of the batch's own list already


def refusal(loader: object) -> str | None:
    """Why a loader's batches cannot be traced to dataset indices.

    Args:
        loader: What the user trains from.

    Returns:
        The reason, or None where they can.
    """
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not a DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is an IterableDataset, which has no indices"
    if loader.batch_sampler is None:
        return "it has batch_size=None, so it draws no batches of indices"
    if not getattr(loader, "in_order", True):
        return "it has in_order=False, so batches may overtake one another"
    return None
