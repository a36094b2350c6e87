"""The linear datamodelling score: do contributions, added up over a subset, rank what retraining on it gives?

Park et al. 2023 (arXiv 2303.14186), eq. (2): the Spearman correlation over random subsets between an output of the
network retrained on the subset and the sum of the subset's contributions to that output, averaged over queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.brute_force import train
from benchmarks.cases import Case, Data

__all__ = ["bootstrap", "halves", "log_odds", "retrained", "scores"]


def log_odds(outputs: Tensor, target: Tensor) -> Tensor:
    """``log p / (1 - p)`` of the target class, ``[n]``, from logits ``[n, K]``: what is explained of a query."""
    own = outputs.gather(1, target[:, None])[:, 0]
    return own - outputs.scatter(1, target[:, None], -torch.inf).logsumexp(1)


def halves(count: int, examples: int, seed: int) -> Tensor:
    """Random halves of the training examples, ``[count, examples]``, True for those that stay."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(count, examples, dtype=torch.bool)
    for row in keep:
        row[torch.randperm(examples, generator=generator)[: examples // 2]] = True
    return keep


def retrained(case: Case, seed: int, data: Data, keep: Tensor, target: Tensor) -> Tensor:
    """Log-odds of the queries after training on each subset, ``[subsets, Q]``.

    The first weights and the order of the examples are drawn from the same seed every time, epochs and batch size are
    those of the recorded run.

    Args:
        case: Network and optimiser.
        seed: Seed of the recorded run.
        data: All training examples, and the queries.
        keep: Subsets, ``[subsets, N]``.
        target: The queries' classes, ``[Q]``.

    Returns:
        The log-odds.
    """
    out = []
    for chosen in keep:
        module = train(case, seed, replace(data, x=data.x[chosen], y=data.y[chosen]), keep=False).module.eval()
        with torch.no_grad():
            out.append(log_odds(module(data.queries), target))
    return torch.stack(out)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the first dimension, those of equal values their mean, centred and of unit norm."""
    columns = values.double().T.contiguous()
    ordered = columns.sort(1).values
    below, up_to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    ranks = (below + up_to).double().T
    ranks = ranks - ranks.mean(0)
    return ranks / ranks.norm(dim=0)


def scores(contributions: Tensor, keep: Tensor, outputs: Tensor) -> Tensor:
    """Spearman correlation of every query, ``[Q]``.

    Args:
        contributions: ``[Q, N]``.
        keep: Subsets, ``[subsets, N]``.
        outputs: What retraining gave, ``[subsets, Q]``.

    Returns:
        The correlations; their mean is the linear datamodelling score.
    """
    predicted = keep.double() @ contributions.double().T
    return (_ranks(predicted) * _ranks(outputs)).sum(0)


def bootstrap(
    found: Sequence[Tensor], keep: Tensor, outputs: Tensor, draws: int = 500, seed: int = 0
) -> list[tuple[float, float]]:
    """Standard error of the score, and of its difference from the first one's, over subsets and queries drawn anew.

    Args:
        found: Contributions of every method, ``[Q, N]`` each; all are judged on the same draws.
        keep: Subsets, ``[subsets, N]``.
        outputs: What retraining gave, ``[subsets, Q]``.
        draws: Number of draws, subsets and queries with replacement.
        seed: Of the draws.

    Returns:
        For every method the standard error of its score and of its score less the first method's.
    """
    generator = torch.Generator().manual_seed(seed)
    predicted = [keep.double() @ each.double().T for each in found]
    means = []
    for _ in range(draws):
        rows = torch.randint(len(keep), (len(keep),), generator=generator)
        columns = torch.randint(outputs.shape[1], (outputs.shape[1],), generator=generator)
        truth = _ranks(outputs[rows][:, columns])
        means.append([float((_ranks(each[rows][:, columns]) * truth).sum(0).mean()) for each in predicted])
    drawn = torch.tensor(means, dtype=torch.float64)
    return list(zip(drawn.std(0).tolist(), (drawn - drawn[:, :1]).std(0).tolist(), strict=True))
