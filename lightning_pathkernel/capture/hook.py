"""Hooks that stay behind when their module is pickled or copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["OwnHook"]


class OwnHook:
    """A hook of ours on a module.

    A pickle or a deep copy of the module, such as a checkpoint or somebody's best model so far, has in its place a hook
    that does nothing: it is not the network in training.

    Args:
        function: What to call.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        """What is pickled and copied."""
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: object, **kwargs: object) -> None:
    return None
