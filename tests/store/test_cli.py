"""`pathkernel`: what it prints, and its exit status; no traceback, whatever it is given."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pathkernel import KernelMachine, cli
from lightning_pathkernel.commands import COMMANDS
from lightning_pathkernel.store import CHUNK, file_table
from tests.golden.make import Tiny
from tests.store.artifacts import edit, flip
from tests.store.large import enlarged

GOLDEN = Path(__file__).parents[1] / "golden" / "1.1" / "rows-16"


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def test_a_whole_artifact_is_told_with_its_sha256(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capsys, "verify", GOLDEN)
    assert (status, err) == (0, "")
    (digest,) = re.findall(r"sha256 of manifest\.json: ([0-9a-f]{64})$", out, re.MULTILINE)
    assert called(capsys, "verify", GOLDEN, "--expected-sha256", digest)[0] == 0
    status, _, err = called(capsys, "verify", GOLDEN, "--expected-sha256", "0" * 64)
    assert status == 1
    assert "another machine or altered" in err
    status, out, _ = called(capsys, "verify", GOLDEN, "--json")
    assert (status, json.loads(out)) == (
        0,
        {"ok": True, "files": 6, "bytes": json.loads(out)["bytes"], "sha256": digest},
    )


def test_the_first_bad_file_and_chunk_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = enlarged(GOLDEN, tmp_path / "machine", 100_000)
    name = "chord-000001.safetensors"
    flip(machine / name, CHUNK + 5)
    flip(machine / name, 2 * CHUNK + 5)
    flip(machine / "chord-000002.safetensors", 0)
    status, out, err = called(capsys, "verify", machine)
    assert (status, out) == (1, "")
    assert f"{name}: " in err
    assert f"is 1, bytes {CHUNK} to {2 * CHUNK - 1}: damaged or altered" in err
    status, out, _ = called(capsys, "verify", machine, "--json")
    found = json.loads(out)
    assert (status, found["ok"], found["file"], found["chunk"]) == (1, False, name, 1)


def test_info_says_what_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, "info", GOLDEN)
    assert status == 0
    for line in ("lightning_pathkernel.machine 1.1", "AdamW", "settings: sketch_dim"):
        assert line in out
    found = json.loads(called(capsys, "info", GOLDEN, "--json")[1])
    assert {key: found[key] for key in ("chords", "steps", "parameters", "trainable_parameters")} == {
        "chords": 3, "steps": 12, "parameters": 7, "trainable_parameters": 5,
    }  # fmt: skip
    assert (found["examples_of_the_largest_chord"], found["numbers_per_example_and_chord"]) == (32, 8)


def test_a_recording_is_exported(
    recording: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    status, told, _ = called(capsys, "export", recording, out, "--row-bits", "8")
    assert (status, told) == (0, f"{out}\n")
    assert called(capsys, "verify", out)[0] == 0
    status, _, err = called(capsys, "export", recording, out)
    assert status == 1
    assert "exists and is not empty" in err
    status, _, err = called(capsys, "export", tmp_path / "nowhere", tmp_path / "other")
    assert (status, "is not a recording: it has no recording.json" in err) == (1, True)
    status, _, err = called(capsys, "export", recording, tmp_path / "other", "--row-bits", "4")
    assert (status, "row_bits must be 8 or 16, found 4" in err) == (2, True)
    assert not (tmp_path / "other").exists()


CALLS: dict[str, tuple[list[str], int, str]] = {
    "nothing": ([], 2, "COMMAND"),
    "no such command": (["predict-all"], 2, "invalid choice: 'predict-all'"),
    "no directory": (["verify"], 2, "required"),
    "an unknown option": (["verify", "x", "--fast"], 2, "--fast"),
    "two directories": (["verify", "x", "y"], 2, "unrecognized arguments: y"),
    "no sha256": (["verify", str(GOLDEN), "--expected-sha256", "abc"], 2, "64 hexadecimal digits"),
    "no such kind of URL": (["verify", "nope://x"], 2, "nope"),
    "no artifact": (["info", "/nowhere/at/all"], 1, "it has no manifest.json"),
    "a file": (["verify", __file__], 1, "it has no manifest.json"),
    "no number": (["export", "a", "b", "--row-bits", "many"], 2, "row"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_told_what_is_wrong(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected, text = CALLS[name]
    status, out, err = called(capsys, *arguments)
    assert (status, out) == (expected, "")
    assert text in err
    assert len(err) < 1000


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, *([command] if command else []), "--help")
    assert status == 0
    assert out.count("\n") <= 24
    assert all(len(line) <= 80 for line in out.splitlines())
    if command is None:
        assert all(f" {name} " in out for name in COMMANDS)


def test_a_strangers_names_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = enlarged(GOLDEN, tmp_path / "machine", 10)
    edit(machine, lambda m: m.update(optimizer={"name": "\x1b]0;mine\x07SGD"}, files=file_table(machine)))
    out = called(capsys, "info", machine)[1]
    assert "\x1b" not in out
    assert "\\x1b]0;mine\\x07SGD" in out


def test_without_jsonargparse_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    status, _, err = called(capsys, "verify", GOLDEN)
    assert status == 2
    assert 'pip install "lightning-pathkernel[cli]"' in err
    assert len(KernelMachine.load(GOLDEN, Tiny()).chords) == 3, "the library works without it"


def test_it_runs_as_a_module() -> None:
    root = Path(cli.__file__).parents[1]
    command = [sys.executable, "-m", "lightning_pathkernel", "verify", str(GOLDEN)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert (found.returncode, found.stderr) == (0, "")
    assert "whole, 6 files" in found.stdout
