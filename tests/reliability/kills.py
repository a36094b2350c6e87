"""SIGKILL at random moments of runs that are resumed until they end: nothing torn, lost or doubled.

Each run is killed again and again, at moments drawn over the whole length of a run, setup and export included, and
resumed from its latest checkpoint or, at times, from an older one. Moments are counted in processor time, so that what
else the machine does changes nothing. After every kill no file at a final path may be
torn; in the end recording and machine must equal those of the run that nobody interrupted, byte for byte.
"""

from __future__ import annotations

import random
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from lightning_pathkernel import verify
from tests.reliability.exports import export
from tests.reliability.forks import Child, Ended, Phase, forked
from tests.reliability.limits import time_left
from tests.reliability.training import PHASES, TRAINING, checkpoints, train
from tests.reliability.trees import final, finished, torn, tree

__all__ = ["KillReport", "campaign"]

_AT_MOST = 12
"""Kills of one run, after which it is let finish."""


@dataclass
class KillReport:
    """What a campaign found.

    Attributes:
        kills: Processes killed, two ranks counted as one.
        recovering: Kills of a resumed run before it had finished a batch.
        phases: Kills by what the run was doing.
        runs: Runs completed and compared.
        exports: Exports of recordings that a kill had interrupted.
        wrong: Every finding, empty if all went well.
    """

    kills: int = 0
    recovering: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    exports: int = 0
    wrong: list[str] = field(default_factory=list)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _Job:
    """A run's processes, one or two."""

    def __init__(self, root: Path, resume: Path | None, ranks: int) -> None:
        self.phase, port = Phase(), _port() if ranks > 1 else 0
        self.children = [
            Child(lambda rank=rank: train(root, resume, self.phase, rank, ranks, port))  # type: ignore[misc]
            for rank in range(ranks)
        ]

    def wait(self) -> list[Ended]:
        return [child.wait() for child in self.children]

    def survives(self, seconds: float) -> bool:
        """Whether it is still at work after so many seconds of processor time."""
        while self.children[0].cpu() < seconds and self.children[0].alive():
            time.sleep(0.001)
        return self.children[0].alive()

    def kill(self, rng: random.Random) -> None:
        """One of two processes a little before the other, as a scheduler does it."""
        rng.shuffle(self.children)
        for child in self.children:
            child.kill()
            time.sleep(rng.choice([0, 0.05]) if len(self.children) > 1 else 0)
        for child in self.children:
            child.wait()


class _Campaign:
    def __init__(self, root: Path, count: int, seed: int, ranks: int) -> None:
        self.root, self.count, self.ranks = root, count, ranks
        self.rng, self.report = random.Random(seed), KillReport()
        ends = _Job(root / "reference", None, ranks).wait()
        if any(end.error or end.signal for end in ends):
            raise RuntimeError(f"the uninterrupted run failed: {ends}")
        self.whole, self.seconds = tree(root / "reference" / "run"), ends[0].cpu
        self.expected = final(self.whole)
        self.steps = int(checkpoints(root / "reference")[-1].stem.split("=")[1])
        self.recovery = self._recovery()

    def _recovery(self) -> float:
        """Processor time of a resumed run until its first batch is over."""
        again = self.root / "again"
        shutil.copytree(self.root / "reference", again)
        shutil.rmtree(again / "run" / "machine")
        job = _Job(again, checkpoints(again)[1], self.ranks)
        while job.phase.value < TRAINING and job.children[0].alive():
            time.sleep(0.001)
        spent = job.children[0].cpu()
        self._finished(job.wait(), again, "resumed once")
        return spent

    def _finished(self, ends: list[Ended], run: Path, name: str) -> None:
        self.report.runs += 1
        self.report.wrong += [f"{name}: {end.error or end.signal}" for end in ends if end.error or end.signal]
        self.report.wrong += [f"{name}: {line}" for line in finished(run / "run", self.expected)]

    def one_run(self, name: str) -> None:
        """From the start to the end, killed again and again."""
        run, resume, kills = self.root / name, None, 0
        while True:
            job = _Job(run, resume, self.ranks)
            if kills < _AT_MOST and self.report.kills < self.count and job.survives(self._moment(resume)):
                job.kill(self.rng)
                self._killed(job.phase.value, resume is not None)
                self._look(run, name)
                kills, resume = kills + 1, self._next(run)
                continue
            self._finished(job.wait(), run, name)
            shutil.rmtree(run)
            return

    def _moment(self, resume: Path | None) -> float:
        if resume is None:
            return self.rng.uniform(0, self.seconds)
        if self.rng.random() < 0.5:
            return self.rng.uniform(0, self.recovery)
        left = 1 - int(resume.stem.split("=")[1].partition("-v")[0]) / self.steps
        return self.rng.uniform(0, self.recovery + left * self.seconds)

    def _killed(self, phase: int, resumed: bool) -> None:
        self.report.kills += 1
        self.report.recovering += resumed and phase < TRAINING
        name = ("resumed, " if resumed else "first, ") + PHASES[phase]
        self.report.phases[name] = self.report.phases.get(name, 0) + 1

    def _next(self, run: Path) -> Path | None:
        """The checkpoint to go on from; without one the run begins anew."""
        found = checkpoints(run)
        if not found:
            shutil.rmtree(run, ignore_errors=True)
            return None
        if self.rng.random() < 0.2:
            found = found[: self.rng.randint(1, len(found))]
            for later in set(checkpoints(run)) - set(found):  # who goes back to an older one is done with them
                later.unlink()
        return found[-1]

    def _look(self, run: Path, name: str) -> None:
        """No file at a final path is torn, and what there is can be exported."""
        where = f"{name}, kill {self.report.kills}"
        self.report.wrong += [f"{where}: {line}" for line in torn(run / "run", self.whole)]
        for machine in (run / "run").glob("machine*"):
            verify(machine)
        if self.report.kills % 10 == 0 and (run / "run" / "recording").exists():
            self.report.exports += 1
            ended = forked(lambda: export(run / "run" / "recording", run / "exported"))
            if ended.value is None:
                self.report.wrong.append(f"{where}: export: {ended.error or ended.signal}")
            shutil.rmtree(run / "exported", ignore_errors=True)


def campaign(root: Path, count: int, seed: int, ranks: int = 1) -> KillReport:
    """Kill until the count is reached, then let the last run finish.

    Args:
        root: An empty directory; on tmpfs thousands of files cost little.
        count: Kills.
        seed: Of their moments.
        ranks: Processes that train together, 1 or 2.
    """
    campaign = _Campaign(root, count, seed, ranks)
    number = 0
    while campaign.report.kills < count and time_left():
        campaign.one_run(f"run-{number}")
        number += 1
    return campaign.report
