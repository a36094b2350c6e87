"""Every layer rule against whole gradients of batches of one, unsketched, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import (
    CaptureError,
    GradientCapture,
    RowGroup,
    layer_rules,
    plan_capture,
    register_layer_rule,
)
from lightning_pathkernel.capture.linear import linear_rule
from lightning_pathkernel.testing import assert_layer_rule, captured_gradients

N = 5

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (N, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (N, 6)),
    "linear, one leading dimension": (lambda: nn.Linear(6, 4), (N, 3, 6)),
    "linear, three leading dimensions": (lambda: nn.Linear(6, 4), (N, 3, 2, 2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (N, 3, 9)),
    "conv1d, stride, padding, dilation": (lambda: nn.Conv1d(3, 4, 3, 2, 2, 2), (N, 3, 11)),
    "conv1d, same": (lambda: nn.Conv1d(3, 4, 3, padding="same", dilation=2), (N, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (N, 3, 7, 6)),
    "conv2d, many channels": (lambda: nn.Conv2d(6, 4, 3, padding=1), (N, 6, 7, 6)),
    "conv2d, rectangular": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), (1, 2)), (N, 3, 8, 7)),
    "conv2d, stride leaves a rest": (lambda: nn.Conv2d(2, 3, 3, stride=3), (N, 2, 8, 10)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (N, 3, 6, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (N, 3, 6, 6)),
    "conv2d, replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (N, 3, 6, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (N, 3, 6, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (N, 4, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (N, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (N, 2, 4, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (N, 3, 6)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 6)), (N, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (N, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (N, 4, 5)),
    "group norm of images": (lambda: nn.GroupNorm(2, 4), (N, 4, 5, 3)),
    "rms norm": (lambda: nn.RMSNorm(6), (N, 3, 6)),
    "rms norm with eps": (lambda: nn.RMSNorm((3, 6), eps=1e-3), (N, 3, 6)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4).eval(), (N, 4)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(4).eval(), (N, 4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4).eval(), (N, 4, 3, 3)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4).eval(), (N, 4, 2, 3, 2)),
    "prelu, by the fallback": (lambda: nn.PReLU(4), (N, 4, 3)),
    "transposed convolution, by the fallback": (lambda: nn.ConvTranspose2d(2, 3, 2), (N, 2, 3, 3)),
    "lstm, by the fallback": (
        lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True),
        (N, 6, 4),
    ),
    "gru, by the fallback": (lambda: nn.GRU(4, 3, batch_first=True), (N, 6, 4)),
}


def randomised(module: nn.Module) -> nn.Module:
    """Norms begin with ones and zeros, running statistics too: nothing may hide behind that."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.3
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_per_example_gradients_are_those_of_batches_of_one(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    assert_layer_rule(randomised(make().to(dtype)), (torch.randn(shape, dtype=dtype),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_embedding(options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_layer_rule(nn.Embedding(7, 3, **options).to(dtype), (torch.randint(0, 7, (N, 4)),))


def test_embedding_scaled_by_frequency_adds_up() -> None:
    assert_layer_rule(nn.Embedding(7, 3, scale_grad_by_freq=True), (torch.randint(0, 7, (N, 4)),), mixes_rows=True)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(4), (N, 4)), (nn.BatchNorm2d(4), (N, 4, 3, 3)), (nn.BatchNorm3d(4), (N, 4, 2, 3, 2))],
)
def test_batch_norm_in_training_shares_out_the_whole_gradient(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Rows are mixed by the batch statistics: the row's share through the layer's own backward is the reference."""
    layer = randomised(layer.double()).train()
    x = torch.randn(shape, dtype=torch.float64)
    assert_layer_rule(layer, (x,), mixes_rows=True)
    rows, _ = captured_gradients(layer, (x,), lambda out: (out**3).sum(), N)
    flat = x.transpose(0, 1).reshape(4, -1)
    spread = (flat.var(1, unbiased=False) + layer.eps).sqrt()
    view = (1, 4) + (1,) * (len(shape) - 2)
    normalised = (x - flat.mean(1).view(view)) / spread.view(view)
    output = layer.weight.view(view) * normalised + layer.bias.view(view)
    expected = (3 * output**2 * normalised).reshape(N, 4, -1).sum(2)
    torch.testing.assert_close(rows["weight"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_by_the_fallback(batch_first: bool) -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            if not batch_first:
                x = x.transpose(0, 1)
            out = self.attention(x, x, x, attn_mask=torch.zeros(N, N, dtype=x.dtype))[0]
            return out if batch_first else out.transpose(0, 1)

    torch.manual_seed(0)
    assert_layer_rule(Self().double(), (torch.randn(N, N, 4, dtype=torch.float64),))


def test_transformer_encoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu").double()
    assert_layer_rule(layer, (torch.randn(N, 3, 8, dtype=torch.float64),))


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).sin())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Positions(nn.Module):
    """Learned positions shared by all examples, and a bare parameter: no module of theirs sees the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.positions = nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.positions(torch.arange(3))).sin() * self.scale)


def test_tied_weights_add_up() -> None:
    torch.manual_seed(0)
    assert_layer_rule(Tied().double(), (torch.randint(0, 7, (N, 4)),))


def test_a_layer_called_twice_and_one_never_called() -> None:
    torch.manual_seed(0)
    assert_layer_rule(Twice().double(), (torch.randn(N, 4, dtype=torch.float64),))


def test_parameters_without_the_batch_are_taken_by_the_enclosing_module() -> None:
    torch.manual_seed(0)
    assert_layer_rule(Positions().double(), (torch.randint(0, 7, (N, 3)),))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    model[0].weight.requires_grad_(False)
    assert_layer_rule(model, (torch.randn(N, 4, dtype=torch.float64),))
    rows, _ = captured_gradients(model, (torch.randn(N, 4, dtype=torch.float64),), lambda out: out.sum(), N)
    assert set(rows) == {"0.bias", "2.weight", "2.bias"}


def test_a_subclass_takes_the_fallback() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert_layer_rule(Doubled(4, 3).double(), (torch.randn(N, 4, dtype=torch.float64),))


def test_hooks_leave_gradients_and_random_state_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(N, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = torch.get_rng_state()
    _, whole = captured_gradients(model, (x,), lambda out: out.sum(), N)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(plain, whole.values(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_that_no_batch_reaches_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(torch.arange(3)).sum() * x.sum()

    with pytest.raises(CaptureError, match=r"'table\.weight' cannot be split among the 5 examples"):
        captured_gradients(Bare(), (torch.randn(N, 2),), lambda out: out, N)


def test_every_offending_module_is_named_at_once() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(3, 2, sparse=True), "b": nn.LazyLinear(2), "c": nn.SyncBatchNorm(3)})
    model["d"] = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(
        CaptureError,
        match=r"'a' \(Embedding\): sparse.*'b' \(LazyLinear\): .* run one batch.*"
        r"'c' \(SyncBatchNorm\): .* use BatchNorm.*'d' \(Linear\): complex",
    ):
        plan_capture(model)
    with pytest.raises(CaptureError, match="no trainable parameter"):
        plan_capture(nn.ReLU())


def test_parameters_that_are_frozen_at_the_moment_cost_nothing() -> None:
    """A plan for everything follows what requires gradients when a batch comes."""
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)).double().requires_grad_(False)
    with pytest.raises(CaptureError, match="no trainable parameter"):
        plan_capture(model)
    plan = plan_capture(model, everything=True)
    assert set(plan.parameters) == {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias"}
    capture = GradientCapture(model, plan).attach()
    x = torch.randn(N, 4, dtype=torch.float64)
    for thawed in (["2.bias"], ["1.weight", "2.bias"], ["0.weight", "2.weight"]):
        for name, parameter in plan.parameters.items():
            parameter.requires_grad_(name in thawed).grad = None
        seen: dict[str, Tensor] = {}
        capture.begin([RowGroup(N)])
        loss = model(x).square().sum()
        capture.listen(lambda group, name, gradient, seen=seen: seen.update({name: gradient.total()}))
        loss.backward()
        capture.check()
        capture.end()
        assert sorted(seen) == thawed
        for name in thawed:
            whole = plan.parameters[name].grad
            torch.testing.assert_close(seen[name].reshape(whole.shape), whole, rtol=1e-10, atol=1e-12)


def test_rules_are_not_replaced_silently() -> None:
    with pytest.raises(ValueError, match=r"exist already for Linear: pass replace=True"):
        register_layer_rule(nn.Linear)(linear_rule)
    assert layer_rules()[nn.Linear] is linear_rule
