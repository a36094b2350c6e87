"""A fit that was interrupted and resumed leaves the recording and the machine of one that was not, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel import KernelMachine, PathKernelCallback, verify
from lightning_pathkernel.recording.open_chord import OpenChord
from lightning_pathkernel.store import WriterLock
from tests.helpers import Classifier, digits, small_cnn
from tests.resuming import Killed, StopAfter, chain_of, files_of, loaders, run, trainer_for

BATCHES = 6
"""In an epoch; there are three."""


class Two(Classifier):
    """Two optimisers by hand, one of which steps every other batch only, on gradients that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, last = list(self.net[1].parameters()), list(self.net[3].parameters())
        return torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(last, lr=3e-3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = self.optimizers()
        if batch_idx % 2 == 0:
            one.zero_grad()
            two.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        one.step()
        if batch_idx % 2:
            two.step()
        return loss


class Tokens(pl.LightningModule):
    """Rows of an image as positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(len(x), 8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].repeat_interleave(8))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Named(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = (t[:96] for t in digits()[0].tensors)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i], f"image {i}"


CASES: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], dict[str, Any], list[int]]] = {
    "sgd with momentum and decay": (lambda: Classifier("sgd", momentum=0.9, weight_decay=1e-3), {}, {}, [1, 8]),
    "adamw, clipping, accumulation": (
        lambda: Classifier("adamw"), {}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}, [2, 7, 13],
    ),
    "before the first step": (lambda: Classifier("adamw"), {}, {"accumulate_grad_batches": 4}, [1]),
    "a node at every step": (lambda: Classifier("adamw"), {"nodes": 18}, {}, [5]),
    "the ends of epochs": (lambda: Classifier("sgd", momentum=0.9), {}, {}, [6, 18]),
    "tolerance": (lambda: Classifier("adamw"), {"tolerance": 0.02, "nodes": 8}, {}, [4, 10]),
    "positions": (
        Tokens,
        {"positions": 8, "forward_fn": lambda module, batch: module(batch[0]).mean(1)}, {}, [7],
    ),
    "string ids": (lambda: Classifier("adamw"), {"example_ids": lambda batch: list(batch[2])}, {}, [3, 11]),
    "two optimisers by hand": (Two, {}, {}, [3, 8]),
    "batch norm, convolutions held back": (
        lambda: Classifier("sgd", small_cnn(), momentum=0.9), {}, {"accumulate_grad_batches": 4}, [2, 9],
    ),
    "no sketch": (lambda: Classifier("adamw"), {"sketch": "identity", "sketch_dim": 4096}, {}, [8]),
    "no probes": (lambda: Classifier("adamw"), {"probes": 0}, {}, [8]),
    "several validations in an epoch": (lambda: Classifier("adamw"), {}, {"val_check_interval": 2}, [4, 9]),
}  # fmt: skip


def seeded(make: Callable[[], pl.LightningModule]) -> Callable[[], pl.LightningModule]:
    def made() -> pl.LightningModule:
        torch.manual_seed(3)
        return make()

    return made


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_fit_leaves_what_an_uninterrupted_one_leaves(name: str, tmp_path: Path) -> None:
    make, recorder, trainer, moments = CASES[name]
    given = {"dataset": Named()} if name == "string ids" else {}
    whole = run(tmp_path / "whole", seeded(make), recorder, trainer, **given)
    verify(whole.machine_dir)
    for batches in moments:
        root = tmp_path / f"after {batches}"
        run(root, seeded(make), recorder, trainer, [StopAfter(root / "at.ckpt", batches)], **given)
        again = run(root, seeded(make), recorder, trainer, checkpoint=root / "at.ckpt", **given)
        for key, value in whole.module.state_dict().items():
            assert torch.equal(value, again.module.state_dict()[key]), f"{key} after {batches} batches: other training"
        assert again.recording_dir == root / "run" / "recording"
        assert chain_of(again.recording_dir) == chain_of(whole.recording_dir), batches
        assert files_of(again.machine_dir) == files_of(whole.machine_dir), batches


def test_visits_that_were_added_up_early_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pathkernel.recording.open_chord._FOLD", 2500)
    folds: list[int] = []
    fold = OpenChord.fold
    monkeypatch.setattr(OpenChord, "fold", lambda chord, rows: (folds.append(chord.index), fold(chord, rows))[1])
    options = {"nodes": 2}
    momentum = seeded(lambda: Classifier("sgd", momentum=0.5))
    whole = run(tmp_path / "whole", momentum, options, {})
    assert folds
    for batches in (4, 14):
        root = tmp_path / f"after {batches}"
        run(root, momentum, options, {}, [StopAfter(root / "at.ckpt", batches)])
        again = run(root, momentum, options, {}, checkpoint=root / "at.ckpt")
        assert chain_of(again.recording_dir) == chain_of(whole.recording_dir), batches


def adamw() -> Classifier:
    torch.manual_seed(3)
    return Classifier("adamw")


def test_from_an_older_checkpoint_and_again_and_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", adamw, {}, {})
    root = tmp_path / "run"
    older = {4: root / "4.ckpt", 9: root / "9.ckpt"}
    run(root, adamw, {}, {}, [StopAfter(root / "14.ckpt", 14, older)])
    for checkpoint in (older[9], older[4]):  # later segments are set aside each time
        again = run(root, adamw, {}, {}, [StopAfter(root / "x.ckpt", 3)], checkpoint)
    with pytest.raises(MisconfigurationException, match="altered, or written after another resume from an earl"):
        run(root, adamw, {}, {}, checkpoint=root / "14.ckpt")
    again = run(root, adamw, {}, {}, checkpoint=older[4])
    assert chain_of(again.recording_dir) == chain_of(whole.recording_dir)
    assert files_of(again.machine_dir) == files_of(whole.machine_dir)
    assert len(list((again.recording_dir / "rank-0000" / "discarded").iterdir())) >= 2


def test_lightnings_own_checkpoints_and_last(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", adamw, {}, {})
    root = tmp_path / "run"

    def saver() -> list[pl.Callback]:
        return [ModelCheckpoint(root / "checkpoints", every_n_train_steps=4, save_last=True, save_top_k=1)]

    class Stops(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 10:
                raise Killed

    run(root, adamw, {}, {"enable_checkpointing": True}, [*saver(), Stops()])
    again = run(root, adamw, {}, {"enable_checkpointing": True}, saver(), checkpoint="last")
    assert chain_of(again.recording_dir) == chain_of(whole.recording_dir)
    assert files_of(again.machine_dir) == files_of(whole.machine_dir)


@pytest.mark.parametrize("saved", ["at the last step", "after the end"])
def test_a_finished_fit_goes_on_for_longer(saved: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    first = run(root, adamw, {}, {"max_epochs": 2}, [StopAfter(root / "end.ckpt", 2 * BATCHES, kill=False)])
    if saved == "after the end":
        first.trainer.save_checkpoint(root / "end.ckpt")
    before = files_of(first.machine_dir)
    again = run(root, adamw, {}, {"max_epochs": 4}, checkpoint=root / "end.ckpt")
    assert again.machine_dir == root / "run" / "machine-v1"
    assert files_of(first.machine_dir) == before
    longer = KernelMachine.load(again.machine_dir, adamw())
    shorter = KernelMachine.load(first.machine_dir, adamw())
    ends = [chord.last_step for chord in longer.chords]
    assert ends[:4] == [chord.last_step for chord in shorter.chords]
    assert ends[-1] == 4 * BATCHES
    assert len(ends) == 8
    assert longer.fidelity([digits()[1].tensors[0]])["fidelity"] > 0.95


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_loader_that_shuffles_anew_is_recorded_as_it_was_drawn(tmp_path: Path) -> None:
    """Lightning begins such an epoch again from another order: what is recorded is what was trained on."""
    drawn: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            drawn.append(trainer.strategy.lightning_module.rows_of(batch))

    class Knows(Classifier):
        def rows_of(self, batch: Any) -> Tensor:
            x = digits()[0].tensors[0][:96]
            return torch.tensor([int((x == one).flatten(1).all(1).nonzero()[0]) for one in batch[0]])

    def make() -> Knows:
        torch.manual_seed(3)
        return Knows("sgd")

    training, validation = (torch.utils.data.TensorDataset(*(t[:96] for t in d.tensors)) for d in digits())
    loader = torch.utils.data.DataLoader(training, 16, shuffle=True)
    path_kernel = None
    for checkpoint in (None, tmp_path / "at.ckpt"):
        pl.seed_everything(7, verbose=False)
        path_kernel = PathKernelCallback(str(tmp_path / "run"), nodes=18, probes=20)
        extra: list[pl.Callback] = [Watch()] if checkpoint else [StopAfter(tmp_path / "at.ckpt", 8), Watch()]
        trainer = trainer_for(tmp_path, [path_kernel, *extra])
        try:
            trainer.fit(make(), loader, torch.utils.data.DataLoader(validation, 50), ckpt_path=checkpoint)
        except Killed:
            continue
    machine = KernelMachine.load(path_kernel.machine_dir, make())
    assert len(machine.chords) == 18
    for chord, rows in zip(machine.chords, drawn[:8] + drawn[8:], strict=True):
        assert chord.example_ids.tolist() == sorted(set(rows.tolist()))


# refusals


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that broke off after eight batches; not to be changed."""
    root = tmp_path_factory.mktemp("stopped") / "it"
    run(root, adamw, {}, {}, [StopAfter(root / "at.ckpt", 8)])
    return root


@pytest.fixture
def root(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "it"))


CHANGES: dict[str, tuple[dict[str, Any], Callable[[], pl.LightningModule], str]] = {
    "sketch_dim": ({"sketch_dim": 32}, adamw, "sketch_dim was 24, is 32"),
    "nodes": ({"nodes": 5}, adamw, "nodes was 4, is 5"),
    "tolerance": ({"tolerance": 0.1}, adamw, "tolerance was None, is 0.1"),
    "seed": ({"seed": 1}, adamw, "seed was 0, is 1"),
    "sketch": ({"sketch": "random"}, adamw, "sketch was 'balanced', is 'random'"),
    "probes": ({"probes": 30}, adamw, "probes was 40, is 30"),
    "unattributed": ({"unattributed": "allow"}, adamw, "unattributed was 'refuse', is 'allow'"),
    "ids": ({"example_ids": lambda batch: batch[1]}, adamw, "example_ids: source was 'dataset', is 'example_ids'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_configuration_is_refused_and_named(name: str, root: Path) -> None:
    recorder, make, said = CHANGES[name]
    before = files_of(root / "run")
    with pytest.raises(MisconfigurationException, match=f"the configuration changed: .*{said}"):
        run(root, make, recorder, {}, checkpoint=root / "at.ckpt")
    assert files_of(root / "run") == before


def test_another_precision_and_another_clipping_are_refused(root: Path) -> None:
    with pytest.raises(MisconfigurationException, match="gradients_may_change_by was 'none', is 'factor'"):
        run(root, adamw, {}, {"gradient_clip_val": 0.5}, checkpoint=root / "at.ckpt")


def test_another_dataset_is_refused(root: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"example_ids: loaders was .*96.*, is .*80"):
        run(root, adamw, {}, {}, checkpoint=root / "at.ckpt", count=80)


def test_weights_only_and_foreign_checkpoints_are_refused(root: Path) -> None:
    class SaveWeights(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(root / "weights.ckpt", weights_only=True)

    other = root / "other"
    run(other, adamw, {}, {"max_steps": 2}, [SaveWeights()])
    with pytest.raises(MisconfigurationException, match=r"weights\.ckpt' has weights only \(save_weights_only=True\)"):
        run(root, adamw, {}, {}, checkpoint=root / "weights.ckpt")
    plain = trainer_for(root, [], max_steps=2)
    plain.fit(adamw(), *loaders())
    plain.save_checkpoint(root / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match=r"plain\.ckpt' has no state of PathKernelCallback"):
        run(root, adamw, {}, {}, checkpoint=root / "plain.ckpt")


def test_another_number_of_processes_is_refused(root: Path) -> None:
    state = torch.load(root / "at.ckpt", weights_only=True)
    own = next(v for k, v in state["callbacks"].items() if "PathKernel" in k)
    own["processes"] *= 2
    torch.save(state, root / "two.ckpt")
    with pytest.raises(MisconfigurationException, match="the checkpoint was written by 2, found 1"):
        run(root, adamw, {}, {}, checkpoint=root / "two.ckpt")


SEGMENTS = ["segment-000000", "segment-000001", "segment-000002", "open-000000"]


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_deleted_segment_is_refused_and_named(name: str, root: Path) -> None:
    (root / "run" / "recording" / "rank-0000" / f"{name}.safetensors").unlink()
    before = files_of(root / "run")
    with pytest.raises(MisconfigurationException, match=f"{name}.safetensors is missing from the recording"):
        run(root, adamw, {}, {}, checkpoint=root / "at.ckpt")
    assert files_of(root / "run") == before


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 1.0])
def test_an_altered_segment_is_refused_and_named(name: str, place: float, root: Path) -> None:
    path = root / "run" / "recording" / "rank-0000" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    with pytest.raises(MisconfigurationException, match=rf"rank-0000/{name}\.safetensors: "):
        run(root, adamw, {}, {}, checkpoint=root / "at.ckpt")


def test_a_segment_of_another_run_is_refused_and_named(root: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", lambda: Classifier("adamw", lr=1e-4), {}, {})
    name = "rank-0000/segment-000001.safetensors"
    shutil.copyfile(other.recording_dir / name, root / "run" / "recording" / name)
    with pytest.raises(MisconfigurationException, match=rf"{name}: .*of another run"):
        run(root, adamw, {}, {}, checkpoint=root / "at.ckpt")


def test_another_directory_is_refused_with_the_place_where_it_was(root: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"cannot find the recording that the checkpoint belongs to"):
        run(root, adamw, {"dirpath": str(root / "elsewhere")}, {}, checkpoint=root / "at.ckpt")
    assert not (root / "elsewhere").exists()


def test_a_second_writer_is_refused_at_once(root: Path) -> None:
    lock = WriterLock(root / "run" / "recording" / "rank-0000")
    with pytest.raises(MisconfigurationException, match=r"rank-0000/lock is held by another writer"):
        run(root, adamw, {}, {}, checkpoint=root / "at.ckpt")
    lock.release()
    assert run(root, adamw, {}, {}, checkpoint=root / "at.ckpt").machine_dir.is_dir()


def test_no_directory_given_the_old_one_is_found(tmp_path: Path) -> None:
    """A logger makes a new version for every fit; the recording stays where it was."""
    logger = {"logger": pl.loggers.CSVLogger(tmp_path, "logs")}
    first = run(tmp_path, adamw, {"dirpath": None}, logger, [StopAfter(tmp_path / "at.ckpt", 8)])
    logger = {"logger": pl.loggers.CSVLogger(tmp_path, "logs")}
    again = run(tmp_path, adamw, {"dirpath": None}, logger, checkpoint=tmp_path / "at.ckpt")
    assert again.recording_dir == first.recording_dir == tmp_path / "logs" / "version_0" / "pathkernel" / "recording"
    verify(again.machine_dir)


def test_the_state_in_a_checkpoint_is_small_and_plain(stopped: Path) -> None:
    state = torch.load(stopped / "at.ckpt", weights_only=True)
    own = next(v for k, v in state["callbacks"].items() if "PathKernel" in k)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int)

    assert plain(own)
    assert len(str(own)) < 2000
    assert own["steps"] == 8
