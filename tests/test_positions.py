"""Every token as a row of its own: their contributions add up to their sequence's, and to the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.capture import CaptureError

WORDS, LENGTH = 11, 6


class Block(nn.Module):
    """A causal language model of one block, every layer of which is called with ``[n, positions, ...]``."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.places = nn.Embedding(LENGTH, 12)
        self.norm = nn.LayerNorm(12)
        self.attend = nn.Linear(12, 36)
        self.out = nn.Linear(12, WORDS)
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        hidden = self.words(x) + self.places(places if self.table else places.expand_as(x))
        q, k, v = self.attend(self.norm(hidden)).chunk(3, dim=-1)
        return self.out(hidden + F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Speaker(pl.LightningModule):
    def __init__(self, table: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = Block(table)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, -1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


def sentences(count: int, seed: int, length: int = LENGTH + 1) -> TensorDataset:
    """Words that follow one another by adding two or three."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(2, 4, (count, length), generator=generator)
    return TensorDataset(steps.cumsum(1) % WORDS)


def fitted(root: Path, module: pl.LightningModule, data: Any = None, **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    path_kernel = PathKernelCallback(str(root), nodes=6, probes=16, sketch="identity", sketch_dim=10**6, **options)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[path_kernel], num_sanity_val_steps=0, precision="64-true",
    )  # fmt: skip
    queries = DataLoader(TensorDataset(sentences(20, 9).tensors[0][:, :-1]), 20)
    trainer.fit(module, DataLoader(data or sentences(40, 0), 10, shuffle=True), queries)
    return path_kernel.machine_dir


def test_tokens_add_up_to_their_sequences_and_to_the_output(tmp_path: Path) -> None:
    module, whole_module = Speaker(), Speaker()
    tokens = KernelMachine.load(fitted(tmp_path / "tokens", module, positions=LENGTH), module)
    whole = KernelMachine.load(fitted(tmp_path / "whole", whole_module), whole_module)
    for a, b in zip(module.parameters(), whole_module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert tokens.example_ids.tolist() == list(range(40 * LENGTH))
    assert whole.example_ids.tolist() == list(range(40))
    x = sentences(8, 5).tensors[0][:, :-1]
    target = torch.arange(8)
    by_token, by_sequence = (m.contributions(x, target) for m in (tokens, whole))
    torch.testing.assert_close(by_token.unflatten(1, (40, LENGTH)).sum(2), by_sequence, rtol=1e-8, atol=1e-10)
    why = tokens.explain(x, target, top_k=3)
    outputs = module.eval()(x).detach().gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(sum(why.ledger.values()), outputs, rtol=1e-8, atol=1e-10)
    assert float(by_token.abs().max()) > 0


def test_a_token_that_only_feeds_the_last_position_has_its_share(tmp_path: Path) -> None:
    """Without attention a token's row is that of its own loss."""
    module = Speaker()
    module.net.attend.requires_grad_(False).weight.zero_()
    module.net.attend.bias.zero_()
    machine = KernelMachine.load(fitted(tmp_path / "run", module, positions=LENGTH), module)
    chord, start = machine.chords[0], Speaker()
    start.double().net.attend.weight.data.zero_()
    start.net.attend.bias.data.zero_()
    rows = dict(zip(chord.example_ids.tolist(), chord.rows, strict=True))
    sequence, position = chord.example_ids[0].item() // LENGTH, 3
    tokens = sentences(40, 0).tensors[0][sequence]
    loss = F.cross_entropy(start.net(tokens[None, :-1])[0, position], tokens[position + 1])
    (expected,) = torch.autograd.grad(loss / (10 * LENGTH), start.net.out.bias)
    found = rows[sequence * LENGTH + position][-WORDS:]
    torch.testing.assert_close(found / found.norm(), -expected / expected.norm(), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_split_by_position_is_refused_by_name(tmp_path: Path) -> None:
    class Convolves(Speaker):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Conv1d(12, 12, 1)

    with pytest.raises(MisconfigurationException, match=r"No gradients by position for 'extra' \(Conv1d\): only Embed"):
        fitted(tmp_path / "conv", Convolves(), positions=LENGTH)
    with pytest.raises(CaptureError, match=r"No gradients by position for 'net.places.weight': the layer was not"):
        fitted(tmp_path / "table", Speaker(table=True), positions=LENGTH)
    with pytest.raises(CaptureError, match=r"by position need \[10, 4, ...\] in both"):
        fitted(tmp_path / "length", Speaker(), positions=4)
    with pytest.raises(MisconfigurationException, match="string ids cannot be used with positions"):
        fitted(tmp_path / "names", Speaker(), positions=LENGTH, example_ids=lambda b: [str(row) for row in b[0]])


def test_a_refused_fit_leaves_no_directory(tmp_path: Path) -> None:
    class Convolves(Speaker):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Conv1d(12, 12, 1)

    with pytest.raises(MisconfigurationException, match="No gradients by position"):
        fitted(tmp_path / "run", Convolves(), positions=LENGTH)
    assert not (tmp_path / "run").exists()
