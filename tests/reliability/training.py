"""The run that campaigns interrupt: a small network on the digits, with a checkpoint every few steps.

Lightning does not restore the order of a loader in the middle of an epoch; the sampler here does it by what the
checkpoint says of the loops, so that a resumed run sees the batches that the uninterrupted one sees.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import torch._decomp.decompositions_for_jvp  # noqa: F401  forward mode loads it late: in every child anew
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_pathkernel import PathKernelCallback, fit_session
from tests.helpers import Classifier, digits
from tests.reliability.forks import Phase

__all__ = ["EXPORTING", "RESTORING", "TRAINING", "checkpoints", "learner", "train"]

STARTING, RESTORING, TRAINING, EXPORTING, DONE = range(5)
PHASES = ("starting", "restoring", "training", "exporting", "done")
DIGITS = digits()
EXAMPLES, BATCH, EPOCHS, CHECKPOINT = 70, 10, 2, 2
"""For each process. No checkpoint is written at the last batch of an epoch but the last one: after resuming from such a
one Lightning 2.6.6 counts its epochs wrongly, and trains longer than the run that nobody interrupted."""


class Order(Sampler[int]):
    """A permutation of each epoch, from any batch on; of two ranks, every other example."""

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        self.count, self.rank, self.ranks = count, rank, ranks
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        mine = order[self.rank :: self.ranks][self.start * BATCH :]
        self.epoch, self.start = self.epoch + 1, 0
        yield from mine

    def __len__(self) -> int:
        return self.count // self.ranks


class Learner(Classifier):
    """Batch norm for buffers, Adam for a state, and a sampler that goes on where the checkpoint was made."""

    def __init__(self, order: Order) -> None:
        torch.manual_seed(3)
        hidden = [nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)]
        super().__init__("adamw", nn.Sequential(nn.Flatten(), *hidden))
        self.order = order

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        self.order.epoch = loop["epoch_progress"]["current"]["processed"]
        done = loop["epoch_loop.batch_progress"]["current"]["ready"]
        batches = len(self.order) // BATCH
        self.order.epoch += done // batches
        self.order.start = done % batches


class Watch(pl.Callback):
    """Tells the parent how far the run has come."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def on_load_checkpoint(self, *args: Any) -> None:
        self.phase.value = RESTORING

    def on_train_batch_end(self, *args: Any) -> None:
        self.phase.value = TRAINING

    def on_train_end(self, *args: Any) -> None:
        self.phase.value = EXPORTING


class Checkpoint(ModelCheckpoint):
    """Says when a checkpoint is written."""

    def __init__(self, told: Callable[[Path], None] | None, **options: Any) -> None:
        super().__init__(**options)
        self.told = told

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.told is not None:
            self.told(Path(filepath))


def learner() -> Learner:
    """The network before training."""
    return Learner(Order(EXAMPLES, 0, 1))


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run, by their steps; Lightning numbers those that it writes a second time."""

    def order(path: Path) -> tuple[int, int]:
        step, _, version = path.stem.removeprefix("step=").partition("-v")
        return int(step), int(version or 0)

    return sorted((root / "checkpoints").glob("*.ckpt"), key=order)


def train(
    root: Path, resume: Path | None = None, phase: Phase | None = None, rank: int = 0, ranks: int = 1, port: int = 0,
    on_checkpoint: Callable[[Path], None] | None = None, checkpoint: bool = True,
    epochs: int = EPOCHS, **options: Any,
) -> dict[str, list[float]]:  # fmt: skip
    """Train, from the beginning or from a checkpoint, recorded and exported under ``root``.

    Args:
        root: Where recording, machine and checkpoints lie.
        resume: The checkpoint.
        phase: Told how far the run has come.
        rank: This process.
        ranks: Number of processes.
        port: Where the first of several processes listens.
        on_checkpoint: Told of every checkpoint once it is written.
        checkpoint: Whether checkpoints are written at all.
        epochs: How long.
        options: Of the callback.

    Returns:
        The sums of the final weights, by name.
    """
    torch.set_num_threads(1)
    fit_session.time = SimpleNamespace(perf_counter=lambda: 0.0)  # no clock: `overhead` is 0 in every run
    warnings.simplefilter("ignore")
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    training, validation = DIGITS
    pl.seed_everything(7, verbose=False)
    module = Learner(Order(EXAMPLES * ranks, rank, ranks))
    keep = Checkpoint(
        on_checkpoint, dirpath=root / "checkpoints", filename="{step}", every_n_train_steps=CHECKPOINT, save_top_k=-1,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    kernel = PathKernelCallback(str(root / "run"), **{"sketch_dim": 16, "nodes": 3, "probes": 4, **options})
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root, num_sanity_val_steps=0,
        use_distributed_sampler=False, enable_checkpointing=checkpoint,
        callbacks=[*([Watch(phase)] if phase else []), kernel, *([keep] if checkpoint else [])],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*(t[: EXAMPLES * ranks] for t in training.tensors)), BATCH, sampler=module.order)
    small = TensorDataset(*(t[:8] for t in validation.tensors))
    trainer.fit(module, loader, DataLoader(small, 8), ckpt_path=None if resume is None else str(resume))
    if phase is not None:
        phase.value = DONE
    state = {name: value.double() for name, value in module.state_dict().items()}
    return {name: [float(value.sum()), float(value.square().sum())] for name, value in state.items()}
