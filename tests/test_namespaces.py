"""The same callback class under `pytorch_lightning` and `lightning.pytorch`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_pathkernel import KernelMachine, PathKernelCallback
from tests.helpers import digits, fit, small_cnn

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def classifier(namespace: str, **methods: Any) -> Any:
    """A LightningModule of the namespace."""
    base = importlib.import_module(namespace).LightningModule

    def initialise(self: Any) -> None:
        base.__init__(self)
        self.network = small_cnn()

    body = {
        "__init__": initialise,
        "forward": lambda self, x: self.network(x),
        "training_step": lambda self, batch, index: F.cross_entropy(self(batch[0]), batch[1]),
        "validation_step": lambda self, batch, index: None,
        "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5),
        **methods,
    }
    return type("Classifier", (base,), body)


def fitted(namespace: str, tmp_path: Path, callbacks: list[Any], kind: Any = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    module = (kind or classifier(namespace))()
    return module, fit(module, callbacks, tmp_path, lightning=importlib.import_module(namespace), **options)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_fit_is_recorded_monitored_and_left_as_it_is(namespace: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    monitors = [
        callbacks.EarlyStopping("pathkernel/fidelity", mode="max", patience=5),
        callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="pathkernel/fidelity", mode="max"),
    ]
    recorder = PathKernelCallback(str(tmp_path / "run"), nodes=6, probes=100)
    module, trainer = fitted(namespace, tmp_path, [recorder, *monitors], enable_checkpointing=True)
    plain, _ = fitted(namespace, tmp_path, [])
    for (name, a), b in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logged = float(trainer.callback_metrics["pathkernel/fidelity"])
    assert logged > 0.98
    assert monitors[1].best_model_path
    machine = KernelMachine.load(tmp_path / "run" / "machine", module)
    first = torch.utils.data.Subset(digits()[1], range(100))
    assert abs(machine.fidelity(DataLoader(first, 50))["fidelity"] - logged) < 1e-3


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_clipping_of_the_modules_own_is_recorded_exactly(namespace: str, tmp_path: Path) -> None:
    """Were it not noticed, contributions would be larger than the steps that were made."""

    def clip(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.3)

    recorder = PathKernelCallback(str(tmp_path / "run"), nodes=6, probes=100)
    kind = classifier(namespace, configure_gradient_clipping=clip)
    _, trainer = fitted(namespace, tmp_path, [recorder], kind)
    assert float(trainer.callback_metrics["pathkernel/fidelity"]) > 0.98


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # LightningCLI's own
@pytest.mark.parametrize("form", ["arguments", "yaml"])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightning_cli_takes_the_callback(
    namespace: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning, cli = importlib.import_module(namespace), importlib.import_module(f"{namespace}.cli")

    class Data(lightning.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(digits()[0], 32, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(digits()[1], 50)

    common = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    common |= {"enable_progress_bar": False, "enable_model_summary": False}
    init = {"dirpath": str(tmp_path / "run"), "nodes": 4, "probes": 50, "sketch": "deflated"}
    name = "lightning_pathkernel.PathKernelCallback"
    if form == "yaml":
        config = {"trainer": {**common, "callbacks": [{"class_path": name, "init_args": init}]}}
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        args = [f"--config={tmp_path / 'config.yaml'}"]
    else:
        args = [f"--trainer.{key}={str(value).lower()}" for key, value in common.items()]
        args += [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{k}={v}" for k, v in init.items())]
    monkeypatch.setattr("sys.argv", ["train.py", "fit", *args])
    run = cli.LightningCLI(classifier(namespace), Data, save_config_callback=None)
    machine = KernelMachine.load(tmp_path / "run" / "machine", run.model)
    assert len(machine.chords) == 4
    assert isinstance(PathKernelCallback(), lightning.Callback)
