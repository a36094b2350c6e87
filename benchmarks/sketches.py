"""Sketches against brute force: networks x optimisers x candidates x seeds.

    python -m benchmarks.sketches IMAGES CACHE --seeds 3

Brute force is run once per case and seed and kept in CACHE, with the weights that training ended at. All candidates of
a case listen to one further training run, which must end at the very same weights. Results are lines of
CACHE/results.jsonl; what is there is not measured again. Pearson is the mean over 24 unseen queries of the correlation
of contributions with the exact ones; fidelity and agreement are those of 64 other unseen inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.brute_force import Exact, Training, exact_contributions, train
from benchmarks.cases import CASES, Data
from benchmarks.page import read_lines
from benchmarks.recorded import Recording
from lightning_pathkernel import query
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.explanation import functional_of
from lightning_pathkernel.functional import kernel_machine_agreement, kernel_machine_fidelity
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import gauss_legendre, node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.basis import query_features
from lightning_pathkernel.recording.fitting import SketchFitter
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.sketch import SketchSettings, fit_second_stage

RULE = gauss_legendre(4)


@dataclass(frozen=True)
class Candidate:
    """A first stage, and ridges of the second stages that are fitted to it."""

    sketch: SketchSettings = field(default_factory=SketchSettings)
    second_ridges: tuple[float, ...] = (0.1,)


def _candidate(second_ridges: tuple[float, ...] = (0.1,), **settings: Any) -> Candidate:
    return Candidate(SketchSettings(**settings), second_ridges)


CANDIDATES = {
    "by error": _candidate(),
    "by error, direction 1": _candidate(direction=1.0),
    "by error, no bound": _candidate(tolerance=0.03, most=1 << 12),
    "256 features": _candidate(most=0),
    "512 features": _candidate(features=512, most=0),
    "1024 features": _candidate(features=1024, most=0),
    "width 8": _candidate(features=None, width=8),
    "width 12": _candidate(features=None, width=12),
    "width 16": _candidate(features=None),
    "width 24": _candidate(features=None, width=24),
    "deflated 16": _candidate(features=None, kind="deflated"),
    "random 16": _candidate(features=None, kind="random"),
    "ridge 0.003": _candidate(ridge=0.003),
    "ridge 0.3": _candidate(ridge=0.3),
}
DIMS = (256, 64)


class Fitter(SketchFitter):
    """Keeps every chord as its first stage leaves it, with the probes' features, for any number of second stages."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: list[tuple[Chord, Tensor]] = []
        self.chords = 0

    def second_stage(self, chord: Chord, rows: Tensor, total: Tensor) -> tuple[Tensor, Tensor] | None:
        """The fewest numbers that are asked for, after the chord was kept as it is."""
        probes = query_features(self._network, self._probes, chord, self._settings.rule, self._generator, self._at_once)
        self.kept.append((chord, probes))
        return fit_second_stage(rows, probes, total, min(DIMS), self._settings.sketch, self._generator)

    def close(self, chord: Chord) -> None:
        """Take in a chord; one that needs no second stage is as its first stage left it."""
        self.chords += 1
        if chord.second_stage is None:
            self.kept.append((chord, chord.rows))


class Heard(Recording):
    """A candidate's recorder, told of a training run; its fits are timed by the processor's time."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, nodes: Sequence[int], candidate: Candidate,
        probes: Tensor, seed: int,
    ) -> None:  # fmt: skip
        self.spent = 0.0
        self.others: Sequence[Heard] = ()
        network = Network(module, plan_capture(module))
        settings = RecorderSettings(nodes, min(DIMS), candidate.sketch, seed)
        self.fitter = Fitter(network, probes, settings, Ranks())
        super().__init__(PathRecorder(network, optimizer, settings, probes, self.fitter.close))
        self.recorder._fitter = self.fitter

    def after_step(self) -> None:
        """It has moved the weights: a fit, where there is one, is timed."""
        with self._alone():
            start = time.process_time()
            super().after_step()
            self.spent += time.process_time() - start

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The other recorders do not hear what this one asks the network."""
        with ExitStack() as stack:
            for other in self.others:
                stack.enter_context(other.recorder.capture.paused())
            yield

    def close(self) -> None:
        """Training is over."""
        with self._alone():
            self.recorder.finish()
        self.recorder.capture.detach()


def _key(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-')}-{seed}"


def _final(run: Training) -> Tensor:
    return torch.cat([value.flatten() for value in run.states[-1].values()])


def exact(name: str, seed: int, data: Data, cache: Path) -> tuple[Exact, Tensor]:
    """Brute force of a case, and the weights that its training ends at."""
    file = cache / f"{_key(name, seed)}.safetensors"
    if not file.exists():
        run = train(CASES[name], seed, data)
        found = exact_contributions(run)
        save_file(
            {
                "contributions": found.contributions, "own": found.own, "target": found.target,
                "unexplained": torch.tensor(found.unexplained), "final": _final(run),
            },
            file,
        )  # fmt: skip
    kept = load_file(file)
    known = Exact(kept["contributions"], kept["own"], kept["target"], float(kept["unexplained"]))
    return known, kept["final"]


@dataclass(frozen=True)
class Result:
    """One candidate on one case and seed.

    Attributes:
        case: Network and optimiser.
        candidate: First stage.
        second_ridge: Of the second stage.
        sketch_dim: Numbers kept.
        seed: Of the run.
        fidelity: On unseen inputs.
        pearson: Correlation of contributions with the exact ones, mean over queries.
        worst: The least of them.
        agreement: Share of unseen inputs with the network's largest output.
        sketch: Sketch error relative to the learned change.
        first: Features of the first stage, mean over chords.
        fit: Processor seconds per chord, both stages, one thread.
    """

    case: str
    candidate: str
    second_ridge: float
    sketch_dim: int
    seed: int
    fidelity: float
    pearson: float
    worst: float
    agreement: float
    sketch: float
    first: float
    fit: float


def _points() -> Iterator[tuple[float, float]]:
    return zip(RULE.points, RULE.weights, strict=True)


def _along(network: Network, x: Tensor, chord: Chord, direction: Mapping[str, Tensor]) -> Tensor:
    """``J`` averaged along the chord times a direction, ``[n, K]``."""
    slopes = [w * network.jvps(x, chord.weights(t), chord.end_buffers, [direction])[0] for t, w in _points()]
    return torch.stack(slopes).sum(0)


class Judge:
    """Measures second stages over one first stage.

    Args:
        module: The trained network.
        kept: Chords with first-stage rows, and probes' features.
        data: The case's data.
        known: What brute force found.
    """

    def __init__(self, module: nn.Module, kept: Sequence[tuple[Chord, Tensor]], data: Data, known: Exact) -> None:
        self._network = Network(module, plan_capture(module))
        self._kept, self._data, self._known = kept, data, known
        chords = [chord for chord, _ in kept]
        functional = functional_of(None, known.target)
        self._features = [query.query_features(self._network, data.queries, c, RULE, functional) for c in chords]
        x, first, last = data.unseen, chords[0], chords[-1]
        self._outputs = self._network.outputs(x, last.weights(1.0), last.end_buffers)
        self._whole, change = torch.zeros(1), torch.zeros(1)
        for chord in chords:
            whole = {n: d - chord.decay.get(n, 0) - chord.residual.get(n, 0) for n, d in chord.delta.items()}
            self._whole = self._whole + _along(self._network, x, chord, whole)
            if chord.decay:
                change = change + _along(self._network, x, chord, chord.decay)
            if chord.end_buffers:
                moved = self._network.outputs(x, chord.start, chord.end_buffers)
                change = change + moved - self._network.outputs(x, chord.start, chord.start_buffers)
        self._base = self._network.outputs(x, first.start, first.start_buffers) + change

    def measure(self, k: int, settings: SketchSettings) -> dict[str, float]:
        """A second stage of ``k`` numbers."""
        examples = torch.zeros(1)
        found = torch.zeros_like(self._known.contributions)
        for (chord, probes), features in zip(self._kept, self._features, strict=True):
            rows, generator = chord.rows, torch.Generator().manual_seed(0)
            maps = fit_second_stage(rows, probes, rows.sum(0), k, settings, generator)
            if maps is not None:
                chord = replace(chord, rows=rows @ maps[0].T, second_stage=maps[1])
                features = features @ maps[1].T
            found.index_add_(1, chord.example_ids, features @ chord.rows.T)
            examples = examples + _along(self._network, self._data.unseen, chord, chord.examples_direction())
        exact = self._known.contributions
        pairs = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found, exact, strict=True)]
        predicted, base = self._base + examples, self._base
        return {
            "fidelity": float(kernel_machine_fidelity(predicted, self._outputs, base)),
            "pearson": fmean(pairs),
            "worst": min(pairs),
            "agreement": float(kernel_machine_agreement(predicted, self._outputs)),
            "sketch": float((self._whole - examples).norm() / (self._outputs - base).norm()),
            "first": fmean(chord.rows.shape[1] for chord, _ in self._kept),
        }


def measure(name: str, seed: int, wanted: Sequence[str], images: Path, cache: Path) -> Iterator[Result]:
    """All candidates of one case, on one training run."""
    case = CASES[name]
    data = case.data(images)
    known, final = exact(name, seed, data, cache)
    heard: list[Heard] = []

    def listeners(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Heard]:
        nodes = node_schedule(steps, case.nodes)
        heard.extend(Heard(module, optimizer, nodes, CANDIDATES[each], data.probes, seed) for each in wanted)
        for each in heard:
            each.others = [other for other in heard if other is not each]
        return heard

    run = train(case, seed, data, listeners, keep=False)
    for each in heard:
        each.close()
    if not torch.equal(_final(run), final):
        raise AssertionError(f"{name}, seed {seed}: recording changed the training run, or the cache is of another one")
    for label, each in zip(wanted, heard, strict=True):
        judge, fit = Judge(run.module, each.fitter.kept, data, known), each.spent / each.fitter.chords
        grid = [(ridge, k) for ridge in CANDIDATES[label].second_ridges for k in DIMS]
        for ridge, k in grid:
            found = judge.measure(k, SketchSettings(second_ridge=ridge))
            yield Result(name, label, ridge, k, seed, **found, fit=fit)


def _spread(values: Sequence[float]) -> str:
    mean = fmean(values)
    return f"{mean:.4f}" + (f" ± {max(abs(v - mean) for v in values):.4f}" if len(values) > 1 else "")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Results as markdown: mean and largest deviation over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        key = (line["candidate"], line["case"], line["second_ridge"], line["sketch_dim"])
        groups.setdefault(key, []).append(line)
    out = [
        "| first stage | case | ridge 2 | sketch_dim | seeds | fidelity | Pearson | least | agreement | features |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, found in groups.items():
        columns = [_spread([line[name] for line in found]) for name in ("fidelity", "pearson")]
        worst, first = min(line["worst"] for line in found), fmean(line["first"] for line in found)
        agreement = fmean(line["agreement"] for line in found)
        cells = [*map(str, key), str(len(found)), *columns, f"{worst:.3f}", f"{agreement:.3f}", f"{first:.0f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="where Fashion-MNIST's *-ubyte.gz files are")
    parser.add_argument("cache", type=Path, help="where results are kept, outside the repository")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--candidate", choices=CANDIDATES, action="append", help="default: all of them")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1 and 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(exist_ok=True)
    file = options.cache / "results.jsonl"
    lines = read_lines(file) if file.exists() else []
    known = {(line["case"], line["candidate"], line["seed"]) for line in lines}
    for seed in options.seed or (0, 1, 2):
        for name in options.case or CASES:
            wanted = [c for c in options.candidate or CANDIDATES if (name, c, seed) not in known]
            for result in measure(name, seed, wanted, options.images, options.cache) if wanted else ():
                print(json.dumps(asdict(result)), flush=True)
                lines.append(asdict(result))
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
