"""Contributions of training examples to queries' log-odds, by this package, captum's TracInCP and TRAK.

Each takes what it needs from a recorded run, says how many bytes it keeps on disk, and is asked the same question. All
explain the same scalar: the log-odds of the class that the network predicts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.brute_force import exact_contributions
from benchmarks.recorded import Run
from benchmarks.retraining import log_odds
from lightning_pathkernel.chord_io import read_chord, write_chord
from lightning_pathkernel.machine import KernelMachine

__all__ = ["Answer", "ask_machine", "ask_tracin", "ask_trak", "checkpoint_bytes", "exact_log_odds", "spread_out"]

Queries = tuple[Tensor, Tensor]
_BATCH, _LONG = 256, 5.0


@dataclass
class Answer:
    """What a method says of the queries.

    Attributes:
        name: The method, with its size.
        contributions: ``[Q, N]``; positive ones speak for the query's class.
        size: Bytes on disk that the question needed, without the training data.
        seconds: Time of the question.
    """

    name: str
    contributions: Tensor
    size: int
    seconds: float


class _LogOdds(nn.Module):
    """Logits as they are in training; in evaluation the log-odds of every class."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x
        classes = torch.arange(x.shape[1])
        return torch.stack([log_odds(x, k.expand(len(x))) for k in classes], 1)


def exact_log_odds(run: Run) -> tuple[Tensor, Tensor]:
    """Exact contributions to the log-odds of every query's predicted class, ``[Q, N]``, and these classes, ``[Q]``."""
    case = run.training.case

    def network() -> nn.Module:
        return nn.Sequential(*case.network(), _LogOdds())

    exact = exact_contributions(replace(run.training, case=replace(case, network=network)))
    return exact.contributions, exact.target


def spread_out(steps: int, count: int) -> list[int]:
    """Numbers of optimiser steps after which ``count`` checkpoints are kept: evenly spaced, the last one the end."""
    return [round(steps * (i + 1) / count) for i in range(count)]


def checkpoint_bytes(run: Run) -> int:
    """Bytes of one checkpoint's weights."""
    return sum(w.numel() * w.element_size() for w in run.training.states[0].values())


def _files(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _asked(question: Any) -> tuple[Any, float]:
    """The answer, and the time it took; the quicker of two where it is short."""
    times: list[float] = []
    while len(times) < 2 and sum(times) < _LONG:
        start = time.perf_counter()
        answer = question()
        times.append(time.perf_counter() - start)
    return answer, min(times)


def ask_machine(name: str, run: Run, queries: Queries, directory: Path) -> Answer:
    """This package: the machine as it is read back from its files."""
    directory.mkdir()
    paths = [write_chord(directory, chord) for chord in run.machine.chords]
    machine = KernelMachine(run.training.case.network(), [read_chord(path) for path in paths])
    found, seconds = _asked(lambda: machine.contributions(*queries, output_fn=log_odds))
    return Answer(name, found, _files(directory), seconds)


def _loader(run: Run) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(run.training.data.x, run.training.data.y), _BATCH)


def _checkpoints(run: Run, steps: Sequence[int], directory: Path) -> list[str]:
    directory.mkdir()
    paths = []
    for step in steps:
        path = directory / f"{step}.safetensors"
        save_file({name: w.contiguous() for name, w in run.training.states[step].items()}, path)
        paths.append(str(path))
    return paths


def ask_tracin(run: Run, queries: Queries, checkpoints: int, directory: Path) -> Answer:
    """Captum's TracInCP over evenly spaced checkpoints, the learning rate of each as its weight."""
    from captum.influence import TracInCP

    steps = spread_out(len(run.training.batches), checkpoints)
    paths = _checkpoints(run, steps, directory)
    rates = {path: run.training.rates[step - 1] for path, step in zip(paths, steps, strict=True)}

    def load(module: nn.Module, path: str) -> float:
        module.load_state_dict(load_file(path))
        return rates[path]

    def minus_log_odds(outputs: Tensor, target: Tensor) -> Tensor:
        return -log_odds(outputs, target).sum()

    tracin = TracInCP(
        run.training.case.network(), _loader(run), paths, load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"), test_loss_fn=minus_log_odds, sample_wise_grads_per_batch=True,
    )  # fmt: skip
    found, seconds = _asked(lambda: tracin.influence(queries).detach())
    return Answer(f"TracInCP, {checkpoints} checkpoints", found, _files(directory), seconds)


def ask_trak(run: Run, queries: Queries, checkpoints: int, proj_dim: int, directory: Path) -> Answer:
    """TRAK with features of evenly spaced checkpoints of the run, averaged; its projector for the CPU."""
    from trak import TRAKer

    n, asked = len(run.training.data.x), len(queries[0])
    states = [dict(run.training.states[step]) for step in spread_out(len(run.training.batches), checkpoints)]
    with open(os.devnull, "w", encoding="ascii") as quiet, contextlib.redirect_stderr(quiet):
        traker = TRAKer(
            model=run.training.case.network().eval(), task="image_classification", train_set_size=n, device="cpu",
            proj_dim=proj_dim, use_half_precision=False, save_dir=str(directory), logging_level=logging.ERROR,
        )  # fmt: skip
        for index, state in enumerate(states):
            traker.load_checkpoint(state, model_id=index)
            for x, y in _loader(run):
                traker.featurize(batch=(x, y), num_samples=len(x))
        traker.finalize_features(del_grads=True)
        size = _files(directory) + checkpoints * checkpoint_bytes(run)
        turns = iter(range(2))

        def question() -> Tensor:
            name = f"queries{next(turns)}"  # a name may be asked once only
            for index, state in enumerate(states):
                traker.start_scoring_checkpoint(exp_name=name, checkpoint=state, model_id=index, num_targets=asked)
                traker.score(batch=queries, num_samples=asked)
            return torch.from_numpy(traker.finalize_scores(exp_name=name).copy()).T

        found, seconds = _asked(question)
    return Answer(f"TRAK {proj_dim}, {checkpoints} checkpoints", found, size, seconds)
