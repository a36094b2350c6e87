"""A bar on standard error where somebody waits, nothing anywhere else."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from lightning_pathkernel import KernelMachine, progress
from lightning_pathkernel.progress import progress_bar, style_of
from tests.helpers import digits
from tests.store.artifacts import network, record
from tests.test_chunks import QUESTIONS

NO_BAR = ("network_outputs", "tangent kernel", "self-influence", "label errors")
"""Questions to one place of the path, or to what is stored of the examples, not to its chords one after another."""


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("progress"), network()) / "machine"


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From now on standard error is one; called within the test, since pytest puts its own in place before it."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def x() -> Tensor:
    return digits()[1].tensors[0][:6]


def test_nothing_is_shown_where_nobody_looks(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    machine = KernelMachine.load(artifact, network())
    machine.explain(x())
    assert capfd.readouterr() == ("", "")


def test_a_question_that_is_answered_at_once_shows_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    KernelMachine.load(artifact, network()).explain(x())
    assert sys.stderr is shown
    assert shown.getvalue() == ""


def test_a_long_question_shows_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.2)
    shown = terminal(monkeypatch)
    for kind in ("tqdm", "rich"):
        for shows, asked in ((True, None), (False, False)):
            begun = len(shown.getvalue())
            with progress_bar(f"by {kind}", 4, asked, kind) as advance:
                for _ in range(4):
                    time.sleep(0.15)
                    advance(1)
            assert (f"by {kind}" in shown.getvalue()[begun:]) == shows, (kind, asked)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [True, "tqdm"])
def test_whoever_asks_for_a_bar_gets_one_on_standard_error(
    kind: bool, artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    KernelMachine.load(artifact, network(), progress=kind).predict(x())
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "predict" in shown.err


def test_rich_draws_its_bar_on_terminals_only(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = KernelMachine.load(artifact, network(), progress="rich")
    machine.predict(x())
    seen = capfd.readouterr()
    assert (seen.out, seen.err.strip()) == ("", "")
    shown = terminal(monkeypatch)
    machine.predict(x())
    assert "predict" in shown.getvalue()


@pytest.mark.parametrize("rtol", [None, 0.1])
@pytest.mark.parametrize("name", [name for name in QUESTIONS if name not in NO_BAR])
def test_the_bar_is_full_when_the_answer_is_there(
    name: str, rtol: float | None, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[list[float]] = []

    def bar(text: str, total: float, *others: object) -> object:
        bars.append([total])
        return real(text, total, *others)

    def advancing(self: object, amount: float = 1) -> None:
        bars[-1].append(amount)

    real = progress._tqdm
    monkeypatch.setattr(progress, "_tqdm", bar)
    monkeypatch.setattr(progress.tqdm, "update", advancing)
    machine = KernelMachine.load(artifact, network(), rtol=rtol, chunk_size=7, example_chunk=50, progress="tqdm")
    QUESTIONS[name](machine)
    assert bars
    for total, *amounts in bars:
        assert sum(amounts) == pytest.approx(total), (name, total, len(amounts))


def test_batches_of_unknown_number_have_a_bar_without_an_end(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    machine = KernelMachine.load(artifact, network(), progress=True)
    machine.fidelity(iter([x()[:3], x()[3:]]))
    assert "fidelity" in capfd.readouterr().err


def test_the_bar_is_of_the_kind_that_the_modules_trainer_has() -> None:
    class RichProgressBar:
        pass

    class Own(RichProgressBar):
        pass

    class Trainer:
        progress_bar_callback: object = None

    module = nn.Linear(1, 1)
    assert style_of(module) == "tqdm"
    module.__dict__["_trainer"] = Trainer()
    assert style_of(module) == "tqdm"
    module.__dict__["_trainer"].progress_bar_callback = Own()
    assert style_of(module) == "rich"


def test_a_bar_goes_away_when_its_block_fails(capfd: pytest.CaptureFixture[str]) -> None:
    for kind in ("tqdm", "rich"):
        with pytest.raises(ZeroDivisionError), progress_bar("text", 3, kind, "tqdm") as advance:
            advance(1 / 0)
    assert capfd.readouterr().out == ""
