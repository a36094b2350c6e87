"""Run as a script by the tests: fits on the digits, by one process or by two, on the same global batches.

The arguments of several fits stand one after another, with a + between them.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_pathkernel import PathKernelCallback
from lightning_pathkernel.store import writer
from tests.helpers import Classifier, digits
from tests.resuming import Killed, ResumableLoader, StopAfter

BATCH = 32
COUNT = 250
"""Examples; not a multiple of two batches, so that two processes pad the last one."""


class Interleaved(torch.utils.data.Sampler[int]):
    """What two distributed samplers draw, one global batch after the other."""

    def __init__(self, dataset: Any) -> None:
        self.parts = [DistributedSampler(dataset, 2, rank, shuffle=True, seed=5) for rank in range(2)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for part in self.parts:
            part.set_epoch(self.epoch)
        one, two = (list(part) for part in self.parts)
        half = BATCH // 2
        for start in range(0, len(one), half):
            yield from one[start : start + half] + two[start : start + half]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


def network(kind: str) -> nn.Module | None:
    if kind == "batch norm":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)
        )
    return None


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--network", default="mlp")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--stop", type=int, help="save a checkpoint after so many batches and break off")
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint")
    parser.add_argument("--fail", type=int, help="the second process' disk is full from this segment on")
    parser.add_argument("--on-store-error", default="raise")
    parser.add_argument("--injected", action="store_true", help="let the Trainer share out a plain loader")
    return parser.parse_args(arguments)


def loader_for(options: argparse.Namespace, training: TensorDataset) -> DataLoader[Any]:
    if options.injected:
        return DataLoader(training, BATCH // 2, shuffle=True, num_workers=1, persistent_workers=True)
    if options.processes > 1:
        return SharedLoader(training)
    return DataLoader(training, BATCH, sampler=Interleaved(training))


def fit(arguments: Sequence[str]) -> None:
    options = parsed(arguments)
    warnings.simplefilter("ignore" if options.fail is None else "default")
    training, validation = digits()
    training = TensorDataset(*(t[:COUNT] for t in training.tensors))
    torch.manual_seed(3)
    module = Classifier(options.optimizer, network(options.network))
    path_kernel = PathKernelCallback(
        str(options.root / "run"), sketch_dim=512, nodes=8, probes=64, tolerance=options.tolerance,
        on_store_error=options.on_store_error,
    )  # fmt: skip
    extra = [StopAfter(options.root / "at.ckpt", options.stop)] if options.stop else []
    if options.fail is not None and os.environ.get("LOCAL_RANK") == "1":
        fill_disk(options.fail)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices=options.processes,
        strategy="ddp" if options.processes > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=options.root,
        gradient_clip_val=options.clip, accumulate_grad_batches=options.accumulate, num_sanity_val_steps=0,
        callbacks=[] if options.plain else [path_kernel, *extra], use_distributed_sampler=options.injected,
    )  # fmt: skip
    try:
        trainer.fit(module, loader_for(options, training), DataLoader(validation, 50), ckpt_path=options.resume)
    except Killed:
        return
    if trainer.is_global_zero:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        torch.save({"weights": module.state_dict(), "logged": logged}, options.root / "result.pt")


def fill_disk(segment: int) -> None:
    """Every write of a segment from this one on fails."""
    whole = writer.write_segment

    def full(directory: Path, header: Any, groups: Any) -> str:
        if header.index >= segment:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(directory, header, groups)

    writer.write_segment = full


class SharedLoader(ResumableLoader):
    """A process' share of every batch, which a fit can be resumed in the midst of."""

    def __init__(self, dataset: Any) -> None:
        DataLoader.__init__(self, dataset, BATCH // 2, sampler=Share(dataset))
        self.__dict__["given"] = 0


class Share(torch.utils.data.Sampler[int]):
    """A distributed sampler that learns its place when the process group is there."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.epoch, self.skip = dataset, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        inner = DistributedSampler(self.dataset, shuffle=True, seed=5)
        inner.set_epoch(self.epoch)
        skip, self.skip = self.skip, 0
        return iter(list(inner)[skip:])

    def __len__(self) -> int:
        return -(-len(self.dataset) // 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for between, each in groupby(sys.argv[1:], lambda argument: argument == "+"):
        if not between:
            fit(list(each))
    if torch.distributed.is_initialized():  # Lightning leaves gloo's threads to the interpreter's end, which may abort
        torch.distributed.destroy_process_group()
