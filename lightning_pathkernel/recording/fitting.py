"""Both stages of a chord's sketch, fitted to what was recorded and to the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.capture import CaptureError, PerExampleGradient
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network, Tensors
from lightning_pathkernel.pass_size import rows_at_once
from lightning_pathkernel.recording.basis import ProbePasses, fit_basis, query_features, random_cotangent
from lightning_pathkernel.recording.budget import FeatureBudget, sketch_error
from lightning_pathkernel.recording.open_chord import compressed
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.settings import RecorderSettings
from lightning_pathkernel.sketch import KroneckerSketch, fit_second_stage, rounded_sketches, rounded_stage

__all__ = ["SketchFitter", "check_ranks"]

_PROBES = 128
"""Most probes whose gradients the first stage is fitted to."""
Held = Sequence[Mapping[str, Sequence[PerExampleGradient]]]


class SketchFitter:
    """Chooses sketches for a network in training.

    Args:
        network: The network.
        probes: A batch of validation examples, or None.
        settings: What to record.
        ranks: The processes that record it.
    """

    def __init__(self, network: Network, probes: object | None, settings: RecorderSettings, ranks: Ranks) -> None:
        self._network = network
        self._probes = probes
        self._settings = settings
        self._ranks = ranks
        self._generator = torch.Generator().manual_seed(settings.seed)
        matrices = sum(p.dim() > 1 for p in network.plan.parameters.values())
        self._at_once = 0 if probes is None else rows_at_once(network, probes, _PROBES)
        self._budget = FeatureBudget(settings.sketch, settings.sketch_dim, matrices)

    def state(self) -> dict[str, Any]:
        """Where the random generator stands, and the features of the next chord."""
        return {"generator": self._generator.get_state(), "features": self._budget.features}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the fitter whose `state` this was."""
        self._generator.set_state(state["generator"])
        self._budget.features = int(state["features"])

    def first_stage(
        self, held: Held, parameters: Mapping[str, Tensor], preconditioner: Tensors, direction: Tensors
    ) -> dict[str, KroneckerSketch]:
        """Sketches of some parameters.

        Args:
            held: Their gradients, backward pass by backward pass; the first one of each parameter is looked at.
            parameters: The parameters.
            preconditioner: D of the latest step; empty for the identity.
            direction: Where the optimiser is moving.

        Returns:
            Parameter -> sketch, its query side rounded to what an artifact stores.
        """
        train: dict[str, Sequence[PerExampleGradient]] = {}
        for batch in reversed(held):
            train.update(batch)
        probes = None
        if self._probes is not None:
            cotangent = random_cotangent(self._generator)
            probes = ProbePasses(self._network, self._probes, cotangent, _PROBES, self._at_once)
        shapes = {name: p.shape for name, p in parameters.items()}
        settings = self._settings.sketch
        if settings.shared_features is not None:
            settings = replace(settings, features=self._budget.features)
        return rounded_sketches(
            fit_basis(train, probes, preconditioner, direction, shapes, settings, self._generator, self._ranks)
        )

    def closed(self, chord: Chord) -> Chord:
        """Bring a chord that has just closed down to ``sketch_dim``, and learn from what its first stage has lost.

        Args:
            chord: With first-stage rows.

        Returns:
            The chord.
        """
        if self._probes is not None and self._settings.sketch.shared_features is not None and chord.sketches:
            error = torch.tensor([sketch_error(self._network, self._probes, chord, self._at_once)])
            self._budget.learn(float(self._ranks.total(error)) / self._ranks.world)  # the same on all processes
        return compressed(chord, self._ranks, partial(self.second_stage, chord), self._settings.sketch_dim)

    def second_stage(self, chord: Chord, rows: Tensor, total: Tensor) -> tuple[Tensor, Tensor] | None:
        """Maps that bring all rows ``[V, F]`` of a chord, ``total`` their sum, down to ``sketch_dim``, or None."""
        settings, query = self._settings, None
        if self._probes is not None:
            query = query_features(self._network, self._probes, chord, settings.rule, self._generator, self._at_once)
        maps = fit_second_stage(rows, query, total, settings.sketch_dim, settings.sketch, self._generator)
        return None if maps is None else rounded_stage(*maps)


def check_ranks(held: Held, unfitted: Sequence[str], ranks: Ranks, like: Tensor) -> None:
    """All processes must have gradients of the same parameters, or none of them.

    Args:
        held: This process' gradients.
        unfitted: Parameters that are about to get a sketch, the same everywhere.
        ranks: The processes.
        like: Gives the device.

    Raises:
        CaptureError: On all processes, naming the parameters that only some have gradients of.
    """
    if ranks.world == 1:
        return
    mine = {name for batch in held for name in batch}
    counts = ranks.total(torch.tensor([float(name in mine) for name in unfitted], device=like.device)).tolist()
    some = [name for name, count in zip(unfitted, counts, strict=True) if 0 < count < ranks.world]
    if some:
        raise CaptureError(
            f"only some of the {ranks.world} processes had a gradient of {', '.join(map(repr, some))} in this step: "
            "let every batch use the same layers, or train on one device."
        )
