"""The network and its queries on one device, examples and answers on the CPU.

Where there is no GPU, torch's meta device stands for another one: it computes shapes and types alone, and refuses what
mixes it with the CPU. It has no numbers, so that whatever decides by them is tested on a GPU only.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pathkernel import KernelMachine, gram, query
from lightning_pathkernel.chord_path import PlacedChords
from lightning_pathkernel.network import on_device
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.query import Question, everywhere
from tests.helpers import digits
from tests.store.artifacts import network, record
from tests.test_chunks import QUESTIONS, alike

META = torch.device("meta")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("devices"), network()) / "machine"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks about autocast for the meta device, which knows nothing of it."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


def x() -> Tensor:
    return digits()[1].tensors[0][:6]


@pytest.mark.usefixtures("elsewhere")
def test_all_that_a_question_needs_of_a_chord_comes_to_the_networks_device(artifact: Path) -> None:
    machine = KernelMachine.load(artifact, network(), device="meta")
    assert machine.device == META
    chords, net = list(PlacedChords(machine.path, META)), machine._network
    assert any(chord.preconditioner for chord in chords)
    assert any(sketch.query_right is not None for chord in chords for sketch in chord.sketches.values())
    rules = [everywhere(gauss_legendre(2))] * len(chords)
    question = Question(on_device(x(), META), torch.zeros(6, dtype=torch.long))
    terms, gaps = query.ledger(net, question, chords, rules)
    assert {value.device for value in (*terms.values(), *gaps)} == {META}
    for part in query.sums(net, question.batch, chords[0], rules[0]):
        assert part.device == META
    for share in query.shares(net, question, chords, rules, [gap[:, 0] for gap in gaps]):
        assert share.features.device == META
        assert (share.features @ next(share.examples.blocks()).rows.to(META).T).device == META


@pytest.mark.usefixtures("elsewhere")
def test_gradients_of_both_sides_of_a_kernel_are_taken_on_the_networks_device(artifact: Path) -> None:
    machine = KernelMachine.load(artifact, network()).to("meta")
    chords = PlacedChords(machine.path, META)
    first, second = gram.sides(x(), x()[:4], None, None, None, 10)
    rules = [gauss_legendre(2)] * len(chords)
    assert gram.path_kernel(machine._network, first, second, chords, rules).device == META
    place = gram.place_of_node(chords, 1)
    assert gram.gram_at(machine._network, first, None, place).device == META


@pytest.mark.usefixtures("elsewhere")
def test_queries_on_another_device_are_noticed(artifact: Path) -> None:
    """The trick of this file works: what is left on the CPU is refused."""
    machine = KernelMachine.load(artifact, network(), device="meta")
    chord = next(iter(PlacedChords(machine.path, META)))
    with pytest.raises(RuntimeError, match="device"):
        query.sums(machine._network, x(), chord, everywhere(gauss_legendre(2)))


def test_a_machine_that_is_moved_leaves_the_first_one_and_the_module_where_they_are(artifact: Path) -> None:
    module = network()
    machine = KernelMachine.load(artifact, module, rtol=0.1, chunk_size=3)
    moved = machine.to("meta")
    assert (moved.device, machine.device) == (META, torch.device("cpu"))
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert moved._options == machine._options
    assert moved.directory == machine.directory
    assert moved.without(moved.example_ids[:3]).device == META
    assert machine.to("cpu")._network.module is machine._network.module
    own = network()
    assert KernelMachine(own, machine.chords, device="cpu")._network.module is own
    assert KernelMachine(own, machine.chords, device="meta")._network.module is not own
    assert {p.device.type for p in own.parameters()} == {"cpu"}


def test_on_the_cpu_a_device_changes_nothing(artifact: Path) -> None:
    plain, asked = KernelMachine.load(artifact, network()), KernelMachine.load(artifact, network(), device="cpu")
    for name in ("predict", "explain, complete", "contributions", "kernel"):
        alike(QUESTIONS[name](asked), QUESTIONS[name](plain), name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rtol", [None, 0.02])
def test_answers_from_a_gpu_are_those_from_the_cpu(rtol: float | None, artifact: Path) -> None:
    plain = KernelMachine.load(artifact, network(), rtol=rtol)
    placed = plain.to("cuda")
    for name, ask in QUESTIONS.items():
        found, wanted = ask(placed), ask(plain)
        values = [(found, wanted)] if isinstance(found, Tensor) else []
        if name.startswith("explain"):
            values = [(found.prediction, wanted.prediction), (found.contributions, wanted.contributions)]
        for one, other in values:
            assert one.device.type == "cpu", name
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.nan_to_num().abs().max()))
    gpu = placed.predict(x().cuda())
    torch.testing.assert_close(gpu, placed.predict(x()))
