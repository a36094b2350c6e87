"""What every training example contributed to predictions, and what it did to its own loss."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel import query
from lightning_pathkernel.explanation import Explanation, OutputFn, joined
from lightning_pathkernel.ledger import bias
from lightning_pathkernel.network import take_rows
from lightning_pathkernel.path_totals import Work
from lightning_pathkernel.query import Question
from lightning_pathkernel.ranking import strongest_contributions
from lightning_pathkernel.workshop import Workshop

__all__ = ["Attribution"]


class Attribution(Workshop, ABC):
    """Methods of `KernelMachine` that share predictions out over training examples, eq. (7)."""

    def contributions(self, x: Any, target: Tensor | None = None, output_fn: OutputFn | None = None) -> Tensor:
        """``c_i(x)`` for every training example ever visited, ``[Q, N]``, in the order of ``example_ids``.

        Args:
            x: Queries.
            target: What is explained of each, ``[Q]``; None for the predicted class, or the only output.
            output_fn: ``(outputs [n, K], target [n]) -> [n]``; default: the output ``target``.

        Returns:
            Contributions, in the units of the scalar explained; positive ones speak for it.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().contributions(torch.eye(2)[:1], torch.tensor([0]))
            tensor([[ 0.0451,  0.0044, -0.0036, -0.0276,  0.0110, -0.0048]])
        """
        target, count, parts = self._targets(x, target), self._count(x), []
        with self._work("contributions", count, count, count) as work:
            for part in self._questions(x, target, output_fn):
                shares = query.shares(self._network, part, work.chords(), self._rules(part.batch, work.chords()))
                parts.append(self._all_contributions(shares, work))
        return torch.cat(parts)

    def explain(
        self,
        x: Any,
        target: Tensor | None = None,
        top_k: int = 10,
        output_fn: OutputFn | None = None,
        complete: bool = True,
    ) -> Explanation:
        """The training examples most for and most against each prediction, and the ledger of all of it.

        Args:
            x: Queries.
            target: As in `contributions`.
            top_k: Examples on each side.
            output_fn: As in `contributions`.
            complete: Correct every contribution by the control variate of docs/theory.md section 4, chord by chord, so
                that all contributions add up to the ledger's ``examples + sketch``: the ledger's ``sketch`` term is
                what was shared out. Without it they add up to ``examples``.

        Returns:
            The explanation.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> why = tiny_machine().explain(torch.eye(2), top_k=1)
            >>> why.example_ids, why.contributions  # for and against each
            (tensor([[0, 3],
                    [3, 4]]), tensor([[ 0.0451, -0.0276],
                    [ 0.0521, -0.0084]]))
        """
        target, count = self._targets(x, target), self._count(x)
        with self._work("explain", 2 * count, count, count) as work:
            return joined(
                [self._explain(part, top_k, complete, work) for part in self._questions(x, target, output_fn)]
            )

    def _explain(self, question: Question, top_k: int, complete: bool, work: Work) -> Explanation:
        rules = self._rules(question.batch, work.chords())
        terms, gaps = query.ledger(self._network, question, work.chords(), rules)
        lost = [gap[:, 0] for gap in gaps] if complete else None
        shares = list(query.shares(self._network, question, work.chords(), rules, lost))
        ids, contributions = strongest_contributions(shares, top_k, self._options.example_chunk, work.passed)
        ledger = {name: value[:, 0].cpu() for name, value in terms.items()}
        assert question.target is not None, "an explanation is of a scalar"
        return Explanation(bias(ledger) + ledger["examples"], ids, contributions, ledger, question.target)

    def coefficients(
        self, x: Any, x_train: Any, ids: Tensor, target: Tensor, target_train: Tensor | None = None
    ) -> Tensor:
        """The paper's ``a_i(x) = c_i(x) / K(x, x_i)``, ``[Q, len(ids)]``; NaN where the kernel is 0.

        Args:
            x: Queries.
            x_train: The inputs of the training examples ``ids``, row by row.
            ids: Their ids.
            target: Output of each query, ``[Q]``.
            target_train: Output of each training example in the kernel, ``[len(ids)]``; None for the query's target.

        Returns:
            The coefficients.

        Raises:
            KeyError: If an id was never visited in training.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> x, ids = torch.eye(2), torch.tensor([3, 5])
            >>> tiny_machine().coefficients(x, torch.eye(2), ids, target=torch.tensor([0, 1])).shape
            torch.Size([2, 2])
        """
        ids, target = torch.as_tensor(ids).cpu(), target.cpu()
        columns = self._columns(ids)
        found = self.contributions(x, target)[:, columns]
        kernel = torch.empty_like(found)
        for value in target.unique():
            rows = (target == value).nonzero().flatten()
            other = torch.full((len(ids),), int(value)) if target_train is None else target_train
            kernel[rows] = self.kernel(take_rows(x, rows), x_train, target[rows], other)
        return torch.where(kernel == 0, torch.full_like(found, torch.nan), found / kernel)

    def self_influence(self) -> Tensor:
        """Each example's contribution to its own loss over training, ``[N]``, in the order of ``example_ids``.

        Negative: training on an example lowers its own loss. Taken in training, visit by visit, as
        ``-weight * <g_i, D g_i>`` with the gradient ``g_i`` as it reached the optimiser, as far as its chord's sketch
        keeps it, times the rows of the step, so that with a mean-reduced loss the unit is that of one example's loss.
        Large magnitudes mark examples that the network had to bend for: rare, hard or mislabelled ones.

        Returns:
            One number per example.

        Examples:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().self_influence()
            tensor([-0.0334, -0.2241, -0.2611, -0.0472, -0.0798, -0.0422])
        """
        out = torch.zeros(len(self.example_ids), dtype=torch.float64)
        for examples in self._path.examples:
            for ids, values in examples.influences():
                out.index_add_(0, torch.searchsorted(self.example_ids, ids), values.double())
        return out.float()
