"""`pathkernel predict` and `explain`: what the library says, from files, for a module named on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_pathkernel import KernelMachine
from lightning_pathkernel.commands import COMMANDS
from tests.golden.make import Tiny, tumours
from tests.store.test_cli import GOLDEN, called

MODULE = ("--module", "tests.golden.make.Tiny")


@pytest.fixture
def x() -> Tensor:
    return tumours()[0][:3]


@pytest.fixture
def machine() -> KernelMachine:
    return KernelMachine.load(GOLDEN, Tiny())


def written(x: Tensor, path: Path) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.double().numpy())
    elif path.suffix == ".csv":
        np.savetxt(path, x.double().numpy(), delimiter=",")
    else:
        save_file({"x": x, "other": x[0].clone()}, path)
    return path


@pytest.mark.parametrize("ending", [".npy", ".csv", ".safetensors"])
def test_predictions_are_the_machines(
    x: Tensor, machine: KernelMachine, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = written(x, tmp_path / f"x{ending}")
    status, out, err = called(capsys, "predict", GOLDEN, inputs, *MODULE, "--json")
    assert (status, err) == (0, "")
    torch.testing.assert_close(torch.tensor(json.loads(out)["outputs"]), machine.predict(x))
    status, out, _ = called(capsys, "predict", GOLDEN, inputs, *MODULE)
    assert [line.split(":")[0] for line in out.splitlines()] == ["0", "1", "2"]


def test_predictions_to_a_file_which_is_not_overwritten(
    x: Tensor, machine: KernelMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, out = written(x, tmp_path / "x.npy"), tmp_path / "out.npy"
    assert called(capsys, "predict", GOLDEN, inputs, *MODULE, "--out", out)[0] == 0
    torch.testing.assert_close(torch.from_numpy(np.load(out)), machine.predict(x))
    status, _, err = called(capsys, "predict", GOLDEN, inputs, *MODULE, "--out", out)
    assert status == 1
    assert "out.npy" in err


@pytest.mark.parametrize("target", [None, "1", "[0, 1, 1]"])
def test_explanations_are_the_machines(
    x: Tensor, machine: KernelMachine, target: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {None: None, "1": torch.tensor([1, 1, 1]), "[0, 1, 1]": torch.tensor([0, 1, 1])}[target]
    why = machine.explain(x, target=chosen, top_k=2)
    given = () if target is None else ("--target", target)
    inputs = written(x, tmp_path / "x.npy")
    status, out, _ = called(capsys, "explain", GOLDEN, inputs, *MODULE, "--top-k", 2, "--json", *given)
    assert status == 0
    for i, query in enumerate(json.loads(out)["queries"]):
        assert query["target"] == int(why.target[i])
        assert query["prediction"] == pytest.approx(float(why.prediction[i]))
        outputs = machine.network_outputs(x[i : i + 1])[0]
        assert query["network"] == pytest.approx(float(outputs[why.target[i]]), rel=1e-4, abs=1e-5)
        assert query["ledger"] == pytest.approx({name: float(v[i]) for name, v in why.ledger.items()}, abs=1e-6)
        shares = query["for"] + query["against"]
        assert [share["id"] for share in shares] == why.example_ids[i].tolist()
        assert [share["name"] for share in shares] == machine.names_of(why.example_ids[i])
        assert [share["contribution"] for share in shares] == pytest.approx(why.contributions[i].tolist())
    text = called(capsys, "explain", GOLDEN, inputs, *MODULE, "--top-k", 2, *given)[1]
    assert machine.names_of(why.example_ids[0])[0] in text
    assert "unattributed" in text
    assert f"query 2, output {int(why.target[2])}: machine {float(why.prediction[2]):.6g}" in text


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("x.npy", "--module", "no.such.Class"), 2, "No module named 'no'"),
        (("x.npy", "--module", "torch.nn.Linear"), 2, "in_features"),
        (
            ("x.npy", "--module", "torch.nn.Linear", "--module-args", '{"in_features": 4, "out_features": 2}'),
            1,
            "net.0",
        ),
        (("x.npy", "--module", "torch.float32"), 2, "cannot be called"),
        (("x.npy", "--module", "builtins.dict"), 2, "no torch.nn.Module"),
        (("x.npy", *MODULE, "--forward-fn", "no.such"), 2, "--forward-fn no.such: cannot be imported"),
        (("x.npy",), 2, "module"),
        (("x.txt", *MODULE), 2, "inputs are read from .npy"),
        (("missing.npy", *MODULE), 1, "missing.npy"),
        (("pickled.npy", *MODULE), 2, "allow_pickle=False"),
        (("two.safetensors", *MODULE), 2, "none is called x"),
        (("x.npy", *MODULE, "--target", "[0, 1]"), 2, "2 given for 3 inputs"),
        (("x.npy", *MODULE, "--top-k", "0"), 2, "at least 1, found 0"),
        (("x.npy", *MODULE, "--device", "nowhere"), 2, "--device nowhere: "),
        (("x.npy", *MODULE, "--device", "xla"), 2, "--device xla: "),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], status: int, said: str, x: Tensor, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    written(x, tmp_path / "x.npy")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    save_file({"a": x, "b": x[0].clone()}, tmp_path / "two.safetensors")
    found, _, err = called(capsys, "explain", GOLDEN, *arguments)
    assert found == status
    assert said in err


@pytest.mark.parametrize("command", ["predict", "explain", "report"])
def test_the_device_asked_for_is_the_networks(
    command: str, x: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    load = KernelMachine.load
    monkeypatch.setattr(KernelMachine, "load", lambda *args, device: asked.append(device) or load(*args, device=device))
    inputs = written(x, tmp_path / "x.npy")
    given = ("--out", tmp_path / "page.html", "--inputs", inputs) if command == "report" else (inputs,)
    plain = called(capsys, command, GOLDEN, *given, *MODULE)
    assert plain == called(capsys, command, GOLDEN, *given, *MODULE, "--device", "cpu")
    assert asked == [None, torch.device("cpu")]


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "lightning_pathkernel", "info", str(GOLDEN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_report_of_what_was_logged_and_one_of_the_machine(
    x: Tensor, machine: KernelMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, inputs = tmp_path / "page.html", written(x, tmp_path / "x.npy")
    assert called(capsys, "report", GOLDEN, "--out", page, "--title", "Tumours")[0] == 0
    logged = page.read_text()
    assert "<title>Tumours" in logged
    assert "tumour-" not in logged
    status, out, _ = called(capsys, "report", GOLDEN, "--out", page, *MODULE, "--inputs", inputs, "--target", 1)
    assert (status, out.strip()) == (0, str(page))
    explained = page.read_text()
    assert machine.names_of(machine.explain(x, target=torch.tensor([1, 1, 1]), top_k=1).example_ids[0])[0] in explained
    status, _, err = called(capsys, "report", GOLDEN, "--out", page, "--inputs", inputs)
    assert status == 2
    assert "--inputs: the network is needed for that, give --module" in err
    status, _, err = called(capsys, "report", GOLDEN, "--out", page, "--device", "cpu")
    assert status == 2
    assert "--device: the network is needed for that, give --module" in err
    status, _, err = called(capsys, "report", tmp_path, "--out", page)
    assert status == 1
    assert "manifest.json" in err
    assert page.read_text() == explained, "a page is replaced by a whole one only"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, command, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80


def test_a_shell_can_complete(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, "--print_completion=shtab-bash")
    assert status == 0
    assert all(command in out for command in COMMANDS)
