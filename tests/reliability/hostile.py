"""Artifacts made to do harm: each is refused with `ArtifactError`, before 64 MB are allocated and within a second.

Refused is what `verify` or `KernelMachine.load` refuses, or, where only a tensor's numbers are wrong, the first
question to the machine: tensors are not read before they are needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pathkernel import ArtifactError, verify
from tests.reliability.forks import forked, measured
from tests.reliability.hostile_manifests import DIRECTORIES, EDITS, NAMES, TEXTS, Change, keys
from tests.reliability.hostile_tensors import CHORDS, FILES, HEADERS
from tests.reliability.sample import answers, made
from tests.store.artifacts import MANIFEST, edit, network

__all__ = ["MEMORY", "SECONDS", "HostileReport", "campaign", "kinds"]

MEMORY, SECONDS = 64 << 20, 1.0
_OTHERS = (None, True, -1, 1.5, 2**63, "x", [], {}, ["x"], {"x": "x"})
_DESCRIPTIVE = ("optimizer", "settings", "ids", "libraries", "module_class", "created", "recording", "metrics")
"""What a manifest says for people to read: another value there may be let pass, if every answer stays the same."""


@dataclass
class HostileReport:
    """What a campaign found.

    Attributes:
        kinds: Kinds of artifacts that had to be refused.
        refused: How many were, and within the limits.
        values: Further changes, of one value of a manifest each, by what became of them: refused, or let pass because
            every answer stayed the same.
        most: Bytes allocated at most, before the refusal.
        slowest: Seconds at most.
        wrong: Every finding, empty if all went well.
    """

    kinds: int = 0
    refused: int = 0
    values: dict[str, int] = field(default_factory=lambda: {"refused": 0, "same answers": 0})
    most: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


def kinds() -> dict[str, Change]:
    """All kinds, by name."""
    tables = {"manifest": TEXTS, "name": NAMES, "facts": EDITS, "place": DIRECTORIES, "file": FILES, "header": HEADERS,
              "chord": CHORDS}  # fmt: skip
    return {f"{table}: {name}": change for table, named in tables.items() for name, change in named.items()}


def values(manifest: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """Each value of a manifest missing, and of other types."""
    for path in keys(manifest):
        dotted = ".".join(map(str, path))
        if not isinstance(path[-1], int):
            yield f"no {dotted}", _changed(path, lambda parent, key: parent.pop(key))
        for other in _OTHERS:
            yield f"{dotted} is {other!r}", _changed(path, lambda parent, key, v=other: parent.__setitem__(key, v))


def _changed(path: tuple[Any, ...], do: Callable[[Any, Any], object]) -> Change:
    def change(machine: Path) -> None:
        def within(manifest: Any) -> None:
            for key in path[:-1]:
                manifest = manifest[key]
            do(manifest, path[-1])

        edit(machine, within)

    return change


class _Bench:
    def __init__(self, root: Path) -> None:
        self.root, self.sound = root, made(root / "sound") / "machine"
        ended = forked(lambda: answers(self.sound, network()))
        if ended.value is None:
            raise RuntimeError(f"the sound machine does not answer: {ended}")
        self.answer: str = ended.value

    def prepared(self, name: str, change: Change) -> Path:
        """A copy of the artifact in a directory of its own, changed."""
        place = self.root / "hostile"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        machine = Path(shutil.copytree(self.sound, place / "machine"))
        change(machine)
        return machine

    def judged(self, machine: Path, with_verify: bool = True) -> tuple[list[Any], str | None]:
        """In a child: what verify, load and the first answers say.

        Returns:
            Seconds, bytes and what became of it; and what went wrong with the child.
        """

        def work() -> list[Any]:
            module = network()
            answers(self.sound, module)  # libraries are mapped, code is read: what follows is the artifact's doing
            found: dict[str, Any] = {}

            def ask() -> None:
                found["same"] = answers(machine, module) == self.answer

            results = [measured(lambda: verify(machine))] if with_verify else []
            results.append(measured(ask))
            errors = [error for error, _, _ in results]
            odd = [repr(e)[:300] for e in errors if e is not None and not isinstance(e, ArtifactError)]
            texts = [str(e)[:300] for e in errors if isinstance(e, ArtifactError)]
            refused_by = "load" if errors[-1] is not None else "verify" if texts else None
            # what verify lets pass is measured at load; what load lets pass has to be found by verify
            first = next((i for i, e in enumerate(errors) if e is not None), len(errors) - 1)
            spent = max(seconds for _, seconds, _ in results[first:])
            return [spent, max(grown for _, _, grown in results[first:]), refused_by, odd, texts, found.get("same")]

        ended = forked(work, timeout=60, memory=2 << 30)
        wrong = None if ended.value is not None else f"signal {ended.signal}, {ended.error}"
        return ended.value or [], wrong


def campaign(root: Path, count: int | None, seed: int = 0) -> HostileReport:
    """Offer every kind of hostile artifact, and manifests with one value missing or of another type.

    Args:
        root: An empty directory.
        count: How many of the latter; None for all of them.
        seed: Which of the latter to begin with.
    """
    bench, report = _Bench(root), HostileReport()
    for name, change in kinds().items():
        report.kinds += 1
        wrong = _offered(bench, name, change, report)
        report.refused += not wrong
        report.wrong += [f"{name}: {line}" for line in wrong]
    changes = list(values(json.loads((bench.sound / MANIFEST).read_text())))
    step = 1 if count is None else max(1, len(changes) // max(1, count))
    for name, change in changes[seed % step :: step]:
        result, wrong_child = bench.judged(bench.prepared(name, change))
        if wrong_child or result[3]:
            report.wrong.append(f"value: {name}: {wrong_child or result[3]}")
        elif result[2] is not None:
            report.values["refused"] += 1
        elif result[5]:
            report.values["same answers"] += 1
        else:
            report.wrong.append(f"value: {name}: let pass, with other answers")
    return report


def _offered(bench: _Bench, name: str, change: Change, report: HostileReport) -> list[str]:
    result, wrong = bench.judged(bench.prepared(name, change), "terabyte" not in name)
    if wrong:
        return [wrong]
    seconds, grown, refused_by, odd, _, _ = result
    report.most, report.slowest = max(report.most, grown), max(report.slowest, seconds)
    lines = [f"raised {line}" for line in odd]
    lines += [] if refused_by or odd else ["was let pass"]
    lines += [f"took {seconds:.2f} s"] if seconds > SECONDS else []
    lines += [f"took {grown >> 20} MB"] if grown > MEMORY else []
    lines += ["ran code"] if os.path.exists("/tmp/pathkernel-was-here") else []
    return lines
