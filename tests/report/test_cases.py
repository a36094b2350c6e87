"""Pages of every kind of machine and every kind of example, with what comes from outside escaped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from lightning_pathkernel import ArtifactError, KernelMachine
from lightning_pathkernel.report import read_history, report_directory
from lightning_pathkernel.report.examples import ExampleSource
from tests.helpers import Classifier, digits
from tests.report.conftest import Written
from tests.report.pages import classifier, machine, read

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&</td>"


class Regressor(Classifier):
    """One output, squared loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])


def patients() -> TensorDataset:
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x[:40, :10], dtype=torch.float32)
    return TensorDataset((x - x.mean(0)) / x.std(0), torch.tensor(y[:40], dtype=torch.float32))


def test_regression_of_one_query_without_validation(tmp_path: Path) -> None:
    """Rows of a table, no metrics, no classes."""
    net = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))
    data = patients()
    found = machine(tmp_path, Regressor(net=net), data, validate=False)
    columns = [str(name) for name in load_breast_cancer().feature_names[:10]]
    page = read(found.report(tmp_path / "r.html", data.tensors[0][:1], examples=data, columns=columns))
    assert page.one("figure").attrs["id"] == "chart-path"
    assert "No metrics were logged" in page.one("section", id="training").text
    assert "Training logged no metrics" in page.one("section", id="summary").text
    assert "1 query" in page.one("section", id="summary").text
    assert "A single output has no classes" in page.one("section", id="classes").text
    panel = page.one(role="tabpanel")
    assert panel.all("dl", class_="cells")[1].all("dt")[0].text == "mean radius"
    expected = found.explain(data.tensors[0][:1]).contributions[0, 0]
    assert float(panel.all("td", class_="signed for")[0].attrs["data-value"]) == pytest.approx(float(expected))
    assert "the output" in panel.text
    labels = {row.all("td")[1].text for row in panel.one("table", class_="fall").parent.all("tbody")[1].all("tr")}
    assert labels <= {"0", "1"}


def test_a_single_training_example_stands_on_one_side_only(tmp_path: Path) -> None:
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    module, _ = classifier(2)
    found = machine(tmp_path, module, TensorDataset(x, torch.tensor([1])), validate=False, nodes=2)
    page = read(found.report(tmp_path / "r.html", x, torch.tensor([1]), examples=[x[0]], labels=[1]))
    panel = page.one(role="tabpanel")
    assert len(panel.all("td", class_="signed for")) == 1
    assert len(panel.all("td", class_="signed against")) == 0
    assert panel.one("td", colspan="3").text == "None: no example has this sign."


@pytest.mark.parametrize("classes", [2, 21, 100])
def test_classes(classes: int, tmp_path: Path) -> None:
    """Up to 20 classes are a table, more of them a picture and its strongest cells."""
    module, data = classifier(classes, examples=max(40, 2 * classes))
    found = machine(tmp_path, module, data, validate=False, nodes=2)
    names = [f"class {EVIL} {k}" for k in range(classes)]
    x = data.tensors[0][:70]
    target = torch.arange(len(x)) % classes
    page = read(found.report(tmp_path / "r.html", x, target, examples=data, class_names=names, max_queries=2, top_k=2))
    section = page.one("section", id="classes")
    sums = found.contributions(x, target)
    labels = data.tensors[1][found.example_ids]
    if classes == 2:
        assert [cell.text for cell in section.one("thead").all("th")[1:]] == names
        assert len(section.all("td")) == 4
        return
    image = section.one("img")
    assert image.attrs["src"].startswith("data:image/png;base64,")
    assert int(image.attrs["width"]) == classes
    assert int(image.attrs["height"]) == min(classes, 70)
    rows = section.one("tbody").all("tr")
    assert len(rows) == 20
    row, column = (int(cell.text.split()[-1]) for cell in rows[0].all("td")[:2])
    expected = float(sums[target == row][:, labels == column].sum(1).mean())
    assert float(rows[0].all("td")[2].attrs["data-value"]) == pytest.approx(expected, rel=1e-4)


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    module, data = classifier(3)
    texts = [f"{EVIL} text {i}" for i in range(len(data))]

    def ids(batch: Any) -> list[str]:
        places = [int((data.tensors[0] == row).all(1).nonzero()[0]) for row in batch[0]]
        return [f"{EVIL} name {i}" for i in places]

    found = machine(tmp_path, module, data, validate=False, example_ids=ids)
    by_name = {f"{EVIL} name {i}": texts[i] for i in range(len(data))}
    labels = {f"{EVIL} name {i}": int(data.tensors[1][i]) for i in range(len(data))}
    directory = found.directory
    assert directory is not None
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["optimizer"]["name"] = EVIL
    (directory / "manifest.json").write_text(json.dumps(manifest))
    path = found.report(
        tmp_path / "r.html", data.tensors[0][:2], examples=by_name, labels=labels, title=EVIL,
        query_items=[EVIL, EVIL], query_names=[EVIL, "b"], query_labels=[EVIL, "c"], class_names=[EVIL] * 3,
        history=[{"step": 1.0, EVIL: 0.5}],
    )  # fmt: skip
    page = read(path)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [node for node in page.all() if "onerror" in node.attrs]
    assert page.one("h1").text == page.one("title").text == EVIL
    panel = page.one("article", id="query-0")
    assert panel.one("h3").text == f"Query {EVIL}"
    names = {row.text for row in panel.all("span", class_="name")}
    assert names <= set(by_name)
    assert len(names) > 3
    assert {row.text for row in panel.all("span", class_="words")} <= {*texts, EVIL}
    assert EVIL in page.one("section", id="training").text
    assert EVIL in page.one("header").text


def test_numbers_that_are_not_finite_leave_gaps(written: Written, tmp_path: Path) -> None:
    history = [{"step": float(k), "fidelity": v, "error_sketch": None, "kernel_velocity": float("nan")}
               for k, v in enumerate([None, 0.5, -59.0, float("inf"), 0.9])]  # fmt: skip
    page = read(written.machine.report(tmp_path / "r.html", history=history))
    chart = page.one("figure", id="chart-fidelity")
    curve = chart.one("svg", preserveaspectratio="none").all("path")[0].attrs["d"]
    assert curve.count("M") == 2  # broken once
    assert curve.count("L") == 1
    assert "nan" not in curve
    assert "1 of 3 values lie below \N{MINUS SIGN}0.25" in chart.text
    assert [figure.attrs["id"] for figure in page.all("figure")] == ["chart-fidelity", "chart-path"]
    assert page.one(data_metric="kernel_velocity").one("p", class_="value").text == "not finite"


def test_thousands_of_epochs_and_queries_make_no_endless_page(written: Written, tmp_path: Path) -> None:
    history = [{"step": float(k), "fidelity": 0.9} for k in range(5000)]
    x = written.batch[0].repeat(20, 1, 1, 1)
    path = written.machine.report(tmp_path / "r.html", x, history=history, examples=digits()[0], max_suspects=10**6)
    page = read(path)
    table = page.one("section", id="training").all("table")[0]
    steps = [float(row.all("td")[0].attrs["data-value"]) for row in table.one("tbody").all("tr")]
    assert len(steps) == 400
    assert (steps[0], steps[-1]) == (0, 4999)
    assert "400 of 5000 epochs" in page.one("section", id="training").text
    assert len(page.all(role="tab")) == 12
    assert len(page.one("section", id="suspects").one("tbody").all("tr")) == 320
    assert path.stat().st_size < 2_000_000


def test_a_directory_alone_has_its_metrics(written: Written, tmp_path: Path) -> None:
    assert written.machine.directory is not None
    found = tmp_path / "machine"
    shutil.copytree(written.machine.directory, found)
    page = read(report_directory(found, title="Alone"))
    assert (tmp_path / "report.html").is_file()
    assert page.one("h1").text == "Alone"
    assert len(page.all("figure")) == 3
    assert page.one(data_metric="fidelity").one("p", class_="value").text
    assert not page.all(role="tab")
    for text in (
        "{",
        '{"history": 1}',
        '{"history": [{"step": "x"}]}',
        '{"history": [1]}',
        '{"history": [{"a": true}]}',
    ):
        (found / "metrics.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"metrics.json: malformed"):
            read_history(found)
    with pytest.raises(ArtifactError, match=r"manifest.json"):
        report_directory(tmp_path / "nothing")


# examples


@pytest.mark.parametrize(
    ("examples", "kind"),
    [
        (torch.rand(5, 3, 8, 8), "image"),
        (np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8), "image"),
        ([f"text {i}" for i in range(5)], "text"),
        (torch.rand(5, 4), "row"),
        ({i: {"a": i, "b": "x"} for i in range(5)}, "row"),
        (TensorDataset(torch.rand(5, 1, 8, 8), torch.arange(5)), "image"),
        (Subset(TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9)), [4, 5, 6, 7, 8]), "image"),
        (torch.randint(0, 99, (5, 12)), "text"),
        ([object()] * 5, "text"),
        (None, "none"),
    ],
)
def test_examples_in_whatever_they_are_kept(examples: Any, kind: str) -> None:
    source = ExampleSource(examples)
    assert source.look(2).kind == kind
    if isinstance(examples, Subset):
        assert source.label(2) == 6
        assert source.label_vector(torch.tensor([0, 4])) == [4, 8]
    if isinstance(examples, TensorDataset):
        assert source.label(2) == 2


def test_a_data_frame_shows_its_columns() -> None:
    class Frame:
        """What of a data frame is used: pandas need not be there."""

        columns = ("age", "sex")

        @property
        def iloc(self) -> list[dict[str, Any]]:
            return [{"age": 40 + i, "sex": "f"} for i in range(3)]

    assert ExampleSource(Frame()).look(1).cells == (("age", "41"), ("sex", "f"))


def test_positions_of_a_sequence_are_looked_up_by_their_example() -> None:
    source = ExampleSource(["one", "two"], labels=torch.tensor([[1, 2, 3], [4, 5, 6]]), positions=3)
    assert (source.name(4), source.look(4).text, source.label(4)) == ("1, position 1", "two", 5)


def test_examples_that_are_not_the_training_set_are_refused(written: Written, tmp_path: Path) -> None:
    few = Subset(digits()[0], range(10))
    with pytest.raises(ValueError, match="rows, but the machine was trained on example"):
        written.machine.report(tmp_path / "r.html", examples=few)
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(ValueError, match="pass examples as a mapping from name"):
        ExampleSource(["x"], names={0: "a"}).look(0)
    with pytest.raises(ValueError, match="examples has no 'a'"):
        ExampleSource({"b": "x"}, names={0: "a"}).look(0)
    for wrong, message in (
        ({"query_items": ["x"]}, "query_items has 1 entries for 2"),
        ({"query_names": ["x"]}, "query_names has 1 entries for 2"),
        ({"query_labels": [1]}, "query_labels has 1 entries for 2"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \(2,\), found \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            written.machine.report(tmp_path / "r.html", written.batch[0][:2], **wrong)


def test_show_turns_examples_and_queries_into_what_is_shown(written: Written, tmp_path: Path) -> None:
    path = written.machine.report(
        tmp_path / "r.html",
        written.batch[0][:1],
        examples=digits()[0],
        show=lambda image: f"ink {float(image.sum()):.3f}",
    )
    panel = read(path).one(role="tabpanel")
    assert panel.all("span", class_="words")[0].text == f"ink {float(written.batch[0][0].sum()):.3f}"
    first = int(panel.all("tbody")[1].all("td")[0].attrs["data-value"])
    assert panel.all("span", class_="words")[1].text == f"ink {float(digits()[0].tensors[0][first].sum()):.3f}"


def test_another_scalar_than_an_output_is_explained(written: Written, tmp_path: Path) -> None:
    x, y = written.batch[0][:2], written.batch[1][:2]

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, reduction="none")

    path = written.machine.report(tmp_path / "r.html", x, y, output_fn=loss, output_name="the loss", complete=False)
    panel = read(path).one("article", id="query-1")
    expected = written.machine.explain(x, y, output_fn=loss, complete=False, top_k=8)
    assert "the loss" in panel.text
    assert "their share of the sketch term" not in panel.text
    values = [float(cell.attrs["data-value"]) for cell in panel.all("td", class_="signed for")]
    assert values == pytest.approx(expected.contributions[1, :8].tolist(), rel=1e-4)


def test_a_machine_without_some_examples_has_a_report_too(written: Written, tmp_path: Path) -> None:
    fewer = written.machine.without(written.machine.example_ids[:100])
    page = read(fewer.report(tmp_path / "r.html", written.batch[0][:1], labels=digits()[0].tensors[1]))
    assert "24 most suspicious of 220" in page.one("section", id="suspects").text


def test_the_machine_s_own_ranking_of_labels_is_taken(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By suspicion, whatever strings the labels are; without labels by self-influence."""
    asked: list[Tensor] = []

    def label_errors(self: KernelMachine, labels: Tensor) -> SimpleNamespace:
        asked.append(labels)
        return SimpleNamespace(
            example_ids=self.example_ids.flip(0), scores=torch.linspace(0.9, 0, len(self.example_ids))
        )

    monkeypatch.setattr(KernelMachine, "label_errors", label_errors, raising=False)
    labels = [f"digit {int(y)}" for y in digits()[0].tensors[1]]
    page = read(written.machine.report(tmp_path / "r.html", labels=labels))
    assert torch.equal(asked[0], digits()[0].tensors[1])
    rows = page.one("section", id="suspects").one("tbody").all("tr")
    ids = [int(row.all("td")[1].attrs["data-value"]) for row in rows]
    assert ids == written.machine.example_ids.flip(0)[:24].tolist()
    assert [row.all("td")[2].text for row in rows] == [labels[i] for i in ids]
    found = dict(zip(written.machine.example_ids.tolist(), written.machine.self_influence().tolist(), strict=True))
    assert [float(row.all("td")[3].attrs["data-value"]) for row in rows] == pytest.approx([found[i] for i in ids])
    assert rows[0].all("td")[4].text == "0.9000"
    page = read(written.machine.report(tmp_path / "r.html"))
    assert len(asked) == 1
    assert "Suspicion" not in page.one("section", id="suspects").text
