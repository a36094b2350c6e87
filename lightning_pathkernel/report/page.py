"""The page itself: one HTML file with everything in it, and nothing that it would fetch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup

from lightning_pathkernel.report.charts import Chart, value_text
from lightning_pathkernel.report.history import METRICS
from lightning_pathkernel.report.overview import Card, ChordRow, Suspects
from lightning_pathkernel.report.queries import QueryPart
from lightning_pathkernel.report.waterfall import LEDGER_WORDS

__all__ = ["Page", "render", "template_text"]


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        title: Its heading.
        facts: What the machine is of: name -> value.
        cards: The summary.
        history: Logged metrics, tidy.
        charts: Charts over training.
        path: The chords as bars; None where they are not known.
        chords: Rows of the table of chords.
        chord_count: How many chords there are.
        queries: The explained queries; None where there are none.
        suspects: Suspected label errors.
        example_count: How many training examples the machine has.
        complete: Whether contributions include their share of the sketch term.
        entries: How many entries were logged, of which ``history`` may hold but some.
    """

    title: str
    facts: Mapping[str, str]
    cards: Sequence[Card]
    history: Sequence[Mapping[str, float | None]]
    charts: Sequence[Chart]
    path: Chart | None
    chords: Sequence[ChordRow]
    chord_count: int
    queries: QueryPart | None
    suspects: Suspects
    example_count: int
    complete: bool

    entries: int

    @property
    def names(self) -> list[str]:
        """All metrics that were logged, those with a meaning of their own first."""
        found = {name for entry in self.history for name in entry} - {"step"}
        return [n for n in METRICS if n in found] + sorted(found - set(METRICS))

    @staticmethod
    def text(name: str, entry: Mapping[str, float | None]) -> str:
        """A metric of an entry as text; nothing where it was not logged."""
        return value_text(name, entry[name]) if name in entry else ""

    @property
    def has_labels(self) -> bool:
        """Whether any suspect has a label."""
        return any(suspect.label for suspect in self.suspects.rows)


def template_text(name: str) -> str:
    """A file of this room's templates."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def render(page: Page) -> str:
    """The page as HTML. What comes from the user or the artifact is escaped; only our own style and script are not."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_text), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style, script = template_text("report.css"), template_text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template("report.html.j2").render(
        page=page, style=Markup(style), script=Markup(script), policy=policy, metrics=METRICS, words=LEDGER_WORDS
    )  # fmt: skip
