"""The passes over a loader that the batches of one epoch come from."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from lightning_pathkernel.identity.errors import REMEDY, UNKNOWN, IdentityError
from lightning_pathkernel.identity.sampling import IndexPass, IndexRecorder

__all__ = ["Line"]


class Line:
    """The passes that one loader's batches of an epoch come from, one after the other, and which batch is next.

    Where Lightning knows the length of an epoch it fetches no batch ahead, so the loader's open pass is the batch's
    own. Where it does not, it has fetched the next batch too, and a short loader may have begun again for that one: so
    passes are kept in line until all their batches were trained on.

    Args:
        recorder: The loader's batch sampler.
        begun: The epoch's batch that is the first one drawn: not 0 where a fit was resumed in mid-epoch.
    """

    def __init__(self, recorder: IndexRecorder, begun: int = 0) -> None:
        self.recorder = recorder
        self._passes: deque[IndexPass] = deque()
        self._before = begun

    def current(self, drawing: Any) -> IndexPass:
        """The pass behind a loader's open iterator."""
        found = self.recorder.find(getattr(drawing, "_sampler_iter", None))
        if found is None:
            raise IdentityError(
                f"{UNKNOWN}: a {type(drawing).__name__} of the training loader does not draw from its batch sampler. "
                f"{REMEDY}"
            )
        return found

    def known(self, drawing: Any) -> Tensor:
        """Indices of the batch that the iterator gave last, in an epoch of known length."""
        return self.current(drawing).entry(drawing._num_yielded - 1)

    def ahead(self, drawing: Any, moment: object, batch_idx: int) -> Tensor:
        """Indices of a batch, in an epoch of unknown length.

        Args:
            drawing: The loader's open iterator, ahead of this batch by one at most.
            moment: What the epoch's first passes were begun for, but not in: Lightning keeps it once they have begun.
            batch_idx: The batch's place in the epoch.

        Returns:
            Dataset indices, ``[n]``.

        Raises:
            IdentityError: If the epoch's first pass is not known any more.
        """
        latest = self.current(drawing)
        if not self._passes and latest.born_in(moment):  # the loader's first pass was over with the first batch
            first = self.recorder.recent[0]
            if self.recorder.recent[-1] is not latest or first.born_in(moment):
                raise IdentityError(
                    f"{UNKNOWN}: the training loader was iterated by somebody else before its first batch. {REMEDY}"
                )
            self._passes.append(first)
        if latest not in self._passes:
            self._passes.append(latest)
        while len(self._passes) > 1 and batch_idx - self._before >= self._passes[0].drawn:
            self._before += self._passes.popleft().drawn
        return self._passes[0].entry(batch_idx - self._before)
