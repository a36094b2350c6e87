"""Giving back what a node took for a moment."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Return free memory at the heap's end and between its blocks to the system, where the C library can (glibc).

    A node forms gradients whole, layer by layer. What is freed again stays with the process otherwise, in pieces that
    training steps do not fit into: the resident set then wanders by a tenth instead of a hundredth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
