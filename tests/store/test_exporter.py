"""Recordings, whole and interrupted, and their export."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.store import publish_json
from tests.store.artifacts import names, network, recorded, refused


def files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_an_interrupted_recording_is_exported_as_far_as_it_went(
    closed: int, run: Path, recording: Path, tmp_path: Path
) -> None:
    for i in range(closed, 5):  # the last one says that the fit ended
        recorded(recording, i).unlink()
    for path in (recording / "rank-0000").glob("open-*"):
        path.unlink()
    before = files(recording)
    out = KernelMachineExporter(recording).export(tmp_path / "deep" / "out")
    verify(out)
    machine = KernelMachine.load(out, network())
    assert [chord.index for chord in machine.chords] == list(range(closed))
    whole = KernelMachine.load(run / "machine", network())
    assert [chord.last_step for chord in machine.chords] == [chord.last_step for chord in whole.chords][:closed]
    assert names(tmp_path / "deep") == ["out"]
    assert files(recording) == before


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_chord_is_refused_and_named(missing: int, recording: Path) -> None:
    recorded(recording, missing).unlink()
    with refused(rf"rank-0000/{recorded(recording, missing).name} is missing from the recording"):
        KernelMachineExporter(recording)


def test_no_chord_yet(recording: Path, tmp_path: Path) -> None:
    for i in range(5):
        recorded(recording, i).unlink()
    for path in (recording / "rank-0000").glob("open-*"):
        path.unlink()
    with refused("has no closed chord yet"):
        KernelMachineExporter(recording).export(tmp_path / "out")
    assert names(tmp_path) == ["recording"]


def test_what_is_no_recording_is_refused(machine: Path, tmp_path: Path) -> None:
    for path in (machine, tmp_path, tmp_path / "nowhere"):
        with refused(re.escape(f"{path} is not a recording: it has no recording.json")):
            KernelMachineExporter(path)


def test_an_export_overwrites_nothing(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    exporter = KernelMachineExporter(recording)
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not empty"):
            exporter.export(tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    verify(exporter.export(tmp_path / "empty"))
    assert names(tmp_path) == ["empty", "file", "full", "recording"]


WRITER = "artifact_writer"


@pytest.mark.parametrize(
    "site", [f"{WRITER}.file_table", f"{WRITER}.publish_json", f"{WRITER}.publish", "exporter.publish_tensors"]
)
def test_a_failing_export_leaves_nothing(
    site: str, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    (tmp_path / "empty").mkdir()
    exporter, before = KernelMachineExporter(recording), files(recording)
    with monkeypatch.context() as patch:
        patch.setattr(f"lightning_pathkernel.{site}", fails)
        for out in ("out", "empty"):
            with pytest.raises(OSError, match="disk full"):
                exporter.export(tmp_path / out)
    assert names(tmp_path) == ["empty", "recording"]
    assert names(tmp_path / "empty") == []
    assert before == files(recording)
    verify(exporter.export(tmp_path / "out"))


def test_two_exports_are_alike(recording: Path, tmp_path: Path) -> None:
    first, second = (KernelMachineExporter(recording).export(tmp_path / n) for n in ("a", "b"))
    assert names(first) == names(second)
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names(first))


def test_a_file_system_without_hard_links(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT, many network mounts and Colab's Drive."""

    def none(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", none)
    verify(KernelMachineExporter(recording).export(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="is not overwritten"):
        publish_json(recording / "recording.json", {})


def test_a_damaged_recording_is_refused_by_name(recording: Path, tmp_path: Path) -> None:
    recorded(recording, -1).unlink()
    with refused(r"rank-0000/segment-000000\.safetensors is missing"):
        KernelMachineExporter(recording).export(tmp_path / "out")
    for text in ("", '{"module": ', "[]", "{}"):
        (recording / "recording.json").write_text(text)
        with refused(r"recording\.json"):
            KernelMachineExporter(recording).export(tmp_path / "out")
    assert names(tmp_path) == ["recording"]
