"""`pathkernel info`: what an artifact says of itself."""

from __future__ import annotations

from typing import Any

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told

__all__ = ["info"]


def info(directory: str, json: bool = False) -> int:
    """Say what a machine is of: optimiser, steps, settings.

    Reads the manifest and the files' headers, no tensor.

    Args:
        directory: The machine: its directory, or an fsspec URL.
        json: Print one line of JSON.

    Returns:
        The exit status: 0, or 1 if it is no artifact.
    """
    try:
        with store.local_copy(directory) as path:
            found = _facts(store.read_manifest(path))
    except store.ArtifactError as error:
        return answer({"ok": False, "error": str(error)}, told(directory, error), json, status=1)
    shown = {key.replace("_", " "): value for key, value in found.items() if key not in ("ok", "settings")}
    plain = {key: value for key, value in found["settings"].items() if not isinstance(value, list | dict)}
    shown |= {f"settings: {key}": value for key, value in plain.items()}
    width = max(len(key) for key in shown)
    return answer(found, "\n".join(f"{key:{width}}  {str(value)[:200]}" for key, value in shown.items()), json)


def _facts(manifest: store.Manifest) -> dict[str, Any]:
    contents = manifest.contents
    heads = [store.TensorFile(manifest.files[name]) for name in contents["chords"]]
    last = store.facts_of(heads[-1])
    rows = [head.entries["rows/rows"] for head in heads if "rows/rows" in head.entries]
    shapes = [entry.shape for entry in rows]
    parameters = contents["module"]["parameters"]
    trainable = [facts["shape"] for facts in parameters.values() if facts["trainable"]]
    settings = contents.get("settings")
    optimizer = contents.get("optimizer")
    return {
        "ok": True,
        "format": f"{contents['format']} {'.'.join(map(str, contents['version']))}",
        "bytes": sum(file.size for file in manifest.files.values()),
        "sha256": manifest.sha256,
        "optimizer": optimizer.get("name") if isinstance(optimizer, dict) else None,
        "steps": last.get("last_step"),
        "chords": len(heads),
        "examples_of_the_largest_chord": max((shape[0] for shape in shapes if shape), default=0),
        "numbers_per_example_and_chord": max((shape[1] for shape in shapes if len(shape) > 1), default=0),
        "bits_per_number": sorted({8 * entry.dtype.itemsize for entry in rows}),
        "parameters": len(parameters),
        "trainable_parameters": len(trainable),
        "left_out": contents.get("left_out", 0),
        "libraries": contents.get("libraries"),
        "settings": settings if isinstance(settings, dict) else {},
    }
