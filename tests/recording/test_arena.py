"""Memory of a chord's rows: apart for each, and used again."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pathkernel.recording.arena import Arena


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_the_arena_gives_the_same_memory_again_after_a_reset() -> None:
    arena, like = Arena(100), torch.zeros((), dtype=torch.float64)
    first = [arena.new(4, 5, like).view() for _ in range(12)]
    assert len({memory(t) for t in first}) == 3, "five rows of 20 numbers to a block of 100"
    arena.reset()
    again = [arena.new(4, 5, like).view() for _ in range(12)]
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in first]


def test_what_the_arena_gave_out_is_not_given_out_twice() -> None:
    arena, like = Arena(100), torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        arena.reset()
        shapes = [(3, 7), (1, 90), (30, 20), (2, 2), (0, 5), (10, 10), (5, 0), (99, 1), (1, 1)]
        given = [arena.new(*shape, like).view().fill_(i) for i, shape in enumerate(shapes)]
        for i, (rows, shape) in enumerate(zip(given, shapes, strict=True)):
            assert rows.shape == shape
            assert rows.T.is_contiguous()
            assert bool((rows == i).all()), f"rows {i} of {shape} were written over"


def test_the_arena_does_not_grow_from_chord_to_chord() -> None:
    arena, like = Arena(100), torch.zeros((), dtype=torch.float64)
    seen: set[int] = set()
    for chord in range(5):
        arena.reset()
        used = {memory(arena.new(n, 6, like).view()) for n in (5, 40, 5, 16, 3, 3)}
        assert chord == 0 or used <= seen
        seen |= used


def test_rows_of_another_dtype_are_given_room_of_their_own() -> None:
    arena = Arena(100)
    single, double = (arena.new(2, 3, torch.zeros((), dtype=d)).view() for d in (torch.float32, torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert memory(single) != memory(double)
    after = arena.new(2, 3, torch.zeros(())).view()
    assert after.data_ptr() == single.data_ptr() + 6 * 4


def test_whole_numbers_get_blocks_of_their_own() -> None:
    arena = Arena(1 << 10)
    ids = [torch.arange(7 * i, 7 * i + 7) for i in range(5)]
    kept = [arena.keep(x) for x in ids]
    arena.new(3, 4, torch.zeros(()))
    assert all(torch.equal(slot.view()[:, 0], x) for slot, x in zip(kept, ids, strict=True))
    assert {len(slot.block) for slot in kept} == {8}
