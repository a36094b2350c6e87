"""Artifacts of every version of the format load forever and say what they said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_pathkernel import KernelMachine, verify
from lightning_pathkernel.store import FORMAT_VERSION
from lightning_pathkernel.store.migrations import current
from tests.golden.make import Tiny
from tests.store.artifacts import edit, flip, refused

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(p.name for p in GOLDEN.iterdir() if p.name[0].isdigit())
ARTIFACTS = [f"{version}/{kind}" for version in VERSIONS for kind in ("rows-16", "rows-8")]


def test_there_is_a_golden_artifact_of_this_version_and_of_every_one_before() -> None:
    assert [f"{FORMAT_VERSION[0]}.{minor}" for minor in range(FORMAT_VERSION[1] + 1)] == VERSIONS


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_golden_artifact_says_what_it_said(name: str) -> None:
    path, answers = GOLDEN / name, load_file(GOLDEN / f"{name}.answers.safetensors")
    assert json.loads((path / "manifest.json").read_text())["version"] == [
        int(x) for x in name.split("/")[0].split(".")
    ]
    verify(path)
    machine = KernelMachine.load(path, Tiny())
    x, target = answers["x"], torch.zeros(len(answers["x"]), dtype=torch.long)
    found = {
        "predict": machine.predict(x), "bias": machine.bias(x), "network": machine.network_outputs(x),
        "contributions": machine.contributions(x, target), "self_influence": machine.self_influence(),
    }  # fmt: skip
    for part, value in found.items():
        torch.testing.assert_close(value, answers[part], rtol=1e-5, atol=1e-5, msg=lambda m, p=part: f"{p}: {m}")
    assert torch.equal(machine.example_ids, answers["example_ids"])
    assert float((machine.predict(x) - machine.bias(x)).abs().max()) > 0.1, "something was learned"
    if name.endswith("rows-16"):
        names = machine.names_of(machine.example_ids)
        assert sorted(names) == sorted(f"tumour-{i}" for i in range(32))


def test_an_old_artifact_without_checksums_of_chunks_is_checked_whole_when_it_is_touched(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / "1.0" / "rows-16", tmp_path / "machine"))
    file = path / "chord-000001.safetensors"
    flip(file, file.stat().st_size - 1)
    with refused(r"^chord-000001\.safetensors: its sha256 is not the manifest's"):
        KernelMachine.load(path, Tiny())


def test_a_manifest_of_1_1_must_have_them(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / "1.0" / "rows-16", tmp_path / "machine"))
    edit(path, lambda manifest: manifest.update(version=[1, 1]))
    with refused("malformed: crc32c of "):
        verify(path)


def test_a_migration_leads_to_this_version_and_keeps_what_it_does_not_know() -> None:
    old = json.loads((GOLDEN / "1.0" / "rows-16" / "manifest.json").read_text())
    new = current({**old, "later": {"a": 1}})
    assert new["later"] == {"a": 1}
    assert new["libraries"] == {"lightning_pathkernel": "0.1.0", "torch": old["libraries"]["torch"]}
    assert {key: new[key] for key in old if key != "libraries"} == {k: old[k] for k in old if k != "libraries"}
