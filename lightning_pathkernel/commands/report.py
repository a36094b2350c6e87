"""`pathkernel report`: one HTML page about a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told
from lightning_pathkernel.commands.inputs import load_machine, read_inputs, read_targets
from lightning_pathkernel.report import report_directory, write_report

__all__ = ["report"]


def report(
    directory: str,
    *,
    out: str = "report.html",
    module: str | None = None,
    module_args: dict[str, Any] | None = None,
    forward_fn: str | None = None,
    device: str | None = None,
    inputs: str | None = None,
    target: int | list[int] | None = None,
    examples: str | None = None,
    labels: str | None = None,
    title: str = "Kernel machine report",
) -> int:
    """Write one HTML page about a machine.

    DIRECTORY alone gives what was logged in training. --module adds the path and striking examples, --inputs the
    reasons for what it says of them, --labels suspected label errors. The page loads nothing from elsewhere.

    Args:
        directory: The machine: its directory, or an fsspec URL.
        out: The page; report.html if not given.
        module: Makes the network: `package.Class` or a function.
        module_args: Arguments for it, as JSON: '{"hidden": 32}'.
        forward_fn: `package.function` given in training, if any.
        device: Where the network runs, such as cuda; default: cpu.
        inputs: To explain, one row each: .npy, .safetensors, .csv.
        target: Output to explain; default: the predicted class.
        examples: File of the training set, a row per id.
        labels: File of its labels, an integer per id.
        title: Heading of the page.

    Returns:
        The exit status: 0, or 1 if the artifact is damaged or of another module.

    Raises:
        ValueError: If something is given that needs a module, and there is none.
    """
    needy = {"--inputs": inputs, "--examples": examples, "--labels": labels, "--target": target, "--device": device}
    given = [option for option, value in needy.items() if value is not None]
    if module is None and given:
        raise ValueError(f"{', '.join(given)}: the network is needed for that, give --module")
    try:
        if module is None:
            with store.local_copy(directory) as path:
                return answer({}, str(report_directory(path, Path(out), title)), False)
        machine, network = load_machine(directory, module, module_args, forward_fn, device)
        x = None if inputs is None else read_inputs(inputs, network)
        chosen = None if x is None else read_targets(target, len(x))
        shown = {
            name: read_inputs(file, network) for name, file in (("examples", examples), ("labels", labels)) if file
        }
        page = write_report(machine, out, x, chosen, title=title, **shown)
    except store.ArtifactError as error:
        return answer({}, told(directory, error), False, status=1)
    return answer({}, str(page), False)
