"""Answers do not depend on how many queries and examples are processed at once, nor on what else is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel import Explanation, KernelMachine
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.example_rows import HeldRows, KeptRows
from lightning_pathkernel.network import Network
from lightning_pathkernel.ranking import ChordShare, all_contributions, strongest_contributions
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import digits, recorded_step
from tests.store.artifacts import network, record

Q, N, RTOL = 12, 30, 0.1
CHUNKS = [(1, None), (5, 64), (7, 1000), (256, 7), (1000, 10_000)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AdamW with batch norm, four chords, examples spread over them; a sketch of 32 numbers."""
    return record(tmp_path_factory.mktemp("chunks"), network()) / "machine"


def x() -> Tensor:
    return digits()[1].tensors[0][:Q]


def target() -> Tensor:
    return torch.arange(Q) % 10


def explained(complete: bool, top_k: int = 6) -> Callable[[KernelMachine], Explanation]:
    return lambda machine: machine.explain(x(), target(), top_k=top_k, complete=complete)


QUESTIONS: dict[str, Callable[[KernelMachine], Any]] = {
    "predict": lambda m: m.predict(x()),
    "bias": lambda m: m.bias(x()),
    "network_outputs": lambda m: m.network_outputs(x()),
    "contributions": lambda m: m.contributions(x()),
    "contributions to targets": lambda m: m.contributions(x(), target()),
    "contributions by chord": lambda m: m.contributions_by_chord(x(), target(), ids=m.example_ids[::50]),
    "without some examples": lambda m: m.without(m.example_ids[::3]).contributions(x(), target()),
    "explain, complete": explained(True),
    "explain, as stored": explained(False),
    "explain everything": explained(True, 10_000),
    "kernel": lambda m: m.kernel(x()),
    "kernel of two": lambda m: m.kernel(x(), x()[:9], target(), target()[:9]),
    "tangent kernel": lambda m: m.tangent_kernel(x(), node=1),
    "coefficients": lambda m: m.coefficients(x(), digits()[0].tensors[0][:5], m.example_ids[:5], target()),
    "self-influence": lambda m: m.self_influence(),
    "fidelity": lambda m: m.fidelity([x()[:7], x()[7:]]),
    "fidelity of one batch": lambda m: m.fidelity(x()),
    "label errors": lambda m: m.label_errors(torch.arange(len(m.example_ids)) % 10).scores,
}


def alike(found: Any, wanted: Any, name: str, scale: float | None = None) -> None:
    """To 1e-5 of the largest number of an answer, or of all terms of a ledger; the same ids."""
    if isinstance(wanted, Explanation):
        assert torch.equal(found.example_ids, wanted.example_ids), name
        for part in ("prediction", "contributions", "ledger"):
            alike(getattr(found, part), getattr(wanted, part), f"{name}: {part}")
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        terms = {key: (torch.as_tensor(found[key]), torch.as_tensor(wanted[key])) for key in wanted}
        largest = max(float(term.abs().max()) for _, term in terms.values())
        for key, (one, other) in terms.items():
            alike(one, other, f"{name}: {key}", largest)
    else:
        largest = float(wanted.nan_to_num().abs().max()) if scale is None else scale
        torch.testing.assert_close(
            found, wanted, rtol=1e-5, atol=1e-5 * largest, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )


@pytest.fixture(scope="module", params=[None, RTOL], ids=["fixed points", "rtol"])
def whole(request: pytest.FixtureRequest, artifact: Path) -> tuple[float | None, dict[str, Any]]:
    machine = KernelMachine.load(artifact, network(), rtol=request.param)
    return request.param, {name: ask(machine) for name, ask in QUESTIONS.items()}


@pytest.mark.parametrize(("chunk_size", "example_chunk"), CHUNKS)
def test_answers_do_not_depend_on_chunks(
    chunk_size: int, example_chunk: int | None, whole: tuple[float | None, dict[str, Any]], artifact: Path
) -> None:
    rtol, wanted = whole
    sizes = {"chunk_size": chunk_size, "example_chunk": example_chunk, "rtol": rtol}
    stored = KernelMachine.load(artifact, network(), **sizes)
    for name, ask in QUESTIONS.items():
        alike(ask(stored), wanted[name], f"{name}, {sizes}")


def test_the_answer_to_a_query_does_not_depend_on_other_queries(artifact: Path) -> None:
    """With a tolerance each takes the points that it needs itself."""
    machine = KernelMachine.load(artifact, network(), rtol=RTOL)
    whole, predicted = machine.explain(x(), target(), top_k=3), machine.predict(x())
    for i in range(0, Q, 3):
        row = slice(i, i + 1)
        alone = machine.explain(x()[row], target()[row], top_k=3)
        assert torch.equal(alone.example_ids, whole.example_ids[row])
        alike(alone.contributions, whole.contributions[row], f"query {i}")
        alike(machine.predict(x()[row]), predicted[row], f"query {i}")


def test_queries_take_unlike_numbers_of_points(artifact: Path) -> None:
    """Or else the tests of this file with a tolerance would show nothing."""
    machine = KernelMachine.load(artifact, network(), rtol=RTOL)
    rules = machine._rules(x(), machine.path)
    assert max(len(own) for own in rules) > 1
    for own in rules:
        assert torch.cat([rows for rows, _ in own]).sort().values.tolist() == list(range(Q))


def test_a_kernel_with_a_tolerance_is_symmetric_and_semi_definite_in_any_chunks(artifact: Path) -> None:
    machine = KernelMachine.load(artifact, network(), rtol=RTOL, chunk_size=5)
    gram = machine.kernel(x(), dtype=torch.float64)
    assert torch.equal(gram, gram.T)
    values = torch.linalg.eigvalsh(gram)
    assert values[0] > -1e-10 * values[-1], values
    one, other = x()[:9], x()[9:]
    alike(machine.kernel(one, other), machine.kernel(other, one).T, "the two sides change places")


def test_machines_in_memory_do_not_depend_on_chunks_in_double_precision() -> None:
    torch.manual_seed(0)
    inputs, y = torch.randn(N, 6).double(), torch.randint(0, 3, (N,))
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    chords: list = []
    settings = RecorderSettings([0, 3, 6, 9], 10_000, SketchSettings("identity"))
    recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, settings, None, chords.append)
    recorder.capture.attach()
    for step in range(9):
        ids = (torch.arange(7) * (1 + step) + step) % N
        ids = ids.unique()
        recorded_step(recorder, optimizer, ids, lambda ids=ids: F.cross_entropy(module(inputs[ids]), y[ids]))
    recorder.capture.detach()
    whole = KernelMachine(module, chords)
    for sizes in ({"chunk_size": 1, "example_chunk": 1}, {"chunk_size": 4, "example_chunk": 3}):
        small = KernelMachine(module, chords, **sizes)
        for complete in (True, False):
            found, wanted = (m.explain(inputs, top_k=4, complete=complete) for m in (small, whole))
            assert torch.equal(found.example_ids, wanted.example_ids)
            torch.testing.assert_close(found.contributions, wanted.contributions, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(small.contributions(inputs), whole.contributions(inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rtol", [None, RTOL])
def test_no_queries_are_answered_by_nothing(rtol: float | None, artifact: Path) -> None:
    machine = KernelMachine.load(artifact, network(), rtol=rtol)
    none = x()[:0]
    assert machine.predict(none).shape == machine.bias(none).shape == machine.network_outputs(none).shape == (0, 10)
    assert machine.contributions(none).shape == (0, len(machine.example_ids))
    assert machine.explain(none, top_k=3).example_ids.shape == (0, 6)


@pytest.mark.parametrize("name", ["chunk_size", "example_chunk"])
def test_chunks_of_nothing_are_refused(name: str, artifact: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, found 0$"):
        KernelMachine.load(artifact, network(), **{name: 0})


# top-k


def test_equal_contributions_are_ranked_by_id_in_any_chunks() -> None:
    """Many examples with the same rows, or with none: which of them are named must not depend on the ranges."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        rows = torch.randint(-1, 2, (40, 2), generator=generator).double()
        ids, features = torch.arange(40) * 3, torch.randint(-1, 2, (5, 2), generator=generator).double()
        shares = [
            ChordShare(features, HeldRows(ids[part].clone(), rows[part], rows[part, 0]))
            for part in (slice(None), slice(0, 25), slice(10, 40, 2))
        ]
        whole = all_contributions(shares, ids)
        for length in (1, 2, 7, 1000, None):
            found, values = strongest_contributions(shares, 6, length)
            for side, sign in ((slice(0, 6), -1), (slice(6, 12), 1)):
                order = (sign * whole).sort(stable=True, dim=1).indices[:, :6]
                assert torch.equal(found[:, side], ids[order]), length
                assert torch.equal(values[:, side], whole.gather(1, order)), length


def test_contributions_that_are_no_numbers_come_last() -> None:
    rows = HeldRows(torch.arange(4), torch.tensor([[1.0], [torch.nan], [3.0], [2.0]]), torch.zeros(4))
    found, values = strongest_contributions([ChordShare(torch.ones(1, 1), rows)], 2)
    assert found.tolist() == [[2, 3, 0, 3]]
    assert values.tolist() == [[3.0, 2.0, 1.0, 2.0]]


@pytest.mark.parametrize("length", [1, 2, 5, None])
def test_examples_left_out_are_in_no_block_and_only_rows_around_the_others_are_read(length: int | None) -> None:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    whole = HeldRows(torch.arange(20), rows, rows[:, 0])
    gone = torch.tensor([0, 1, 2, 7, 8, 9, 19])
    blocks = list(KeptRows(whole, gone).blocks(length))
    kept = [i for i in range(20) if i not in gone.tolist()]
    assert torch.cat([block.ids for block in blocks]).tolist() == kept
    assert torch.equal(torch.cat([block.rows for block in blocks]), rows[kept])
    for block in blocks:
        assert torch.equal(block.between(1, len(block.ids)), block.rows[1:])
