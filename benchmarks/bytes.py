"""Bytes of an artifact by kind, beside those of storing every step's weights, and what rounding costs in fidelity.

Trains a small CNN on Fashion-MNIST with AdamW, exports it, and compares the machine as loaded with the machine as
recorded. Needs the images, for example of Debian's package dataset-fashion-mnist, in the directory given.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import cnn, images
from benchmarks.networks import NETWORKS
from benchmarks.recorded import recorded_step
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.exporter import KernelMachineExporter
from lightning_pathkernel.fingerprint import constants, describe_module
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording_store import RecordingStore

BATCH, PROBES = 64, 256
MODELS: dict[str, Callable[[], nn.Module]] = {"cnn 16-32": lambda: NETWORKS["cnn"]()[0], "cnn 8-16": cnn}
VISITS = ("rows/rows", "rows/example_ids", "rows/self_inner", "rows/exponents", "rows/rest", "rows/row_exponents")


@dataclass
class Run:
    """A trained module and its path as recorded."""

    module: nn.Module
    chords: list[Chord]
    steps: int
    visits: int


def train(name: str, seed: int, nodes: int, sketch_dim: int, epochs: int, data: tuple[Tensor, Tensor], probes: Tensor,
          directory: Path) -> Run:  # fmt: skip
    """Train and record to a directory."""
    x, y = data
    torch.manual_seed(seed)
    module = MODELS[name]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(x), generator=generator).split(BATCH)]
    chords: list[Chord] = []
    settings = RecorderSettings(node_schedule(len(batches), nodes), sketch_dim, seed=seed)
    facts = {"module_class": name, "optimizer": {"name": "AdamW"}, "settings": {"sketch_dim": sketch_dim}}
    described = {"module": describe_module(module), "ranks": 1, "configuration": {}, **facts}
    store = RecordingStore.begin(directory, described, constants(module), Ranks())

    def keep(chord: Chord) -> None:
        store.chord(chord)
        chords.append(chord)

    recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, settings, probes, keep)
    recorder.capture.attach()
    for rows in batches:
        recorded_step(recorder, optimizer, rows, lambda rows=rows: F.cross_entropy(module(x[rows]), y[rows]))
    recorder.finish()
    store.end(recorder.steps, {})
    store.close()
    recorder.capture.detach()
    return Run(module, chords, len(batches), sum(map(len, batches)))


def bytes_by_kind(directory: Path) -> Counter[str]:
    """Bytes of every kind of tensor in the chords of a directory; all else under ``other``."""
    found: Counter[str] = Counter(other=sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()))
    for path in [*directory.glob("chord-*.safetensors"), *directory.glob("rank-0000/segment-*.safetensors")]:
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                group, _, own = name.partition("/")
                kind = f"{group}/{own}" if group == "rows" else group.partition(".")[0]
                found[kind] += tensor.numel() * tensor.element_size()
    found["other"] -= sum(size for kind, size in found.items() if kind != "other")
    return found


def compare(run: Run, machine: KernelMachine, queries: Tensor, explained: int) -> list[str]:
    """Fidelity of the machine as recorded and as loaded, and how alike their contributions are."""
    recorded = KernelMachine(run.module, run.chords)
    lines, found = [], []
    target = recorded.network_outputs(queries[:explained]).argmax(1)
    for label, each in (("recorded", recorded), ("loaded", machine)):
        metrics = each.fidelity([queries])
        lines.append(f"{label}: " + ", ".join(f"{name} {value:.5f}" for name, value in metrics.items()))
        found.append(each.contributions(queries[:explained], target))
    alike = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*found, strict=True)]
    same = torch.equal(recorded.network_outputs(queries), machine.network_outputs(queries))
    prediction, other = (m.predict(queries) for m in (recorded, machine))
    apart = float((prediction - other).norm() / (prediction - recorded.bias(queries)).norm())
    lines.append(f"contributions alike: Pearson {float(torch.stack(alike).mean()):.7f}; predictions apart {apart:.2e}")
    return [*lines, f"the network's outputs are {'the same bits' if same else 'NOT the same bits'}"]


def report(run: Run, recording: Path, artifact: Path, sketch_dim: int) -> list[str]:
    """The table of bytes."""
    before, after = bytes_by_kind(recording), bytes_by_kind(artifact)
    whole = run.steps * sum(p.numel() for p in run.module.parameters()) * 4
    lines = ["| kind | recording | artifact | of all weights |", "|---|---|---|---|"]
    for kind in sorted(before | after):
        lines.append(f"| {kind} | {before[kind]:,} | {after[kind]:,} | {after[kind] / whole:.2%} |")
    visits = [sum(found[kind] for kind in VISITS) for found in (before, after)]
    rest = [sum(found.values()) - v for found, v in zip((before, after), visits, strict=True)]
    rows = sum(len(chord.example_ids) for chord in run.chords)
    each = [v / run.visits for v in visits]
    lines.append(f"{rows:,} rows for {run.visits:,} visits (momentum carries visits into the next chord)")
    lines.append(
        f"bytes per visit, at most {2 * sketch_dim + 16}: {each[0]:.1f} recorded, {each[1]:.1f} in the artifact"
    )
    shares = [r / whole for r in rest]
    lines.append(f"all else, of {whole:,} bytes: {shares[0]:.2%} recorded, {shares[1]:.2%} in the artifact")
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the *-ubyte.gz files are")
    parser.add_argument("--model", choices=MODELS, default="cnn 16-32")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--explained", type=int, default=16, help="queries whose contributions are compared")
    parser.add_argument("--row-bits", type=int, choices=(8, 16), default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = images(options.directory, "train", options.examples)
    unseen = images(options.directory, "t10k", PROBES + options.queries)[0]
    with tempfile.TemporaryDirectory() as folder:
        recording, artifact = Path(folder) / "recording", Path(folder) / "machine"
        run = train(options.model, options.seed, options.nodes, options.sketch_dim, options.epochs, data,
                    unseen[:PROBES], recording)  # fmt: skip
        KernelMachineExporter(recording).export(artifact, options.row_bits)
        features = sorted({sum(s.features for s in chord.sketches.values()) for chord in run.chords})
        print(f"{options}: {run.steps} steps, {len(run.chords)} chords, first stage {features}")
        print("\n".join(report(run, recording, artifact, options.sketch_dim)), flush=True)
        machine = KernelMachine.load(artifact, MODELS[options.model]())
        print("\n".join(compare(run, machine, unseen[PROBES:], options.explained)))


if __name__ == "__main__":
    main()
