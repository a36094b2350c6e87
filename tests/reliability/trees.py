"""Directories as dictionaries, to be compared."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lightning_pathkernel.store import ArtifactError, read_segment

__all__ = ["differences", "final", "finished", "torn", "tree"]

ASIDE = ("discarded", "lock")
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


def final(found: dict[str, str]) -> dict[str, str]:
    """What a finished run is compared by: all but the states of open chords, of which a checkpoint names one."""
    return {name: digest for name, digest in found.items() if not Path(name).name.startswith("open-")}


def finished(run: Path, expected: dict[str, str]) -> list[str]:
    """What differs in a run that reached its end after it was interrupted, one line each.

    A run that was interrupted after its machine had been published makes another one beside it: the same, to the byte.

    Args:
        run: The directory of recording and machine.
        expected: What an undisturbed run has there.
    """
    found, expected = final(tree(run)), final(expected)
    machine = {name: digest for name, digest in expected.items() if name.startswith("machine/")}
    lines = []
    for again in sorted({name.split("/")[0] for name in found if name.startswith("machine-v")}):
        other = {name: digest for name, digest in found.items() if name.startswith(f"{again}/")}
        found = {name: digest for name, digest in found.items() if name not in other}
        same = {f"machine/{name.partition('/')[2]}": digest for name, digest in other.items()}
        lines += [f"{again}: {line}" for line in differences(same, machine)]
    return lines + differences(found, expected)


def torn(run: Path, expected: dict[str, str]) -> list[str]:
    """Files of an interrupted run that are at a final path and not what they should be.

    Args:
        run: The directory of recording and machine.
        expected: What an undisturbed run has there. Only the states of open chords may differ, which have to be whole;
            and the metrics of a recording that goes on.
    """
    wrong = []
    for name, digest in tree(run).items():
        if any(part.endswith(".tmp") for part in Path(name).parts) or name not in expected or digest == expected[name]:
            continue
        if Path(name).name.startswith("open-"):
            try:
                read_segment(run / name)
            except ArtifactError as error:
                wrong.append(f"{name} is torn: {error}")
        elif name.startswith("recording/"):
            wrong.append(f"{name} differs")
    return wrong
