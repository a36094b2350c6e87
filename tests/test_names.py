"""String ids beside integers: merged over chords, given back nested as they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pathkernel import ArtifactError, KernelMachine
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.sketch import KroneckerSketch


def chord(index: int, names: dict[int, str]) -> Chord:
    weights = {"weight": torch.ones(1, 2)}
    ids = torch.tensor([3, 5])
    sketches = {"weight": KroneckerSketch(1, 2)}
    return Chord(
        index, index, index + 1, 0.1, ids, torch.ones(2, 2), torch.ones(2), sketches, None, weights, weights, {}, {},
        names=names,
    )  # fmt: skip


def machine(*tables: dict[int, str]) -> KernelMachine:
    return KernelMachine(nn.Linear(2, 1, bias=False), [chord(i, names) for i, names in enumerate(tables)])


def test_names_of_all_chords_are_one_table() -> None:
    found = machine({3: "a"}, {}, {3: "a", 5: "b"})
    assert found.example_names == {3: "a", 5: "b"}
    assert found.without([3]).example_names == {3: "a", 5: "b"}


def test_one_id_has_one_name() -> None:
    with pytest.raises(ArtifactError, match="example 3 is called 'a' by one chord and 'b' by another"):
        machine({3: "a"}, {3: "b"})


def test_names_are_nested_as_the_ids_are() -> None:
    found = machine({3: "a", 5: "b"})
    assert found.names_of([5, 4, 3]) == ["b", "4", "a"]
    assert found.names_of(torch.tensor([[3, 3], [5, 7]])) == [["a", "a"], ["b", "7"]]
    assert found.names_of(torch.zeros(2, 0, dtype=torch.long)) == [[], []]


def test_the_bytes_do_not_depend_on_the_order_of_the_names() -> None:
    names = {5: "b", -1: "ü"}
    assert torch.equal(encode_names(names), encode_names(dict(reversed(names.items()))))
    assert decode_names(encode_names(names)) == names
    assert decode_names(encode_names({})) == {}
