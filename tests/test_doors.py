"""Doors open one way: who may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_pathkernel

ROOT = Path(lightning_pathkernel.__file__).parent
SIBLINGS = ("capture", "sketch", "optim", "path", "store", "functional")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return found


def test_one_module_each_knows_lightning_torchmetrics_and_scikit_learn() -> None:
    for path in ROOT.rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path)}
        if path.name != "callback.py":
            assert not roots & {"pytorch_lightning", "lightning_fabric", "lightning"}, path.name
        assert "torchmetrics" not in roots or path.name == "metrics.py", path.name
        assert "sklearn" not in roots or path.name == "sklearn.py", path.name


def test_the_report_looks_at_machines_from_outside() -> None:
    """It knows machines and artifacts, not what records or commands them; nothing but their doors knows it."""
    strangers = {f"lightning_pathkernel.{name}" for name in ("callback", "cli", "recorder", "fit_session", "recording")}
    doors = {"reporting.py", "callback.py", "cli.py"}
    for path in ROOT.rglob("*.py"):
        found = imports(path)
        if path.parent.name == "report":
            assert not {n for n in found if n.startswith(tuple(strangers))}, path.name
        elif path.name not in doors:
            assert not {n for n in found if n.startswith("lightning_pathkernel.report.")}, path.name


def test_siblings_do_not_import_one_another_or_what_is_built_on_them() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in SIBLINGS:
            mine = {n for n in imports(path) if n.startswith("lightning_pathkernel.")}
            strangers = {n for n in mine if n.split(".")[1] != room}
            assert not strangers, f"{path.name} imports {strangers}"


def test_the_reference_is_independent_of_every_fast_path() -> None:
    """It is two files, of which the optimisers' import nothing of the package."""
    for name, doors in (
        ("reference.py", {"lightning_pathkernel.reference_optimizers"}),
        ("reference_optimizers.py", set()),
    ):
        assert {n for n in imports(ROOT / name) if n.startswith("lightning_pathkernel")} == doors
