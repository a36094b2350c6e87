"""A recording, finished or interrupted, becomes a kernel machine's artifact: a directory published in one rename."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import nn

from lightning_pathkernel.artifact_writer import METRICS, README, publish_artifact, seal, write_text
from lightning_pathkernel.chord_io import chord_name, merged_chord
from lightning_pathkernel.fingerprint import constants, describe_module
from lightning_pathkernel.packed_io import Node, write_packed
from lightning_pathkernel.store import (
    CONSTANTS,
    ArtifactError,
    publish,
    publish_json,
    publish_tensors,
    read_tensors,
)

__all__ = ["RECORDING", "KernelMachineExporter", "open_recording", "record_metrics"]

RECORDING = "recording.json"


def open_recording(directory: Path, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Begin a recording: what is recorded of which module, and the state that training will not move.

    Args:
        directory: Where; made if missing, and refused if a recording is there.
        module: The network, before its first step.
        facts: JSON-able description of the run.

    Raises:
        FileExistsError: If a recording is there already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    publish_json(directory / RECORDING, {"module": describe_module(module), **facts})
    publish_tensors(directory / CONSTANTS, constants(module), {"format": "pt"})


def record_metrics(directory: Path, history: list[dict[str, float]]) -> None:
    """Publish the metrics that were logged, epoch by epoch; a newer history replaces an older one.

    What is not finite (the network's outputs overflowed) is published as null, which strict JSON has.
    """
    finite = [{name: v if math.isfinite(v) else None for name, v in entry.items()} for entry in history]
    path = directory / METRICS
    staged = publish_json(directory / f"{METRICS}.{secrets.token_hex(4)}", {"history": finite})
    os.replace(staged, path)


class KernelMachineExporter:
    """Turns a recording into an artifact.

    Args:
        recording_dir: The recording's directory.

    Raises:
        ArtifactError: If there is no recording, or it has no closed chord.
    """

    def __init__(self, recording_dir: str | Path) -> None:
        self.directory = Path(recording_dir)
        path = self.directory / RECORDING
        if not path.is_file():
            raise ArtifactError(f"{self.directory} is not a recording: it has no {RECORDING}")
        self.facts = _read_facts(path)
        self.chords = self._find_chords()

    def _find_chords(self) -> list[str]:
        found = sorted(p.name for p in self.directory.glob("chord-*.safetensors"))
        expected = [chord_name(i) for i in range(len(found))]
        if not found:
            raise ArtifactError(f"{self.directory} has no closed chord yet: nothing was learned that could be exported")
        if found != expected:
            raise ArtifactError(f"{self.directory}: {min(set(expected) - set(found))} is missing from the recording")
        return found

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
            ArtifactError: If the recording is incomplete.
            FileExistsError: If there is something at ``out_dir``; nothing is overwritten.
            ValueError: If ``row_bits`` is neither 8 nor 16.
        """
        if row_bits not in (8, 16):
            raise ValueError(f"row_bits must be 8 or 16, found {row_bits}")
        if not (self.directory / CONSTANTS).is_file():
            raise ArtifactError(f"{self.directory}: {CONSTANTS} is missing from the recording")
        return publish_artifact(out_dir, lambda staged: self._stage(staged, row_bits))

    def _stage(self, staged: Path, row_bits: int) -> None:
        ranks = int(self.facts.get("ranks", 1))
        node: Node | None = None
        learning: list[str] = []
        for index in range(len(self.chords)):
            chord = merged_chord(self.directory, index, ranks)
            learning = list(chord.start)
            node = write_packed(staged, chord, node, index == len(self.chords) - 1, row_bits)
        module: dict[str, Any] = self.facts["module"]
        thawed: list[str] = []
        for name in learning:
            if not module["parameters"][name]["trainable"]:
                thawed.append(name)
                module["parameters"][name]["trainable"] = True
        if thawed:
            values, _ = read_tensors(self.directory / CONSTANTS)
            kept = {name: value for name, value in values.items() if name not in thawed}
            publish_tensors(staged / CONSTANTS, kept, {"format": "pt"})
        else:
            _place(self.directory / CONSTANTS, staged / CONSTANTS)
        if (self.directory / METRICS).is_file():
            _place(self.directory / METRICS, staged / METRICS)
        write_text(staged / README, self._card())
        facts = {"optimizer": self.facts["optimizer"], "settings": self.facts["settings"], "ids": self.facts.get("ids")}
        seal(staged, {**facts, "chords": self.chords, "module": module})

    def _card(self) -> str:
        lines = [
            "# Kernel machine",
            "",
            f"Path kernel of a {self.facts['module_class']} trained with {self.facts['optimizer']['name']}: "
            f"{len(self.chords)} chords, at most {self.facts['settings']['sketch_dim']} numbers per example and chord.",
            "",
        ]
        path = self.directory / METRICS
        history = json.loads(path.read_text(encoding="utf-8"))["history"] if path.is_file() else []
        if history:
            lines += ["Last logged on the validation probes:", "", "| metric | value |", "|---|---|"]
            shown = ((name, "not finite" if value is None else f"{value:.6g}") for name, value in history[-1].items())
            lines += [f"| {name} | {value} |" for name, value in sorted(shown)]
        else:
            lines.append("No fidelity was logged: training had no validation data.")
        return "\n".join([*lines, "", "Load it with `lightning_pathkernel.KernelMachine.load(directory, module)`.", ""])


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        missing = {"module", "module_class", "optimizer", "settings"} - set(facts)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: malformed: {error!r}") from error
    if not isinstance(facts, dict) or missing:
        raise ArtifactError(f"{path.name}: malformed: {', '.join(sorted(missing)) or 'no table'} missing")
    return facts


def _place(source: Path, target: Path) -> None:
    """Hard link where the file system can, copy otherwise: both are immutable once published."""
    try:
        os.link(source, target)
    except OSError:
        publish(target, lambda temporary: _copy(source, temporary))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
