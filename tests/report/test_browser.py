"""The page in headless Chromium: what a person with a mouse, a keyboard, a phone or a printer meets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from playwright.sync_api import sync_playwright

from lightning_pathkernel import KernelMachine
from tests.helpers import digits
from tests.report.conftest import Written


def chromium() -> str | None:
    """The system's Chromium, or the one that `playwright install chromium` brought."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    with sync_playwright() as run:
        path = run.chromium.executable_path
    return path if os.path.exists(path) else None


CHROMIUM = chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


class Visit:
    """A page that is open, and what it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(120_000)  # two cores and a whole suite beside it
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id"))


@pytest.fixture
def visit(browser: Any, written: Written) -> Iterator[Any]:
    visits: list[Visit] = []

    def go(**options: Any) -> Visit:
        visits.append(Visit(browser, written.path, **options))
        return visits[-1]

    yield go
    for each in visits:
        each.context.close()


def shown_panels(page: Any) -> list[str]:
    return [panel.get_attribute("id") for panel in page.locator("[role=tabpanel]").all() if panel.is_visible()]


def test_nothing_is_asked_for_and_nothing_complained_of(visit: Any, written: Written) -> None:
    seen = visit()
    seen.page.wait_for_load_state("networkidle")
    assert seen.complaints == []
    outside = [url for url in seen.requests if not url.startswith("data:")]
    assert outside == [written.path.as_uri()]


def test_every_image_is_loaded(visit: Any) -> None:
    page = visit().page
    widths = page.evaluate("Array.from(document.images, image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) > 60
    assert min(widths) == 8


def test_tabs_by_mouse(visit: Any) -> None:
    page = visit().page
    assert shown_panels(page) == ["query-0"]
    page.locator("#tab-3").click()
    assert shown_panels(page) == ["query-3"]
    assert page.locator("[role=tab][aria-selected=true]").get_attribute("id") == "tab-3"
    assert page.locator("[role=tab][tabindex='0']").get_attribute("id") == "tab-3"


def test_tabs_by_keyboard(visit: Any) -> None:
    seen = visit()
    seen.page.locator("#tab-0").focus()
    for key, expected in (
        ("ArrowRight", "1"), ("ArrowDown", "2"), ("ArrowLeft", "1"), ("End", "5"), ("ArrowRight", "0"),
        ("ArrowUp", "5"), ("Home", "0"),
    ):  # fmt: skip
        seen.page.keyboard.press(key)
        assert seen.focused() == f"tab-{expected}"
        assert shown_panels(seen.page) == [f"query-{expected}"]
    seen.page.keyboard.press("Tab")
    assert seen.focused() == "query-0"


def column(table: Any, index: int) -> list[str]:
    return [str(text) for text in table.locator(f"tbody tr td:nth-child({index})").all_inner_texts()]


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_tables_are_sorted(visit: Any, by: str) -> None:
    page = visit().page
    table = page.locator("#suspects table")
    ranks = column(table, 1)
    assert ranks == [str(k) for k in range(1, 25)]

    def press(name: str) -> None:
        button = table.get_by_role("button", name=name, exact=True)
        if by == "mouse":
            button.click()
        else:
            button.focus()
            page.keyboard.press("Enter")

    head = table.locator("th", has=page.get_by_role("button", name="Self-influence"))
    place = 1 + table.locator("th button").all_inner_texts().index("Self-influence")
    cells = table.locator(f"td:nth-child({place})")
    press("Self-influence")
    assert head.get_attribute("aria-sort") == "ascending"
    assert table.locator("th[aria-sort]").count() == 1
    values = [float(v) for v in cells.evaluate_all("cells => cells.map(c => c.dataset.value)")]
    assert values == sorted(values)
    press("Self-influence")
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(v) for v in cells.evaluate_all("cells => cells.map(c => c.dataset.value)")]
    assert values == sorted(values, reverse=True)
    press("Example")
    ids = [int(text) for text in column(table, 2)]
    assert ids == sorted(ids)
    assert head.get_attribute("aria-sort") is None
    press("Rank")
    assert column(table, 1) == ranks


def test_a_query_s_examples_are_sorted_by_label(visit: Any) -> None:
    table = visit().page.locator("#query-0 .sides table").first
    assert table.locator("th").last.get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="Contribution").click()
    values = table.locator("td.signed").evaluate_all("cells => cells.map(c => Number(c.dataset.value))")
    assert len(values) == 5
    assert values == sorted(values)
    table.get_by_role("button", name="Label").click()
    labels = column(table, 2)
    assert labels == sorted(labels, key=int)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_is_never_wider_than_the_screen(visit: Any, width: int) -> None:
    page = visit(viewport={"width": width, "height": 844}, has_touch=True, is_mobile=width < 700).page
    page.locator("details").evaluate_all("all => all.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for k in range(6):
        page.locator(f"#tab-{k}").click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    beyond = page.evaluate(
        """width => Array.from(document.querySelectorAll("main *")).filter(each =>
            !each.closest(".scroll, .hidden-text, svg") && each.getBoundingClientRect().right > width + 0.5
        ).map(each => each.className)""",
        width,
    )
    assert beyond == []


@pytest.mark.parametrize("width", [360, 375, 390])
def test_a_ranking_of_images_is_not_cut_on_a_phone(visit: Any, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800}).page
    table = "document.querySelector('#suspects .scroll')"
    assert page.evaluate(f"{table}.scrollWidth - {table}.clientWidth") <= 0
    assert page.evaluate("document.querySelector('.top .facts').offsetWidth") > 0.85 * width


def ground(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


LIGHT, DARK = "rgb(246, 246, 243)", "rgb(16, 19, 22)"


@pytest.mark.parametrize(("scheme", "first", "second"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_the_theme_follows_the_system_until_it_is_chosen_and_then_stays(
    visit: Any, scheme: str, first: str, second: str
) -> None:
    page = visit(color_scheme=scheme).page
    button = page.get_by_role("button", name="Dark theme")
    assert ground(page) == first
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.focus()
    page.keyboard.press("Space")
    assert ground(page) == second
    assert button.get_attribute("aria-pressed") == str(scheme == "light").lower()
    page.reload()
    assert ground(page) == second
    button.click()
    assert ground(page) == first


def test_print_is_light_without_controls_and_with_every_query(visit: Any) -> None:
    page = visit(color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    for control in (".theme", ".nav", ".tabs", ".skip", "details"):
        assert not page.locator(control).first.is_visible(), control
    assert len(shown_panels(page)) == 6
    assert ground(page) == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(25, 28, 32)"


def test_a_chart_tells_the_numbers_under_the_pointer(visit: Any) -> None:
    page = visit().page
    figure = page.locator("#chart-fidelity")
    output, step = figure.locator("[data-texts]").first, figure.locator(".axis b")
    last = (output.inner_text(), step.inner_text())
    figure.scroll_into_view_if_needed()
    box = figure.locator(".plot").bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 20)
    assert (output.inner_text(), step.inner_text()) != last
    assert output.inner_text() == page.evaluate(
        "JSON.parse(document.querySelector('#chart-fidelity [data-texts]').dataset.texts)[0]"
    )
    page.mouse.move(0, 0)
    assert (output.inner_text(), step.inner_text()) == last


def test_every_control_can_be_reached_by_tab_and_shows_it(visit: Any) -> None:
    page = visit().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    controls = page.evaluate(
        """Array.from(document.querySelectorAll("a[href], button, summary, [tabindex='0']")).filter(each =>
            each.checkVisibility() && each.tabIndex >= 0).length"""
    )
    seen = set()
    for _ in range(controls + 5):
        seen.add(page.evaluate("Array.from(document.querySelectorAll('*')).indexOf(document.activeElement)"))
        style = page.evaluate("document.activeElement.tagName === 'BODY' || "
                              "getComputedStyle(document.activeElement).outlineStyle")  # fmt: skip
        assert style in (True, "solid")
        page.keyboard.press("Tab")
    assert len(seen) >= controls


def test_without_script_every_query_is_there(visit: Any) -> None:
    page = visit(java_script_enabled=False).page
    assert len(shown_panels(page)) == 6
    assert not page.locator(".tabs").is_visible()
    assert not page.locator(".theme").is_visible()


@pytest.mark.parametrize("kind", ["text", "row", "image"])
def test_texts_and_table_rows_and_a_ranking_of_labels_fit_a_phone(
    browser: Any, written: Written, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking = SimpleNamespace(example_ids=written.machine.example_ids, scores=torch.linspace(1, 0, 320))
    monkeypatch.setattr(KernelMachine, "label_errors", lambda self, labels: ranking, raising=False)
    long = "Wörter und eine_sehr_lange_Zeichenkette_ohne_jede_Lücke_die_nirgends_umbrochen_werden_kann " * 2
    items = [long if kind == "text" else {f"a column called {k}": float(k) ** 9 for k in range(20)}] * 320
    given = digits()[0].tensors[0] if kind == "image" else items
    names = [f"{k % 3}" if kind == "image" else f"a long label, {k % 3}" for k in range(320)]
    path = written.machine.report(
        tmp_path / "r.html", written.batch[0][:3], examples=given, query_items=items[:3], query_labels=[1, 2, 3],
        labels=names, query_names=["a", long, "c"], top_k=2, max_suspects=3,
    )  # fmt: skip
    seen = Visit(browser, path, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    try:
        assert seen.complaints == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        seen.page.locator("#tab-1").click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        assert seen.page.locator("#suspects th").count() == 5
        assert kind == "image" or seen.page.locator("#query-1 td.example").first.bounding_box()["width"] > 280
    finally:
        seen.context.close()
