"""What is public is documented: every name has a doctest and a place in docs/api.md; the quickstart runs."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader

import lightning_pathkernel
from lightning_pathkernel import KernelMachine
from tests.helpers import Classifier, digits

DOCS = Path(__file__).parent.parent / "docs"
MODULES = ("lightning_pathkernel", *(f"lightning_pathkernel.{name}" for name in ("report", "sklearn", "testing")))
ALSO = ("lightning_pathkernel.cli.main", "lightning_pathkernel.grouping.contributions_by_epoch",
        "lightning_pathkernel.label_errors.LabelErrors")  # fmt: skip
"""Public names that stand in no such list."""


def public() -> dict[str, Any]:
    found = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in MODULES
        for name in importlib.import_module(module).__all__
    }
    for path in ALSO:
        module, _, name = path.rpartition(".")
        found[path] = getattr(importlib.import_module(module), name)
    return found


PUBLIC = public()


def members(kind: type) -> Iterator[tuple[str, str]]:
    """Public methods and properties that are ours and no framework's hooks, with their docstrings."""
    for name in dir(kind):
        owner = next((c for c in kind.__mro__ if name in vars(c)), object)
        inherited = any(name in vars(c) for c in kind.__mro__ if not c.__module__.startswith("lightning_pathkernel"))
        member = inspect.getattr_static(kind, name)
        methods = (property, functools.cached_property, classmethod, staticmethod)
        if (
            not name.startswith("_") and owner.__module__.startswith("lightning_pathkernel") and not inherited
            and (inspect.isfunction(member) or isinstance(member, methods))
        ):  # fmt: skip
            yield name, inspect.getdoc(member) or ""


def shown(text: str) -> str:
    """The lines of a docstring that are run."""
    return "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", text, re.MULTILINE))


def names() -> list[str]:
    methods = [f"{name}.{m}" for name, kind in PUBLIC.items() if inspect.isclass(kind) for m, _ in members(kind)]
    return [*PUBLIC, *methods]


def test_the_names_are_those_that_scripts_call() -> None:
    found = {name.removeprefix("lightning_pathkernel.KernelMachine.") for name in names()}
    assert {"predict", "bias", "explain", "contributions", "coefficients", "self_influence", "label_errors", "grouped",
            "contributions_by_chord", "report", "save", "load", "fidelity", "without", "names_of", "kernel",
            "tangent_kernel", "example_ids", "node_steps"} <= found  # fmt: skip
    assert set(lightning_pathkernel.__all__) == {
        n.rpartition(".")[2] for n in PUBLIC if n.count(".") == 1 and n.startswith("lightning_pathkernel.")
    }


@pytest.mark.parametrize("name", names())
def test_every_public_name_has_a_doctest(name: str) -> None:
    """A method or property may be shown in its class's; a method of `KernelMachine` has one of its own."""
    if name in PUBLIC:
        assert shown(PUBLIC[name].__doc__ or ""), f"{name}: no >>> in its docstring"
        return
    owner, _, member = name.rpartition(".")
    kind = PUBLIC[owner]
    own = shown(dict(members(kind))[member])
    static = inspect.getattr_static(kind, member)
    of_class = re.search(rf"\.{member}\b", shown(kind.__doc__ or "")) is not None
    needs_its_own = kind is KernelMachine and not isinstance(static, property | functools.cached_property)
    assert own or (of_class and not needs_its_own), f"{name}: no >>> in its docstring"


def test_doctests_stand_where_the_reference_shows_them_as_code() -> None:
    """mkdocstrings takes a section called Example for prose, in which `>>>` is a quotation."""
    for path in Path(lightning_pathkernel.__file__).parent.rglob("*.py"):
        assert not re.search(r"^ *Example:$", path.read_text(encoding="utf-8"), re.MULTILINE), f"{path.name}: Examples:"


def test_the_reference_has_every_public_name_and_nothing_that_is_not_there() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(PUBLIC) - listed == set(), "not in docs/api.md"
    for path in listed - set(PUBLIC):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"docs/api.md lists {path}, which is not there"


README = DOCS.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def block(path: Path, number: int) -> str:
    return BLOCK.findall(path.read_text(encoding="utf-8"))[number]


def users_own() -> dict[str, Any]:
    """What a user has: a LightningModule and loaders."""
    training, validation = digits()
    return {
        "model": Classifier(), "train_set": training, "train_loader": DataLoader(training, 8, shuffle=True),
        "val_loader": DataLoader(validation, 50),
    }  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Trainer that stops early, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    short = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    monkeypatch.setattr(pl, "Trainer", lambda **options: TRAINER(**{**options, **short}))


TRAINER = pl.Trainer


@pytest.mark.filterwarnings("ignore:probes=256, but the validation set has")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("path", [README, DOCS / "index.md"], ids=lambda path: path.name)
def test_the_quickstart_leads_to_a_report_in_less_than_ten_lines(path: Path) -> None:
    first = block(path, 0)
    assert len([line for line in first.splitlines() if line]) < 10
    names = users_own()
    exec(compile(first, str(path), "exec"), names)
    page = Path("report.html").read_text(encoding="utf-8")
    assert "Examples for" in page
    assert "Suspected label errors" in page
    exec(compile(block(path, 1), str(path), "exec"), names)
    assert names["why"].example_ids.shape == (50, 10)
