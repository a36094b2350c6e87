"""Directories as dictionaries, to be compared."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["differences", "tree"]

ASIDE = ("discarded", "writer.lock")
"""What a recording may hold besides its contents: segments after the checkpoint resumed from, and its lock."""


def tree(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file, symbolic links and other kinds of files by their kind.

    Args:
        root: The directory; one that is not there is empty.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if set(relative.parts) & set(ASIDE) or path.is_dir():
            continue
        plain = path.is_file() and not path.is_symlink()
        found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "no plain file"
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What is missing, left over or different, one line each."""
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} should not be there" for name in found.keys() - expected.keys()]
    lines += [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(lines)
