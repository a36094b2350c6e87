"""Text: which sentences of Python's language reference taught a small transformer what a sentence is about.

The text is that of `pydoc_data.topics`, which comes with Python. A transformer with two layers tells which of six
chapters a sentence is from; words that are rare are spelled `?`. It writes to `examples/out/text`.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_pathkernel import Explanation, KernelMachine, PathKernelCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "text"
CHAPTERS = ["compound", "debugger", "formatstrings", "specialnames", "string-methods", "types"]
LENGTH, WORDS = 24, 600


def sentences(chapter: str) -> list[str]:
    """The sentences of a chapter that have 6 to 24 words, each once."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", topics[chapter])]
    found = [s for part in paragraphs for s in re.split(r"(?<=[.:])\s+(?=[A-Z])", part)]
    return list(dict.fromkeys(s for s in found if 6 <= len(s.split()) <= LENGTH))


class Reference:
    """Sentences as rows of word numbers; 0 is the end, 1 a rare word. Four of five are for training."""

    def __init__(self) -> None:
        pairs = [(s, label) for label, chapter in enumerate(CHAPTERS) for s in sentences(chapter)]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        self.text = [pairs[i][0] for i in order]
        split = [re.findall(r"\w+|[^\w\s]", s.lower())[:LENGTH] for s in self.text]
        words = [w for w, _ in Counter(w for s in split for w in s).most_common(WORDS - 2)]
        number = {w: i for i, w in enumerate(words, start=2)}
        x = torch.tensor([[number.get(w, 1) for w in s] + [0] * (LENGTH - len(s)) for s in split])
        y = torch.tensor([pairs[i][1] for i in order])
        n = 4 * len(y) // 5
        self.training, self.validation = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])


class Reader(pl.LightningModule):
    """Embeddings, two encoder layers with GELU, the mean over positions."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, d), nn.Embedding(LENGTH, d)
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, len(CHAPTERS))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=x.device).expand_as(x)
        return self.head(self.body(self.words(x) + self.positions(places)).mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def train(reference: Reference) -> tuple[Reader, PathKernelCallback]:
    """Train as always, with one callback more."""
    pl.seed_everything(0)
    module = Reader()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), nodes=6, probes=32, prog_bar=True)
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(reference.training, 32, shuffle=True), DataLoader(reference.validation, 128))
    return module, path_kernel


def show(why: Explanation, chosen: list[int], queries: list[int], reference: Reference) -> None:
    """Each query, and the training sentences most for and most against the chapter it was put in."""
    labels, first = reference.training.tensors[1], len(reference.training)
    for q, query in enumerate(queries):
        print(f"\n{reference.text[first + query]}\n  {CHAPTERS[chosen[q]]}, logit {float(why.prediction[q]):.2f}")
        for i, c in zip(why.example_ids[q].tolist(), why.contributions[q].tolist(), strict=True):
            print(f"  {c:+.3f}  [{CHAPTERS[int(labels[i])]}] {reference.text[i]}")


def draw(why: Explanation, queries: list[int], reference: Reference, path: Path) -> None:
    """Signed bars of the sentences for and against the first query."""
    first = len(reference.training)
    values = why.contributions[0].tolist()
    names = [reference.text[i] for i in why.example_ids[0].tolist()]
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axis.barh(range(len(values)), values, color=["#1a7f37" if v > 0 else "#b3261e" for v in values])
    axis.set_yticks(range(len(values)), [n if len(n) < 64 else n[:61] + "..." for n in names], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("contribution to the logit")
    axis.set_title(f"Training sentences for and against\n“{reference.text[first + queries[0]]}”", fontsize=9, wrap=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Train, export, explain; returns the exit status."""
    shutil.rmtree(OUT, ignore_errors=True)
    reference = Reference()
    module, path_kernel = train(reference)
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    for name, value in machine.fidelity(DataLoader(Subset(reference.validation, range(64)), 64)).items():
        print(f"  {name:20s} {value:9.4f}")
    queries = [0, 1, 2]
    x = reference.validation.tensors[0][queries]
    chosen = machine.predict(x).argmax(1)
    why = machine.explain(x, target=chosen, top_k=3)
    show(why, chosen.tolist(), queries, reference)
    draw(why, queries, reference, OUT / "text.png")
    print(f"\nPicture: {OUT / 'text.png'}\nMachine: {path_kernel.machine_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
