"""The examples that `make demo` does not run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pathkernel import verify

EXAMPLES = Path(__file__).parent.parent / "examples"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def run(name: str, *args: str) -> str:
    """What an example prints, from the root of a checkout."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside the suite's other processes two would wait, spinning
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *args],
        capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent, env=one_thread,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def fidelity(printed: str) -> float:
    found = re.search(r"fidelity +(\d\.\d+)", printed)
    assert found, printed
    return float(found[1])


def check_files(printed: str, *names: str) -> None:
    for name in names:
        path = re.search(rf"^{name}: (.+)$", printed, re.MULTILINE)
        assert path, printed
        assert Path(path[1]).exists()


def test_regression_on_patients() -> None:
    printed = run("diabetes.py")
    assert fidelity(printed) > 0.99
    check_files(printed, "Picture", "Machine")


def test_sentences_of_a_language_reference() -> None:
    printed = run("text.py")
    assert fidelity(printed) > 0.95
    check_files(printed, "Picture", "Machine")


def test_a_callback_from_yaml() -> None:
    shutil.rmtree(EXAMPLES / "out" / "cli", ignore_errors=True)
    run("cli.py", "fit", "--config", "examples/cli.yaml", "--trainer.enable_progress_bar=false")
    machine = EXAMPLES / "out" / "cli" / "run" / "machine"
    verify(machine)
    history = json.loads((machine / "metrics.json").read_text())["history"]
    assert history[-1]["fidelity"] > 0.99


def test_two_processes() -> None:
    printed = run("ddp.py")
    assert "1436 training examples of 2 processes" in printed
    assert fidelity(printed) > 0.95
    check_files(printed, "Machine")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not there")
def test_clothes() -> None:
    printed = run("fashion_mnist.py")
    assert fidelity(printed) > 0.97
    check_files(printed, "Picture", "Machine")


def test_without_the_clothes_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "fashion_mnist.py", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "apt install dataset-fashion-mnist" in done.stderr


def numbers(line: str, text: str) -> list[float]:
    """The numbers after the words with which a line begins."""
    found = re.search(rf"^ *{re.escape(line)}((?: +-?\d+\.\d+)+)", text, re.MULTILINE)
    assert found, f"no line {line!r} in {text}"
    return [float(number) for number in found[1].split()]


def test_label_errors_on_digits() -> None:
    printed = run("label_errors.py")
    check_files(printed, "Picture")
    for score in ("label_errors(labels)", "label_errors(labels, x)"):
        assert numbers(score, printed)[2] >= 0.9, "share of the wrong labels among the first 20 %"


def test_kernels_on_digits() -> None:
    """A network's kernels are better aligned with the labels after training; SVMs on them read digits."""
    printed = run("kernels.py")
    check_files(printed, "Picture")
    for name in ("MLP 0", "CNN 0"):
        start, end, path = (numbers(f"{name}, {kind}", printed) for kind in ("tangent, start", "tangent, end", "path"))
        assert start[0] < path[0]
        assert start[0] < end[0]
        assert min(end[1], path[1]) > 0.9
