"""Small networks of many kinds: what they are made of, what they see, and how they learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CLASSES, TOKENS, LENGTH = 3, 11, 6


class Residual(nn.Module):
    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.conv(x)))


class Adapter(nn.Module):
    """LoRA of bare parameters over a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class LinearAdapter(nn.Module):
    """The same of linear layers."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.cells = kind(4, 5, batch_first=batch_first)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.cells.batch_first else x.transpose(0, 1)
        states = self.cells(x)[0]
        return self.head(states[:, -1] if self.cells.batch_first else states[-1])


class VisionTransformer(nn.Module):
    """Patches, a class token and learned positions before encoder layers."""

    def __init__(self, dropout: float = 0.0, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.begin = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 5, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 2, 12, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.begin.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.encoder(rows)[:, 0])


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, s, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, s, width))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """A causal language model, its output layer tied to its embedding; logits ``[n, s, TOKENS]``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.block, self.norm = CausalBlock(width, 2), nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.block(rows)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(TOKENS, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, TOKENS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.tokens(x).mean(1)).tanh())[:, :CLASSES]


class Mixed(nn.Module):
    """No rule for any of it: a bilinear layer, a complex filter held as two real parts, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(6, 6, 5)
        self.filter = nn.Parameter(torch.randn(4, 2) * 0.3)
        self.slope = nn.PReLU(6)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * torch.complex(self.filter[:, 0], self.filter[:, 1])
        x = self.slope(x + torch.fft.irfft(spectrum, n=6))
        return self.head(self.pairs(x, x.sin()).tanh())


def images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with a bright row: which third it is in is the class."""
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.randn(n, 1, 8, 8, generator=generator) * 0.5
    x[torch.arange(n), 0, 1 + 3 * labels] += 1.5
    return x, labels


def vectors(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


def series(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, 4, generator=generator)
    return x, x.sum(1)[:, :CLASSES].argmax(1)


def words(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, TOKENS, (n, LENGTH), generator=generator)
    return x, x.sum(1) % CLASSES


def sentences(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every token follows from the one before; the target is the next token at every position."""
    first = torch.randint(0, TOKENS, (n, 1), generator=generator)
    text = (first * 2 ** torch.arange(LENGTH + 1) + torch.arange(LENGTH + 1)) % TOKENS
    return text[:, :-1], text[:, 1:]


def last_token(module: Any, batch: Any) -> Tensor:
    """Logits of the token after the whole sequence, ``[n, TOKENS]``."""
    logits: Tensor = module(batch[0] if isinstance(batch, tuple | list) else batch)[:, -1]
    return logits


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        make: Builds it.
        data: ``(n, generator) -> (inputs, targets)``.
        lr: Learning rate of AdamW, or of SGD with momentum if negative.
        forward_fn: Its outputs as ``[n, K]``, where they are not.
        mixes_rows: Training passes mix rows or draw random numbers: per-example gradients are not those of batches of
            one.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    lr: float = 3e-3
    forward_fn: Callable[[Any, Any], Tensor] | None = None
    mixes_rows: bool = False


def perceptron(wrap: Callable[[nn.Linear], nn.Module], *between: nn.Module) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Linear(6, 12)), nn.GELU(), *between, wrap(nn.Linear(12, 8)), nn.Tanh(), nn.Linear(8, 3)
    )


def cnn(*blocks: nn.Module) -> nn.Module:
    """An image classifier around blocks of width 4."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, CLASSES))


NETWORKS: dict[str, Case] = {
    "cnn with batch norm": Case(lambda: cnn(nn.BatchNorm2d(4), nn.GELU()), images, -0.02, mixes_rows=True),
    "residual net": Case(
        lambda: cnn(Residual(nn.BatchNorm2d(4), 4), Residual(nn.GroupNorm(2, 4), 4)), images, mixes_rows=True
    ),
    "perceptron with dropout": Case(
        lambda: perceptron(nn.Identity(), nn.Dropout(0.3)), vectors, -0.05, mixes_rows=True
    ),
    "weight norm": Case(lambda: perceptron(parametrizations.weight_norm), vectors),
    "spectral norm": Case(lambda: perceptron(parametrizations.spectral_norm), vectors, mixes_rows=True),
    # without weight decay: Householder vectors of torch carry signs that decay would turn into zeros
    "orthogonal": Case(lambda: perceptron(parametrizations.orthogonal), vectors, -0.05),
    "tied weights": Case(Tied, words),
    "adapters of bare parameters": Case(lambda: perceptron(lambda base: Adapter(base, 2)), vectors),
    "adapters of linear layers": Case(lambda: perceptron(lambda base: LinearAdapter(base, 2)), vectors, -0.05),
    "lstm": Case(lambda: Recurrent(nn.LSTM, batch_first=True), series),
    "lstm, time first": Case(lambda: Recurrent(nn.LSTM, batch_first=False), series),
    "gru": Case(lambda: Recurrent(nn.GRU, batch_first=True), series),
    "gru, time first": Case(lambda: Recurrent(nn.GRU, batch_first=False), series),
    "vision transformer": Case(VisionTransformer, images),
    "vision transformer with dropout": Case(lambda: VisionTransformer(dropout=0.1, depth=1), images, mixes_rows=True),
    "language model": Case(LanguageModel, sentences, forward_fn=last_token),
    "no rule for any layer": Case(Mixed, vectors),
}
