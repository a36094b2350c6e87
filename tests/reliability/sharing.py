"""Two processes at one place: readers while machines are exported, and a second writer of a recording."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from lightning_pathkernel import ArtifactError, KernelMachineExporter, verify
from tests.reliability.forks import Child, Phase, forked
from tests.reliability.sample import made
from tests.reliability.training import TRAINING, checkpoints, train
from tests.reliability.trees import differences, final, tree

__all__ = ["SharingReport", "readers", "writers"]


@dataclass
class SharingReport:
    """What a campaign found.

    Attributes:
        polls: Looks at the place of the machine; or second writers.
        whole: How many found all of a machine.
        nothing: How many found nothing.
        exports: Machines exported meanwhile.
        slowest: Seconds from the second fit's start to its refusal, at most.
        wrong: Every finding, empty if all went well.
    """

    polls: int = 0
    whole: int = 0
    nothing: int = 0
    exports: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


def _looked(out: Path) -> str:
    """What a reader sees at this moment: the directory that it opened stays the same one however it is renamed."""
    try:
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return "nothing"
    try:
        verify(f"/proc/self/fd/{descriptor}")
        return "whole"
    except ArtifactError as error:
        return f"half: {error}"
    finally:
        os.close(descriptor)


def readers(root: Path, count: int, seed: int) -> SharingReport:
    """Look, again and again, at a place where machines appear and are moved away.

    Args:
        root: An empty directory.
        count: Looks, at least; more until a machine was seen, and none.
        seed: Of the pauses between them.
    """
    recording, out, report = made(root / "sound") / "recording", root / "machine", SharingReport()
    stop = Phase()

    def exporting() -> int:
        done, rng = 0, random.Random(seed + 1)
        while not stop.value:
            KernelMachineExporter(recording).export(out)
            done += 1
            time.sleep(rng.uniform(0, 0.05))
            out.rename(root / f"gone-{done}")
            shutil.rmtree(root / f"gone-{done - 20}", ignore_errors=True)
        return done

    def looking() -> list[str]:
        rng, seen, deadline = random.Random(seed), list[str](), time.monotonic() + 60
        while len(seen) < count or (len(set(seen)) < 2 and time.monotonic() < deadline):
            seen.append(_looked(out))
            time.sleep(rng.uniform(0, 0.02))
        return seen

    writer = Child(exporting)
    looked = forked(looking, timeout=3600)
    stop.value = 1
    ended = writer.wait()
    report.wrong += [f"{e.error or e.signal}" for e in (looked, ended) if e.value is None]
    seen = looked.value or []
    report.polls, report.exports = len(seen), ended.value or 0
    report.whole, report.nothing = seen.count("whole"), seen.count("nothing")
    report.wrong += [line for line in seen if line not in ("whole", "nothing")]
    report.wrong += [] if report.whole and report.nothing else ["machines were always there, or never"]
    return report


def writers(root: Path, count: int, seed: int) -> SharingReport:
    """A second fit that records to the same place while the first one is stopped at a random moment.

    Args:
        root: An empty directory.
        count: Second writers.
        seed: Of the moments.
    """
    rng, report = random.Random(seed), SharingReport()
    reference = forked(lambda: train(root / "reference"))
    if reference.value is None:
        raise RuntimeError(f"the undisturbed run failed: {reference}")
    expected = final(tree(root / "reference" / "run"))
    for number in range(count):
        run, phase = root / f"run-{number}", Phase()
        first = Child(lambda run=run, phase=phase: train(run, phase=phase))  # type: ignore[misc]
        while not checkpoints(run) and first.alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(first.pid, signal.SIGSTOP)
        if phase.value == TRAINING and first.alive():
            report.polls += 1
            resume = checkpoints(run)[-1] if number % 2 == 0 else None
            second = forked(lambda run=run, resume=resume: train(run, resume))  # type: ignore[misc]
            report.slowest = max(report.slowest, second.seconds)
            if second.error is None or not _named(second.error[1], resume is not None):
                report.wrong.append(f"second writer {number}: {second.error or 'was let in'}")
        os.kill(first.pid, signal.SIGCONT)
        ended = first.wait()
        report.wrong += [f"first writer {number}: {ended.error or ended.signal}"] if ended.value is None else []
        report.wrong += [f"run {number}: {line}" for line in differences(final(tree(run / "run")), expected)]
        shutil.rmtree(run)
    return report


def _named(text: str, resumed: bool) -> bool:
    """Whether a refusal says that there is another writer; to one that does not resume any recording is in the way."""
    words = ("another process", "another writer", "second writer", "being written")
    return any(word in text for word in (*words, *(() if resumed else ("is not empty",))))
