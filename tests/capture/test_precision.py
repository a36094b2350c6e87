"""Under autocast every rule and the fallback give gradients in the parameters' precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import GradientCapture, RowGroup, layer_rules, plan_capture
from lightning_pathkernel.testing import captured_gradients

N = 6

LAYERS = {
    nn.Linear: (lambda: nn.Linear(16, 12), (N, 3, 16)),
    nn.Conv1d: (lambda: nn.Conv1d(3, 4, 3), (N, 3, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(4, 6, 3, groups=2), (N, 4, 6, 6)),
    nn.Conv3d: (lambda: nn.Conv3d(2, 3, 2), (N, 2, 4, 4, 4)),
    nn.Embedding: (lambda: nn.Embedding(7, 8), None),
    nn.LayerNorm: (lambda: nn.LayerNorm(8), (N, 3, 8)),
    nn.RMSNorm: (lambda: nn.RMSNorm(8), (N, 3, 8)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), (N, 4, 5)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(4), (N, 4, 5)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(4), (N, 4, 3, 3)),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(4), (N, 4, 3, 3, 2)),
    "fallback": (lambda: Scale(8), (N, 8)),
    "fallback, random": (lambda: nn.LSTM(8, 6, 2, dropout=0.3, batch_first=True), (N, 4, 8)),
    nn.MultiheadAttention: (lambda: nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), (N, 4, 8)),
}


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.sin() * self.scale).cos()


def test_every_rule_has_a_case() -> None:
    assert set(layer_rules()) <= set(LAYERS)


class Between(nn.Module):
    """The layer between two others, so that what comes in and goes back is in low precision."""

    def __init__(self, layer: nn.Module, width: int | None) -> None:
        super().__init__()
        self.before = nn.Identity() if width is None else nn.Linear(width, width)
        self.layer = layer
        self.after = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.after(self.layer(x, x, x)[0])
        out = self.layer(x)
        return self.after(out[0] if isinstance(out, tuple) else out)


def made(kind: object) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = torch.randint(0, 7, (N, 5)) if shape is None else torch.randn(shape)
    model = Between(make(), None if shape is None else shape[-1])
    torch.manual_seed(1)
    model(x)
    return model, x


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's remark on RMSNorm's speed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind if isinstance(kind, str) else kind.__name__)
def test_gradients_under_autocast_add_up_and_are_near_those_in_full(
    kind: object, backward_inside: bool, dtype: torch.dtype
) -> None:
    model, x = made(kind)
    model.after.requires_grad_(False)
    plan = plan_capture(model)
    sides = []
    for low in (False, True):
        rows: dict[str, Tensor] = {}

        def sink(group: int, name: str, gradient: object, rows: dict[str, Tensor] = rows) -> None:
            value = gradient.dense()
            assert value.dtype == torch.float32
            rows[name] = rows.get(name, 0) + value

        capture = GradientCapture(model, plan).attach()
        model.zero_grad()
        torch.manual_seed(2)
        capture.begin([RowGroup(N)])
        capture.listen(sink)
        with torch.autocast("cpu", dtype, enabled=low):
            loss = model(x).float().sin().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        capture.check()
        capture.detach()
        sides.append((rows, {name: p.grad.clone() for name, p in plan.parameters.items()}))
    (full, _), (half, whole) = sides
    for name, gradient in whole.items():
        gap = half[name].sum(0).reshape(gradient.shape) - gradient
        assert gap.norm() <= 0.02 * gradient.norm(), f"{name}: {gap.norm() / gradient.norm():.3g}"
        gap = half[name] - full[name]
        assert gap.norm() <= 0.02 * full[name].norm(), f"{name}: {gap.norm() / full[name].norm():.3g}"


def test_a_model_in_low_precision_keeps_it() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16)
    rows, _ = captured_gradients(model, (torch.randn(N, 4, dtype=torch.bfloat16),), lambda out: out.sum(), N)
    assert all(value.dtype == torch.bfloat16 for value in rows.values())
