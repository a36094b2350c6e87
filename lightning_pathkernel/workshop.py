"""What a kernel machine can be asked beyond predictions: kernels, groups of examples, and suspects among the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lightning_pathkernel import gram, query
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import ChordPath, PlacedChords
from lightning_pathkernel.explanation import OutputFn
from lightning_pathkernel.grouping import Labels, grouped_chord, labels_in_order
from lightning_pathkernel.label_errors import LabelErrors, ranked, suspicion
from lightning_pathkernel.network import batch_size, take_rows
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.path_totals import PathTotals, Work
from lightning_pathkernel.ranking import ChordShare, all_contributions

__all__ = ["Workshop"]


class Workshop(PathTotals, ABC):
    """Methods of `KernelMachine` that need its chords and its network, and nothing of how they are read."""

    @abstractmethod
    def _along(self, path: Sequence[Chord] | ChordPath) -> Self: ...

    @property
    def node_steps(self) -> Tensor:
        """Optimiser steps at which the path has its nodes, ``[C + 1]`` for C chords."""
        return torch.tensor([step for k, c in enumerate(self._path) for step in (c.first_step, c.last_step)[k > 0 :]])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that the path moves, which inputs have as a rule."""
        return next(iter(next(iter(self._path)).start.values())).dtype

    # kernels

    def kernel(
        self,
        x: Any,
        x2: Any | None = None,
        target: Tensor | None = None,
        target2: Tensor | None = None,
        output_fn: OutputFn | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The path kernel ``K(x, x2) [Q, Q2]``, in units of squared output per unit of learning rate x time.

        ``sum_c integral of J_c D_c J_c^T`` (Domingos 2020, definition 2; D = 1 under SGD). Computed from whole
        gradients on both sides, block by block, so it needs no stored example; symmetric and positive semi-definite
        when ``x2`` is None: a Gram matrix for ``kernel="precomputed"`` in scikit-learn.

        Args:
            x: Queries.
            x2: Other queries; None for ``x`` itself.
            target: Output of each query, ``[Q]``; None for the trace over outputs.
            target2: Output of each other query, ``[Q2]``; None for the same as ``target`` where ``x2`` is None.
            output_fn: As in `contributions`.
            dtype: Type in which gradients are multiplied and added; None for their own. With float64 the matrix of
                float32 gradients is positive semi-definite to 1e-15 of its largest eigenvalue instead of 1e-7.

        Returns:
            The kernel matrix.

        Raises:
            ValueError: If only one of the two targets is given, or one does not fit its queries.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> machine = tiny_machine(nn.Linear(2, 3))
            >>> gram = machine.kernel(torch.eye(2))
            >>> gram.shape, bool((gram == gram.T).all())
            (torch.Size([2, 2]), True)
        """
        first, second = self._sides(x, x2, target, target2, output_fn)
        inputs = [x] if x2 is None else [x, x2]
        with self._work("kernel", 1, sum(map(self._count, inputs))) as work:
            rules, chunk = self._common_rules(inputs, work.chords()), self._options.chunk_size
            return gram.path_kernel(self._network, first, second, work.chords(), rules, chunk, dtype).cpu()

    def _common_rules(self, inputs: Sequence[Any], chords: PlacedChords) -> list[QuadratureRule]:
        """One rule for each chord, the finest that any of the inputs asks for: the matrix stays semi-definite."""
        parts = [self._rules(part, chords) for x in inputs for part in self._chunks(x)]
        return [
            max((rule for rules in own for _, rule in rules), key=lambda rule: len(rule.points))
            for own in zip(*parts, strict=True)
        ]

    def tangent_kernel(
        self,
        x: Any,
        x2: Any | None = None,
        node: int = -1,
        target: Tensor | None = None,
        target2: Tensor | None = None,
        output_fn: OutputFn | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tangent kernel ``J(x) J(x2)^T [Q, Q2]`` at a node of the path, in units of squared output / weight.

        The neural tangent kernel of Jacot et al. 2018 at the weights of that node, without a preconditioner, over the
        parameters that move next to it. Under SGD the path kernel is its integral over learning rate x time.

        Args:
            x: Queries.
            x2: Other queries; None for ``x`` itself.
            node: 0 for the start of training, -1 for its end, or any node between, as in ``node_steps``.
            target: As in `kernel`.
            target2: As in `kernel`.
            output_fn: As in `contributions`.
            dtype: As in `kernel`.

        Returns:
            The kernel matrix, symmetric and positive semi-definite when ``x2`` is None.

        Raises:
            ValueError: As in `kernel`.
            IndexError: If there is no such node.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> machine = tiny_machine(nn.Linear(2, 3, bias=False))
            >>> machine.tangent_kernel(torch.eye(2), node=0)  # x . x2 for each of 3 outputs
            tensor([[3., 0.],
                    [0., 3.]])
        """
        place = gram.place_of_node(PlacedChords(self._path, self.device), node)
        first, second = self._sides(x, x2, target, target2, output_fn)
        return gram.gram_at(self._network, first, second, place, self._options.chunk_size, dtype).cpu()

    def _sides(
        self, x: Any, x2: Any | None, target: Tensor | None, target2: Tensor | None, output_fn: OutputFn | None
    ) -> tuple[gram.Side, gram.Side | None]:
        outputs = self._end_outputs(take_rows(x, slice(1))).shape[1]
        return gram.sides(x, x2, target, target2, output_fn, outputs)

    # groups

    def grouped(self, labels: Labels) -> Self:
        """The machine with groups of training examples in the place of examples.

        Whatever it is asked is answered for groups: the columns of `contributions` are the labels in ``example_ids``,
        `explain` names the groups most for and against, and what the numbers add up to is unchanged. It holds one row
        per group and chord, so that no ``[Q, N]`` matrix is formed.

        Args:
            labels: Group of each training example, such as its class: integers in the order of ``example_ids``, or a
                mapping id -> integer.

        Returns:
            A machine that shares everything else with this one.

        Raises:
            ValueError: If there is not one integer for each example.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> machine = tiny_machine(nn.Linear(2, 3))
            >>> by_group = machine.grouped(torch.tensor([0, 1, 1, 0, 7, 7]))
            >>> by_group.example_ids, by_group.contributions(torch.eye(2)).shape
            (tensor([0, 1, 7]), torch.Size([2, 3]))
        """
        found = labels_in_order(labels, self.example_ids)
        return self._along([grouped_chord(chord.held(), self.example_ids, found) for chord in self._path])

    def contributions_by_chord(
        self,
        x: Any,
        target: Tensor | None = None,
        output_fn: OutputFn | None = None,
        ids: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """When in training an example mattered: its contributions, chord by chord, ``[Q, C, N]``.

        Over C they add up to `contributions`. For epochs, see `grouping.contributions_by_epoch`; to keep the answer
        small, name the examples, or ask `grouped`.

        Args:
            x: Queries.
            target: As in `contributions`.
            output_fn: As in `contributions`.
            ids: Examples asked for, in this order; None for all, in the order of ``example_ids``.

        Returns:
            Contributions, in the units of the scalar explained; 0 where a chord has no visit of the example.

        Raises:
            KeyError: If an id was never visited in training.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> machine = tiny_machine(nn.Linear(2, 3), chords=4)
            >>> by_chord = machine.contributions_by_chord(torch.eye(2), ids=[0, 1])
            >>> by_chord.shape
            torch.Size([2, 4, 2])
        """
        columns = slice(None) if ids is None else self._columns(ids)
        target = self._targets(x, target)
        count, pieces = self._count(x), []
        with self._work("contributions", count, count, count) as work:
            for part in self._questions(x, target, output_fn):
                shares = query.shares(self._network, part, work.chords(), self._rules(part.batch, work.chords()))
                found = [self._all_contributions([share], work)[:, columns] for share in shares]
                pieces.append(torch.stack(found, dim=1))
        return torch.cat(pieces)

    def _all_contributions(self, shares: Iterable[ChordShare], work: Work) -> Tensor:
        return all_contributions(shares, self.example_ids, self._options.example_chunk, work.passed)

    # labels

    def label_errors(self, labels: Labels, x: Any | None = None) -> LabelErrors:
        """Rank the training examples by how suspicious their labels are.

        Without inputs, from what the artifact stores: an example is suspicious whose gradients are large and unlike
        those of the examples with the same label, chord by chord (`label_errors.suspicion`). With
        inputs, by the cross-entropy of its label, averaged over the nodes of the path by optimiser steps: the training
        loss averaged over training, which found more of the wrong labels in nearly every fit that we measured
        (docs/label-errors.md), for networks whose outputs are the logits of classes.

        Args:
            labels: Label of each training example as it was trained on: integers in the order of ``example_ids``, or a
                mapping id -> integer.
            x: The training inputs in the order of ``example_ids``, or None.

        Returns:
            All examples, ranked; scores are between 0 and 1 without inputs, in nats with them.

        Raises:
            ValueError: If there is not one label, or one input, for each example, or a label is no output.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.1, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.1]])
            >>> y = torch.tensor([0, 0, 0, 1, 1, 1])  # the last one is wrong
            >>> _ = torch.manual_seed(1)
            >>> found = tiny_machine(nn.Linear(2, 2), x, y).label_errors(y)
            >>> found.example_ids[0]
            tensor(5)
        """
        found = labels_in_order(labels, self.example_ids)
        if x is None:
            scores = suspicion((chord.held() for chord in self._path), self.example_ids, found)
            return ranked(scores, self.example_ids, found)
        if batch_size(x) != len(found):
            raise ValueError(f"x has {batch_size(x)} rows for {len(found)} training examples")
        with self._work("label errors", self._count(x), 0) as work:
            parts = zip(self._chunks(x), found.split(self._options.chunk_size), strict=True)
            losses = torch.cat([self._path_loss(part, own, work.chords()) for part, own in parts])
        return ranked(losses, self.example_ids, found)

    def _path_loss(self, x: Any, labels: Tensor, chords: PlacedChords) -> Tensor:
        """Cross-entropy ``[n]`` over the path's nodes but the first, each for the steps of the chord before it."""
        steps = self.node_steps.diff()
        total = torch.zeros(len(labels))
        for chord, share in zip(chords, steps / steps.sum(), strict=True):
            outputs = self._network.outputs(x, chord.weights(1.0), chord.end_buffers).float().cpu()
            if int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]:
                raise ValueError(
                    f"labels from {int(labels.min())} to {int(labels.max())} for a network of {outputs.shape[1]} "
                    "outputs: with x, a label must be the number of an output"
                )
            total += share * torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
        return total
