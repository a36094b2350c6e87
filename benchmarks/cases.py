"""Networks x optimisers that sketches are judged on, each with real data, as named cases.

Images are Fashion-MNIST's, for example of Debian's package dataset-fashion-mnist; text is that of `pydoc_data.topics`,
the language reference that ships with Python.
"""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import Transformer, mlp

__all__ = ["CASES", "NETWORKS", "Case", "Data", "images"]

TRAIN, BATCH, EPOCHS, PROBES, QUERIES, UNSEEN = 2000, 64, 5, 256, 24, 128
CHARACTERS, LENGTH, WORDS, WINDOW = 96, 32, 2000, 16


def cnn() -> nn.Module:
    """Convolutions with 8 and 16 channels, 27k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def gelu_mlp() -> nn.Module:
    """784-96-96-10, GELU, 86k weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))


class _Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet() -> nn.Module:
    """Batch norm, 11 convolutions of 8 and 16 channels, 13k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        _Residual(8, 8, 1), _Residual(8, 8, 1), _Residual(8, 16, 2), _Residual(16, 16, 1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class _Rows(nn.Module):
    """The rows of an image as tokens of a transformer, averaged: 4 layers, d = 32, GELU, 51k weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Linear(28, 32), Transformer(1, 32, 4, 1).blocks
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x[:, 0])
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h).mean(1))
        return out


class _Language(nn.Module):
    """A causal transformer over characters, asked for the one after the last: 4 layers, d = 32, GELU, 58k weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(CHARACTERS, 32, 4, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out[:, -1]


class _Bag(nn.Module):
    """Words that are mostly rare, averaged, then ReLU: 36k weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.hidden, self.head = nn.Linear(16, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.hidden(self.words(x).mean(1))))
        return out


@dataclass(frozen=True)
class Data:
    """Training inputs and labels, probes, queries whose contributions are asked for, and further unseen inputs."""

    x: Tensor
    y: Tensor
    probes: Tensor
    queries: Tensor
    unseen: Tensor


def images(directory: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images ``[n, 1, 28, 28]`` in [0, 1] and their labels."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((directory / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    x = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)[:count].copy()).float() / 255
    return x, torch.from_numpy(labels[:count].copy()).long()


def _parted(x: Tensor, y: Tensor) -> Data:
    """Data of rows in random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: TRAIN + PROBES + QUERIES + UNSEEN]
    train, probes, queries, unseen = order.split((TRAIN, PROBES, QUERIES, UNSEEN))
    return Data(x[train], y[train], x[probes], x[queries], x[unseen[:64]])


@cache
def fashion(directory: Path) -> Data:
    """Images and what they show."""
    x, y = images(directory, "train", TRAIN)
    probes, queries, unseen = images(directory, "t10k", PROBES + QUERIES + UNSEEN)[0].split((PROBES, QUERIES, UNSEEN))
    return Data(x, y, probes, queries, unseen[:64])


@cache
def characters(_: Path) -> Data:
    """Windows of 32 characters of the language reference, and the character after each."""
    text = "".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([min(max(ord(c) - 31, 0), CHARACTERS - 1) for c in text])
    windows = codes.unfold(0, LENGTH + 1, LENGTH + 1)
    return _parted(windows[:, :-1].contiguous(), windows[:, -1])


@cache
def words(_: Path) -> Data:
    """Windows of 16 words of its ten longest topics, and the topic of each."""
    longest = sorted(topics, key=lambda name: len(topics[name]))[-10:]
    found = [re.findall(r"[a-z_]+", topics[name].lower()) for name in longest]
    known = [word for word, _ in Counter(word for text in found for word in text).most_common(WORDS - 1)]
    number = {word: i + 1 for i, word in enumerate(known)}
    codes = [torch.tensor([number.get(word, 0) for word in text]).unfold(0, WINDOW, 8) for text in found]
    labels = torch.cat([torch.full((len(code),), i) for i, code in enumerate(codes)])
    return _parted(torch.cat(codes), labels)


@dataclass(frozen=True)
class Case:
    """A network, its optimiser and data, and how it is trained.

    Attributes:
        network: Makes it.
        optimizer: Makes the optimiser of its parameters.
        nodes: Chords of its recording.
        clip: Norm that gradients are clipped to.
        accumulate: Batches per step.
        warm_up: Steps before a cosine schedule; None for a constant rate.
        data: Reads the data, given the directory of the images.
        points: Gauss points per step with which brute force closes eq. (1); smooth networks need few.
    """

    network: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    nodes: int
    clip: float | None = None
    accumulate: int = 1
    warm_up: int | None = None
    data: Callable[[Path], Data] = fashion
    points: int = 6

    def rates(self, steps: int) -> list[float]:
        """What every step's learning rate is multiplied with."""
        if self.warm_up is None:
            return [1.0] * steps
        falling = [0.5 + 0.5 * math.cos(math.pi * s / (steps - self.warm_up)) for s in range(steps - self.warm_up)]
        return [(s + 1) / self.warm_up for s in range(self.warm_up)] + falling


def _sgd(lr: float, momentum: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True)
class _Entry:
    """A network, its data, nodes, rate under SGD (a fifth of that with momentum) and Gauss points."""

    network: Callable[[], nn.Module]
    data: Callable[[Path], Data]
    nodes: int
    rate: float
    points: int = 6


NETWORKS = {
    "MLP": _Entry(mlp, fashion, 24, 0.1),
    "CNN": _Entry(cnn, fashion, 24, 0.05),
    "ResNet": _Entry(resnet, fashion, 24, 0.05),
    "characters": _Entry(_Language, characters, 40, 0.1, 3),
    "rows": _Entry(_Rows, fashion, 40, 0.05, 3),
    "GELU": _Entry(gelu_mlp, fashion, 24, 0.1, 3),
    "words": _Entry(_Bag, words, 24, 1.0),
}

CASES: dict[str, Case] = {}
for _name, _entry in NETWORKS.items():
    for _kind, _optimizer in (("AdamW", _adamw), ("SGD", _sgd(_entry.rate)), ("momentum", _sgd(_entry.rate / 5, 0.9))):
        CASES[f"{_name}, {_kind}"] = Case(
            _entry.network, _optimizer, _entry.nodes, data=_entry.data, points=_entry.points
        )
CASES["CNN, momentum, clipping"] = Case(cnn, _sgd(0.02, 0.9), 24, 1.0)
CASES["MLP, AdamW, clipping, accumulation, cosine"] = Case(mlp, _adamw, 24, 1.0, 2, 10)
