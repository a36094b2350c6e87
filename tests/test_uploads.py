"""The machine through the Trainer's loggers: real services, offline, and what happens when they fail."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_pathkernel import PathKernelCallback, verify
from tests.helpers import Classifier, fit

NOISE = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning:wandb")


def fitted(root: Path, logger: Any, **options: Any) -> Path:
    callback = PathKernelCallback(
        str(root / "run"), nodes=2, probes=16, sketch_dim=8, **{"log_artifact": True, **options}
    )
    fit(Classifier(), [callback], root, logger=logger, max_epochs=1)
    assert callback.machine_dir is not None
    return callback.machine_dir


@pytest.mark.filterwarnings(*NOISE)
def test_mlflow_keeps_the_machine_as_artifacts_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny sqlalchemy alembic")
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = MLFlowLogger("pathkernel", tracking_uri=store, artifact_location=(tmp_path / "kept").as_uri())
    machine = fitted(tmp_path, logger)
    found = {item.path for item in logger.experiment.list_artifacts(logger.run_id, "kernel-machine")}
    assert found == {f"kernel-machine/{p.name}" for p in machine.iterdir()}
    verify(logger.experiment.download_artifacts(logger.run_id, "kernel-machine", str(tmp_path)))


@pytest.mark.filterwarnings(*NOISE)
def test_wandb_keeps_the_machine_as_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="WandB is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    logger = WandbLogger(project="pathkernel", save_dir=tmp_path, offline=True)
    taken: list[Any] = []
    with monkeypatch.context() as patch:
        real = wandb.sdk.wandb_run.Run.log_artifact
        patch.setattr(
            wandb.sdk.wandb_run.Run, "log_artifact", lambda run, artifact: taken.append(artifact) or real(run, artifact)
        )
        machine = fitted(tmp_path, logger)
    wandb.finish()
    (artifact,) = taken
    assert artifact.type == "kernel-machine"
    sizes = {name: entry.size for name, entry in artifact.manifest.entries.items()}
    assert sizes == {p.name: p.stat().st_size for p in machine.iterdir()}
    assert any(p.suffix == ".wandb" for p in tmp_path.rglob("*")), "an offline run is there to be synchronised"


@pytest.mark.filterwarnings(*NOISE)
def test_tensorboard_gets_the_card_as_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="logs")
    machine = fitted(tmp_path, logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (text,) = events.Tensors("pathkernel/machine/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "# Kernel machine" in shown
    assert str(machine) in shown


class Silent(Logger):
    """Takes no artifacts."""

    name, version = "silent", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_logger_that_takes_no_artifacts_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Silent takes no artifacts .*: the machine is in .*/machine only"):
        verify(fitted(tmp_path, Silent()))


class Down:
    """A service that cannot be reached."""

    def log_artifacts(self, *args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")


Unreachable = type("MLFlowLogger", (Silent,), {"experiment": Down(), "run_id": "7"})


def test_an_upload_that_fails_is_told_and_loses_nothing(tmp_path: Path) -> None:
    said = r"could not be uploaded by MLFlowLogger: ConnectionError: no route to host\. It is complete in .*/machine"
    with pytest.warns(UserWarning, match=said):
        verify(fitted(tmp_path, Unreachable()))


def test_nothing_is_uploaded_unless_asked_for(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?!PathKernelCallback)")
        verify(fitted(tmp_path, Silent(), log_artifact=False))
    with pytest.warns(UserWarning, match="log_artifact=True, but no machine was exported"):
        fitted(tmp_path / "other", Silent(), export=False)


def test_loggers_are_lightnings() -> None:
    """They are told by their names: these must be Lightning's."""
    for kind in (WandbLogger, MLFlowLogger, TensorBoardLogger):
        assert issubclass(kind, Logger)
        assert kind.__name__ in ("WandbLogger", "MLFlowLogger", "TensorBoardLogger")
