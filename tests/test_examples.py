"""The examples that `make demo` does not run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_regression_on_patients() -> None:
    run = subprocess.run([sys.executable, EXAMPLES / "diabetes.py"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    fidelity = re.search(r"fidelity +(\d\.\d+)", run.stdout)
    assert fidelity, run.stdout
    assert float(fidelity[1]) > 0.99
    for name in ("Picture", "Machine"):
        path = re.search(rf"^{name}: (.+)$", run.stdout, re.MULTILINE)
        assert path, run.stdout
        assert Path(path[1]).exists()
