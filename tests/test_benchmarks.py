"""The benchmarks' measuring functions on tiny sizes, so that they do not rot."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import attribution, attributors, growth, label_errors, literal, page, peers, plots, queries, retraining
from benchmarks.cases import CASES, Data
from benchmarks.contenders import CONTENDERS, PEERS, PLAIN, RECORDED, Settings
from benchmarks.networks import mlp
from benchmarks.page import read_lines
from benchmarks.recorded import data_of, record
from lightning_pathkernel import KernelMachine

torch_only = {"vmap(grad)", PLAIN, RECORDED}


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of ten classes that differ, ``[n, 1, 28, 28]``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    templates = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(99))
    return (templates[labels] + 0.3 * torch.rand(count, 1, 28, 28, generator=generator)) / 1.3, labels


def data(train: int, probes: int, queries: int) -> Data:
    return data_of(pictures(train, 0), pictures(probes + queries, 1)[0], probes)


# steps


@pytest.mark.filterwarnings("ignore")
def test_all_contenders_that_are_here_are_timed() -> None:
    found = peers.costs("mlp", 4, 32, probes=16)
    assert list(found) == list(CONTENDERS)
    for name, cost in found.items():
        if name in torch_only or find_spec(PEERS[name]) is not None:
            assert cost.error is None, (name, cost.error)
            assert cost.step > 0, name
        else:
            assert "not installed" in (cost.error or ""), (name, cost.error)
    assert found[PLAIN].ratio == 1
    assert found[RECORDED].node > 0
    best = peers.factor(found)
    assert best is not None
    assert best[0] in peers.WHOLE


def test_a_contender_that_fails_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: Settings) -> None:
        raise NotImplementedError("LayerNorm is not supported")

    monkeypatch.setitem(CONTENDERS, "vmap(grad)", refuse)
    found = peers.costs("mlp", 2, 32, probes=16)
    assert found["vmap(grad)"].error == "NotImplementedError: LayerNorm is not supported"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in (PLAIN, "dattri DVEmb")])
def test_contenders_take_the_plain_step(name: str) -> None:
    if name not in torch_only and find_spec(PEERS[name]) is None:
        pytest.skip(f"{name} is not installed")
    ends = []
    for each in (PLAIN, name):
        settings = Settings("mlp", 32, [0, 2, 100], 16)
        models: list[torch.nn.Module] = []
        build = settings.build

        def kept(build: object = build, models: list[torch.nn.Module] = models) -> object:
            out = build()  # type: ignore[operator]
            models.append(out[0])
            return out

        settings.build = kept  # type: ignore[method-assign, assignment]
        step = CONTENDERS[each](settings)
        for _ in range(3):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in models[0].parameters()]))
    gap = float((ends[0] - ends[1]).norm() / ends[0].norm())
    assert gap < 1e-3, gap


def test_peak_memory_is_takenin_a_process_of_its_own() -> None:
    before, beyond = peers.peak_memory(PLAIN, "mlp", 32, 1, probes=16)
    assert before > 50
    assert 0 < beyond < 500


# contributions


def test_halves_are_halves_and_the_same_again() -> None:
    keep = retraining.halves(5, 20, seed=3)
    assert keep.sum(1).tolist() == [10] * 5
    assert torch.equal(keep, retraining.halves(5, 20, seed=3))
    assert not torch.equal(keep, retraining.halves(5, 20, seed=4))


def test_the_score_is_one_for_what_retraining_gives_and_minus_one_for_its_opposite() -> None:
    generator = torch.Generator().manual_seed(0)
    contributions, keep = torch.randn(3, 20, generator=generator), retraining.halves(30, 20, seed=0)
    outputs = keep.float() @ contributions.T
    assert torch.allclose(retraining.scores(contributions, keep, outputs), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(retraining.scores(-contributions, keep, outputs), -torch.ones(3, dtype=torch.float64))
    (_, same), (_, gap) = retraining.bootstrap([contributions, -contributions], keep, outputs, draws=20)
    assert same == 0
    assert gap < 1e-9


def test_log_odds() -> None:
    outputs = torch.tensor([[2.0, 1.0, -1.0]])
    p = outputs.softmax(1)[0, 1]
    assert float(retraining.log_odds(outputs, torch.tensor([1]))) == pytest.approx(float((p / (1 - p)).log()), rel=1e-5)


def test_retraining_on_all_examples_is_the_recorded_run() -> None:
    few = data(128, 16, 8)
    run = record(CASES["MLP, SGD"], 0, 32, few)
    outputs = run.machine.network_outputs(few.queries)
    target = outputs.argmax(1)
    again = retraining.retrained(CASES["MLP, SGD"], 0, few, torch.ones(1, 128, dtype=torch.bool), target)
    assert torch.allclose(again[0], retraining.log_odds(outputs, target), atol=1e-4)


def test_exact_contributions_to_log_odds_add_up_to_their_change() -> None:
    few = data(128, 16, 8)
    run = record(replace(CASES["MLP, SGD"], points=24), 0, 32, few)
    exact, target = attributors.exact_log_odds(run)
    module, states = run.training.case.network(), run.training.states
    first, last = (
        retraining.log_odds(torch.func.functional_call(module, state, (few.queries,)), target)
        for state in (states[0], states[-1])
    )
    gap = float((exact.sum(1) - (last - first)).norm() / (last - first).norm())
    assert gap < 0.01, gap


@pytest.mark.filterwarnings("ignore")
def test_methods_are_compared() -> None:
    verdicts, notes = attribution.compare("MLP, SGD", 0, [32], data(192, 32, 8), 4)
    exact, ours, *others = verdicts
    assert exact.pearson == pytest.approx(1)
    assert ours.pearson > 0.98
    assert ours.answer.size > 0
    for module, name in (("captum", "TracInCP"), ("trak", "TRAK")):
        there = [v for v in others if v.answer.name.startswith(name)]
        if find_spec(module) is None:
            assert not there
            assert any("not installed" in note for note in notes), notes
        else:
            assert there, name
            assert all(v.answer.contributions.shape == (8, 192) for v in there), name


# the literal sum


def test_the_literal_sum_is_measured() -> None:
    found = literal.measure(literal.CASES["MLP, SGD 0.1"], 0, 32, data(128, 16, 8))
    assert found.exact > 0.99, found
    assert found.exact > found.literal, found
    assert found.exact > found.linearized, found
    assert found.machine > 0.95, found


# queries


def test_questions_are_timed_and_the_artifact_is_what_was_recorded(tmp_path: Path) -> None:
    queries.write_machine(tmp_path / "machine", 3000, 4, 64)
    found = queries.measure(tmp_path / "machine", 32)
    assert list(found) == list(queries.COLUMNS)
    for name, (seconds, megabytes) in found.items():
        assert 0 < seconds < 10, (name, seconds)
        assert 0 <= megabytes < 200, (name, megabytes)
    machine = KernelMachine.load(tmp_path / "machine", mlp())
    assert [len(rows) for rows in machine.path.examples] == [3000] * 4
    assert {rows.width for rows in machine.path.examples} == {64}
    lines = queries.report([found, found])
    assert len(lines) == 2 + len(queries.COLUMNS)


def test_multiplied_examples_add_up_to_those_recorded() -> None:
    recorded = record(CASES["MLP, SGD"], 0, 32, data(128, 16, 8)).machine
    path = queries.Multiplied(recorded.chords, 500)
    for one, other in zip(path, recorded.chords, strict=True):
        assert one.example_ids.tolist() == list(range(500))
        torch.testing.assert_close(one.rows.sum(0), other.rows.sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.self_inner.sum(), other.self_inner.sum(), rtol=1e-4, atol=1e-5)


# growth


def test_growth_of_one_point() -> None:
    found = growth.in_a_process(growth.Point(200, 20, 16, 1, 3, 16), 1)
    assert found.keys() == growth.COLUMNS.keys()
    assert found["parameters"] == 256 * 16 + 16 + 16 * 10 + 10
    assert found["artifact_mb"] > found["rows_mb"] > 0
    assert found["recorded_ms"] > 0


def test_power_of_growth() -> None:
    assert growth.power([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert growth.power([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


# pages and pictures


def test_a_section_is_replaced_and_what_is_around_it_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    page.emit("one", "python -m a", ["old"], path)
    path.write_text(path.read_text() + "\nSaid by hand.\n")
    page.emit("two", "python -m b", ["other"], path)
    page.emit("one", "python -m a", ["new"], path)
    text = path.read_text()
    assert "old" not in text
    assert text.index("new") < text.index("Said by hand.") < text.index("other")
    assert "python -m a" in capsys.readouterr().out


def test_the_command_names_no_paths(tmp_path: Path) -> None:
    given = [str(tmp_path), "--docs", "page.md", "--case", "MLP, SGD", "--seeds", "2"]
    assert page.command("literal", given) == "python -m benchmarks.literal DIRECTORY --case 'MLP, SGD' --seeds 2"


def test_the_grid_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"case": case, "optimizer": optimizer, "nodes": nodes, "sketch_dim": dim, "seed": seed,
         "fidelity": 1 - (1 + seed) / (nodes * dim), "pearson": 1 - 0.1 / nodes}
        for case, optimizer, nodes, dim, seed in product(
            ("batch-norm ResNet",), ("SGD", "AdamW"), (4, 64), (32, 2048), range(2)
        )
    ]  # fmt: skip
    lines = tmp_path / "grid.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    paths = plots.draw_grid(read_lines(lines), tmp_path / "plots")
    assert [path.name for path in paths] == ["batch-norm-resnet-sketch-dim.svg", "batch-norm-resnet-nodes.svg"]
    text = paths[0].read_text()
    assert "nodes = 64" in text
    assert len(text) < 200_000
    assert plots.draw_grid(rows, tmp_path / "plots")[0].read_text() == text


def test_a_grid_with_a_field_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1 has no pearson, seed"):
        plots.draw_grid([{"case": "a", "optimizer": "b", "nodes": 1, "sketch_dim": 1, "fidelity": 1.0}], tmp_path)


def test_growth_is_drawn(tmp_path: Path) -> None:
    rows = [{"sweep": "steps", "value": n, **{key: float(n) for key in growth.COLUMNS}} for n in (10, 100)]
    path = plots.draw_growth(rows, tmp_path)
    assert "artifact, MB" in path.read_text()


# wrong labels


def test_a_tenth_of_the_labels_is_changed_and_a_perfect_ranking_finds_them_first() -> None:
    labels = torch.arange(200) % 10
    given, wrong = label_errors.flipped(labels, seed=3)
    assert int(wrong.sum()) == 20
    assert torch.equal(given != labels, wrong)
    curve = dict(zip(label_errors.POINTS, label_errors.found(wrong.float(), wrong), strict=True))
    assert (curve[0.0], curve[0.05], curve[0.1], curve[1.0]) == (0, 0.5, 1, 1)
    last = dict(zip(label_errors.POINTS, label_errors.found(-wrong.float(), wrong), strict=True))
    assert (last[0.9], last[0.95], last[1.0]) == (0, 0.5, 1)


def test_the_table_of_wrong_labels_has_the_mean_and_the_least_of_the_seeds(tmp_path: Path) -> None:
    curve = [min(1.0, 4 * p) for p in label_errors.POINTS]
    row = {"data": "digits", "network": "MLP", "optimizer": "SGD", "score": "label_errors(labels)"}
    rows = [{**row, "seed": seed, "found": [c - 0.1 * seed for c in curve]} for seed in (0, 2)]
    lines = list(label_errors.table(rows))
    assert lines[2].startswith("| digits, MLP, SGD | 2 | 0.700 (0.600) |")
    label_errors.draw(rows, tmp_path / "plots" / "label-errors.svg")
    assert (tmp_path / "plots" / "label-errors.svg").read_text(encoding="utf-8").startswith("<?xml")
