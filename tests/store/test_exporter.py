"""Recordings, whole and interrupted, and their export."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.chord_io import chord_name
from lightning_pathkernel.exporter import open_recording, record_metrics
from lightning_pathkernel.store import publish_json
from tests.store.artifacts import CONSTANTS, names, network, refused


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_an_interrupted_recording_is_exported_as_far_as_it_went(
    closed: int, run: Path, recording: Path, tmp_path: Path
) -> None:
    for i in range(closed, 4):
        (recording / chord_name(i)).unlink()
    (recording / "metrics.json").unlink()
    before = names(recording)
    out = KernelMachineExporter(recording).export(tmp_path / "deep" / "out")
    verify(out)
    machine = KernelMachine.load(out, network())
    assert [chord.index for chord in machine.chords] == list(range(closed))
    whole = KernelMachine.load(run / "machine", network())
    assert [chord.last_step for chord in machine.chords] == [chord.last_step for chord in whole.chords][:closed]
    assert names(tmp_path / "deep") == ["out"]
    assert names(recording) == before


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_chord_is_refused_and_named(missing: int, recording: Path) -> None:
    (recording / chord_name(missing)).unlink()
    with refused(rf"{chord_name(missing)} is missing from the recording"):
        KernelMachineExporter(recording)


def test_no_chord_yet(recording: Path) -> None:
    for i in range(4):
        (recording / chord_name(i)).unlink()
    with refused("has no closed chord yet"):
        KernelMachineExporter(recording)


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
    "site", [f"{WRITER}.file_table", f"{WRITER}.publish_json", f"{WRITER}.publish", "exporter._place"]
)
def test_a_failing_export_leaves_nothing(
    site: str, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    (tmp_path / "empty").mkdir()
    exporter, before = KernelMachineExporter(recording), {p: p.read_bytes() for p in recording.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(f"lightning_pathkernel.{site}", fails)
        for out in ("out", "empty"):
            with pytest.raises(OSError, match="disk full"):
                exporter.export(tmp_path / out)
    assert names(tmp_path) == ["empty", "recording"]
    assert names(tmp_path / "empty") == []
    assert before == {p: p.read_bytes() for p in recording.iterdir()}
    verify(exporter.export(tmp_path / "out"))


def test_two_exports_are_alike(recording: Path, tmp_path: Path) -> None:
    first, second = (KernelMachineExporter(recording).export(tmp_path / n) for n in ("a", "b"))
    assert names(first) == names(second)
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names(first))


def test_another_file_system(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording cannot be linked from there: it is copied."""
    link = os.link

    def across(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", across)
    out = KernelMachineExporter(recording).export(tmp_path / "out")
    verify(out)
    assert all(p.stat().st_nlink == 1 for p in out.iterdir())


def test_a_file_system_without_hard_links(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT, many network mounts and Colab's Drive."""

    def none(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", none)
    verify(KernelMachineExporter(recording).export(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="is not overwritten"):
        publish_json(recording / "recording.json", {})


def test_a_damaged_recording_is_refused_by_name(recording: Path, tmp_path: Path) -> None:
    (recording / CONSTANTS).unlink()
    with refused(CONSTANTS):
        KernelMachineExporter(recording).export(tmp_path / "out")
    for text in ("", '{"module": ', "[]", "{}"):
        (recording / "recording.json").write_text(text)
        with refused(r"recording\.json"):
            KernelMachineExporter(recording).export(tmp_path / "out")
    assert names(tmp_path) == ["recording"]


def test_a_second_recording_does_not_replace_the_first(recording: Path) -> None:
    before = {p: p.read_bytes() for p in recording.iterdir()}
    with pytest.raises(FileExistsError, match=r"recording\.json exists already"):
        open_recording(recording, network(), {})
    assert before == {p: p.read_bytes() for p in recording.iterdir()}


def test_a_newer_history_of_metrics_replaces_the_older(tmp_path: Path) -> None:
    for history in ([{"fidelity": 0.5}], [{"fidelity": 0.5}, {"fidelity": 0.9}]):
        record_metrics(tmp_path, history)
        assert json.loads((tmp_path / "metrics.json").read_text()) == {"history": history}
        assert names(tmp_path) == ["metrics.json"]
