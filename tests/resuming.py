"""Fits that are interrupted and resumed, on loaders whose order is the same either way."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_pathkernel import PathKernelCallback
from tests.helpers import digits


class EpochOrder(Sampler[int]):
    """A permutation that the epoch decides, from a position in it on."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.skip = count, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        skip, self.skip = self.skip, 0
        return iter(order[skip:])

    def __len__(self) -> int:
        return self.count


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning can resume in mid-epoch; without workers, which draw ahead."""

    def __init__(self, dataset: Any, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, batch_size, sampler=EpochOrder(len(dataset)), **options)
        self.__dict__["given"] = 0

    def __iter__(self) -> Iterator[Any]:
        inner = super().__iter__()
        self.__dict__["given"] = self.sampler.skip // self.batch_size  # type: ignore[attr-defined,operator]
        return Counting(inner, self)

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.__dict__["given"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        given = state["given"] % len(self)
        self.sampler.skip = given * self.batch_size  # type: ignore[attr-defined,operator]


class Counting:
    """A loader's iterator that counts for `ResumableLoader`; everything else is the inner one's."""

    def __init__(self, inner: Any, loader: ResumableLoader) -> None:
        self.inner, self.loader = inner, loader

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> Any:
        found = next(self.inner)
        self.loader.__dict__["given"] += 1
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class StopAfter(pl.Callback):
    """Saves a checkpoint after some batches, and ends the process' fit there as a kill would: by an exception."""

    def __init__(self, path: Path, batches: int | None, also: dict[int, Path] | None = None, kill: bool = True) -> None:
        self.path, self.batches, self.kill = path, batches, kill
        self.also = also or {}
        self.seen = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen += 1
        if self.seen in self.also:
            trainer.save_checkpoint(self.also[self.seen])
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)
            if self.kill:
                raise Killed


class Killed(BaseException):
    """Stands for the end of a process."""


def trainer_for(root: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root,
            "num_sanity_val_steps": 0, **options,
        },
        callbacks=callbacks,
    )  # fmt: skip


def loaders(count: int = 96, batch_size: int = 16, dataset: Any = None) -> tuple[Any, Any]:
    training, validation = digits()
    dataset = dataset or TensorDataset(*(t[:count] for t in training.tensors))
    return ResumableLoader(dataset, batch_size), DataLoader(validation, 50)


def run(
    root: Path, make: Callable[[], pl.LightningModule], recorder: dict[str, Any], trainer: dict[str, Any],
    extra: list[pl.Callback] | None = None, checkpoint: Path | None = None, dataset: Any = None, **given: Any,
) -> PathKernelCallback:  # fmt: skip
    """One fit, resumed or not; `Killed` ends it quietly."""
    pl.seed_everything(7, verbose=False)
    path_kernel = PathKernelCallback(**{"dirpath": str(root / "run"), "nodes": 4, "probes": 40, "sketch_dim": 24,
                                        **recorder})  # fmt: skip
    fit = trainer_for(root, [path_kernel, *(extra or [])], **trainer)
    module = make()
    path_kernel.module, path_kernel.trainer = module, fit  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Killed):
            fit.fit(module, *loaders(dataset=dataset, **given), ckpt_path=checkpoint)
    return path_kernel


def chain_of(recording: Path) -> dict[str, str]:
    """Every file that does not depend on where checkpoints were, with a digest."""
    return {
        str(p.relative_to(recording)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(recording.rglob("*"))
        if p.is_file() and "discarded" not in p.parts and not p.name.startswith("open-")
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
