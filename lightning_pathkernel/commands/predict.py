"""`pathkernel predict`: the machine's outputs for inputs from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told
from lightning_pathkernel.commands.inputs import load_machine, read_inputs

__all__ = ["predict"]


def predict(
    directory: str,
    inputs: str,
    *,
    module: str,
    module_args: dict[str, Any] | None = None,
    forward_fn: str | None = None,
    device: str | None = None,
    out: str | None = None,
    json: bool = False,
) -> int:
    """Predict from the machine: bias plus all contributions.

    Args:
        directory: The machine: its directory, or an fsspec URL.
        inputs: One row per input: .npy, .safetensors or .csv.
        module: Makes the network: `package.Class` or a function.
        module_args: Arguments for it, as JSON: '{"hidden": 32}'.
        forward_fn: `package.function` given in training, if any.
        device: Where the network runs, such as cuda; default: cpu.
        out: File for the outputs, .npy; not overwritten.
        json: Print one line of JSON.

    Returns:
        The exit status: 0, or 1 if the artifact is damaged or of another module.
    """
    try:
        machine, network = load_machine(directory, module, module_args, forward_fn, device)
        outputs = machine.predict(read_inputs(inputs, network))
    except store.ArtifactError as error:
        return answer({"ok": False, "error": str(error)}, told(directory, error), json, status=1)
    if out is not None:
        with Path(out).open("xb") as file:
            np.save(file, outputs.numpy(), allow_pickle=False)
        print(f"{out}: {tuple(outputs.shape)}", file=sys.stderr)
    rows = outputs.tolist()
    text = "\n".join(f"{i}: " + " ".join(f"{value:.6g}" for value in row) for i, row in enumerate(rows))
    return answer({"ok": True, "outputs": rows}, text, json)
