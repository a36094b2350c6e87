"""Flipped bits and cut files, one at a time: found by `verify`, and never answered from.

Of an artifact, `verify` has to name the file. A machine loaded from it either refuses, at the latest when it is asked,
or gives the answers of the undamaged one to the last bit. Of a recording, export is what checks: it refuses, or gives
the undamaged artifact.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pathkernel import ArtifactError, KernelMachineExporter, verify
from tests.reliability.forks import forked
from tests.reliability.limits import time_left
from tests.reliability.sample import answers, made
from tests.reliability.trees import differences, tree
from tests.store.artifacts import MANIFEST, network

__all__ = ["DamageReport", "flips", "truncations"]

_BLOCK = 250
"""Damages per child."""


@dataclass
class DamageReport:
    """What a campaign found.

    Attributes:
        verified: Damages of an artifact shown to `verify`.
        loaded: Damages of an artifact that a machine was loaded from, and asked.
        refused: How many of these were refused; the others were in bytes that no answer depends on.
        recordings: Damages of a recording that was exported.
        ignored: How many of these gave the undamaged artifact.
        files: Files that were damaged.
        wrong: Every finding, empty if all went well.
    """

    verified: int = 0
    loaded: int = 0
    refused: int = 0
    recordings: int = 0
    ignored: int = 0
    files: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Damage:
    file: str
    place: int
    bit: int | None

    def do(self, root: Path) -> None:
        path = root / self.file
        if self.bit is None:
            os.truncate(path, self.place)
            return
        with open(path, "r+b") as file:
            file.seek(self.place)
            byte = file.read(1)[0]
            file.seek(self.place)
            file.write(bytes([byte ^ (1 << self.bit)]))

    def __str__(self) -> str:
        what = "cut to" if self.bit is None else f"bit {self.bit} of byte"
        return f"{self.file}, {what} {self.place}"


def _drawn(root: Path, count: int, rng: random.Random, cut: bool) -> list[_Damage]:
    """Damages over all files of a directory, each file as often as the others."""
    sizes = {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
    names = [name for name, size in sizes.items() if size]
    out = []
    for number in range(count):
        name = names[number % len(names)]
        out.append(_Damage(name, rng.randrange(sizes[name]), None if cut else rng.randrange(8)))
    return out


class _Bench:
    """A sound artifact and recording, and what they say."""

    def __init__(self, root: Path) -> None:
        self.root, self.module = root, network()
        run = made(root / "sound")
        self.machine, self.recording = run / "machine", run / "recording"
        self.digest = hashlib.sha256((self.machine / MANIFEST).read_bytes()).hexdigest()
        ended = forked(lambda: [answers(self.machine, network()), answers(self.machine, network())])
        if ended.error or ended.signal or ended.value[0] != ended.value[1]:
            raise RuntimeError(f"the sound machine does not answer twice alike: {ended}")
        self.answer = ended.value[0]
        exported = KernelMachineExporter(self.recording).export(root / "exported")
        self.exported = tree(exported)

    def artifact(self, damages: list[_Damage], ask: bool) -> dict[str, Any]:
        """In a child: every damage in turn, on a copy."""
        found: dict[str, Any] = {"verified": 0, "loaded": 0, "refused": 0, "wrong": []}
        for damage in damages:
            copy = _copied(self.machine, self.root / "copy")
            damage.do(copy)
            found["verified"] += 1
            found["wrong"] += [f"{damage}: {line}" for line in self._verified(copy, damage.file)]
            if ask:
                found["loaded"] += 1
                line = self._asked(copy)
                found["refused"] += line == "refused"
                found["wrong"] += [f"{damage}: {line}"] if line not in ("refused", "same") else []
        return found

    def _verified(self, copy: Path, name: str) -> list[str]:
        try:
            verify(copy, self.digest)
        except ArtifactError as error:
            return [] if name in str(error) else [f"verify does not name the file: {error}"]
        except Exception as error:
            return [f"verify raised {error!r}"]
        return ["verify found nothing"]

    def _asked(self, copy: Path) -> str:
        try:
            return "same" if answers(copy, self.module) == self.answer else "other answers, silently"
        except ArtifactError:
            return "refused"
        except Exception as error:
            return f"loading or asking raised {error!r}"

    def recorded(self, damages: list[_Damage]) -> dict[str, Any]:
        """In a child: every damage of the recording in turn, and an export."""
        found: dict[str, Any] = {"recordings": 0, "ignored": 0, "wrong": []}
        for damage in damages:
            copy, out = _copied(self.recording, self.root / "copy"), self.root / "out"
            shutil.rmtree(out, ignore_errors=True)
            damage.do(copy)
            found["recordings"] += 1
            try:
                KernelMachineExporter(copy).export(out)
                left = differences(tree(out), self.exported)
                found["ignored"] += not left
                found["wrong"] += [f"recording: {damage}: exported, silently: {left}"] if left else []
            except ArtifactError:
                pass
            except Exception as error:
                found["wrong"].append(f"recording: {damage}: export raised {error!r}")
        return found


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def _campaign(root: Path, count: int, seed: int, cut: bool, asked: int) -> DamageReport:
    bench, rng, report = _Bench(root), random.Random(seed), DamageReport()
    damages = _drawn(bench.machine, count, rng, cut)
    report.files = {damage.file for damage in damages}
    for start in range(0, count, _BLOCK):
        if not time_left():
            break
        block = damages[start : start + _BLOCK]
        each = max(1, count // asked)
        _add(report, block[::each], lambda b: bench.artifact(b, True))
        if each > 1:
            rest = [damage for number, damage in enumerate(block) if number % each]
            _add(report, rest, lambda b: bench.artifact(b, False))
    recorded = _drawn(bench.recording, max(1, count // 4), rng, cut)
    report.files |= {f"recording/{damage.file}" for damage in recorded}
    for start in range(0, len(recorded), _BLOCK):
        if not time_left():
            break
        _add(report, recorded[start : start + _BLOCK], bench.recorded)
    return report


def _add(report: DamageReport, block: list[_Damage], work: Any) -> None:
    ended = forked(lambda: work(block), timeout=600)
    if ended.value is None:
        report.wrong.append(f"between {block[0]} and {block[-1]}: signal {ended.signal}, {ended.error}")
        return
    for name, value in ended.value.items():
        setattr(report, name, getattr(report, name) + value)


def flips(root: Path, count: int, seed: int, asked: int | None = None) -> DamageReport:
    """Single flipped bits, over every file of an artifact and, a quarter as many more, of a recording.

    Args:
        root: An empty directory.
        count: Flips in the artifact.
        seed: Of their places.
        asked: About how many of the damaged artifacts are loaded and asked; None for all.
    """
    return _campaign(root, count, seed, False, asked or count)


def truncations(root: Path, count: int, seed: int, asked: int | None = None) -> DamageReport:
    """Cut files; arguments as in `flips`."""
    return _campaign(root, count, seed, True, asked or count)
