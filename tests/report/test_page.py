"""The page: its structure, and that its numbers are the machine's."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from lightning_pathkernel.report.history import METRICS
from tests.helpers import digits
from tests.report.conftest import Written
from tests.report.pages import Node, read


def test_it_has_a_language_a_title_landmarks_and_one_heading_of_the_first_order(written: Written) -> None:
    page = written.page
    assert page.one("html").attrs["lang"] == "en"
    assert page.one("title").text == "Digits" == page.one("h1").text
    assert page.one("meta", name="viewport").attrs["content"] == "width=device-width, initial-scale=1"
    for landmark in ("header", "main", "footer"):
        assert len(page.all(landmark)) == 1
    assert page.one("nav").attrs["aria-label"] == "Sections"
    assert page.one("a", class_="skip").attrs["href"] == "#main" == "#" + page.one("main").attrs["id"]


def test_headings_do_not_leave_out_an_order(written: Written) -> None:
    orders = [int(node.tag[1]) for node in written.page.all() if re.fullmatch("h[1-6]", node.tag)]
    assert orders[0] == 1
    assert orders.count(1) == 1
    assert len(orders) > 12
    assert all(b <= a + 1 for a, b in itertools.pairwise(orders)), orders


def test_every_reference_points_at_one_element(written: Written) -> None:
    ids = [node.attrs["id"] for node in written.page.all() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    found = 0
    for node in written.page.all():
        targets = [node.attrs[k] for k in ("aria-labelledby", "aria-controls") if k in node.attrs]
        targets += [node.attrs["href"][1:]] if node.attrs.get("href", "").startswith("#") else []
        found += len(targets)
        assert set(targets) <= set(ids), targets
    assert found > 20


def test_everything_that_can_be_used_or_seen_has_a_name(written: Written) -> None:
    page = written.page
    assert all(button.text for button in page.all("button"))
    assert all("alt" in image.attrs for image in page.all("img"))
    content = [image for image in page.all("img") if image.parent is not None and image.parent.tag != "button"]
    assert len(content) > 50
    assert all(image.attrs["alt"] for image in content)
    assert all(table.all("caption") and table.all("caption")[0].text for table in page.all("table"))
    assert all(cell.attrs.get("scope") in ("row", "col") for cell in page.all("th"))
    for node in page.all():
        if node.attrs.get("role") in ("img", "region", "tablist"):
            assert node.attrs["aria-label"]
    assert all("hidden" in node.attrs.get("aria-hidden", "") or node.attrs["aria-hidden"] == "true"
               for node in page.all("svg"))  # fmt: skip


def test_tabs_have_the_roles_of_tabs(written: Written) -> None:
    tabs, panels = written.page.all(role="tab"), written.page.all(role="tabpanel")
    assert len(tabs) == len(panels) == 6
    assert [tab.attrs["aria-controls"] for tab in tabs] == [panel.attrs["id"] for panel in panels]
    assert [tab.attrs["id"] for tab in tabs] == [panel.attrs["aria-labelledby"] for panel in panels]
    assert [tab.attrs["tabindex"] for tab in tabs] == ["0"] + ["-1"] * 5


def test_it_holds_everything_and_asks_for_nothing(written: Written) -> None:
    page, text = written.page, written.path.read_text(encoding="utf-8")
    for node in page.all():
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = node.attrs.get(name, "#")
            assert value.startswith(("#", "data:")), (node.tag, name, value[:60])
        assert not [name for name in node.attrs if name.startswith("on")]
    style = page.one("style").text
    assert "url(" not in style
    assert "@import" not in style
    policy = page.one("meta", http_equiv="Content-Security-Policy").attrs["content"]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


# numbers


def cells(panel: Node, side: str) -> list[tuple[int, float, str]]:
    """Example, exact contribution and text of one side."""
    out = []
    for cell in panel.all("td", class_=f"signed {side}"):
        assert cell.parent is not None
        name = cell.parent.all("td")[0].attrs["data-value"]
        out.append((int(name), float(cell.attrs["data-value"]), cell.one("span", class_=f"amount text-{side}").text))
    return out


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def near(text: str, value: float) -> bool:
    """Whether a text is a value, rounded to the decimals that the text has."""
    decimals = len(text.partition(".")[2])
    return abs(number(text) - value) <= 0.5000001 * 10**-decimals


def test_contributions_are_those_of_explain(written: Written) -> None:
    why = written.machine.explain(written.batch[0][:6], top_k=5)
    for q, panel in enumerate(written.page.all(role="tabpanel")):
        shown = cells(panel, "for") + cells(panel, "against")
        expected = list(zip(why.example_ids[q].tolist(), why.contributions[q].tolist(), strict=True))
        assert [i for i, _, _ in shown] == [i for i, _ in expected]
        assert [c for _, c, _ in shown] == pytest.approx([c for _, c in expected], rel=1e-5)
        assert all(near(text, c) for _, c, text in shown)
        assert all(text.startswith("+" if c > 0 else "\N{MINUS SIGN}") for _, c, text in shown)


def test_the_waterfall_is_the_ledger_and_adds_up_to_the_network(written: Written) -> None:
    x = written.batch[0][:6]
    target = written.machine.network_outputs(x).argmax(1)
    why, all_of_them = written.machine.explain(x, target), written.machine.contributions(x, target)
    network = written.machine.network_outputs(x).gather(1, target[:, None])[:, 0]
    for q, panel in enumerate(written.page.all(role="tabpanel")):
        rows = {row.attrs["data-term"]: row.one("td", data_value=row.all("td")[1].attrs["data-value"])
                for row in panel.all("tr") if "data-term" in row.attrs}  # fmt: skip
        assert list(rows) == ["initial", "decay", "buffers", "bias", "for", "against", "machine", "sketch",
                              "quadrature", "unattributed", "network"]  # fmt: skip
        values = {name: float(cell.attrs["data-value"]) for name, cell in rows.items()}
        for name in ("initial", "decay", "buffers", "sketch", "quadrature", "unattributed"):
            assert values[name] == pytest.approx(float(why.ledger[name][q]), rel=1e-4, abs=1e-6)
        assert values["for"] == pytest.approx(float(all_of_them[q].clamp_min(0).sum()), rel=1e-4)
        assert values["against"] == pytest.approx(float(all_of_them[q].clamp_max(0).sum()), rel=1e-4)
        assert values["machine"] == pytest.approx(float(why.prediction[q]), abs=1e-4)
        assert values["network"] == pytest.approx(float(network[q]), abs=1e-4)
        parts = sum(v for name, v in values.items() if name not in ("bias", "machine", "network"))
        assert values["network"] == pytest.approx(parts, abs=1e-6)
        assert all(near(rows[name].text, value) for name, value in values.items())


def test_the_summary_is_what_was_logged_and_what_the_queries_say(written: Written) -> None:
    assert written.machine.directory is not None
    last = json.loads((written.machine.directory / "metrics.json").read_text())["history"][-1]
    measured = written.machine.fidelity([written.batch[0]])
    for name in ("fidelity", "agreement", "error_quadrature", "error_sketch", "error_unattributed", "kernel_velocity"):
        card = written.page.one(data_metric=name)
        texts = [card.one("p", class_="value").text]
        values = [last[name]]
        if name in measured:
            texts.append(card.one("p", class_="other").text.removesuffix(" on the queries"))
            values.append(measured[name])
        scale = 100 if METRICS[name].share else 1
        for text, value in zip(texts, values, strict=True):
            assert near(text.removesuffix("%").strip(), scale * value), (name, text, value)
        assert METRICS[name].meaning == card.one("p", class_="meaning small quiet").text


def test_the_heat_map_is_the_mean_of_the_contributions_by_class(written: Written) -> None:
    x, machine = written.batch[0], written.machine
    target = machine.network_outputs(x).argmax(1)
    found, labels = machine.contributions(x, target), digits()[0].tensors[1][machine.example_ids]
    table = written.page.one("table", class_="heat")
    rows = table.one("tbody").all("tr")
    assert [row.one("th").text for row in rows] == [str(k) for k in target.unique().tolist()]
    for row, k in zip(rows, target.unique(), strict=True):
        expected = [float(found[target == k][:, labels == c].sum(1).mean()) for c in range(10)]
        values = [float(cell.attrs["data-value"]) for cell in row.all("td")]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert all((cell.attrs["class"] == "for") == (v > 0) for cell, v in zip(row.all("td"), values, strict=True))


def test_suspects_are_ranked_by_the_size_of_self_influence(written: Written, tmp_path: Path) -> None:
    """Where no labels are known."""
    found = written.machine.self_influence()
    page = read(written.machine.report(tmp_path / "r.html", examples=digits()[0].tensors[0]))
    rows = page.one("section", id="suspects").one("tbody").all("tr")
    assert len(rows) == 24
    values = [float(row.all("td")[-1].attrs["data-value"]) for row in rows]
    assert values == pytest.approx(found[found.abs().argsort(descending=True)[:24]].tolist())


def test_charts_and_tables_hold_the_history_and_the_path(written: Written) -> None:
    assert written.machine.directory is not None
    history = json.loads((written.machine.directory / "metrics.json").read_text())["history"]
    assert {figure.attrs["id"] for figure in written.page.all("figure")} == {
        "chart-fidelity", "chart-errors", "chart-velocity", "chart-path"
    }  # fmt: skip
    chart = written.page.one("figure", id="chart-fidelity").one(role="img")
    assert json.loads(chart.attrs["data-steps"]) == [int(entry["step"]) for entry in history]
    tables = written.page.one("section", id="training").all("table")
    logged = tables[0].one("tbody").all("tr")
    assert len(logged) == len(history)
    texts = [button.text for button in tables[0].all("button")]
    column = texts.index(METRICS["fidelity"].label)
    assert [float(row.all("td")[column].attrs["data-value"]) for row in logged] == [e["fidelity"] for e in history]
    chords = tables[1].one("tbody").all("tr")
    assert len(chords) == len(written.machine.chords)
    for row, chord in zip(chords, written.machine.chords, strict=True):
        moved = torch.cat([d.flatten() for d in chord.delta.values()]).norm()
        weights = torch.cat([w.flatten() for w in chord.start.values()]).norm()
        assert float(row.all("td")[3].attrs["data-value"]) == pytest.approx(float(moved / weights), rel=1e-5)
        assert int(row.all("td")[5].text) == len(chord.example_ids)


def test_it_says_how_many_are_shown(written: Written) -> None:
    assert "6 of 14 queries are shown" in written.page.one("section", id="queries").text
    assert "24 most suspicious of 320 training examples" in written.page.one("section", id="suspects").text


def test_a_page_is_replaced_whole_and_leaves_nothing_behind(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    for title in ("First", "Second"):
        assert written.machine.report(path, title=title) == path
        assert read(path).one("h1").text == title
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(TypeError, match="unknown"):
        written.machine.report(path, unknown=1)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        written.machine.report(path, top_k=0)
