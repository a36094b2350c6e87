"""Which examples are in a batch: told right for every way of loading, or refused with a remedy."""

from __future__ import annotations

import json
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)  # fmt: skip

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.identity import BatchRows, IdentityError, TrainingIds, string_id
from lightning_pathkernel.identity.loaders import tensors_in
from tests.helpers import Classifier, digits, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
    pytest.mark.filterwarnings("ignore:train_dataloader yielded None"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
]


def numbers(n: int, first: float = 0.0) -> TensorDataset:
    """Rows that say which they are."""
    x = torch.arange(n, dtype=torch.float32) + first
    return TensorDataset(x[:, None].repeat(1, 3))


class Sum(pl.LightningModule):
    """Trains on whatever it gets: all matrices of three columns in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(torch.cat([x for x in tensors_in(batch) if x.dim() == 2 and x.shape[1] == 3])).mean() * 1e-9

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


class Validated(Sum):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Spy(pl.Callback):
    """Drives TrainingIds as the callback does and keeps every batch's rows."""

    def __init__(self, example_ids: Callable[[Any], Any] | None = None) -> None:
        self.ids = TrainingIds(example_ids)
        self.epochs: list[list[list[BatchRows]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ids.watch(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ids.begin(trainer)
        self.facts = json.loads(json.dumps(self.ids.facts()))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.epochs[-1].append(self.ids.rows(trainer, batch))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ids.release(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.ids.release(trainer)


def train(loaders: Any, *callbacks: pl.Callback, module: Any = None, val: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(5)
    trainer = pl.Trainer(
        **{
            "max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks), **options,
        }
    )  # fmt: skip
    trainer.fit(module or (Sum() if val is None else Validated()), loaders, val)
    return trainer


def shuffled(dataset: Dataset, workers: int = 0, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, **options)


def assert_right(spy: Spy, *datasets: TensorDataset) -> None:
    """Every id of every batch is that of the example in its row; the datasets' ids follow one another."""
    every = torch.cat([dataset.tensors[0] for dataset in datasets])
    for e, epoch in enumerate(spy.epochs):
        for b, parts in enumerate(epoch):
            for ids, part in parts:
                x = next(x for x in tensors_in(part) if x.dim() == 2 and x.shape[1] == 3)
                assert ids.dtype == torch.long
                assert torch.equal(every[ids], x), f"epoch {e}, batch {b}: {every[ids][:, 0]} for {x[:, 0]}"


def visits(spy: Spy, epoch: int = 0) -> list[int]:
    return [i for parts in spy.epochs[epoch] for rows in parts for i in rows.ids.tolist()]


# one loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 2},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 7},
        {"val_check_interval": 2},
    ],
    ids=str,
)
def test_ids_are_right_however_the_trainer_iterates(options: dict, workers: int) -> None:
    data, spy = numbers(18), Spy()
    loader = shuffled(data, workers)
    own = loader.batch_sampler
    trainer = train(loader, spy, val=DataLoader(numbers(4), 2), **options)
    assert_right(spy, data)
    batches = {"limit_train_batches": 2, "overfit_batches": 2}.get(next(iter(options), ""), 5)
    assert [len(epoch) for epoch in spy.epochs] == ([5, 2] if "max_steps" in options else [batches] * 3)
    assert loader.batch_sampler is own
    assert "process_dataloader" not in vars(trainer.strategy)


def test_a_loader_made_anew_every_epoch() -> None:
    class Reloads(Sum):
        def train_dataloader(self) -> DataLoader:
            made.append(shuffled(data, workers=2))
            return made[-1]

    data, spy = numbers(18), Spy()
    made: list[DataLoader] = []
    train(None, spy, module=Reloads(), reload_dataloaders_every_n_epochs=1)
    assert_right(spy, data)
    assert len(made) == 3
    assert all(type(loader.batch_sampler) is BatchSampler for loader in made)


def test_persistent_workers() -> None:
    data, spy = numbers(18), Spy()
    train(shuffled(data, 2, persistent_workers=True), spy)
    assert_right(spy, data)
    assert sorted(visits(spy, 2)) == list(range(18))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_loader_is_also_iterated_by_validation_and_by_the_user(workers: int) -> None:
    class Peeks(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            next(iter(loader))

    data, spy = numbers(18), Spy()
    loader = shuffled(data, workers)
    train(loader, spy, Peeks(), val=DataLoader(data, batch_sampler=loader.batch_sampler), max_epochs=2)
    train(loader, again := Spy(), val=loader, val_check_interval=2, max_epochs=2)
    for found in (spy, again):
        assert_right(found, data)
        assert [len(epoch) for epoch in found.epochs] == [5, 5]


def test_a_stop_in_mid_epoch_and_a_second_fit() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    data, loader = numbers(18), shuffled(numbers(18), 2)
    spy, again = Spy(), Spy()
    train(loader, spy, Stop(), min_epochs=0)
    train(loader, again)
    assert [len(epoch) for epoch in spy.epochs] == [5, 2]
    assert_right(spy, data)
    assert_right(again, data)


def test_two_recorders_of_one_fit() -> None:
    data, spies, loader = numbers(18), (Spy(), Spy()), shuffled(numbers(18), 2)
    trainer = train(loader, *spies)
    for spy in spies:
        assert_right(spy, data)
        assert len(spy.epochs) == 3
    assert type(loader.batch_sampler) is BatchSampler
    assert trainer.strategy.process_dataloader(loader) is loader


class Unsized:
    """A batch sampler without a length: Lightning fetches a batch ahead to know the last one."""

    def __init__(self, n: int, batch_size: int = 4) -> None:
        self.n, self.batch_size = n, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in torch.randperm(self.n).split(self.batch_size):
            yield batch.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n", [3, 18])
def test_custom_batch_samplers(n: int, workers: int) -> None:
    data, spy = numbers(n), Spy()
    train(DataLoader(data, batch_sampler=Unsized(n), num_workers=workers), spy)
    assert_right(spy, data)
    assert [sorted(visits(spy, e)) for e in range(3)] == [list(range(n))] * 3


def test_a_user_may_change_the_batch_sampler_in_mid_training() -> None:
    class Grows(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.train_dataloader.batch_sampler.batch_size = 2 + trainer.current_epoch

    loader = DataLoader(numbers(18), batch_sampler=BatchSampler(RandomSampler(range(18)), 4, False))
    train(loader, spy := Spy(), Grows(), limit_train_batches=3)
    assert_right(spy, numbers(18))
    assert [[len(parts[0].ids) for parts in epoch] for epoch in spy.epochs] == [[2] * 3, [3] * 3, [4] * 3]
    assert loader.batch_sampler.batch_size == 4


def test_drop_last_visits_whole_batches_only() -> None:
    data, spy = numbers(18), Spy()
    train(shuffled(data, drop_last=True), spy)
    assert_right(spy, data)
    assert all(len(set(visits(spy, e))) == 16 for e in range(3))


def test_a_weighted_sampler_counts_visits_not_ids() -> None:
    """Drawn twice in a batch, an example has two rows under one id."""
    data, spy = numbers(6), Spy()
    sampler = WeightedRandomSampler([10.0, 1, 1, 1, 1, 1], 24, replacement=True)
    train(DataLoader(data, 8, sampler=sampler), spy, max_epochs=2)
    assert_right(spy, data)
    counts = Counter(visits(spy))
    assert sum(counts.values()) == 24
    assert counts[0] > 8 > len(counts)


def test_batches_that_a_collate_function_leaves_out() -> None:
    """Lightning goes past a batch that is None without calling a hook."""

    def collate(rows: list[Any]) -> Any:
        return None if any(row[0][0] in (3, 11) for row in rows) else default_collate(rows)

    data = numbers(18)
    for workers in (0, 2):
        for sampler in (Unsized(18), BatchSampler(RandomSampler(data), 4, False)):
            train(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers), spy := Spy())
            assert_right(spy, data)
            assert all(3 <= len(epoch) <= 4 for epoch in spy.epochs)


# batches of any structure

Pair = namedtuple("Pair", ["flag", "x"])


@dataclass
class Record:
    name: str
    x: Tensor


COLLATED: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x,
    "a dictionary": lambda x: {"x": x, "y": x[:, 0]},
    "a scalar and a mask first": lambda x: {"weight": torch.tensor(0.5), "mask": torch.ones(7, 7), "x": x},
    "keys in another order in every batch": lambda x: dict(
        sorted({"x": x, "mask": torch.ones(9)}.items(), reverse=bool(x[0, 0] % 2))
    ),
    "nested": lambda x: ({"meta": ["a", None], "in": [{"x": x}]}, x[:, 0]),
    "a named tuple": lambda x: Pair(torch.tensor(1), x),
    "a dataclass": lambda x: [Record("a", x)],
}


@pytest.mark.parametrize("name", COLLATED)
def test_batches_of_any_structure(name: str) -> None:
    def collate(rows: list[Any]) -> Any:
        return COLLATED[name](torch.stack([row[0] for row in rows]))

    data, spy = numbers(10), Spy()
    train(shuffled(data, collate_fn=collate), spy, max_epochs=2)
    assert_right(spy, data)
    assert sorted(visits(spy)) == list(range(10))


# several loaders


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("sized", [True, False], ids=["", "of unknown length"])
def test_every_mode_of_a_combined_loader(mode: str, workers: int, sized: bool) -> None:
    """Loaders of 5, 1 and 3 batches; the short ones begin again in mid-epoch, or give None."""
    data = numbers(18), numbers(3, 100), numbers(9, 200)

    def loader(dataset: TensorDataset) -> DataLoader:
        sampler = BatchSampler(RandomSampler(dataset), 4, False) if sized else Unsized(len(dataset))
        return DataLoader(dataset, batch_sampler=sampler, num_workers=workers)

    loaders = {"big": loader(data[0]), "pair": [loader(data[1]), loader(data[2])]}
    spy = Spy()
    train(CombinedLoader(loaders, mode), spy)
    assert_right(spy, *data)
    given = {
        "min_size": [3],
        "max_size": [3, 2, 2, 1, 1],
        "max_size_cycle": [3] * 5,
    }[mode]
    assert [[len(parts) for parts in epoch] for epoch in spy.epochs] == [given] * 3
    assert [tuple(place.values()) for place in spy.facts["loaders"]] == [
        ("big", 0, 18), ("pair.0", 18, 3), ("pair.1", 21, 9),
    ]  # fmt: skip
    assert spy.facts["mode"] == mode
    if mode != "min_size":
        assert set(range(18)) == {i for i in visits(spy) if i < 18}


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 4}, {"overfit_batches": 2}, {"val_check_interval": 3}], ids=str
)
def test_combined_loaders_with_limits_reloading_and_validation(options: dict) -> None:
    class Loads(Validated):
        def train_dataloader(self) -> Any:
            return [shuffled(data[0], 2), shuffled(data[1], 0)]

        def val_dataloader(self) -> Any:
            return DataLoader(numbers(4), 2)

    data, spy = (numbers(18), numbers(7, 100)), Spy()
    train(None, spy, module=Loads(), reload_dataloaders_every_n_epochs=2, **options)
    assert_right(spy, *data)
    assert sum(map(len, spy.epochs)) >= 6


def test_a_dataset_in_two_loaders_has_one_range_of_ids() -> None:
    data, other = numbers(8), numbers(4, 50)
    spy = Spy()
    train({"a": shuffled(data), "b": shuffled(other), "c": shuffled(data)}, spy)
    assert_right(spy, data, other)
    assert [place["offset"] for place in spy.facts["loaders"]] == [0, 8, 0]


def test_one_loader_in_a_collection() -> None:
    data, spy = numbers(8), Spy()
    train({"only": shuffled(data)}, spy)
    assert_right(spy, data)
    assert spy.facts == {
        "source": "dataset", "mode": None, "loaders": [{"name": "only", "offset": 0, "length": 8}],
    }  # fmt: skip


# the user's function


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        training, _ = digits()
        for i in range(64):
            yield (*training[i], f"image/{i % 48}")


def returning(ids: Any) -> Callable[[Any], Any]:
    return lambda batch: ids


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([3, 1, 3]), torch.tensor([3, 1, 3], dtype=torch.int32), [3, 1, 3], (3, 1, 3), np.array([3, 1, 3]),
        np.array([3, 1, 3], dtype=object), [np.int32(3), 1, np.uint8(3)],
    ],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_integers_of_any_kind_are_taken_as_they_are(ids: Any) -> None:
    spy = Spy(returning(ids))
    train(DataLoader(numbers(3), 3), spy, max_epochs=1)
    assert visits(spy) == [3, 1, 3]
    assert spy.ids.new_names() == {}
    assert spy.facts["source"] == "example_ids"


@pytest.mark.parametrize("names", [["a", "ü", "a"], ("a", "ü", "a"), np.array(["a", "ü", "a"])])
def test_strings_become_integers_that_are_the_same_everywhere(names: Any) -> None:
    spy = Spy(returning(names))
    train(DataLoader(numbers(3), 3), spy, max_epochs=1)
    assert visits(spy) == [2285969620036808, string_id("ü"), 2285969620036808]
    assert spy.ids.new_names() == {2285969620036808: "a", string_id("ü"): "ü"}
    assert spy.ids.new_names() == {}
    assert all(0 <= string_id(str(i)) < 2**53 for i in range(1000))


def test_string_ids_from_a_stream_to_a_loaded_machine(tmp_path: Path) -> None:
    path_kernel = PathKernelCallback(
        str(tmp_path / "run"), nodes=2, probes=0, sketch_dim=16, example_ids=lambda batch: batch[2]
    )
    fit(Classifier(), [path_kernel], tmp_path, loader=DataLoader(Stream(), 16), max_steps=4)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    names = {f"image/{i}" for i in range(48)}
    assert set(machine.names_of(machine.example_ids)) == names
    assert machine.example_names == {string_id(name): name for name in names}
    x = digits()[1].tensors[0][:3]
    top = machine.contributions(x).topk(4, dim=1).indices
    shown = machine.names_of(machine.example_ids[top])
    assert [len(row) for row in shown] == [4, 4, 4]
    assert {name for row in shown for name in row} <= names
    recording = json.loads((path_kernel.recording_dir / "recording.json").read_text())
    assert recording["ids"]["source"] == "example_ids"


def test_several_loaders_and_a_function() -> None:
    """It gets the whole batch and returns a list with an entry for each part that is there."""
    data = numbers(8), numbers(4, 50)
    spy = Spy(lambda batch: [x[0][:, 0].long() for x in batch.values() if x is not None])
    train(CombinedLoader({"a": shuffled(data[0], 2), "b": shuffled(data[1])}, "max_size"), spy, max_epochs=2)
    for epoch in spy.epochs:
        assert [len(parts) for parts in epoch] == [2, 1]
        for ids, part in (rows for parts in epoch for rows in parts):
            assert ids.tolist() == part[0][:, 0].tolist()


# refusals


def test_a_loader_iterated_by_somebody_else_between_two_of_its_passes() -> None:
    """It has a single batch and no length: its second pass began before its first batch is trained on."""
    short = DataLoader(numbers(3, 100), batch_sampler=Unsized(3))

    class Peeks(Sum):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            next(iter(short))
            return batch

    with pytest.raises(IdentityError, match="was iterated by somebody else before its first batch"):
        train([DataLoader(numbers(8), 4), short], Spy(), module=Peeks())


WRONG = {
    "None": (None, "returned None, expected one id per row"),
    "a number": (3, "returned a int, expected one id per row"),
    "a dictionary": ({"a": 1}, "returned a dict, expected one id per row"),
    "a matrix": (torch.zeros(3, 1, dtype=torch.long), r"returned a tensor \(3, 1\) of torch.int64, expected"),
    "an array of two dimensions": (np.zeros((3, 2), int), r"returned an array \(3, 2\) of int64, expected"),
    "a scalar": (torch.tensor(3), r"returned a tensor \(\) of torch.int64, expected"),
    "floats": (torch.zeros(3), r"returned a tensor \(3,\) of torch.float32, expected"),
    "an array of floats": (np.zeros(3), "returned a float at position 0, expected"),
    "booleans": (torch.ones(3, dtype=torch.bool), "of torch.bool, expected"),
    "a list with a boolean": ([1, 2, True], "returned a bool at position 2, expected"),
    "a list with None": ([1, None, 2], "returned a NoneType at position 1, expected"),
    "bytes": ([b"a", b"b", b"c"], "returned a bytes at position 0, expected"),
    "nested lists": ([[1], [2], [3]], "returned a list at position 0, expected"),
    "a mixture": ([1, "a", 2], r"returned a mixture of integers \(position 0\) and strings \(position 1\), expected"),
    "too few": ([1, 2], "returned 2 ids, but the batch has 3 rows. Return one id for each row of it."),
    "too many strings": (list("abcd"), "returned 4 ids, but the batch has 3 rows"),
    "none at all": ([], "returned 0 ids, but the batch has 3 rows"),
    "too large": ([1, 2**63, 3], "the integer 9223372036854775808, which does not fit into 64 bits, expected"),
    "half a character": (["a", "\ud800", "b"], r"returned '\\ud800', which is no text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_one_id_per_row_is_refused(name: str) -> None:
    ids, match = WRONG[name]
    with pytest.raises(IdentityError, match=f"example_ids {match}|{match}"):
        train(DataLoader(numbers(3), 3), Spy(returning(ids)), max_epochs=1)


def test_strings_after_integers_are_refused() -> None:
    answers = iter([[1, 2, 3], ["a", "b", "c"]])
    with pytest.raises(IdentityError, match="returned strings in this batch after integers in an earlier one"):
        train(DataLoader(numbers(6), 3), Spy(lambda batch: next(answers)))


def test_two_strings_that_collide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pathkernel.identity.user.string_id", len)
    with pytest.raises(IdentityError, match="string ids 'ab' and 'ba' collide: both hash to 2"):
        train(DataLoader(numbers(3), 3), Spy(returning(["ab", "c", "ba"])))


def test_a_function_for_several_loaders_returns_an_entry_for_each() -> None:
    loaders = {"a": DataLoader(numbers(3), 3), "b": DataLoader(numbers(3), 3)}
    match = "returned a list of 3, expected a list of 2 entries: .* training loader 'a', training loader 'b'"
    with pytest.raises(IdentityError, match=match):
        train(loaders, Spy(returning([1, 2, 3])))
    with pytest.raises(IdentityError, match="returned a float at position 0 for the training loader 'b', expected"):
        train(loaders, Spy(returning([[1, 2, 3], [0.5, 1, 2]])))
    with pytest.raises(IdentityError, match="returned 2 ids, but the batch of the training loader 'b' has 3 rows"):
        train(loaders, Spy(returning([[1, 2, 3], [1, 2]])))


class Endless(Dataset):
    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), float(index))


def both(second: Any) -> dict[str, Any]:
    return {"a": DataLoader(numbers(4), 2), "b": second}


SAME = DataLoader(numbers(4), 2)
UNTRACED = {
    "a stream": (DataLoader(Stream(), 4), "training loader: its dataset is an IterableDataset, which has no indices"),
    "no batches": (DataLoader(numbers(4), batch_size=None), "training loader: it has batch_size=None"),
    "no loader": ([[torch.zeros(2, 3)]], "training loader '0.0': it is a Tensor, not a DataLoader"),
    "one of two": (both(DataLoader(Stream(), 4)), "training loader 'b': its dataset is an IterableDataset"),
    "overtaking": (DataLoader(numbers(4), 2, num_workers=1, in_order=False), "it has in_order=False"),
    "one loader twice": ([SAME, SAME], "one DataLoader object stands in two places. Make a DataLoader for each"),
    "no length": (both(DataLoader(Endless(), batch_sampler=[[1, 2]])), "'b': its Endless has no length"),
    "strings": (DataLoader(numbers(4), batch_sampler=[["a"]], collate_fn=lambda r: r), r"the sampler drew \['a'\]"),
    "negative": (DataLoader(numbers(4), batch_sampler=[[-1, 2]]), r"drew \[-1, 2\], no list of integers from 0 on"),
    "sequential": (CombinedLoader(both(SAME), "sequential"), "the CombinedLoader's mode is 'sequential'. Lightning tr"),
    "rows dropped": (
        DataLoader(numbers(8), 4, collate_fn=lambda rows: default_collate(rows[1:])),
        "the loader drew 4 examples, but the batch has 3 rows: its collate function drops or adds rows. Pass example",
    ),
    "rows dropped by one of two": (
        both(DataLoader(numbers(8), 4, collate_fn=lambda rows: default_collate(rows[1:]))),
        "drew 4 examples, but the batch of the training loader 'b' has 3 rows",
    ),
    "no rows": (
        DataLoader(numbers(8), 4, collate_fn=lambda rows: {"a": 1}), "drew 4 examples, but the batch has no tensor with"
    ),
}  # fmt: skip


class Texts(Dataset):
    """Strings may be drawn from it, too."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.ones(3)

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("name", UNTRACED)
def test_batches_that_cannot_be_traced_are_refused(name: str) -> None:
    loaders, match = UNTRACED[name]
    if name == "strings":
        loaders = DataLoader(Texts(), batch_sampler=[["a"]])
    with pytest.raises(IdentityError, match=match):
        train(loaders, Spy())


def test_an_index_beyond_a_datasets_length_would_be_another_datasets_id() -> None:
    first = DataLoader(Texts(), batch_sampler=[[1, 4]])
    with pytest.raises(IdentityError, match="'a' drew index 4 of a dataset of length 4, an id of the dataset after"):
        train({"a": first, "b": DataLoader(numbers(4), 2)}, Spy())
    train(first, spy := Spy(), max_epochs=1)
    assert visits(spy) == [1, 4]


def test_a_training_step_that_fetches_for_itself() -> None:
    class Fetches(Sum):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(IdentityError, match="training_step takes dataloader_iter and fetches its batches itself"),
    ):
        train(DataLoader(numbers(4), 2), Spy(), module=Fetches())


def test_a_combined_batch_that_was_restructured() -> None:
    class Joins(Sum):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return torch.cat([batch["a"][0], batch["b"][0]])

    with pytest.raises(IdentityError, match="the part of the training loader 'a' is not where it was collated"):
        train(both(DataLoader(numbers(4), 2)), Spy(), module=Joins())


def test_datasets_that_change_their_lengths_when_reloaded() -> None:
    class Grows(Sum):
        def train_dataloader(self) -> Any:
            made.append(DataLoader(numbers(4 + 2 * len(made)), 2))
            return [made[-1], DataLoader(numbers(4), 2)]

    made: list[DataLoader] = []
    with pytest.raises(IdentityError, match=r"training loader '1' began at 4, now at 6. Keep the lengths"):
        train(None, Spy(), module=Grows(), reload_dataloaders_every_n_epochs=1)


def test_a_refused_fit_leaves_loaders_as_they_were() -> None:
    loader = DataLoader(numbers(8), 4, collate_fn=lambda rows: default_collate(rows[1:]))
    own = loader.batch_sampler
    with pytest.raises(IdentityError):
        train(loader, Spy())
    assert loader.batch_sampler is own
