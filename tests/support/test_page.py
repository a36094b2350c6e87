"""docs/support.md says what the table says."""

from __future__ import annotations

from tests.support.page import PATH, page


def test_the_page_is_generated_from_the_table() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "run python -m tests.support"
