"""Make golden artifacts with the package as it is: `python -m tests.golden.make DIRECTORY`.

An artifact is golden once: it is made by the version that wrote its format, committed, and never made again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, KernelMachineExporter, PathKernelCallback


def tumours() -> tuple[Tensor, Tensor]:
    """The first four measurements of 40 tumours, standardised, and whether each is benign."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x[:40, :4], dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(y[:40])


class Tiny(pl.LightningModule):
    """Batch norm and a frozen layer: something for every file of an artifact."""

    def __init__(self) -> None:
        super().__init__()
        frozen = nn.Linear(3, 3).requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), frozen, nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def name_of(batch: list[Tensor]) -> list[str]:
    """A string id: the tumour's index in the data."""
    return [f"tumour-{int(i)}" for i in batch[2]]


def recording(root: Path, named: bool) -> Path:
    """Fit `Tiny` and leave its recording."""
    pl.seed_everything(5, verbose=False)
    x, y = tumours()
    callback = PathKernelCallback(
        str(root), sketch_dim=8, nodes=3, probes=8, export=False, example_ids=name_of if named else None
    )
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    validation = DataLoader(TensorDataset(x[32:], y[32:]), 8)
    trainer.fit(Tiny(), DataLoader(TensorDataset(x[:32], y[:32], torch.arange(32)), 8), validation)
    return root / "recording"


def expect(machine: Path, answers: Path) -> None:
    """Store what the machine says about the tumours that it was not trained on."""
    x = tumours()[0][32:].contiguous()
    found = KernelMachine.load(machine, Tiny())
    target = torch.zeros(len(x), dtype=torch.long)
    values = {
        "x": x, "predict": found.predict(x), "bias": found.bias(x), "network": found.network_outputs(x),
        "contributions": found.contributions(x, target), "example_ids": found.example_ids,
        "self_influence": found.self_influence(),
    }  # fmt: skip
    save_file({name: value.detach().contiguous() for name, value in values.items()}, str(answers))


def main(out: Path) -> None:
    """Two artifacts: rows of sixteen bits and string ids, rows of eight bits and dataset indices."""
    torch.set_num_threads(1)
    for name, bits, named in (("rows-16", 16, True), ("rows-8", 8, False)):
        run = recording(out / f"run-{name}", named)
        expect(KernelMachineExporter(run).export(out / name, row_bits=bits), out / f"{name}.answers.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
