"""The lint rules against code that runs what a file says: each of them fires, and nothing in the package needs one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_pathkernel"
RULES = "TID251,S102,S301,S302,S307"

BANNED = {
    "pickle": "import pickle\n\npickle.loads(data)",
    "from pickle": "from pickle import loads\n\nloads(data)",
    "_pickle": "import _pickle\n\n_pickle.loads(data)",
    "cloudpickle": "import cloudpickle\n\ncloudpickle.load(file)",
    "dill": "import dill\n\ndill.load(file)",
    "joblib": "import joblib\n\njoblib.load(path)",
    "marshal": "import marshal\n\nmarshal.loads(data)",
    "shelve": "import shelve\n\nshelve.open(path)",
    "yaml": "import yaml\n\nyaml.load(data)",
    "torch.load": "import torch\n\ntorch.load(path, weights_only=True)",
    "from torch": "from torch import load\n\nload(path)",
    "torch under another name": "import torch as t\n\nt.load(path)",
    "torch.save": "import torch\n\ntorch.save({}, path)",
    "torch.serialization": "import torch\n\ntorch.serialization.load(path)",
    "torch.jit.load": "import torch\n\ntorch.jit.load(path)",
    "torch.export.load": "import torch\n\ntorch.export.load(path)",
    "torch.hub": "import torch\n\ntorch.hub.load(path, name)",
    "torch.package": "from torch.package import PackageImporter\n\nPackageImporter(path)",
    "torch.distributed.checkpoint": "import torch.distributed.checkpoint as dcp\n\ndcp.load({})",
    "numpy.load": "import numpy as np\n\nnp.load(path)",
    "numpy.load with pickles": "import numpy as np\n\nnp.load(path, allow_pickle=True)",
    "numpy.lib.format": "import numpy as np\n\nnp.lib.format.read_array(file)",
    "import_module": "import importlib\n\nimportlib.import_module(name)",
    "runpy": "import runpy\n\nrunpy.run_path(path)",
    "subprocess": "import subprocess\n\nsubprocess.run(name)",
    "os.system": "import os\n\nos.system(name)",
    "os.popen": "import os\n\nos.popen(name)",
    "eval": "eval(text)",
    "exec": "exec(text)",
}


def lint(snippets: dict[str, str], folder: Path) -> dict[str, set[str]]:
    """Rules that fire, by snippet, under the project's settings for the package."""
    folder.mkdir()
    for number, text in enumerate(snippets.values()):
        (folder / f"s{number}.py").write_text(text + "\n")
    command = [
        sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache",
        "--output-format", "json", str(folder),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    fired: dict[str, set[str]] = {name: set() for name in snippets}
    for line in json.loads(found.stdout):
        fired[list(snippets)[int(Path(line["filename"]).stem[1:])]].add(line["code"])
    return fired


def test_every_rule_fires(tmp_path: Path) -> None:
    fired = lint(BANNED, tmp_path / "banned")
    silent = [name for name, codes in fired.items() if not codes & set(RULES.split(","))]
    assert not silent
    plain = lint({"plain": "import json\n\njson.loads(text)"}, tmp_path / "plain")
    assert not plain["plain"] & set(RULES.split(","))


CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    """What ruff has no rule for: built-in functions that make code or modules of strings, and ways round the rules."""
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & CALLS
    waived = [line for line in path.read_text().splitlines() if "noqa" in line and "allow_pickle=False" not in line]
    assert not [line for line in waived if any(rule in line for rule in RULES.split(","))]
