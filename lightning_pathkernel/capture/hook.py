"""Hooks that stay behind when their module is pickled or copied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["OwnHook"]


class OwnHook(partial[None]):
    """A hook of ours on a module.

    A pickle or a deep copy of the module, such as a checkpoint or somebody's best model so far, has in its place a hook
    that does nothing: it is not the network in training.

    Args:
        function: What to call.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        """What is pickled and copied."""
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: object, **kwargs: object) -> None:
    return None
