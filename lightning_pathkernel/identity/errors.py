"""The error of this room, and its usual remedy."""

from __future__ import annotations

__all__ = ["REMEDY", "UNKNOWN", "IdentityError"]

UNKNOWN = "Cannot tell which examples are in a batch"
REMEDY = "Pass example_ids=, a function batch -> LongTensor [n] that reads the ids from the batch."


class IdentityError(RuntimeError):
    """The examples of a batch cannot be told."""
