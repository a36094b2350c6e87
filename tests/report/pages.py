"""Machines to report on, and a reader of the pages."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import html5lib
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from tests.helpers import Classifier, digits, fit

VOID = {"meta", "link", "img", "br", "hr", "input"}


def machine(
    root: Path, module: Any = None, training: Any = None, validate: bool = True, **options: Any
) -> KernelMachine:
    """A machine of a short fit: digits, unless there are others."""
    module = Classifier() if module is None else module
    callback = PathKernelCallback(
        str(root / "run"), **{"sketch_dim": 64, "nodes": 4, "probes": 32 if validate else 0, **options}
    )
    loader = None if training is None else DataLoader(training, batch_size=8, shuffle=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        fit(module, [callback], root, validate=validate, loader=loader)
    return KernelMachine.load(callback.machine_dir, module)


def classifier(classes: int, features: int = 6, examples: int = 40) -> tuple[Classifier, TensorDataset]:
    """A small classifier and something for it to learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, features, generator=generator)
    y = torch.arange(examples) % classes
    return Classifier(net=nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes))), TensorDataset(x, y)


@dataclass
class Node:
    """An element: its tag, attributes, children and text."""

    tag: str
    attrs: dict[str, str]
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def all(self, tag: str | None = None, **attrs: str) -> list[Node]:
        """Elements below, in the order of the page."""
        out = []
        for child in self.children:
            fits = tag is None or child.tag == tag
            if fits and all(child.attrs.get(k.strip("_").replace("_", "-")) == v for k, v in attrs.items()):
                out.append(child)
            out += child.all(tag, **attrs)
        return out

    def one(self, tag: str | None = None, **attrs: str) -> Node:
        (found,) = self.all(tag, **attrs)
        return found

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words + [c.text for c in self.children]).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("#document", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Node(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> where <{self.at.tag}> is open"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.words.append(data)


def read(path: Path) -> Node:
    """The page as a tree, after an HTML5 parser has found no fault with it."""
    text = path.read_text(encoding="utf-8")
    parser = html5lib.HTMLParser(strict=False)
    parser.parse(text)
    faults = [name for _, name, _ in parser.errors]
    assert faults == [], faults
    reader = _Reader()
    reader.feed(text)
    assert reader.at is reader.root, f"<{reader.at.tag}> is never closed"
    return reader.root


def digits_machine(root: Path) -> KernelMachine:
    """Digits with their metrics."""
    return machine(root, nodes=6)


def validation_batch(count: int) -> list[torch.Tensor]:
    return [tensor[:count] for tensor in digits()[1].tensors]
