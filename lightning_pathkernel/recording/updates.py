"""What an optimiser did in its latest step, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import CaptureError, matrix_shape
from lightning_pathkernel.optim import ForeseeableRule, OptimizerRule, ParameterUpdate
from lightning_pathkernel.recording.buckets import Bucket, GroupBuckets
from lightning_pathkernel.recording.displacement import LOOSENESS, ChordDisplacement

__all__ = ["OptimizerUpdates"]


class OptimizerUpdates:
    """Reads an optimiser's groups and state around each of its steps.

    Args:
        module: The network, for the names in messages.
        names: Id of a parameter -> its name, for every parameter that can be recorded.
        optimizer: The raw torch optimiser.
        rule: Its rule; None for an optimiser whose steps are left unattributed.
    """

    def __init__(
        self, module: nn.Module, names: Mapping[int, str], optimizer: torch.optim.Optimizer, rule: OptimizerRule | None
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self._foreseeable = rule if isinstance(rule, ForeseeableRule) else None
        self._module = module
        self._names = names
        self._seen: set[str] = set()
        self._plain: dict[str, Tensor] = {}
        self._groups: list[GroupBuckets] = []
        self._expected: dict[int, tuple[tuple[str, ...], list[Tensor], float]] = {}

    def state(self) -> dict[str, Any]:
        """All of it between two steps, as plain values and tensors that the next step changes."""
        places = {id(group): i for i, group in enumerate(self.optimizer.param_groups)}
        expected = [[places[key], list(names), rate] for key, (names, _, rate) in self._expected.items()]
        groups = [group.state() for group in self._groups]
        return {"seen": sorted(self._seen), "plain": dict(self._plain), "expected": expected, "groups": groups}

    def restore(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Become the account whose `state` this was; ``parameters`` are all that can be recorded."""
        self._seen, self._plain = set(state["seen"]), dict(state["plain"])
        groups = self.optimizer.param_groups
        self._expected = {
            id(groups[i]): (tuple(names), [parameters[name] for name in names], float(rate))
            for i, names, rate in state["expected"]
        }
        self._groups = []
        if self.rule is None:
            return
        for group, stored in zip(groups, state["groups"], strict=False):
            self._groups.append(GroupBuckets(self._names, self.rule))
            self._groups[-1].restore(stored, self.optimizer, group, parameters)

    def received(self) -> dict[str, Tensor]:
        """The parameters that have a gradient, by name.

        Returns:
            Name -> parameter.

        Raises:
            CaptureError: If one of them cannot be recorded.
        """
        found = {}
        names = self._names
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    name = names.get(id(parameter))
                    if name is None:
                        raise CaptureError(_stranger(self._module, parameter))
                    found[name] = parameter
        return found

    # before the step

    def expect_decay(self, displacement: ChordDisplacement, weights: Mapping[str, Tensor]) -> None:
        """Take in the weight decay of the step to come, or note the weights where only the step will tell.

        Args:
            displacement: The sums of the open chord.
            weights: All weights that are recorded.
        """
        self.withdraw_decay(displacement)
        if self.rule is None:
            return
        remember = displacement.remembers
        for group in self.optimizer.param_groups:
            if not group.get("weight_decay", 0):
                continue
            rate = self._foreseeable.decay_rate(group) if self._foreseeable is not None else 0.0
            if not rate:
                remember = True
                continue
            moving = [p for p in group["params"] if p.grad is not None]
            names = tuple([self._names[id(p)] for p in moving])
            displacement.decay_directly(names, moving, rate)
            self._expected[id(group)] = names, moving, rate
        if remember:
            displacement.remember(weights)

    def withdraw_decay(self, displacement: ChordDisplacement) -> None:
        """The step that was expected last has not been made, and will not be."""
        for names, moving, rate in self._expected.values():
            displacement.decay_directly(names, moving, -rate)
        self._expected = {}

    # after the step

    def take(
        self, displacement: ChordDisplacement, foreign: Mapping[str, Tensor]
    ) -> dict[ParameterUpdate, tuple[str, ...]]:
        """Note the latest step in the chord's running sums.

        Args:
            displacement: The sums of the open chord.
            foreign: Parameter -> what its gradient held beyond the examples' parts.

        Returns:
            The parameters that moved, by the scalars of their update.
        """
        rule = self.rule
        if rule is None:
            displacement.step_unruled(list(self.received()))
            return {}
        moved: dict[ParameterUpdate, tuple[str, ...]] = {}
        for bucket in self._buckets(displacement):
            update = rule.update(bucket.group, bucket.states[0], bucket.first)
            names = bucket.names
            displacement.step_foreign(names, update, foreign)
            if displacement.decays(update):
                self._decay(displacement, update, bucket)
            if rule.diagonal:
                self._precondition(rule, displacement, update, bucket)
            moved[update] = (*moved[update], *names) if update in moved else names
        self._expected = {}
        return moved

    def _decay(self, displacement: ChordDisplacement, update: ParameterUpdate, bucket: Bucket) -> None:
        if self._foreseeable is not None:
            expected = self._expected[id(bucket.group)][2] if id(bucket.group) in self._expected else 0.0
            if update.decay_rate != expected:
                # changed since: the weights after the step stand for those before it, an error of one step's movement
                displacement.decay_directly(bucket.names, bucket.parameters, update.decay_rate - expected)
            update = update._replace(decay_rate=0.0)
        if displacement.decays(update):
            displacement.step_decay(bucket.names, update)

    def _precondition(
        self, rule: OptimizerRule, displacement: ChordDisplacement, update: ParameterUpdate, bucket: Bucket
    ) -> None:
        if self._foreseeable is None or update.before_buffer:
            denominators, directions, factor = self._multiplied(rule, displacement, update, bucket)
            if update.before_buffer:
                buffers = self._plain_buffers(bucket.names, update, directions)
                mixed = torch._foreach_mul(directions, update.from_gradient)
                torch._foreach_add_(mixed, buffers, alpha=update.from_buffer)
                directions, factor = list(mixed), 1.0
            displacement.step_preconditioned(bucket.names, update.rate * factor, directions, denominators)
            return
        directions, factor = self._directions(rule, displacement, update, bucket)
        displacement.step_moved(bucket.names, update.rate * factor, directions)
        further = self._foreseeable.rise(bucket.group, bucket.states[0])
        if bucket.risen * further > LOOSENESS:
            self._look(rule, displacement, bucket)
        elif bucket.looked:
            displacement.look_away(bucket.names)
            bucket.looked = False
        bucket.risen *= further

    def _look(self, rule: OptimizerRule, displacement: ChordDisplacement, bucket: Bucket) -> None:
        """See D at the latest step, where it need not be seen at every one."""
        buffers = bucket.buffers(rule)
        displacement.look(bucket.names, buffers, rule.denominators(bucket.group, bucket.states, buffers))
        bucket.risen, bucket.looked = 1.0, True

    def settle(self, displacement: ChordDisplacement) -> None:
        """Bring the chord's sums up to the latest step, so that its parts may be asked for."""
        self.withdraw_decay(displacement)
        if self._foreseeable is not None:
            for group in self._groups:
                self._look_again(displacement, group.buckets)

    def _look_again(self, displacement: ChordDisplacement, buckets: Sequence[Bucket]) -> None:
        assert self.rule is not None
        for bucket in buckets:
            if not bucket.looked:
                self._look(self.rule, displacement, bucket)

    @contextmanager
    def settled(self, displacement: ChordDisplacement) -> Iterator[None]:
        """`settle` for a while only: what is recorded must not depend on how often one looked."""
        unlooked = [b for group in self._groups for b in group.buckets if not b.looked]
        names = {name for b in unlooked for name in b.names}
        names |= {name for moving, _, _ in self._expected.values() for name in moving}
        known, risen, expected = displacement.bounds(names), [b.risen for b in unlooked], self._expected
        try:
            self.settle(displacement)
            yield
        finally:
            displacement.put_back(known)
            self._expected = expected
            for bucket, value in zip(unlooked, risen, strict=True):
                bucket.risen, bucket.looked = value, False

    def end_chord(self) -> None:
        """The next chord has seen no D yet."""
        for group in self._groups:
            for bucket in group.buckets:
                bucket.risen, bucket.looked = math.inf, True

    def _directions(
        self, rule: OptimizerRule, displacement: ChordDisplacement, update: ParameterUpdate, bucket: Bucket
    ) -> tuple[list[Tensor], float]:
        """What D multiplied in the latest step, and a factor to it."""
        gradients = bucket.gradients() if update.from_gradient else []
        return displacement.directions(bucket.names, update, bucket.buffers(rule), gradients)

    def _multiplied(
        self, rule: OptimizerRule, displacement: ChordDisplacement, update: ParameterUpdate, bucket: Bucket
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """``1 / D`` of the latest step, what D multiplied in it, and a factor to that."""
        if update.before_buffer:
            entering = update._replace(from_buffer=0.0, from_gradient=1.0)
            directions, factor = displacement.directions(bucket.names, entering, [], bucket.gradients())
        else:
            directions, factor = self._directions(rule, displacement, update, bucket)
        return rule.denominators(bucket.group, bucket.states, directions), directions, factor

    def _plain_buffers(self, names: Sequence[str], update: ParameterUpdate, entering: list[Tensor]) -> list[Tensor]:
        """Momentum of gradients without their preconditioners, which the optimiser itself does not keep."""
        for name, value in zip(names, entering, strict=True):
            if name not in self._plain:
                self._plain[name] = torch.zeros_like(value)
        buffers = [self._plain[name] for name in names]
        torch._foreach_mul_(buffers, update.keep)
        torch._foreach_add_(buffers, entering, alpha=update.inject)
        return buffers

    def _buckets(self, displacement: ChordDisplacement) -> list[Bucket]:
        """All parameters that the latest step moved, by the scalars of their update."""
        rule, optimizer = self.rule, self.optimizer
        assert rule is not None
        found: list[Bucket] = []
        for index, group in enumerate(optimizer.param_groups):
            if index == len(self._groups):
                self._groups.append(GroupBuckets(self._names, rule))
            known = self._groups[index]
            if not known.same(optimizer, group):
                self._look_again(displacement, known.buckets)
                known.find(optimizer, group, self._seen)
            found += known.buckets
        return found

    def preconditioner(self, names: set[str], displacement: ChordDisplacement) -> dict[str, Tensor]:
        """D of the latest step, by parameter, 0 where a weight has never moved; empty for the identity."""
        out: dict[str, Tensor] = {}
        rule = self.rule
        if rule is None or not rule.diagonal:
            return out
        for group in self._groups:
            for bucket in group.buckets:
                update = rule.update(bucket.group, bucket.states[0], bucket.first)
                denominators, _, _ = self._multiplied(rule, displacement, update, bucket)
                for name, state, found in zip(bucket.names, bucket.states, denominators, strict=True):
                    if name in names:
                        out[name] = found.reciprocal() * rule.moved(bucket.group, state)
        return out

    def direction(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where parameters are moving: their momentum buffers, or their gradients."""
        out = {}
        for name, parameter in names.items():
            buffer = self._momentum(name, parameter)
            found = parameter.grad if buffer is None else buffer
            out[name] = torch.zeros_like(parameter) if found is None else found.detach()
        return out

    def _momentum(self, name: str, parameter: Tensor) -> Tensor | None:
        if self.rule is None:
            return None
        plain = self._plain.get(name)
        return plain if plain is not None else self.rule.buffer(self.optimizer.state[parameter])

    def earlier_momentum(
        self, parameters: Mapping[str, Tensor], newest: Mapping[str, float], foreign: Mapping[str, Tensor],
        pulls: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the momentum buffers hold of the examples of earlier steps.

        Args:
            parameters: Those that are asked about.
            newest: Parameter -> share of the latest step's gradient in its buffer.
            foreign: Parameter -> what the latest gradient held beyond the examples' parts.
            pulls: Parameter -> what decay and foreign gradients, the latest included, put into its buffer.

        Returns:
            Parameter -> the rest of its buffer, as a matrix ``[r, c]``.
        """
        out = {}
        for name, parameter in parameters.items():
            buffer = self._momentum(name, parameter)
            if buffer is None:
                continue
            tail = buffer.detach().clone()
            if parameter.grad is not None:
                examples = parameter.grad - foreign[name] if name in foreign else parameter.grad
                tail -= examples * newest[name]
            if name in pulls:
                tail -= pulls[name]
            out[name] = tail.reshape(matrix_shape(parameter.shape))
        return out


def _stranger(module: nn.Module, parameter: Tensor) -> str:
    name = next((name for name, p in module.named_parameters() if p is parameter), None)
    if name is None:
        return (
            f"the optimiser moves a parameter of shape {tuple(parameter.shape)} that is not the module's: register "
            "what owns it (the loss?) as a submodule."
        )
    return (
        f"{name!r} was frozen when the fit began and is learning now: give it to the optimiser from the start, or use "
        "Lightning's BaseFinetuning."
    )
