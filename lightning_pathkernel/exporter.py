"""A recording, finished or interrupted, becomes a kernel machine's artifact: a directory published in one rename."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from torch import Tensor

from lightning_pathkernel.artifact_writer import METRICS, README, publish_artifact, seal, write_text
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import chord_name
from lightning_pathkernel.packed_io import Node, write_packed
from lightning_pathkernel.recording_reader import Recording
from lightning_pathkernel.store import (
    CONSTANTS,
    ArtifactError,
    publish_json,
    publish_tensors,
)

__all__ = ["KernelMachineExporter"]


class KernelMachineExporter:
    """Turns a recording into an artifact.

    Args:
        recording_dir: The recording's directory.

    Raises:
        ArtifactError: If there is no recording, or a part of it is missing.

    Examples:
        >>> import tempfile
        >>> from pytorch_lightning import Trainer
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_pathkernel import KernelMachineExporter, PathKernelCallback
        >>> path_kernel = PathKernelCallback(dirpath=tempfile.mkdtemp(), nodes=2, probes=8, export=False)
        >>> no = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
        >>> Trainer(max_steps=4, callbacks=[path_kernel], **no).fit(BoringModel())
        >>> KernelMachineExporter(path_kernel.recording_dir).export(path_kernel.machine_dir).name
        'machine'
    """

    def __init__(self, recording_dir: str | Path) -> None:
        self.directory = Path(recording_dir)
        self.recording = Recording(self.directory)
        self.facts = self.recording.facts

    @overload
    def export(self, out_dir: Path, row_bits: int = 16) -> Path: ...
    @overload
    def export(self, out_dir: str, row_bits: int = 16) -> str | Path: ...
    def export(self, out_dir: str | Path, row_bits: int = 16) -> str | Path:
        """Write the artifact.

        Args:
            out_dir: Where it is to be: a directory that does not exist or is empty, or an fsspec URL (``s3://``,
                ``gs://``, ``hf://``, ``memory://``) under which there is nothing. Readers see all of it or nothing.
            row_bits: Bits of each number kept of an example: 16, or 8 for half the bytes and a coarser split among the
                examples; their sum stays either way (docs/benchmarks.md). A run in double precision keeps its numbers
                as they are.

        Returns:
            ``out_dir``, a directory as a path.

        Raises:
            ArtifactError: If the recording is damaged, or nothing in it was learned yet.
            FileExistsError: If there is something at ``out_dir``; nothing is overwritten.
            ValueError: If ``row_bits`` is neither 8 nor 16.
        """
        if row_bits not in (8, 16):
            raise ValueError(f"row_bits must be 8 or 16, found {row_bits}")
        return publish_artifact(out_dir, lambda staged: self._stage(staged, row_bits))

    def _stage(self, staged: Path, row_bits: int) -> None:
        constants: dict[str, Tensor] = {}
        node: Node | None = None
        count = 0
        before: Chord | None = None
        for chord in self.recording.chords(constants):
            if before is not None:
                node = write_packed(staged, before, node, False, row_bits)
            count, before = count + 1, chord
        if before is None:
            raise ArtifactError(f"{self.directory} has no closed chord yet: nothing was learned that could be exported")
        write_packed(staged, before, node, True, row_bits)
        history = self.recording.history()
        module = self._module(before, constants)
        publish_tensors(staged / CONSTANTS, constants, {"format": "pt"})
        if history:
            publish_json(staged / METRICS, {"history": history})
        write_text(staged / README, self._card(count, history))
        facts = {"optimizer": self.facts["optimizer"], "settings": self.facts["settings"], "ids": self.facts.get("ids")}
        seal(staged, {**facts, "chords": [chord_name(i) for i in range(count)], "module": module})

    def _module(self, last: Chord, constants: dict[str, Tensor]) -> dict[str, Any]:
        """What is said of the module; parameters that began to learn during the fit are no constants."""
        module: dict[str, Any] = dict(self.facts["module"])
        parameters = {name: dict(facts) for name, facts in module["parameters"].items()}
        for name in last.start:
            parameters[name]["trainable"] = True
            constants.pop(name, None)
        return {**module, "parameters": parameters}

    def _card(self, chords: int, history: list[dict[str, Any]]) -> str:
        lines = [
            "# Kernel machine",
            "",
            f"Path kernel of a {self.facts['module_class']} trained with {self.facts['optimizer']['name']}: "
            f"{chords} chords, at most {self.facts['settings']['sketch_dim']} numbers per example and chord.",
            "",
        ]
        if history:
            lines += ["Last logged on the validation probes:", "", "| metric | value |", "|---|---|"]
            shown = ((name, "not finite" if value is None else f"{value:.6g}") for name, value in history[-1].items())
            lines += [f"| {name} | {value} |" for name, value in sorted(shown)]
        else:
            lines.append("No fidelity was logged: training had no validation data.")
        return "\n".join([*lines, "", "Load it with `lightning_pathkernel.KernelMachine.load(directory, module)`.", ""])
