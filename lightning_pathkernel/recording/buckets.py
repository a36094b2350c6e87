"""Parameters whose updates have the same scalars, found once and used again while nothing about them changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim import OptimizerRule

__all__ = ["Bucket", "GroupBuckets"]


class Bucket:
    """Parameters of one group that have a gradient, have made as many steps, and take them by the same scalars.

    Args:
        group: Their group.

    Attributes:
        names: Their names.
        parameters: The parameters.
        states: The optimiser's states of them.
        first: Whether the latest step was the first one that went into their momentum buffers.
        risen: Factor by which D grows at most until after the next step, since it was last looked at.
        looked: Whether nothing has happened since then.
    """

    __slots__ = ("first", "group", "looked", "names", "parameters", "risen", "states")

    def __init__(self, group: Mapping[str, Any], first: bool) -> None:
        self.group = group
        self.first = first
        self.names: tuple[str, ...] = ()
        self.parameters: list[Tensor] = []
        self.states: list[Any] = []
        self.risen, self.looked = math.inf, True

    def buffers(self, rule: OptimizerRule) -> list[Tensor]:
        """Their momentum buffers; empty where there are none."""
        return [b for state in self.states if (b := rule.buffer(state)) is not None]

    def gradients(self) -> list[Tensor]:
        """What the optimiser received."""
        return [p.grad for p in self.parameters if p.grad is not None]


class GroupBuckets:
    """The buckets of one parameter group.

    Args:
        names: Id of a parameter -> its name.
        rule: The optimiser's rule.
    """

    def __init__(self, names: Mapping[int, str], rule: OptimizerRule) -> None:
        self._names = names
        self._rule = rule
        self._group: Mapping[str, Any] = {}
        self._parameters: list[Tensor] = []
        self._states: list[Any] = []
        self.buckets: list[Bucket] = []

    def state(self) -> dict[str, Any]:
        """The buckets as plain values."""
        names = [self._names[id(p)] for p in self._parameters]
        buckets = [[list(b.names), b.first, b.risen, b.looked] for b in self.buckets]
        return {"parameters": names, "buckets": buckets}

    def restore(
        self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, group: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Become the buckets whose `state` this was.

        Args:
            state: Their state.
            optimizer: The raw optimiser, its own state restored already.
            group: Its group.
            parameters: Name -> parameter.
        """
        self._group = group
        self._parameters = [parameters[name] for name in state["parameters"]]
        self._states = [optimizer.state[p] for p in self._parameters]
        self.buckets = []
        for names, first, risen, looked in state["buckets"]:
            bucket = Bucket(group, bool(first))
            bucket.names, bucket.parameters = tuple(names), [parameters[name] for name in names]
            bucket.states = [optimizer.state[p] for p in bucket.parameters]
            bucket.risen, bucket.looked = float(risen), bool(looked)
            self.buckets.append(bucket)

    def same(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
        """Whether the buckets found last are right for the latest step too: every parameter has made one step more."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = optimizer.state
        if group is not self._group or len(parameters) != len(self._parameters):
            return False
        if not all(map(is_, parameters, self._parameters)):
            return False
        if not all(map(is_, [states[p] for p in parameters], self._states)):
            return False
        return not any(bucket.first and bucket.buffers(self._rule) for bucket in self.buckets)

    def find(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any], seen: set[str]) -> Sequence[Bucket]:
        """Look again.

        Args:
            optimizer: The raw optimiser.
            group: One of its groups.
            seen: Parameters whose buffers had taken in a gradient before the latest step; brought up to date.

        Returns:
            The buckets.
        """
        self._group = group
        self._parameters = [p for p in group["params"] if p.grad is not None]
        self._states = [optimizer.state[p] for p in self._parameters]
        alike: dict[tuple[float, bool], Bucket] = {}
        for parameter, state in zip(self._parameters, self._states, strict=True):
            name = self._names[id(parameter)]
            key = (float(state.get("step", 0)), name not in seen)
            bucket = alike.setdefault(key, Bucket(group, key[1]))
            bucket.names = (*bucket.names, name)
            bucket.parameters.append(parameter)
            bucket.states.append(state)
            if key[1] and self._rule.buffer(state) is not None:
                seen.add(name)
        self.buckets = list(alike.values())
        return self.buckets
