"""A hook of mkdocs: the gallery's pictures are those that the examples drew; a page without its own is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PICTURES = {
    f"gallery/{name}.png": ROOT / "examples" / "out" / name / f"{name}.png"
    for name in ("digits", "diabetes", "fashion_mnist", "kernels", "label_errors", "text")
}
OPTIONAL = {"gallery/fashion_mnist.png"}
"""Drawn where Debian's package with the images is."""


def on_files(files: Files, *, config: Any) -> Files:
    """Put the pictures among the site's files."""
    for name, path in PICTURES.items():
        if path.is_file():
            files.append(File.generated(config, name, abs_src_path=str(path)))
        elif name not in OPTIONAL:
            raise PluginError(f"{path.relative_to(ROOT)} is not there: run `make docs`, which runs the examples")
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Say so where an optional picture was not drawn."""
    for name in OPTIONAL:
        if not PICTURES[name].is_file() and f"]({Path(name).name})" in markdown:
            lines = markdown.splitlines()
            kept = [line for line in lines if f"]({Path(name).name})" not in line]
            return "\n".join([*kept, "", "*Not drawn: Debian's package dataset-fashion-mnist was not there.*"])
    return markdown
