"""The examples that `make demo` does not run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def output(name: str, *written: str) -> str:
    """What an example prints, after checking that it wrote what it says."""
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for kind in written:
        path = re.search(rf"^{kind}: (.+)$", run.stdout, re.MULTILINE)
        assert path, run.stdout
        assert Path(path[1]).exists()
    return run.stdout


def numbers(line: str, text: str) -> list[float]:
    """The numbers after the words with which a line begins."""
    found = re.search(rf"^ *{re.escape(line)}((?: +-?\d+\.\d+)+)", text, re.MULTILINE)
    assert found, f"no line {line!r} in {text}"
    return [float(number) for number in found[1].split()]


def test_regression_on_patients() -> None:
    assert numbers("fidelity", output("diabetes.py", "Picture", "Machine"))[0] > 0.99


def test_label_errors_on_digits() -> None:
    shown = output("label_errors.py", "Picture")
    for score in ("label_errors(labels)", "label_errors(labels, x)"):
        assert numbers(score, shown)[2] >= 0.9, "share of the wrong labels among the first 20 %"


def test_kernels_on_digits() -> None:
    """A network's kernels are better aligned with the labels after training; SVMs on them read digits."""
    shown = output("kernels.py", "Picture")
    for name in ("MLP 0", "CNN 0"):
        start, end, path = (numbers(f"{name}, {kind}", shown) for kind in ("tangent, start", "tangent, end", "path"))
        assert start[0] < path[0]
        assert start[0] < end[0]
        assert min(end[1], path[1]) > 0.9
