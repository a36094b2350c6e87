"""One side of a fit by two processes: ``python -m tests.support.processes ROOT plain|recorded``."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import save_file

from lightning_pathkernel import PathKernelCallback
from tests.support.fitting import Combination, dataset
from tests.support.judge import Judge, Step, Witness
from tests.support.rows import FeatureRow
from tests.support.table import NETWORKS, OPTIMIZERS

WORLD = 2
DDP = Combination(
    OPTIMIZERS["adamw"],
    FeatureRow(
        'two processes on the CPU (`strategy="ddp"`), clipping by norm',
        {"strategy": "ddp", "devices": WORLD, "gradient_clip_val": 0.2},
        max_norm=0.2, steps=3,
    ),
    NETWORKS["mlp"],
)  # fmt: skip
QUERIES, TARGET = dataset(DDP.network, 2, 2, torch.float64).tensors[0], torch.tensor([0, 2])


def together(sides: list[list[Step]]) -> list[Step]:
    """The steps of one process with the uses of all, whose gradients were averaged."""
    out = []
    for steps in zip(*sides, strict=True):
        uses = [dataclasses.replace(use, scale=use.scale * WORLD) for step in steps for use in step.uses]
        out.append(dataclasses.replace(steps[0], uses=uses))
    return out


def plain(root: Path) -> None:
    """Fit without the callback, and judge."""
    witness = Witness()
    module = DDP.fit(root, witness)
    bare = [
        dataclasses.replace(step, options={n: {**o, "params": None} for n, o in step.options.items()})
        for step in witness.steps
    ]
    sides: list[list[Step]] = [[] for _ in range(WORLD)]
    torch.distributed.all_gather_object(sides, bare)
    if torch.distributed.get_rank() == 0:
        judge = Judge(module.net, together(sides), DDP.optimizer.reference, DDP.feature.max_norm)
        ids, found = judge.contributions(QUERIES, TARGET)
        save_file({"ids": torch.tensor(ids), "contributions": found}, root / "judged.safetensors")
        save_file(dict(module.state_dict()), root / "plain.safetensors")


def recorded(root: Path) -> None:
    """Fit with the callback."""
    callback = PathKernelCallback(str(root / "run"), nodes=1000, sketch="identity", sketch_dim=10**6, probes=0)
    module = DDP.fit(root, callback)
    if torch.distributed.get_rank() == 0:
        save_file(dict(module.state_dict()), root / "recorded.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"plain": plain, "recorded": recorded}[sys.argv[2]](Path(sys.argv[1]))
