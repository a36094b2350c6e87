"""Rows kept in the arena: the same numbers as sketched one by one, in memory that is used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_pathkernel.recording.batches
from lightning_pathkernel.capture.gradients import DenseGradient, OuterGradient, PerExampleGradient, VectorGradient
from lightning_pathkernel.recording.arena import Arena
from lightning_pathkernel.recording.batches import batches
from lightning_pathkernel.recording.carry import carried as carried_steps
from lightning_pathkernel.recording.carry import reexpress
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.rows import RecordedStep, StepRows, summed, visited
from lightning_pathkernel.sketch import KroneckerSketch

R, C, K = 7, 9, 4
Uses = Mapping[str, Sequence[PerExampleGradient]]


def private(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=private(seed), dtype=torch.float64).to(dtype)


def basis(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, KroneckerSketch]:
    """Factors on both sides, on one, and on none; the query factors are the training side's pseudo-inverses."""

    def sketch(r: int, c: int, left: bool, right: bool, at: int) -> KroneckerSketch:
        train = [normal(at + i, K, d, dtype=dtype) if has else None for i, d, has in ((0, r, left), (1, c, right))]
        query = [None if p is None else torch.linalg.pinv(p).T for p in train]
        return KroneckerSketch(r, c, *train, *query)

    return {
        "both": sketch(R, C, True, True, seed),
        "right": sketch(3, C, False, True, seed + 2),
        "whole": sketch(3, 2, False, False, seed + 4),
        "bias": sketch(R, 1, True, False, seed + 6),
        "unused": sketch(R, C, True, True, seed + 8),
    }


def gradients(seed: int, n: int, dtype: torch.dtype = torch.float64) -> dict[str, list[PerExampleGradient]]:
    """Of one batch: every form, and a parameter of two uses."""

    def some(at: int, *shape: int) -> Tensor:
        return normal(100 * seed + at, n, *shape, dtype=dtype)

    left = some(0, R)
    return {
        "both": [OuterGradient(left, some(1, C)), DenseGradient(some(2, R, C))],
        "bias": [VectorGradient(left)],
        "right": [OuterGradient(some(3, 3), some(4, C))],
        "whole": [OuterGradient(some(5, 3), some(6, 2))],
    }


def features_in(sketches: Mapping[str, KroneckerSketch]) -> int:
    return sum(sketch.features for sketch in sketches.values())


def added(arena: Arena, sketches: Mapping[str, KroneckerSketch], uses: Uses, n: int) -> StepRows:
    rows = StepRows(torch.arange(n), arena)
    for name, parts in uses.items():
        for part in parts:
            rows.add(name, sketches[name], part)
    rows.close()
    return rows


def unpacked(sketches: Mapping[str, KroneckerSketch], uses: Uses, n: int) -> Tensor:
    """Every gradient formed whole and sketched by itself."""
    like = next(iter(uses.values()))[0].dense()
    columns = []
    for name, sketch in sketches.items():
        zero = like.new_zeros(n, sketch.features)
        columns.append(sum((sketch.train(DenseGradient(use.dense())) for use in uses.get(name, ())), zero))
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("block", [1, 50, 1 << 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_many_steps_are_those_sketched_one_by_one(block: int, dtype: torch.dtype) -> None:
    """Over three chords in one arena, smaller and larger than its block, and read only when each chord ends."""
    arena, tolerance = Arena(block), {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    for chord in range(3):
        arena.reset()
        sketches, sizes = basis(10 * chord, dtype), [5, 1, 8, 3]
        batches = [gradients(10 * chord + i, n, dtype) for i, n in enumerate(sizes)]
        steps = [added(arena, sketches, uses, n) for uses, n in zip(batches, sizes, strict=True)]
        for step, uses, n in zip(steps, batches, sizes, strict=True):
            found, expected = step.features(sketches), unpacked(sketches, uses, n)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rows_held_back_are_those_taken_in_at_once_and_may_move() -> None:
    """Some parameters' sketches are known in the backward pass, the others' only at the step."""
    sketches, uses, rows = basis(0), gradients(0, 5), StepRows(torch.arange(5), Arena(16))
    for name, parts in uses.items():
        for part in parts:
            if name == "both":
                rows.add(name, sketches[name], part)
            else:
                rows.held.setdefault(name, []).append(part)
    rows.close()
    rows.settle(sketches, ["right", "whole"])
    rows.settle(sketches, ["bias"])
    assert not rows.held
    torch.testing.assert_close(rows.features(sketches), unpacked(sketches, uses, 5))
    rows.move(Arena(64))
    torch.testing.assert_close(rows.features(sketches), unpacked(sketches, uses, 5))
    assert rows.ids.tolist() == list(range(5))


def test_rows_do_not_change_with_the_tensors_they_came_from() -> None:
    """A layer's activations are freed or written over after the backward pass."""
    sketches, values, whole = basis(0), normal(0, 5, R), normal(1, 5, 3, 2)
    rows = StepRows(torch.arange(5), Arena(1 << 12))
    rows.add("bias", KroneckerSketch(R, 1), VectorGradient(values))
    rows.add("whole", sketches["whole"], DenseGradient(whole))
    plain = {"bias": KroneckerSketch(R, 1), "whole": sketches["whole"]}
    expected = torch.cat([values, whole.flatten(1)], dim=1)
    values.zero_()
    rows.close()
    whole.zero_()
    assert torch.equal(rows.features(plain), expected)


def test_weighted_rows_are_each_parameters_share() -> None:
    sketches, arena = basis(0), Arena(64)
    weights = np.random.default_rng(0).standard_normal((3, len(sketches)))
    passes = [[gradients(0, 4)], [gradients(1, 2), gradients(2, 3)], [gradients(3, 1)]]
    clipping = [1.0, 0.25, 3.0]
    steps = [
        RecordedStep([added(arena, sketches, uses, uses["bias"][0].n) for uses in step], factor)
        for step, factor in zip(passes, clipping, strict=True)
    ]
    expected = torch.zeros(4, sum(s.features for s in sketches.values()), dtype=torch.float64)
    for step, weight, factor in zip(passes, weights, clipping, strict=True):
        scale = factor * torch.from_numpy(np.repeat(-weight, [s.features for s in sketches.values()]))
        for uses in step:
            n = uses["bias"][0].n
            expected[:n] += unpacked(sketches, uses, n) * scale
    ids = visited(steps)
    assert ids.tolist() == [0, 1, 2, 3]
    found = ((batch.ids, batch.shares(weights, sketches)) for batch in batches(steps, sketches))
    torch.testing.assert_close(summed(ids, found, expected.shape[1:], expected), expected)


@pytest.mark.parametrize("sizes", [[4] * 9, [4, 4, 1, 4, 4, 4, 2, 2], [1]])
def test_steps_taken_together_have_each_its_own_features(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sketches, arena = basis(0), Arena(64)
    monkeypatch.setattr(lightning_pathkernel.recording.batches, "_NUMBERS", 12 * features_in(sketches))
    uses = [gradients(i, n) for i, n in enumerate(sizes)]
    steps = [
        RecordedStep([added(arena, sketches, each, n)], 1.0 + i)
        for i, (each, n) in enumerate(zip(uses, sizes, strict=True))
    ]
    found = list(batches(steps, sketches))
    assert [step for batch in found for step in batch.steps] == list(range(len(sizes)))
    assert all(batch.ids.shape[0] <= 12 for batch in found)
    assert len(found) < len(sizes) or len(sizes) == 1
    whole = torch.cat([unpacked(sketches, each, n) for each, n in zip(uses, sizes, strict=True)])
    torch.testing.assert_close(torch.cat([batch.features for batch in found]), whole)
    assert np.concatenate([batch.coefficients for batch in found]).tolist() == [1.0 + i for i in range(len(sizes))]


def carried(momentum: Mapping[str, Tensor], shares: np.ndarray, overwrite: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Two steps carried to the next chord's basis, whose own rows then fill the arena; and both steps' old rows."""
    arena, old, new = Arena(64), basis(0), basis(50)
    steps = [RecordedStep([added(arena, old, gradients(i, n), n)]) for i, n in ((0, 4), (1, 3))]
    before = [step.parts[0].features(old) for step in steps]
    after = carried_steps(steps, old)
    arena.reset()
    columns = {name: shares[:, j] for j, name in enumerate(old)}
    for names in (("both", "bias"), ("right", "whole", "unused")):  # parameters may follow at different steps
        some = {name: old[name] for name in names}
        reexpress(after, columns, momentum, some, new, Ranks())
    if overwrite:
        for i in range(4):
            added(arena, new, gradients(9 + i, 8), 8)
    return torch.cat([step.parts[0].features(new) for step in after]), before


def test_rows_carried_over_outlive_the_arenas_reset() -> None:
    shares = np.ones((2, 5))
    found, before = carried({}, shares)
    assert torch.equal(found, carried({}, shares, overwrite=False)[0])
    old, new, parts = basis(0), basis(50), []
    sizes = [sketch.features for sketch in old.values()]
    for rows, (name, sketch) in zip(torch.cat(before).split(sizes, dim=1), old.items(), strict=True):
        parts.append(new[name].train(DenseGradient(sketch.synthesise(rows))))
    torch.testing.assert_close(found, torch.cat(parts, dim=1))


def test_rows_carried_over_add_up_to_the_momentum() -> None:
    """Weighted by their steps' shares of the buffer; a step that a buffer no longer holds is left as it is."""
    shares = np.array([[0.5, 0.3, 0.0, 0.2, 0.0], [1.0, 0.7, 1.0, 0.0, 0.0]])
    shapes = {"both": (R, C), "right": (3, C), "whole": (3, 2), "bias": (R, 1)}
    momentum = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items(), start=200)}
    new = basis(50)
    sizes = [sketch.features for sketch in new.values()]
    found, plain = (carried(m, shares)[0].split(sizes, dim=1) for m in (momentum, {}))
    visits = torch.from_numpy(np.repeat(shares, [4, 3], axis=0))
    for j, name in enumerate(shapes):
        total = (visits[:, j : j + 1] * found[j]).sum(0)
        torch.testing.assert_close(total, new[name].train_matrix(momentum[name]))
        gone = visits[:, j] == 0
        torch.testing.assert_close(found[j][gone], plain[j][gone])
        assert not torch.equal(found[j][~gone], plain[j][~gone])


def test_rows_carried_over_stay_small_where_their_sum_cancels() -> None:
    """What is missing of a sum is not made of what is there: a correction in proportion to it would have no bound."""
    arena = Arena(64)
    old, new = (KroneckerSketch(1, 2, None, factor, None, factor) for factor in (torch.eye(2)[:1], torch.eye(2)))
    rows = torch.tensor([1.0, -1.0, 3.0, -3.0 + 1e-6])
    uses = {"w": [DenseGradient(torch.stack([rows, torch.zeros(4)], dim=1).unsqueeze(1))]}
    steps = carried_steps([RecordedStep([added(arena, {"w": old}, uses, 4)])], {"w": old})
    shares, wanted = np.array([0.5]), torch.tensor([[1e-6, 0.2]])
    reexpress(steps, {"w": shares}, {"w": wanted}, {"w": old}, {"w": new}, Ranks())
    found = steps[0].parts[0].features({"w": new})
    torch.testing.assert_close(0.5 * found.sum(0), wanted[0])
    torch.testing.assert_close(found, torch.stack([rows, torch.full((4,), 0.1)], dim=1))
