"""Writes docs/support.md: ``python -m tests.support``."""

from tests.support.page import PATH, page

if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
