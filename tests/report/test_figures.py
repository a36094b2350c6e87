"""The figures for notebooks, and on their way to loggers."""

from __future__ import annotations

import builtins
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_pathkernel import PathKernelCallback
from lightning_pathkernel.report import (
    log_figures,
    plot_class_heatmap,
    plot_error_budget,
    plot_examples,
    plot_fidelity,
    plot_kernel_velocity,
    plot_ledger,
    plot_path,
    read_history,
)
from tests.helpers import Classifier, digits, fit
from tests.report.conftest import Written

HISTORY: list[dict[str, Any]] = [
    {"step": 1.0, "fidelity": 0.5, "fidelity_left": -59.0, "error_sketch": 0.2, "kernel_velocity": 0.3},
    {"step": 2.0, "fidelity": None, "fidelity_left": 0.4, "error_sketch": float("nan"), "kernel_velocity": 0.1},
    {"step": 4.0, "fidelity": 0.9, "fidelity_left": 0.8, "error_sketch": 0.1, "kernel_velocity": 0.0},
]


@pytest.fixture
def ax() -> Any:
    return Figure().subplots()


def test_curves_are_the_history_with_its_gaps(ax: Any) -> None:
    figure, same = plot_fidelity(HISTORY, ax=ax)
    assert same is ax
    assert figure is ax.get_figure()
    fidelity, left = ax.get_lines()
    assert fidelity.get_xdata().tolist() == [1, 2, 4]
    np.testing.assert_array_equal(fidelity.get_ydata(), [0.5, np.nan, 0.9])
    assert left.get_ydata().tolist() == [-59, 0.4, 0.8]
    assert ax.get_ylim() == (-0.25, 1.02)  # what lies far below hides nothing
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Fidelity", "Left end"]


def test_error_budget_and_velocity(ax: Any) -> None:
    plot_error_budget(HISTORY, ax=ax)
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [0.2, np.nan, 0.1])
    assert ax.get_ylim()[0] == 0
    _, other = plot_kernel_velocity(HISTORY, ax=Figure().subplots())
    assert other.get_lines()[0].get_ydata().tolist() == [0.3, 0.1, 0.0]


@pytest.mark.parametrize("plot", [plot_fidelity, plot_error_budget, plot_kernel_velocity])
def test_what_was_not_logged_is_said(plot: Any, ax: Any) -> None:
    plot([], ax=ax)
    assert [text.get_text() for text in ax.texts] == ["not logged"]


def test_the_path_is_the_machine_s(written: Written, ax: Any) -> None:
    plot_path(written.machine, ax=ax)
    bars = ax.patches
    assert [bar.get_x() for bar in bars] == [chord.first_step for chord in written.machine.chords]
    chord = written.machine.chords[-1]
    moved = sum(float(d.square().sum()) for d in chord.delta.values())
    weights = sum(float(w.square().sum()) for w in chord.start.values())
    assert bars[-1].get_height() == pytest.approx(100 * (moved / weights) ** 0.5, rel=1e-5)


def test_the_ledger_adds_up_in_a_figure_too(written: Written) -> None:
    x = written.batch[0][:2]
    why, parts = written.machine.explain(x), written.machine.contributions(x)
    for contributions, rows in ((None, 10), (parts, 11)):
        _, ax = plot_ledger(why, 1, contributions, ax=Figure().subplots())
        assert len(ax.patches) == rows
        labels = [text.get_text() for text in ax.get_yticklabels()]
        assert ("Examples" in labels) == (contributions is None)
        total = sum(float(value[1]) for value in why.ledger.values())
        assert labels[-1] == "Network"
        assert ax.patches[-1].get_width() == pytest.approx(total, rel=1e-5)
        assert ax.patches[-2].get_x() + ax.patches[-2].get_width() == pytest.approx(total, rel=1e-5)


def test_examples_and_their_images(written: Written, ax: Any) -> None:
    why = written.machine.explain(written.batch[0][:1], top_k=3)
    plot_examples(why, digits()[0], ax=ax)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx(sorted(why.contributions[0].tolist(), reverse=True))
    labels = digits()[0].tensors[1]
    order = why.contributions[0].argsort(descending=True)
    expected = [f"{int(i)} ({int(labels[i])})" for i in why.example_ids[0][order]]
    assert [text.get_text() for text in ax.get_yticklabels()] == expected
    assert sum(type(artist).__name__ == "AnnotationBbox" for artist in ax.get_children()) == 6
    _, bare = plot_examples(why, ax=Figure().subplots())
    assert [text.get_text() for text in bare.get_yticklabels()] == [str(int(i)) for i in why.example_ids[0][order]]


def test_the_heat_map_of_classes(ax: Any) -> None:
    contributions = torch.tensor([[1.0, 2.0, -3.0], [5.0, 0.0, 1.0], [3.0, 0.0, 1.0]])
    plot_class_heatmap(contributions, torch.tensor([0, 1, 1]), ["a", "a", "b"], ax=ax)
    assert ax.images[0].get_array().tolist() == [[3, -3], [4, 1]]
    assert ax.images[0].get_clim() == (-4, 4)


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-pathkernel\[report\]'"):
        plot_fidelity(HISTORY)


def test_a_callback_that_could_not_draw_says_so_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pathkernel.callback.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="log_figures needs matplotlib"):
        PathKernelCallback(log_figures=True)


def test_the_callback_hands_figures_to_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="logs")
    callback = PathKernelCallback(str(tmp_path / "run"), sketch_dim=32, nodes=2, probes=16, log_figures=True)
    fit(Classifier(), [callback], tmp_path, logger=[logger, CSVLogger(tmp_path, name="csv")], log_every_n_steps=5)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert sorted(events.Tags()["images"]) == [
        "pathkernel/error_budget", "pathkernel/fidelity_over_training", "pathkernel/kernel_velocity_over_training",
        "pathkernel/path",
    ]  # fmt: skip
    assert callback.machine_dir is not None
    (image,) = events.Images("pathkernel/path")
    assert image.step == read_history(callback.machine_dir)[-1]["step"]
    assert image.width > 300
    assert (tmp_path / "run" / "machine").is_dir()


class WandbLogger:
    """Answers as Lightning's would, which is told by its name."""

    def __init__(self) -> None:
        self.images: dict[str, Figure] = {}

    def log_image(self, **given: Any) -> None:
        bound = inspect.signature(pl.loggers.WandbLogger.log_image).bind(self, **given)
        (self.images[bound.arguments["key"]],) = bound.arguments["images"]


def test_figures_go_to_weights_and_biases_and_to_no_other_logger(written: Written) -> None:
    class Derived(WandbLogger):
        pass

    logger = Derived()
    assert log_figures([logger, object()], HISTORY) == ["Derived"]
    assert list(logger.images) == [
        "pathkernel/fidelity_over_training", "pathkernel/error_budget", "pathkernel/kernel_velocity_over_training"
    ]  # fmt: skip
    assert all(isinstance(figure, Figure) for figure in logger.images.values())
    log_figures([logger], HISTORY, written.machine)
    assert "pathkernel/path" in logger.images
    assert log_figures([object()], HISTORY) == []
