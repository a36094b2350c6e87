"""`KernelMachine.save`: a machine becomes an artifact again, to the last bit, or without what was taken out of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_pathkernel import KernelMachine, KernelMachineExporter, artifact_writer, verify
from lightning_pathkernel.store import read_group
from tests.golden.make import Tiny, tumours
from tests.helpers import digits
from tests.store import plain_reader
from tests.store.artifacts import MANIFEST, MIDDLE, flip, names, network, refused
from tests.store.large import enlarged

GOLDEN = Path(__file__).parents[1] / "golden"


def unseen() -> Tensor:
    return tumours()[0][32:]


@pytest.mark.parametrize("name", ["1.0/rows-16", "1.0/rows-8", "1.1/rows-16"])
def test_a_machine_is_saved_as_it_was_loaded(name: str, tmp_path: Path) -> None:
    """One of an old version becomes one of this version."""
    out = KernelMachine.load(GOLDEN / name, Tiny()).save(tmp_path / "deep" / "out")
    verify(out)
    assert names(out) == names(GOLDEN / name)
    assert names(tmp_path / "deep") == ["out"]
    for path in [*(GOLDEN / name).glob("*.safetensors"), GOLDEN / name / "metrics.json"]:
        assert (out / path.name).read_bytes() == path.read_bytes()
    one, other = (json.loads((p / MANIFEST).read_text()) for p in (GOLDEN / name, out))
    assert other["version"] == [1, 1]
    assert all(one[key] == other[key] for key in ("module", "optimizer", "settings", "ids", "chords"))
    plain_reader.read_manifest(out)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_was_taken_out_is_gone_and_all_else_is_as_it_was(
    bits: int, share: float, run: Path, tmp_path: Path
) -> None:
    path = KernelMachineExporter(run / "recording").export(tmp_path / "whole", row_bits=bits)
    whole, x = KernelMachine.load(path, network()), digits()[1].tensors[0][:20]
    gone = whole.example_ids[torch.randperm(len(whole.example_ids))[: int(share * len(whole.example_ids))]]
    reduced = whole.without(gone)
    verify(reduced.save(tmp_path / "out"))
    again = KernelMachine.load(tmp_path / "out", network())
    assert torch.equal(again.example_ids, reduced.example_ids)
    assert not torch.isin(again.example_ids, gone).any()
    assert torch.equal(again.contributions(x), reduced.contributions(x))
    assert torch.equal(again.self_influence(), reduced.self_influence())
    assert torch.equal(again.network_outputs(x), whole.network_outputs(x))
    torch.testing.assert_close(again.predict(x), reduced.predict(x))
    one, other = (m.explain(x, top_k=1).ledger for m in (reduced, again))
    for term, value in one.items():
        torch.testing.assert_close(other[term], value, rtol=1e-5, atol=1e-4, msg=lambda m, t=term: f"{t}: {m}")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["left_out"] == len(gone)
    assert f"{len(gone)} training examples were taken out" in (tmp_path / "out" / "README.md").read_text()
    assert "metrics.json" not in names(tmp_path / "out"), "they are those of another machine"
    assert len(plain_reader.machine(tmp_path / "out")) == 4
    twice = again.without(reduced.example_ids[:2]).save(tmp_path / "twice")
    rest = len(reduced.example_ids[:2])
    assert len(KernelMachine.load(twice, network()).example_ids) == len(reduced.example_ids) - rest
    assert json.loads((twice / MANIFEST).read_text())["left_out"] == len(gone) + rest


def test_names_of_what_was_taken_out_are_gone_too(tmp_path: Path) -> None:
    whole = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny())
    known = dict(zip(whole.names_of(whole.example_ids), whole.example_ids.tolist(), strict=True))
    out = whole.without([known["tumour-3"], known["tumour-30"]]).save(tmp_path / "out")
    kept = KernelMachine.load(out, Tiny())
    assert kept.example_names == {i: name for name, i in known.items() if name not in ("tumour-3", "tumour-30")}
    assert all(b"tumour-30" not in path.read_bytes() for path in out.iterdir())


def test_a_machine_that_was_never_an_artifact_is_saved_too(run: Path, tmp_path: Path) -> None:
    loaded, x = KernelMachine.load(run / "machine", network()), digits()[1].tensors[0][:20]
    module = network()
    module.load_state_dict(loaded._network.module.state_dict())
    out = KernelMachine(module, loaded.chords).save(tmp_path / "out")
    verify(out)
    again = KernelMachine.load(out, network())
    assert torch.equal(again.network_outputs(x), loaded.network_outputs(x))
    torch.testing.assert_close(again.contributions(x), loaded.contributions(x), rtol=1e-3, atol=1e-3)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not empty"):
            machine.save(tmp_path / name)

    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    for site in ("publish", "publish_json", "file_table"):
        with monkeypatch.context() as patch:
            patch.setattr(artifact_writer, site, fails)
            with pytest.raises(OSError, match="disk full"):
                machine.save(tmp_path / "out")
    assert names(tmp_path) == ["full", "link"]


def test_a_machine_whose_place_cannot_be_synced_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, seen = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny()), []
    sync = artifact_writer.fsync_directory

    def fails(directory: Path) -> None:
        if directory == tmp_path:
            seen.append(names(tmp_path))
            raise OSError(errno.EIO, "input/output error")
        sync(directory)

    monkeypatch.setattr(artifact_writer, "fsync_directory", fails)
    with pytest.raises(OSError, match="input/output error"):
        machine.save(tmp_path / "out")
    assert seen == [["out"]]
    assert names(tmp_path) == []


@pytest.mark.parametrize("taken", ["file", "full", "empty"])
def test_a_place_that_is_taken_meanwhile_is_not_replaced(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who is quicker, after the place was found to be free and before the rename."""
    machine, out = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny()), tmp_path / "out"
    calls: list[Path] = []

    def check(place: Path) -> None:
        calls.append(place)
        if len(calls) == 2:
            out.write_text("mine") if taken == "file" else out.mkdir()
            if taken == "full":
                (out / "mine").write_text("mine")

    monkeypatch.setattr(artifact_writer, "_check_free", check)
    if taken == "empty":
        verify(machine.save(out))
    else:
        with pytest.raises(FileExistsError, match="out exists and is not empty"):
            machine.save(out)
        assert (out if taken == "file" else out / "mine").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_readers_see_all_of_it_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked at every file that is published and at every rename."""
    machine, out, seen = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny()), tmp_path / "out", []
    real_publish, real_json, real_rename = artifact_writer.publish, artifact_writer.publish_json, Path.rename

    def look() -> None:
        seen.append(out.exists())
        if out.exists():
            verify(out)

    def looking(real: object) -> object:
        def call(*args: object) -> object:
            look()
            result = real(*args)
            look()
            return result

        return call

    monkeypatch.setattr(artifact_writer, "publish", looking(real_publish))
    monkeypatch.setattr(artifact_writer, "publish_json", looking(real_json))
    monkeypatch.setattr(Path, "rename", looking(real_rename))
    machine.save(out)
    assert len(seen) >= 14
    assert sorted(seen) == seen
    assert seen[-1]


def test_damage_is_not_copied(tmp_path: Path) -> None:
    path = enlarged(GOLDEN / "1.1" / "rows-16", tmp_path / "machine", 200_000)
    machine = KernelMachine.load(path, Tiny())
    groups, _ = read_group(path / MIDDLE)
    offset = (path / MIDDLE).read_bytes().index(groups["rows"]["rows"].numpy().tobytes())
    flip(path / MIDDLE, offset + groups["rows"]["rows"].nbytes // 2)
    with refused(f"^{MIDDLE}: .*damaged or altered"):
        machine.save(tmp_path / "out")
    assert names(tmp_path) == ["machine"]


def test_a_machine_is_saved_to_a_url(tmp_path: Path) -> None:
    machine = KernelMachine.load(GOLDEN / "1.1" / "rows-16", Tiny())
    assert machine.save("memory://saved/machine") == "memory://saved/machine"
    answers = load_file(GOLDEN / "1.1" / "rows-16.answers.safetensors")
    found = KernelMachine.load("memory://saved/machine", Tiny())
    torch.testing.assert_close(found.predict(unseen()), answers["predict"], rtol=1e-5, atol=1e-5)
    fsspec.filesystem("memory").rm("/saved", recursive=True)
