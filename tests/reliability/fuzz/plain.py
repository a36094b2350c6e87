"""Fuzzing without coverage: mutations of sound inputs, by the hundred thousand."""

from __future__ import annotations

import base64
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.forks import forked
from tests.reliability.fuzz.doors import DOORS, Target
from tests.reliability.fuzz.mutations import mutated
from tests.reliability.fuzz.seeds import seeds
from tests.reliability.limits import time_left

__all__ = ["FuzzReport", "plain"]

_BLOCK, _MEMORY, _SLOW = 20_000, 1 << 30, 1.0


@dataclass
class FuzzReport:
    """What fuzzing found.

    Attributes:
        inputs: Inputs tried.
        doors: Inputs by door.
        let_in: Inputs that were accepted.
        slowest: Seconds of processor time that one input took at most.
        wrong: Every finding, empty if all went well.
    """

    inputs: int = 0
    doors: dict[str, int] = field(default_factory=dict)
    let_in: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


def plain(root: Path, count: int, seed: int) -> FuzzReport:
    """Give mutated inputs to all doors in turn.

    Args:
        root: An empty directory in memory.
        count: Inputs.
        seed: Of the mutations.
    """
    sound, node = seeds(root / "seeds")
    report, number = FuzzReport(), 0
    while report.inputs < count and time_left():
        size = min(_BLOCK, count - report.inputs)
        place = root / f"block-{number}"
        place.mkdir()
        ended = forked(
            lambda place=place, number=number, size=size: _block(Target(place, node), sound, size, seed + number),  # type: ignore[misc]
            timeout=3600, memory=_MEMORY,
        )  # fmt: skip
        if ended.value is None:
            report.wrong.append(f"block {number} of {size}: signal {ended.signal}, {ended.error}")
            report.inputs += size
        else:
            _add(report, ended.value)
        number += 1
    return report


def _add(report: FuzzReport, found: dict[str, Any]) -> None:
    report.inputs += found["inputs"]
    report.let_in += found["let_in"]
    report.slowest = max(report.slowest, found["slowest"])
    for door, inputs in found["doors"].items():
        report.doors[door] = report.doors.get(door, 0) + inputs
    report.wrong += found["wrong"]


def _block(target: Target, sound: dict[str, list[bytes]], count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    found: dict[str, Any] = {"inputs": 0, "let_in": 0, "slowest": 0.0, "doors": Counter(), "wrong": []}
    for door in DOORS:
        for data in sound[door]:
            if door not in ("directory", "description") and not target(door, data):
                found["wrong"].append(f"{door}: a sound input is refused")
    for number in range(count):
        door = DOORS[number % len(DOORS)]
        data = mutated(rng.choice(sound[door]), rng)
        started = time.process_time()
        try:
            found["let_in"] += target(door, data)
        except Exception as error:
            found["wrong"].append(f"{door}: {error!r:.200}: {base64.b64encode(data[:3000]).decode()}")
        spent = time.process_time() - started
        found["slowest"] = max(found["slowest"], spent)
        if spent > _SLOW:
            found["wrong"].append(f"{door}: {spent:.1f} s: {base64.b64encode(data[:3000]).decode()}")
        found["inputs"] += 1
        found["doors"][door] += 1
        if len(found["wrong"]) > 20:
            break
    return found
