"""Examples stay in their files: opened at once, asked in little memory, every chunk checked before it is used."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pathkernel import KernelMachine, KernelMachineExporter, stored_path, verify
from lightning_pathkernel.example_rows import Block
from lightning_pathkernel.ranking import ChordShare, strongest_contributions
from lightning_pathkernel.store import CHUNK, read_group, write_group
from lightning_pathkernel.store.checked_file import CheckedFile
from tests.golden.make import Tiny, tumours
from tests.helpers import digits
from tests.store.artifacts import MIDDLE, flip, network, refused, reseal
from tests.store.large import enlarged, sparse

GOLDEN = Path(__file__).parents[1] / "golden" / "1.1" / "rows-16"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300,000 examples in each of three chords, of 8 numbers: 7 MB each; not to be changed."""
    return enlarged(GOLDEN, tmp_path_factory.mktemp("many") / "machine", 300_000)


def queries() -> Tensor:
    return tumours()[0][32:]


# size


def opened_in(path: Path) -> float:
    began = time.perf_counter()
    machine = KernelMachine.load(path, Tiny())
    took = time.perf_counter() - began
    assert torch.equal(
        machine.network_outputs(queries()), KernelMachine.load(GOLDEN, Tiny()).network_outputs(queries())
    )
    with refused(r"chord-00000\d\.safetensors: not a chord: example ids do not ascend"):
        machine.contributions(queries())
    return took


@pytest.mark.parametrize("gigabytes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_large_artifact_is_opened_within_a_second(gigabytes: int, tmp_path: Path) -> None:
    path = sparse(GOLDEN, tmp_path / "machine", gigabytes << 30)
    assert sum(p.stat().st_size for p in path.iterdir()) > gigabytes << 30
    best = min(opened_in(path) for _ in range(2))
    assert best < 1, best


def grown(machine: KernelMachine, x: Tensor) -> float:
    """MB by which the process is at most larger while it explains."""
    machine.explain(x[:1], top_k=1)

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    machine.explain(x, top_k=5)
    return (peak() - before) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_top_k_takes_memory_that_does_not_grow_with_the_examples(many: Path, tmp_path: Path) -> None:
    """Of 300,000 examples in 3 chords the contributions to 64 queries would take 77 MB, their rows 29 MB."""
    few = enlarged(GOLDEN, tmp_path / "few", 5_000)
    x = queries().repeat(8, 1)
    sizes = {path: grown(KernelMachine.load(path, Tiny()), x) for path in (few, many)}
    assert sizes[many] < sizes[few] + 12, sizes
    assert sizes[many] < 30, sizes


def test_the_strongest_of_many_are_those_of_all_contributions(many: Path) -> None:
    machine = KernelMachine.load(many, Tiny())
    assert len(machine.example_ids) == 600_000, "chords hold even ids, or odd ones"
    why, everything = machine.explain(queries(), top_k=7, complete=False), machine.contributions(queries())
    assert torch.equal(why.contributions[:, :7], everything.topk(7).values)
    assert torch.equal(why.contributions[:, 7:], everything.topk(7, largest=False).values)
    columns = torch.searchsorted(machine.example_ids, why.example_ids)
    assert torch.equal(everything.gather(1, columns), why.contributions)


class Fixed:
    """Examples of one chord, in blocks of given lengths."""

    width = 1

    def __init__(self, ids: Tensor, rows: Tensor, lengths: list[int]) -> None:
        self.ids, self.rows, self.lengths = ids, rows, lengths

    def blocks(self, length: int | None = None):
        assert length is None
        for ids, rows in zip(self.ids.split(self.lengths), self.rows.split(self.lengths), strict=True):
            yield Block(ids, lambda start, stop, rows=rows: rows[start:stop])


def test_blocks_of_any_lengths_are_merged_by_id() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        shares, whole = [], torch.zeros(2, 40, dtype=torch.float64)
        for _ in range(3):
            count = int(torch.randint(0, 40, (1,), generator=generator))
            ids = torch.randperm(40, generator=generator)[:count].sort().values
            rows = torch.randn(count, 1, generator=generator, dtype=torch.float64)
            cuts = sorted(torch.randint(0, count + 1, (3,), generator=generator).tolist())
            lengths = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
            features = torch.randn(2, 1, generator=generator, dtype=torch.float64)
            shares.append(ChordShare(features, Fixed(ids, rows, lengths)))
            whole.index_add_(1, ids, features @ rows.T)
        found, values = strongest_contributions(shares, 3)
        seen = torch.unique(torch.cat([share.examples.ids for share in shares]))
        best = whole[:, seen].topk(min(3, len(seen)))
        torch.testing.assert_close(values[:, : best.values.shape[1]], best.values)
        torch.testing.assert_close(whole.gather(1, found), values)


# the same answers


@pytest.mark.parametrize("bits", [8, 16])
def test_answers_from_files_are_those_from_memory(bits: int, run: Path, tmp_path: Path) -> None:
    path = KernelMachineExporter(run / "recording").export(tmp_path / "machine", row_bits=bits)
    stored, x = KernelMachine.load(path, network()), digits()[1].tensors[0][:12]
    module = network()
    module.load_state_dict(stored._network.module.state_dict())
    held = KernelMachine(module, stored.chords)
    for ask in (KernelMachine.predict, KernelMachine.bias, KernelMachine.network_outputs):
        torch.testing.assert_close(ask(stored, x), ask(held, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(stored.contributions(x), held.contributions(x))
    assert torch.equal(stored.self_influence(), held.self_influence())
    one, other = stored.explain(x), held.explain(x)
    assert torch.equal(one.example_ids, other.example_ids)
    gone = stored.example_ids[::3]
    torch.testing.assert_close(stored.without(gone).predict(x), held.without(gone).predict(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(stored.without(gone).contributions(x), held.without(gone).contributions(x))
    again = stored.without(gone[:5]).without(gone[5:])
    torch.testing.assert_close(again.explain(x).ledger, stored.without(gone).explain(x).ledger, rtol=1e-4, atol=1e-5)


def test_chords_too_large_to_be_kept_are_read_anew(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kept = digits()[1].tensors[0][:5], KernelMachine.load(machine, network())
    expected = kept.explain(x)
    monkeypatch.setattr(stored_path, "_KEPT_BYTES", 0)
    anew = KernelMachine.load(machine, network())
    assert kept._path._kept
    found = anew.explain(x)
    assert not anew._path._kept
    assert torch.equal(found.example_ids, expected.example_ids)
    assert torch.equal(found.contributions, expected.contributions)
    reduced = anew.without(anew.example_ids[:9]).predict(x)
    assert torch.equal(reduced, kept.without(anew.example_ids[:9]).predict(x))


# damage


@pytest.fixture
def large(many: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(many, tmp_path / "machine"))


def test_only_the_chunks_that_are_touched_are_read_and_each_is_checked(large: Path) -> None:
    """Self-influences are in other chunks than rows."""
    groups, _ = read_group(large / MIDDLE)
    expected = KernelMachine.load(large, Tiny()).self_influence()
    offset = (large / MIDDLE).read_bytes().index(groups["rows"]["rows"].numpy().tobytes())
    where = offset + groups["rows"]["rows"].nbytes // 2
    flip(large / MIDDLE, where)
    machine = KernelMachine.load(large, Tiny())
    assert torch.equal(machine.self_influence(), expected)
    chunk = where // CHUNK
    named = rf"^{MIDDLE}: .* is {chunk}, bytes {chunk * CHUNK} to {(chunk + 1) * CHUNK - 1}: damaged or altered$"
    for ask in (machine.predict, machine.explain, machine.contributions):
        with refused(named):
            ask(queries())
    with refused(named):
        verify(large)


def test_a_file_that_changes_after_it_was_opened_is_noticed(large: Path) -> None:
    machine = KernelMachine.load(large, Tiny())
    expected = machine.explain(queries())
    os.utime(large / MIDDLE)
    assert torch.equal(machine.explain(queries()).contributions, expected.contributions)
    with open(large / MIDDLE, "r+b") as file:  # in place
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with refused(rf"^{MIDDLE}: .*damaged or altered$"):
        machine.explain(queries())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999999])
def test_a_file_that_shrinks_after_it_was_opened_is_refused_and_the_process_lives(share: float, large: Path) -> None:
    machine = KernelMachine.load(large, Tiny())
    machine.explain(queries())
    os.truncate(large / MIDDLE, int(share * (large / MIDDLE).stat().st_size))
    for ask in (machine.explain, machine.contributions):
        with refused(f"^{MIDDLE}: replaced or resized since it was opened"):
            ask(queries())


def test_a_file_that_is_replaced_after_it_was_opened_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = KernelMachine.load(machine, network())
    for file in found._path.files:
        file.file.close()
    copy = machine / "copy"
    shutil.copy(machine / MIDDLE, copy)
    copy.replace(machine / MIDDLE)
    with refused(f"^{MIDDLE}: replaced or resized since it was opened"):
        found.explain(digits()[1].tensors[0][:2])


def test_files_that_are_no_longer_there_are_refused(machine: Path) -> None:
    found = KernelMachine.load(machine, network())
    for file in found._path.files:
        file.file.close()
    shutil.rmtree(machine)
    with refused(r"^chord-000000\.safetensors: cannot be read"):
        found.explain(digits()[1].tensors[0][:2])


def test_any_number_of_files_may_be_open(tmp_path: Path) -> None:
    """More than a process may have descriptors for: the least recently used map is given up."""
    files = []
    for i in range(200):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 10)
        files.append(CheckedFile(tmp_path / f"{i}"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [bytes(f.read(3, 5)) for f in files] == [bytes([i]) * 2 for i in range(200)]
    assert len(os.listdir("/proc/self/fd")) < before + 140
    for file in files:
        file.close()


# examples that make no sense


@pytest.mark.parametrize("ids", ["twice", "unsorted"])
def test_ids_that_do_not_ascend_are_refused(ids: str, machine: Path) -> None:
    groups, facts = read_group(machine / MIDDLE)
    found = groups["rows"]["example_ids"]
    groups["rows"]["example_ids"] = found.flip(0).contiguous() if ids == "unsorted" else found.clamp_min(int(found[1]))
    (machine / MIDDLE).unlink()
    write_group(machine / MIDDLE, groups, facts)
    reseal(machine)
    with refused(f"^{MIDDLE}: not a chord: example ids do not ascend"):
        KernelMachine.load(machine, network())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["rows", "rest"])
def test_rows_that_are_not_finite_are_refused(part: str, value: float, machine: Path) -> None:
    groups, facts = read_group(machine / MIDDLE)
    groups["rows"][part].view(-1)[0] = value
    (machine / MIDDLE).unlink()
    write_group(machine / MIDDLE, groups, facts)
    reseal(machine)
    found = KernelMachine.load(machine, network())
    with refused(f"^{MIDDLE}: not a chord: .* not finite"):
        found.predict(digits()[1].tensors[0][:2])
