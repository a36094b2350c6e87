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
from tests.reliability.hostile_chords import CHORDS
from tests.reliability.hostile_manifests import DIRECTORIES, EDITS, NAMES, TEXTS, Change, keys
from tests.reliability.hostile_tensors import FILES, HEADERS
from tests.reliability.sample import answers, made
from tests.store.artifacts import MANIFEST, edit, network

__all__ = ["MEMORY", "SECONDS", "HostileReport", "campaign", "kinds"]

MEMORY, SECONDS = 64 << 20, 1.0
_BLOCK, _NOTED = 24, 4 << 20
_OTHERS = (None, True, -1, 1.5, 2**63, "x", [], {}, ["x"], {"x": "x"})


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


@dataclass(frozen=True)
class _Judgement:
    """What became of one artifact."""

    name: str
    seconds: float
    grown: int
    refused: bool | None
    odd: list[str]
    same: bool


class _Bench:
    def __init__(self, root: Path) -> None:
        self.root, self.sound = root, made(root / "sound") / "machine"
        ended = forked(lambda: answers(self.sound, network()))
        if ended.value is None:
            raise RuntimeError(f"the sound machine does not answer: {ended}")
        self.answer: str = ended.value

    def prepared(self, number: int, change: Change) -> Path:
        """A copy of the artifact in a directory of its own, changed."""
        place = self.root / f"hostile-{number}"
        place.mkdir()
        machine = Path(shutil.copytree(self.sound, place / "machine"))
        change(machine)
        return machine

    def judged(self, changes: list[tuple[str, Change]]) -> Iterator[_Judgement]:
        """What verify, load and the first answers say of each artifact; many of them in one child."""
        left = list(changes)
        while left:
            block = left[:_BLOCK]
            machines = [self.prepared(number, change) for number, (_, change) in enumerate(block)]
            work = [(machine, "terabyte" not in name) for machine, (name, _) in zip(machines, block, strict=True)]
            ended = forked(lambda work=work: self._judge(work), timeout=120, memory=2 << 30)  # type: ignore[misc]
            for machine in machines:
                shutil.rmtree(machine.parent)
            if ended.value is None and len(block) == 1:
                yield _Judgement(block[0][0], 0.0, 0, None, [f"signal {ended.signal}, {ended.error}"], False)
                left = left[1:]
            elif ended.value is None:  # one of them took the child down: each in a child of its own
                for one in block:
                    yield from self.judged([one])
                left = left[len(block) :]
            else:
                for found, (name, _) in zip(ended.value, block, strict=False):
                    yield _Judgement(name, *found)
                left = left[len(ended.value) :]

    def _judge(self, work: list[tuple[Path, bool]]) -> list[Any]:
        """In a child: one after another, up to one that takes memory, which would be there for the next."""
        module, found = network(), []
        answers(self.sound, module)  # libraries are mapped, code is read: what follows is the artifact's doing
        for machine, with_verify in work:
            same: list[bool] = []
            results = [measured(lambda machine=machine: verify(machine))] if with_verify else []  # type: ignore[misc]
            results.append(
                measured(lambda machine=machine, same=same: same.append(answers(machine, module) == self.answer))
            )
            errors = [error for error, _, _ in results]
            odd = [repr(e)[:300] for e in errors if e is not None and not isinstance(e, ArtifactError)]
            refused = any(isinstance(error, ArtifactError) for error in errors)
            # what verify lets pass is measured when it is loaded and asked
            counted = [result for result in results if result[0] is not None] or results[-1:]
            grown = max(grown for _, _, grown in counted)
            found.append([max(spent for _, spent, _ in counted), grown, refused, odd, same == [True]])
            if max(grown for _, _, grown in results) > _NOTED:
                break
        return found


def campaign(root: Path, count: int | None, seed: int = 0) -> HostileReport:
    """Offer hostile artifacts of every kind, and manifests with one value missing or of another type.

    Args:
        root: An empty directory.
        count: How many of each of the two; None for all of them.
        seed: Which one to begin with.
    """
    bench, report = _Bench(root), HostileReport()
    for found in bench.judged(_spread(list(kinds().items()), count, seed)):
        report.kinds += 1
        report.most, report.slowest = max(report.most, found.grown), max(report.slowest, found.seconds)
        wrong = _wrong(found)
        report.refused += not wrong
        report.wrong += [f"{found.name}: {line}" for line in wrong]
    changes = list(values(json.loads((bench.sound / MANIFEST).read_text())))
    for found in bench.judged(_spread(changes, count, seed)):
        if found.odd:
            report.wrong.append(f"value: {found.name}: {found.odd}")
        elif found.refused or found.same:
            report.values["refused" if found.refused else "same answers"] += 1
        else:
            report.wrong.append(f"value: {found.name}: let pass, with other answers")
    return report


def _spread(items: list[tuple[str, Change]], count: int | None, seed: int) -> list[tuple[str, Change]]:
    step = 1 if count is None else max(1, len(items) // count)
    return items[seed % step :: step]


def _wrong(found: _Judgement) -> list[str]:
    lines = [f"raised {line}" for line in found.odd]
    lines += [] if found.refused or found.odd else ["was let pass"]
    lines += [f"took {found.seconds:.2f} s"] if found.seconds > SECONDS else []
    lines += [f"took {found.grown >> 20} MB"] if found.grown > MEMORY else []
    return lines + (["ran code"] if os.path.exists("/tmp/pathkernel-was-here") else [])
