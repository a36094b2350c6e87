"""Two processes make the machine that one process makes on the same global batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.store import ArtifactError
from tests.ddp.train import COUNT, fit, network
from tests.helpers import Classifier, digits
from tests.resuming import chain_of, files_of

CASES = {
    "sgd": ["--optimizer=sgd"],
    "sgd, nodes by a tolerance": ["--optimizer=sgd", "--tolerance=0.05"],
    "adamw, clipping, accumulation": ["--optimizer=adamw", "--clip=1.0", "--accumulate=2"],
}


def launch(*fits: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Fits by two processes, one after another: most of the time goes into starting processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    arguments = [argument for options in fits for argument in ("+", *options)]
    command = [sys.executable, "-m", "tests.ddp.train", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def run(root: Path, *options: str) -> None:
    done = launch([str(root), *options])
    assert done.returncode == 0, done.stderr[-4000:]


def result(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / "result.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two processes, recorded and plain, and by one process."""
    root = tmp_path_factory.mktemp("fits")
    pairs = [(root / name / side, *CASES[name]) for name in CASES for side in ("two", "plain")]
    for place, *_ in pairs:
        place.mkdir(parents=True)
    done = launch(*[[str(place), *options, *["--plain"] * (place.name == "plain")] for place, *options in pairs])
    assert done.returncode == 0, done.stderr[-4000:]
    for name in CASES:
        (root / name / "one").mkdir()
        fit([str(root / name / "one"), "--processes=1", *CASES[name]])
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_machine_of_one(name: str, fits: Path) -> None:
    one, two, plain = (result(fits / name / side) for side in ("one", "two", "plain"))
    for key, value in plain["weights"].items():
        assert torch.equal(value, two["weights"][key]), f"{key}: training is not bit-identical"
    machines = {}
    for side in ("one", "two"):
        verify(fits / name / side / "run" / "machine")
        machines[side] = KernelMachine.load(fits / name / side / "run" / "machine", Classifier())
    nodes = [[chord.last_step for chord in machine.chords] for machine in machines.values()]
    assert nodes[0] == nodes[1], nodes
    assert machines["one"].example_ids.tolist() == machines["two"].example_ids.tolist() == list(range(COUNT))
    x, y = digits()[1].tensors
    found = torch.stack([machines[side].contributions(x[:40], y[:40]).flatten() for side in ("one", "two")])
    assert float(torch.corrcoef(found)[0, 1]) > 0.9999
    fidelity = {side: machines[side].fidelity([x])["fidelity"] for side in machines}
    assert abs(fidelity["one"] - fidelity["two"]) < 1e-3, fidelity
    assert fidelity["two"] > 0.97
    influences = torch.stack([machines[side].self_influence() for side in ("one", "two")])
    assert float(torch.corrcoef(influences)[0, 1]) > 0.999
    logged = {side: found["logged"]["pathkernel/fidelity"] for side, found in (("one", one), ("two", two))}
    assert abs(logged["one"] - logged["two"]) < 1e-3, logged


def test_a_recording_by_two_processes_is_merged_at_export_or_its_gap_named(tmp_path: Path) -> None:
    run(tmp_path, "--optimizer=sgd", "--network=batch norm", "--injected")
    recording = tmp_path / "run" / "recording"
    parts = sorted(p.name for p in (recording / "rank-0001").glob("segment-*"))
    assert parts == sorted(p.name for p in (recording / "rank-0000").glob("segment-*"))
    module = Classifier("sgd", network("batch norm"))
    machine = KernelMachine.load(KernelMachineExporter(recording).export(tmp_path / "again"), module)
    x = digits()[1].tensors[0]
    assert machine.fidelity([x])["fidelity"] > 0.9
    assert machine.example_ids.tolist() == list(range(COUNT))
    (recording / "rank-0001" / parts[2]).unlink()
    with pytest.raises(ArtifactError, match=f"rank-0001/{parts[2]} is missing from the recording"):
        KernelMachineExporter(recording).export(tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


def test_two_processes_resume_to_the_bytes_of_two_that_were_not_interrupted(fits: Path, tmp_path: Path) -> None:
    name = "adamw, clipping, accumulation"
    options = CASES[name]
    launch([str(tmp_path), *options, "--stop=11"])  # in mid-accumulation
    rescued = KernelMachineExporter(tmp_path / "run" / "recording").export(tmp_path / "rescued")
    verify(rescued)
    assert KernelMachine.load(rescued, Classifier()).chords[-1].last_step == 5
    with pytest.raises(MisconfigurationException, match="the checkpoint was written by 2, found 1"):
        fit([str(tmp_path), *options, "--processes=1", f"--resume={tmp_path / 'at.ckpt'}"])
    run(tmp_path, *options, f"--resume={tmp_path / 'at.ckpt'}")
    whole, again = fits / name / "two" / "run", tmp_path / "run"
    assert chain_of(again / "recording") == chain_of(whole / "recording")
    assert any(name.startswith("rank-0001/segment-") for name in chain_of(again / "recording"))
    assert files_of(again / "machine") == files_of(whole / "machine")


@pytest.mark.parametrize("choice", ["raise", "stop_recording"])
def test_a_full_disk_of_one_process_stops_all_of_them_alike(choice: str, tmp_path: Path) -> None:
    done = launch([str(tmp_path), "--optimizer=sgd", "--fail=3", f"--on-store-error={choice}"])
    assert "No space left on device" in done.stderr
    assert (done.returncode == 0) == (choice == "stop_recording"), done.stderr[-3000:]
    assert (tmp_path / "result.pt").exists() == (choice == "stop_recording")
    machine = KernelMachineExporter(tmp_path / "run" / "recording").export(tmp_path / "out")
    verify(machine)
    assert [c.index for c in KernelMachine.load(machine, Classifier()).chords] == [0, 1]
