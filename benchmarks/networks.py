"""The networks whose step is timed, with a batch each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Transformer", "mlp"]


class Transformer(nn.Module):
    """A causal language model: d = 256, 4 layers, 128 positions, GELU."""

    def __init__(self, vocabulary: int = 256, d: int = 256, layers: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(length, d)
        self.blocks = nn.ModuleList(_Block(d) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, t, v]`` of token ids ``[n, t]``."""
        where = torch.arange(x.shape[1], device=x.device).expand_as(x)
        h = self.tokens(x) + self.positions(where)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h))
        return out


class _Block(nn.Module):
    def __init__(self, d: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        out: Tensor = h + self.down(nn.functional.gelu(self.up(self.norm2(h))))
        return out


def mlp() -> nn.Module:
    """784-128-64-10, ReLU, 110k weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return mlp(), torch.rand(128, 1, 28, 28), torch.randint(0, 10, (128,))


def _cnn() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    return model, torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(), torch.randint(0, 256, (16, 128)), torch.randint(0, 256, (16, 128))


NETWORKS = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer}
