"""The callback in a real Trainer: what it logs, what it leaves alone, what it refuses."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_pathkernel import KernelMachine, KernelMachineExporter, PathKernelCallback, verify
from lightning_pathkernel.capture import CaptureError
from lightning_pathkernel.recorder import NonFiniteError
from lightning_pathkernel.trainer_checks import FitError, check_trainer
from tests.helpers import Classifier, digits, fit, small_cnn

METRICS = [
    "fidelity", "agreement", "error_quadrature", "error_sketch", "error_unattributed", "fidelity_left",
    "fidelity_linearized", "kernel_velocity", "overhead",
]  # fmt: skip


def callback(root: Path, **options: Any) -> PathKernelCallback:
    return PathKernelCallback(**{"dirpath": str(root / "run"), "nodes": 6, "probes": 100, **options})


class Witness(pl.Callback):
    """Notes everything that must not change: order of the data, weights, random states."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].sum((1, 2, 3)).clone())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.torch_state = torch.get_rng_state()
        self.numpy_state = np.random.get_state()[1]
        self.python_state = random.getstate()
        self.grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]


LOOPS = {
    "sgd": {"module": {}},
    "momentum, clipping": {
        "module": {"momentum": 0.9, "weight_decay": 1e-3},
        "gradient_clip_val": 0.5,
    },
    "adamw, accumulation": {"module": {"optimizer": "adamw"}, "accumulate_grad_batches": 3},
    "workers": {"module": {}, "workers": 2},
    "several validations": {"module": {"optimizer": "adamw"}, "val_check_interval": 4},
    "batch norm": {"module": {"net": "cnn"}},
    "dropout": {"module": {"net": "dropout", "momentum": 0.9}},
    "anomaly detection": {"module": {}, "detect_anomaly": True},
    "loaders reloaded": {"module": {"momentum": 0.9}, "reload_dataloaders_every_n_epochs": 1},
    "few batches": {"module": {}, "limit_train_batches": 0.4, "max_epochs": 4},
    "max_steps, truncated": {"module": {"optimizer": "adamw"}, "max_steps": 13, "accumulate_grad_batches": 2},
    "overfitting": {"module": {}, "overfit_batches": 3, "max_epochs": 5},
}
NETS = {
    "cnn": small_cnn,
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(32, 10)
    ),
}


def make(options: dict) -> Classifier:
    torch.manual_seed(3)
    options = dict(options)
    net = options.pop("net", None)
    return Classifier(net=NETS[net]() if net else None, **options)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize("name", LOOPS)
def test_training_is_bit_identical_with_and_without(name: str, tmp_path: Path) -> None:
    options = dict(LOOPS[name])
    settings = options.pop("module")
    sides = []
    for recorded in (False, True):
        module, witness = make(settings), Witness()
        extra = [callback(tmp_path)] if recorded else []
        fit(module, [*extra, witness], tmp_path, **options)
        sides.append((module, witness))
    (plain, before), (watched, after) = sides
    for (key, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs by {(a - b).abs().max()}"
    assert all(torch.equal(a, b) for a, b in zip(before.batches, after.batches, strict=True))
    assert torch.equal(before.torch_state, after.torch_state)
    assert np.array_equal(before.numpy_state, after.numpy_state)
    assert before.python_state == after.python_state
    for a, b in zip(before.grads, after.grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert watched.training
    assert not any(m._forward_hooks for m in watched.modules())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize("name", LOOPS)
def test_the_machine_stands_for_the_network(name: str, tmp_path: Path) -> None:
    options = dict(LOOPS[name])
    module = make(options.pop("module"))
    path_kernel = callback(tmp_path, sketch_dim=512)
    trainer = fit(module, [path_kernel], tmp_path, **options)
    machine = KernelMachine.load(path_kernel.machine_dir, make(LOOPS[name]["module"]))
    _, validation = digits()
    found = machine.fidelity(DataLoader(validation, 50))
    assert found["fidelity"] > 0.97, found
    if "val_check_interval" not in options:  # then the last validation is not at the end of training
        assert float(trainer.callback_metrics["pathkernel/fidelity"]) == pytest.approx(found["fidelity"], abs=1e-3)
    x = validation.tensors[0][:20]
    with torch.no_grad():
        outputs = module.eval()(x)
    why = machine.explain(x, top_k=3)
    scale = outputs.abs().max()
    assert (sum(why.ledger.values()) - outputs.max(1).values).abs().max() < 1e-4 * scale
    verify(path_kernel.machine_dir)


def reproduced(module: pl.LightningModule, path_kernel: PathKernelCallback) -> KernelMachine:
    """The exported machine, once it is shown to stand for the network."""
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    assert machine.fidelity(DataLoader(digits()[1], 50))["fidelity"] > 0.97
    return machine


def test_a_fit_that_stops_in_mid_epoch_is_recorded_up_to_there(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 9

    module, path_kernel = Classifier(), callback(tmp_path)
    trainer = fit(module, [path_kernel, Stop()], tmp_path)
    assert trainer.global_step == 9 < trainer.num_training_batches
    machine = reproduced(module, path_kernel)
    assert machine.chords[-1].last_step == 9


def test_an_example_drawn_twice_in_a_batch_counts_twice(tmp_path: Path) -> None:
    """Its contribution is the sum of both visits', under its one id."""
    training = digits()[0]
    weights = torch.ones(len(training))
    weights[:5] = 40.0
    sampler = WeightedRandomSampler(weights.tolist(), 400, replacement=True)
    module, path_kernel = Classifier(), callback(tmp_path, sketch_dim=512)
    fit(module, [path_kernel], tmp_path, loader=DataLoader(training, 32, sampler=sampler))
    machine = reproduced(module, path_kernel)
    ids = machine.example_ids
    assert len(ids.unique()) == len(ids) < 400
    sizes = machine.contributions(digits()[1].tensors[0][:20], digits()[1].tensors[1][:20]).abs().sum(0)
    assert sizes[ids < 5].mean() > 4 * sizes[ids >= 5].mean()


def test_ids_are_the_datasets_own(tmp_path: Path) -> None:
    """Each image's own id gets its rows: found by training on a set whose labels are its indices."""
    seen: dict[int, list[float]] = {}

    class Spy(PathKernelCallback):
        def _rows(self, trainer: pl.Trainer, batch: Any) -> Any:
            found = super()._rows(trainer, batch)
            ids = found[0].ids
            for i, value in zip(ids.tolist(), batch[0].sum((1, 2, 3)).tolist(), strict=True):
                seen.setdefault(i, []).append(value)
            return found

    training, _ = digits()
    for workers in (0, 2):
        seen.clear()
        fit(Classifier(), [Spy(str(tmp_path / str(workers)), nodes=3, probes=10)], tmp_path, workers=workers)
        assert sorted(seen) == list(range(320))
        for i, values in seen.items():
            assert len(values) == 2
            assert values == [float(training[i][0].sum())] * 2, f"example {i}"


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_limits_overfitting_and_reloading_keep_ids_right(tmp_path: Path) -> None:
    training, _ = digits()

    class Spy(PathKernelCallback):
        def _rows(self, trainer: pl.Trainer, batch: Any) -> Any:
            found = super()._rows(trainer, batch)
            ids = found[0].ids
            assert torch.equal(training.tensors[0][ids], batch[0])
            counts.append(len(ids))
            return found

    for j, options in enumerate(
        [{"limit_train_batches": 3}, {"overfit_batches": 2}, {"reload_dataloaders_every_n_epochs": 1}]
    ):
        counts: list[int] = []
        fit(Classifier(), [Spy(str(tmp_path / str(j)), nodes=3, probes=10)], tmp_path, **options)
        assert counts, options


def test_metrics_reach_loggers_early_stopping_and_checkpoints(tmp_path: Path) -> None:
    early = EarlyStopping("pathkernel/fidelity", mode="max", patience=5)
    best = ModelCheckpoint(tmp_path / "best", monitor="pathkernel/fidelity", mode="max")
    logger = CSVLogger(tmp_path / "logs")
    path_kernel = callback(tmp_path, prog_bar=True)
    trainer = fit(
        Classifier(), [path_kernel, early, best], tmp_path, logger=logger, enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    for name in METRICS:
        assert np.isfinite(float(trainer.callback_metrics[f"pathkernel/{name}"])), name
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert all(f"pathkernel/{name}" in header for name in METRICS)
    assert "pathkernel/fidelity" in trainer.progress_bar_metrics
    assert float(early.best_score) == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert float(best.best_model_score) > 0.9


def test_dirpath_none_is_the_loggers_directory(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="mine")
    path_kernel = callback(tmp_path, dirpath=None)
    fit(Classifier(), [path_kernel], tmp_path, logger=logger)
    assert path_kernel.machine_dir == Path(logger.log_dir) / "pathkernel" / "machine"
    without = callback(tmp_path, dirpath=None)
    fit(Classifier(), [without], tmp_path)
    assert without.machine_dir == tmp_path / "pathkernel" / "machine"


def test_accumulation_with_a_truncated_window(tmp_path: Path) -> None:
    """Ten batches of 32 in windows of three: the last window holds one, its loss still divided by three."""
    path_kernel = callback(tmp_path, sketch_dim=2048, nodes=8)
    module = Classifier(momentum=0.9)
    fit(module, [path_kernel], tmp_path, accumulate_grad_batches=3)
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    assert machine.chords[-1].last_step == 8
    assert machine.fidelity(DataLoader(digits()[1], 50))["fidelity"] > 0.995


def test_a_parameter_group_and_a_schedule_of_its_own(tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[1].parameters()}, {"params": self.net[3].parameters(), "lr": 0.02}]
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    path_kernel = callback(tmp_path, sketch_dim=2048)
    module = Scheduled()
    fit(module, [path_kernel], tmp_path)
    found = KernelMachine.load(path_kernel.machine_dir, module).fidelity(DataLoader(digits()[1], 50))
    assert found["fidelity"] > 0.98, found


def test_early_stopping_leaves_a_shorter_path(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 7

    path_kernel = callback(tmp_path)
    fit(Classifier(), [path_kernel, Stop()], tmp_path, min_epochs=0, max_epochs=5)
    chords = [c.last_step for c in KernelMachine.load(path_kernel.machine_dir, Classifier()).chords]
    assert chords[-1] in (7, 8)


# bad input


def refused(match: str, tmp_path: Path, module: Any = None, options: Any = None, **trainer: Any) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(module or Classifier(), [callback(tmp_path, **(options or {}))], tmp_path, **trainer)


def test_an_optimiser_without_a_rule(tmp_path: Path) -> None:
    class ASGD(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.ASGD(self.parameters())

    refused(
        "No optimiser rule for ASGD. Supported: Adadelta, Adagrad, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop",
        tmp_path,
        ASGD(),
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_epochs": -1, "max_steps": -1}, "give the Trainer max_epochs or max_steps"),
    ],
)
def test_what_the_trainer_does_is_not_supported(options: dict, match: str, tmp_path: Path) -> None:
    refused(match, tmp_path, **options)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_strategies_that_split_the_network_are_refused_by_name(name: str) -> None:
    trainer = SimpleNamespace(strategy=type(name, (), {})())
    with pytest.raises(FitError, match=f"does not support the strategy {name}: train on one device .* strategy='ddp'"):
        check_trainer(trainer)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_the_callback_does_not_come_back_from_are_refused(strategy: str, tmp_path: Path) -> None:
    trainer = pl.Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(
        MisconfigurationException, match="from which the callback does not come back: use strategy='ddp'"
    ):
        callback(tmp_path).setup(trainer, Classifier(), "fit")


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        training, _ = digits()
        for i in range(64):
            yield (*training[i], i)


def test_a_loader_without_indices_and_its_remedy(tmp_path: Path) -> None:
    refused("IterableDataset, which has no indices. Pass example_ids=", tmp_path, loader=DataLoader(Stream(), 16))
    path_kernel = callback(tmp_path, example_ids=lambda batch: batch[2])
    fit(Classifier(), [path_kernel], tmp_path, loader=DataLoader(Stream(), 16), max_steps=8)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    assert machine.example_ids.tolist() == list(range(64))


@pytest.mark.parametrize("wrong", [lambda b: b[1].float(), lambda b: b[1][:3], lambda b: [1, 2]])
def test_example_ids_of_the_wrong_kind(wrong: Any, tmp_path: Path) -> None:
    refused("example_ids returned", tmp_path, options={"example_ids": wrong})


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Any:
        training, _ = digits()
        yield training[:32]

    def __len__(self) -> int:
        return 1


def test_other_loaders_are_refused(tmp_path: Path) -> None:
    training, _ = digits()
    refused("batch_size=None", tmp_path, loader=DataLoader(training, batch_size=None))
    refused("in_order=False", tmp_path, loader=DataLoader(training, 32, num_workers=1, in_order=False))
    refused("is a Batches, not a DataLoader", tmp_path, loader=Batches())


def test_a_collate_function_that_drops_rows(tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> Any:
        return torch.utils.data.default_collate(rows[1:])

    loader = DataLoader(digits()[0], 32, collate_fn=collate)
    refused("the loader drew 32 examples, but the batch has 31 rows", tmp_path, loader=loader)


class Shrinking(TensorDataset):
    """A dataset whose length changes after the loader was made."""

    def __getitems__(self, indices: list[int]) -> Any:
        kept = [i for i in indices if i < 300]
        return [self[i] for i in kept]


def test_a_dataset_that_changed_its_length(tmp_path: Path) -> None:
    training, _ = digits()
    refused(
        "the loader drew 32 examples, but the batch has", tmp_path, loader=DataLoader(Shrinking(*training.tensors), 32)
    )


@pytest.mark.filterwarnings("ignore:.*nan")
def test_nan_in_the_middle_of_training(tmp_path: Path) -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 7 else loss

    path_kernel, module = callback(tmp_path), Breaks()
    with pytest.raises(NonFiniteError, match="gradients are not finite at optimiser step 7: the path ends there"):
        fit(module, [path_kernel], tmp_path)
    assert not any(m._forward_hooks for m in module.modules())
    out = KernelMachineExporter(tmp_path / "run" / "recording").export(tmp_path / "rescued")
    assert KernelMachine.load(out, Classifier()).chords[-1].last_step <= 7


def test_nodes_larger_than_the_number_of_steps(tmp_path: Path) -> None:
    path_kernel = callback(tmp_path, nodes=50)
    with pytest.warns(UserWarning, match="nodes=50 is more than the 20 optimiser steps: every step gets its own node"):
        fit(Classifier(), [path_kernel], tmp_path)
    assert len(KernelMachine.load(path_kernel.machine_dir, Classifier()).chords) == 20


def test_fewer_validation_examples_than_probes(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="probes=500, but the validation set has 100 examples: all of them"):
        fit(Classifier(), [callback(tmp_path, probes=500)], tmp_path)


def test_no_validation_loader(tmp_path: Path) -> None:
    class Trains(Classifier):
        validation_step = pl.LightningModule.validation_step

    path_kernel = callback(tmp_path)
    with pytest.warns(UserWarning, match="no validation loader, so no fidelity is logged"):
        fit(Trains(), [path_kernel], tmp_path, validate=False, limit_val_batches=0)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    assert machine.fidelity(DataLoader(digits()[1], 50))["fidelity"] > 0.8


def test_probes_are_there_where_the_first_validation_is_epochs_away(tmp_path: Path) -> None:
    """No sanity check has set up the validation loader then; following probes must still change nothing."""
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    plain, recorded, path_kernel = Witness(), Witness(), callback(tmp_path)
    fit(Classifier(), [plain], tmp_path, **options)
    trainer = fit(Classifier(), [recorded, path_kernel], tmp_path, **options)
    assert trainer.callback_metrics["pathkernel/fidelity"] > 0.9
    assert all(torch.equal(a, b) for a, b in zip(plain.batches, recorded.batches, strict=True))
    assert torch.equal(plain.torch_state, recorded.torch_state)


def test_a_batch_of_one(tmp_path: Path) -> None:
    path_kernel = callback(tmp_path, sketch_dim=1024)
    fit(Classifier(lr=0.01), [path_kernel], tmp_path, batch_size=1, max_steps=30)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    assert len(machine.example_ids) == 30
    assert machine.fidelity(DataLoader(digits()[1], 50))["fidelity"] > 0.95


def test_a_second_fit_begins_a_second_recording(tmp_path: Path) -> None:
    path_kernel = callback(tmp_path)
    fit(Classifier(), [path_kernel], tmp_path)
    first = path_kernel.machine_dir
    before = (first / "manifest.json").read_bytes()
    fit(Classifier(), [path_kernel], tmp_path)
    assert path_kernel.machine_dir == tmp_path / "run-v1" / "machine"
    assert (first / "manifest.json").read_bytes() == before
    verify(path_kernel.machine_dir)


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(Classifier(), [callback(tmp_path)], tmp_path, fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_an_existing_non_empty_dirpath(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    refused(r"is not empty \(it has 'precious.txt'\): nothing is overwritten", tmp_path)
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_resuming_a_fit_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    trainer = fit(Classifier(), [], tmp_path)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    training, validation = digits()
    again = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, callbacks=[callback(tmp_path)],
                       enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(MisconfigurationException, match="has no state of PathKernelCallback: it was written by a fit"):
        again.fit(Classifier(), DataLoader(training, 32), DataLoader(validation, 50), ckpt_path=tmp_path / "at.ckpt")


def test_outputs_of_another_shape_and_the_remedy(tmp_path: Path) -> None:
    class Sequence(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).unsqueeze(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])[:, 0], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    refused(r"must be a tensor \[n, K\] or \[n\], found a tensor of shape \(100, 1, 10\)", tmp_path, Sequence())
    path_kernel = callback(tmp_path, forward_fn=lambda module, batch: module(batch[0])[:, 0])
    fit(Sequence(), [path_kernel], tmp_path)
    assert path_kernel.machine_dir.is_dir()


def test_a_weight_used_outside_its_module(tmp_path: Path) -> None:
    class Outside(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.net[3].weight ** 2).sum()

    with pytest.raises(CaptureError, match=r"do not add up to the gradient for 'net\.3\.weight'"):
        fit(Outside(), [callback(tmp_path)], tmp_path)


@pytest.mark.parametrize(("name", "value"), [("sketch_dim", 0), ("nodes", 0), ("probes", -1)])
def test_numbers_that_make_no_sense(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        PathKernelCallback(**{name: value})


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_training_step_without_a_loss_leaves_no_trace(tmp_path: Path) -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (0, 3, 9) else super().training_step(batch, batch_idx)

    torch.manual_seed(3)
    path_kernel = callback(tmp_path, nodes=20)
    fit(Skips(momentum=0.9), [path_kernel], tmp_path)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    assert machine.chords[-1].last_step == 20
    assert machine.fidelity([digits()[1].tensors[0]])["fidelity"] > 0.97


def test_a_module_that_skips_batches_leaves_no_trace(tmp_path: Path) -> None:
    class Skips(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 6 else None

    path_kernel = callback(tmp_path)
    fit(Skips(), [path_kernel], tmp_path)
    assert KernelMachine.load(path_kernel.machine_dir, Classifier()).chords[-1].last_step == 12


def test_a_parameter_that_the_optimiser_gets_later_is_refused_by_name(tmp_path: Path) -> None:
    class Thaws(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                self.net[1].requires_grad_(True)
                self.optimizers().add_param_group({"params": self.net[1].parameters()})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.net[1].requires_grad_(False)
            return torch.optim.SGD(self.net[3].parameters(), lr=0.1)

    with pytest.raises(CaptureError, match=r"'net\.1\.weight' was frozen .* from the start, or use .*BaseFinetuning"):
        fit(Thaws(), [callback(tmp_path)], tmp_path)


def test_a_parameter_that_the_optimiser_has_from_the_start_may_be_unfrozen_by_hand(tmp_path: Path) -> None:
    class Thaws(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[1].weight.requires_grad_(self.current_epoch > 0)

    module, path_kernel = Thaws(), callback(tmp_path, sketch_dim=512)
    module.net[1].weight.requires_grad_(False)
    fit(module, [path_kernel], tmp_path, max_epochs=3)
    machine = reproduced(Thaws(), path_kernel)
    assert "net.1.weight" not in machine.chords[0].delta
    assert "net.1.weight" in machine.chords[-1].delta


def test_a_parameter_outside_the_module_is_refused(tmp_path: Path) -> None:
    class Outside(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Parameter(torch.ones(10))]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]) * self.hidden[0], batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.1)

    with pytest.raises(CaptureError, match=r"a parameter of shape \(10,\) that is not the module's"):
        fit(Outside(), [callback(tmp_path)], tmp_path)


def test_mps_is_refused() -> None:
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(torch.device("mps")))
    with pytest.raises(FitError, match="does not support MPS, which lacks float64"):
        check_trainer(trainer)


def test_a_sampler_that_draws_no_integers(tmp_path: Path) -> None:
    class Named(TensorDataset):
        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(int(key))

    loader = DataLoader(Named(*digits()[0].tensors), batch_sampler=[["1", "2"], ["3", "4"]])
    with pytest.raises(MisconfigurationException, match=r"the sampler drew \['1', '2'\], no list of integers"):
        fit(Classifier(), [callback(tmp_path, nodes=2)], tmp_path, loader=loader)


def test_metrics_that_are_not_finite_do_not_stop_the_export(tmp_path: Path) -> None:
    class Logs(PathKernelCallback):
        def on_validation_epoch_end(self, *args: Any) -> None:
            super().on_validation_epoch_end(*args)
            if self._session is not None and self._session.history:
                self._session.history[-1]["fidelity"] = float("nan")

    path_kernel = Logs(str(tmp_path / "run"), sketch_dim=32, nodes=3, probes=16)
    fit(Classifier(), [path_kernel], tmp_path)
    verify(path_kernel.machine_dir)
    assert "| fidelity | not finite |" in (path_kernel.machine_dir / "README.md").read_text()
