"""Which rows of a batch a layer is called with, where several loaders feed one batch.

With one loader every call has the batch's rows. With several, a training step may call the network on each loader's
part in turn, or on all parts joined. The outermost call decides for all calls within it: by its number of rows and,
where parts are of equal size, by the part of the batch whose memory its inputs share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_pathkernel.capture.fallback import batch_dimension
from lightning_pathkernel.capture.hook import OwnHook
from lightning_pathkernel.capture.plan import CaptureError

__all__ = ["CallGroups", "RowGroup"]


class RowGroup(NamedTuple):
    """Rows that go through the network together: their number, and the part of the batch they are in."""

    n: int
    batch: object = None


class CallGroups:
    """The group of the call that is running.

    Attributes:
        n: Its number of rows.
        current: Its index; None where it cannot be told.
        followed: Whether calls are followed, which only several groups need.
    """

    def __init__(self) -> None:
        self.n = 0
        self.current: int | None = 0
        self.followed = False
        self._groups: Sequence[RowGroup] = ()
        self._depth = 0

    def begin(self, groups: Sequence[RowGroup]) -> None:
        """Expect calls with these groups of rows."""
        self._groups, self._depth = groups, 0
        self.n, self.current = groups[0].n, 0

    def follow(self, model: nn.Module) -> list[RemovableHandle]:
        """Install hooks that follow the outermost calls.

        Args:
            model: The network.

        Returns:
            Handles that remove them.
        """
        self.followed = True
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(OwnHook(self._enter), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(OwnHook(self._leave), always_call=True))
        return handles

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth == 0 and len(self._groups) > 1:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.n, self.current = self._of(tensors, batch_dimension(module))
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)

    def _of(self, tensors: list[Tensor], dim: int) -> tuple[int, int | None]:
        n = next((int(x.shape[dim]) for x in tensors if x.dim() > dim), 0)
        fitting = [i for i, group in enumerate(self._groups) if group.n == n]
        if len(fitting) < 2:
            return n if fitting else -1, fitting[0] if fitting else 0
        mine = {x.untyped_storage().data_ptr() for x in tensors}
        sharing = [i for i in fitting if mine & _storages(self._groups[i].batch)]
        return n, sharing[0] if len(sharing) == 1 else None

    def refuse(self, path: str) -> NoReturn:
        """Say that the rows of a call could not be told.

        Args:
            path: The layer.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"cannot tell which loader's rows {path or 'the model'!r} was called with: several loaders gave {self.n} "
            "rows each, and the call's input is none of their tensors. Call the network on a loader's own tensor (or a "
            "view of it) or on all of them joined in the loaders' order, or give the loaders different batch sizes."
        )


def _storages(batch: object) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)}
