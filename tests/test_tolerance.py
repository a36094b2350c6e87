"""Nodes by a tolerance in a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.trainer_checks import FitError, training_nodes
from tests.helpers import Classifier, digits, fit, small_cnn

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({"momentum": 0.9}, {}),
    "adamw, clipping, accumulation": (
        {"optimizer": "adamw"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 4},
    ),
    "batch norm": ({"net": small_cnn}, {}),
}


def module(options: dict[str, Any]) -> Classifier:
    torch.manual_seed(3)
    net = options.get("net")
    return Classifier(**{**options, "net": net() if net else None})


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical_and_the_machine_stands_for_the_network(name: str, tmp_path: Path) -> None:
    settings, options = CASES[name]
    plain = module(settings)
    fit(plain, [], tmp_path, **options)
    state = torch.get_rng_state()
    path_kernel = PathKernelCallback(str(tmp_path / "run"), nodes=8, probes=60, tolerance=0.05)
    watched = module(settings)
    trainer = fit(watched, [path_kernel], tmp_path, **options)
    assert torch.equal(state, torch.get_rng_state())
    for (key, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs by {(a - b).abs().max()}"
    assert path_kernel.machine_dir is not None
    machine = KernelMachine.load(path_kernel.machine_dir, watched)
    steps = trainer.global_step
    assert 2 <= len(machine.chords) <= 8
    assert (machine.chords[0].first_step, machine.chords[-1].last_step) == (0, steps)
    assert machine.fidelity(DataLoader(digits()[1], 50))["fidelity"] > 0.95
    manifest = json.loads((path_kernel.machine_dir / "manifest.json").read_text())
    assert {"tolerance": 0.05, "nodes": 8, "total_steps": steps} in find(manifest, "nodes")


def find(value: Any, key: str) -> list[Any]:
    """All that stands under a key, however deep."""
    if not isinstance(value, dict):
        return []
    here = [value[key]] if key in value else []
    return here + [found for inner in value.values() for found in find(inner, key)]


def test_a_fit_without_an_end_needs_a_tolerance(tmp_path: Path) -> None:
    class Ends(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step >= 25:
                self.trainer.should_stop = True

    endless = {"max_epochs": -1, "max_time": "00:00:10:00"}
    with pytest.raises(Exception, match="With tolerance= the end need not be known"):
        fit(Ends(), [PathKernelCallback(str(tmp_path / "one"), nodes=6, probes=20)], tmp_path, **endless)
    path_kernel = PathKernelCallback(str(tmp_path / "two"), nodes=6, probes=20, tolerance=0.02)
    ended = Ends()
    trainer = fit(ended, [path_kernel], tmp_path, **endless)
    machine = KernelMachine.load(path_kernel.machine_dir, ended)
    assert 1 < len(machine.chords) <= 6
    assert machine.chords[-1].last_step == trainer.global_step >= 25


@pytest.mark.parametrize("wrong", [0.0, -0.1, float("nan"), float("inf")])
def test_a_tolerance_that_makes_no_sense(wrong: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be positive, or None for a schedule"):
        PathKernelCallback(tolerance=wrong)


def test_the_budget_is_that_of_all_optimisers_steps() -> None:
    class Trainer:
        estimated_stepping_batches, max_steps = 10, -1

    budget = training_nodes(Trainer(), 8, optimizers=2, tolerance=0.1)
    assert not isinstance(budget, list)
    assert (budget.total_steps, budget.nodes, budget.tolerance) == (20, 8, 0.1)
    Trainer.estimated_stepping_batches = float("inf")  # type: ignore[assignment]
    with pytest.raises(FitError, match="max_epochs or max_steps"):
        training_nodes(Trainer(), 8)
