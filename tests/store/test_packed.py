"""Chords of an artifact: what rounding costs, what it never touches, and nothing that does not fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pathkernel import KernelMachine, KernelMachineExporter
from lightning_pathkernel.chord_io import chord_name, read_chord
from lightning_pathkernel.ledger import LEDGER_TERMS
from lightning_pathkernel.packed_io import Node, read_packed
from lightning_pathkernel.packing import BLOCK, pack_blocks, pack_logarithms, pack_rows, unpack, unpack_rows
from lightning_pathkernel.store import read_group, write_group
from tests.helpers import Classifier, digits
from tests.store.artifacts import MIDDLE, WEIGHT, network, record, recorded, refused

SKETCH_DIM = 32


def plain() -> Classifier:
    """Without the bias before a batch norm of `network`, whose contributions are huge and cancel."""
    torch.manual_seed(4)
    return Classifier("adamw", weight_decay=0.1)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("plain"), plain())


def machines(
    run: Path, make: Callable[[], Classifier] = network, machine: Path | None = None
) -> tuple[KernelMachine, KernelMachine]:
    """As recorded and as loaded."""
    loaded = KernelMachine.load(machine or run / "machine", make())
    module = make()
    module.load_state_dict(loaded._network.module.state_dict())
    return KernelMachine(module, [read_chord(recorded(run / "recording", i)) for i in range(4)]), loaded


@pytest.mark.parametrize(("bits", "least"), [(16, 0.99999), (8, 0.997)])
def test_the_network_is_the_same_to_the_last_bit_and_predictions_nearly(
    bits: int, least: float, plain_run: Path, tmp_path: Path
) -> None:
    machine = KernelMachineExporter(plain_run / "recording").export(tmp_path / "machine", row_bits=bits)
    recorded, loaded = machines(plain_run, plain, machine)
    x, y = digits()[1].tensors
    assert torch.equal(recorded.network_outputs(x), loaded.network_outputs(x))
    assert torch.equal(recorded.example_ids, loaded.example_ids)
    assert torch.equal(recorded.self_influence(), loaded.self_influence())
    learned = (recorded.network_outputs(x) - recorded.bias(x)).norm()
    for ask in (KernelMachine.predict, KernelMachine.bias):
        apart = float((ask(recorded, x) - ask(loaded, x)).norm() / learned)
        assert apart < 1e-2, (ask.__name__, apart)
    pairs = zip(recorded.contributions(x[:20], y[:20]), loaded.contributions(x[:20], y[:20]), strict=True)
    alike = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs)
    assert alike > least, alike


@pytest.mark.parametrize("changed", [False, True])
def test_the_ledger_of_the_loaded_machine_closes(changed: bool, plain_run: Path) -> None:
    loaded = machines(plain_run, plain)[1]
    x, y = digits()[1].tensors
    ledger = (loaded.without(loaded.example_ids[:40]) if changed else loaded).explain(x, y).ledger
    total = torch.stack([ledger[name] for name in LEDGER_TERMS]).sum(0)
    wanted = loaded.network_outputs(x).gather(1, y[:, None])[:, 0]
    sizes = torch.stack([ledger[name].abs() for name in LEDGER_TERMS]).sum(0)
    assert float(((total - wanted).abs() / sizes).max()) < 1e-5


def test_rounding_of_nodes_does_not_add_up(run: Path) -> None:
    node: Node | None = None
    for i in range(4):
        exact = read_chord(recorded(run / "recording", i))
        chord, node = read_packed(run / "machine" / chord_name(i), node)
        for name, weight in exact.weights(1.0).items():
            gap = float((node.weights[name] - weight).abs().max())
            assert gap <= float(exact.delta[name].abs().max()) / 100, (i, name, gap)
            assert i < 3 or torch.equal(node.weights[name], weight), name
        assert all(torch.equal(chord.end_buffers[n], b) for n, b in exact.end_buffers.items())


def test_an_artifact_takes_few_bytes(run: Path, recording: Path, tmp_path: Path) -> None:
    rows, rest, weights = 0, 0, 0
    for i in range(4):
        groups, _ = read_group(run / "machine" / chord_name(i))
        sizes = {f"{g}/{n}": t.numel() * t.element_size() for g, named in groups.items() for n, t in named.items()}
        own = {f"rows/{n}" for n in ("rows", "exponents", "example_ids", "self_inner", "rest")}
        count = len(groups["rows"]["example_ids"])
        assert sum(sizes[n] for n in own) <= count * (2 * SKETCH_DIM + 8) + 5 * SKETCH_DIM, i
        exact = read_chord(recorded(run / "recording", i))
        weights = sum(t.numel() for t in exact.start.values())
        rows, rest = rows + count, rest + sum(size for n, size in sizes.items() if n not in own)
        factors = sum(t.numel() for s in exact.sketches.values() for t in s.tensors().values())
        assert exact.second_stage is not None
        features = exact.second_stage.shape[1]
        rest -= 2 * factors + SKETCH_DIM * (features - SKETCH_DIM) + 5 * features
    # first and last node, and two bytes for D, one and a little more for each of displacement, decay and residual
    assert rest <= 8 * weights + 4 * 5.4 * weights + 4 * 400, (rest, weights)
    eight = KernelMachineExporter(recording).export(tmp_path / "eight", row_bits=8)
    groups, _ = read_group(eight / MIDDLE)
    taken = sum(groups["rows"][n].nbytes for n in ("rows", "row_exponents", "example_ids", "self_inner"))
    assert taken <= len(groups["rows"]["example_ids"]) * (SKETCH_DIM + 9)
    with pytest.raises(ValueError, match="row_bits must be 8 or 16, found 4"):
        KernelMachineExporter(recording).export(tmp_path / "quarter", row_bits=4)


# formats


def heavy(*shape: int) -> Tensor:
    """Numbers over many orders of magnitude, both signs."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator) * torch.exp(6 * torch.randn(*shape, generator=generator))


def test_blocks_are_within_half_a_step_of_their_largest() -> None:
    for shape in ((3, 50), (7,), (1,), (130, 2, 2)):
        groups: dict[str, dict[str, Tensor]] = {}
        value = heavy(*shape)
        pack_blocks("residual", {"a": value}, groups)
        found = unpack("residual", groups)["a"]
        assert found.shape == value.shape
        for part, exact in zip(found.flatten().split(BLOCK), value.flatten().split(BLOCK), strict=True):
            assert float((part - exact).abs().max()) <= float(exact.abs().max()) / 127


def test_logarithms_keep_zeros_and_are_even() -> None:
    value = heavy(200).abs()
    value[::7] = 0
    groups: dict[str, dict[str, Tensor]] = {}
    pack_logarithms("preconditioner", {"a": value, "none": value * 0, "even": torch.ones(3)}, groups)
    found = unpack("preconditioner", groups)
    assert groups["preconditioner"]["a"].dtype is torch.int16
    assert torch.equal(found["a"] == 0, value == 0)
    assert torch.equal(found["none"], value * 0)
    assert torch.equal(found["even"], torch.ones(3))
    there = value > 0
    step = float((value[there].max().log() - value[there].min().log()) / 65534)
    assert float((found["a"][there].double().log() - value[there].double().log()).abs().max()) <= 0.5 * step + 1e-6


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_keep_their_sum(bits: int) -> None:
    rows = torch.randn(2000, 10, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 2000).unsqueeze(1)
    found = unpack_rows(pack_rows(rows, bits))
    worst = ((found - rows).abs().amax(1) / rows.abs().amax(1))[:-1].max()  # the last one is the largest
    assert bits == 16 or float(worst) < 1 / 31, float(worst)
    gap = (found.double().sum(0) - rows.double().sum(0)).abs().max() / rows.abs().max()
    assert float(gap) < 1e-6, float(gap)


def test_what_is_no_float32_or_not_finite_is_kept_as_it_is() -> None:
    values = {"double": heavy(9).double(), "infinite": torch.tensor([1.0, float("inf")]), "half": heavy(5).half()}
    for pack in (pack_blocks, pack_logarithms):
        groups: dict[str, dict[str, Tensor]] = {}
        pack("decay", values, groups)
        assert groups == {"decay": values}
        assert unpack("decay", groups).keys() == values.keys()
    assert pack_rows(heavy(4, 3).double(), 8)["rows"].dtype is torch.float64


# files

Z = torch.zeros
Groups = dict[str, dict[str, Tensor]]


def put(group: str, name: str, value: Tensor) -> Callable[[Groups], object]:
    return lambda groups: groups.setdefault(group, {}).update({name: value})


def drop(group: str, name: str | None = None) -> Callable[[Groups], object]:
    return lambda groups: groups.pop(group) if name is None else groups[group].pop(name)


MISFITS = {
    "no displacement": drop("delta"),
    "no exponents of the displacement": drop("delta.exponents"),
    "no exponents of one displacement": drop("delta.exponents", WEIGHT),
    "too few exponents": put("delta.exponents", WEIGHT, Z(3, dtype=torch.int8)),
    "exponents that are floats": put("delta.exponents", WEIGHT, Z(12)),
    "exponents of nothing": put("decay.exponents", "nope", Z(3, dtype=torch.int8)),
    "an end beside a displacement": put("end", WEIGHT, Z(12, 64)),
    "D of another type": put("preconditioner", WEIGHT, Z(12, 64, dtype=torch.int8)),
    "D of another shape": put("preconditioner", WEIGHT, Z(12, 63, dtype=torch.int16)),
    "D without its scale": drop("preconditioner.scale", WEIGHT),
    "D with a scale of three": put("preconditioner.scale", WEIGHT, Z(3, dtype=torch.float64)),
    "rows without exponents": drop("rows", "exponents"),
    "rows with too few exponents": put("rows", "exponents", Z(3, dtype=torch.int8)),
    "rows with exponents of another type": put("rows", "exponents", Z(3)),
    "ids that are small integers": put("rows", "example_ids", Z(3, dtype=torch.int16)),
    "rows with too few row exponents": put("rows", "row_exponents", Z(3, dtype=torch.int8)),
    "rows of eight bits without row exponents": put("rows", "rows", Z(500, SKETCH_DIM, dtype=torch.int8)),
    "rows without a rest": drop("rows", "rest"),
    "rows with a rest of another width": put("rows", "rest", Z(3)),
    "no pivots": drop("rows", "pivots"),
    "no exponents of the second stage": drop("rows", "stage_exponents"),
    "no second stage": drop("rows", "second_stage"),
    "pivots all the same": put("rows", "pivots", Z(SKETCH_DIM, dtype=torch.int32)),
    "pivots beyond all features": put("rows", "pivots", 10**6 + torch.arange(SKETCH_DIM, dtype=torch.int32)),
    "pivots below 0": put("rows", "pivots", -torch.arange(SKETCH_DIM, dtype=torch.int32)),
    "pivots of two dimensions": put("rows", "pivots", Z(SKETCH_DIM, 1, dtype=torch.int32)),
    "billions of pivots and no features": put("rows", "second_stage", Z(0, 2**40, dtype=torch.int8)),
    "factor without exponents": drop("query_right.exponents", WEIGHT),
    "factor with too few exponents": put("query_right.exponents", WEIGHT, Z(3, dtype=torch.int8)),
    "factor of another width": put("query_right", WEIGHT, Z(16, 63, dtype=torch.int8)),
    "no buffers at the end": drop("end_buffers"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_of_a_packed_chord_that_do_not_fit_are_refused(name: str, run: Path, tmp_path: Path) -> None:
    _, node = read_packed(run / "machine" / chord_name(0), None)
    groups, facts = read_group(run / "machine" / MIDDLE)
    MISFITS[name](groups)
    path = write_group(tmp_path / "x.safetensors", groups, facts)
    with refused(r"^x\.safetensors: (not a chord: |.*no elements and a dimension of 1099511627776)"):
        read_packed(path, node)


@pytest.mark.parametrize("value", [None, 3, [3], ["nope"], "net"])
def test_unattributed_parameters_that_are_none_are_refused(value: object, run: Path, tmp_path: Path) -> None:
    groups, facts = read_group(run / "machine" / chord_name(0))
    path = write_group(tmp_path / "x.safetensors", groups, {**facts, "unattributed": value})
    with refused(r"^x\.safetensors: not a chord: "):
        read_packed(path, None)


def test_the_chord_that_they_are_made_of_is_read(run: Path) -> None:
    _, node = read_packed(run / "machine" / chord_name(0), None)
    chord, _ = read_packed(run / "machine" / MIDDLE, node)
    assert chord.index == 1
    with refused(rf"^{MIDDLE}: not a chord: "):
        read_packed(run / "machine" / MIDDLE, None)


@pytest.mark.parametrize("part", ["query_right", "rows", "second_stage"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_parts_of_another_precision_than_the_weights_are_refused(
    part: str, dtype: torch.dtype, run: Path, tmp_path: Path
) -> None:
    """They would meet in a product, at the first question."""
    groups, facts = read_group(run / "machine" / chord_name(0))
    if part == "query_right":
        groups[part] = {name: value.to(dtype) for name, value in groups[part].items()}
        groups.pop(f"{part}.exponents")
    elif part == "rows":
        groups["rows"]["rows"] = groups["rows"]["rows"].to(dtype)
        for name in ("exponents", "rest"):
            groups["rows"].pop(name)
    else:
        codes, pivots = groups["rows"]["second_stage"], groups["rows"].pop("pivots")
        groups["rows"].pop("stage_exponents")
        groups["rows"][part] = torch.zeros(len(codes), codes.shape[1] + len(pivots), dtype=dtype)
    path = write_group(tmp_path / "x.safetensors", groups, facts)
    with refused(r"^x\.safetensors: not a chord: .*rows and sketches of .* for weights of \['torch.float32'\]"):
        read_packed(path, None)
