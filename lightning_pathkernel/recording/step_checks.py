"""What a recorder checks of every step's gradients, before and after the optimiser has moved the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_pathkernel.capture import CaptureError
from lightning_pathkernel.recording.cancelling import warn_of_cancelling
from lightning_pathkernel.recording.checks import NonFiniteError, not_finite, sum_gaps
from lightning_pathkernel.recording.fitting import check_ranks
from lightning_pathkernel.recording.followed import FollowedOptimizer
from lightning_pathkernel.recording.open_chord import OpenChord
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.settings import RecorderSettings

__all__ = ["StepChecks"]


class StepChecks:
    """Holds what was captured against what an optimiser received.

    Args:
        settings: What to record.
        parameters: The parameters that learn; others may be added later.
        chord: The open chord.
        ranks: The processes that train the network.
    """

    def __init__(
        self, settings: RecorderSettings, parameters: Mapping[str, Tensor], chord: OpenChord, ranks: Ranks
    ) -> None:  # fmt: skip
        self._settings = settings
        self._parameters = parameters
        self._chord = chord
        self._ranks = ranks

    def all_fitted(self) -> bool:
        """Whether every parameter has its sketch in the open chord."""
        return len(self._chord.fitted) == len(self._parameters)

    def inspect(
        self, followed: FollowedOptimizer, received: dict[str, Tensor], removed: float, within: float, step: int
    ) -> None:
        """Look at gradients that nobody has changed yet, but for a loss scale: removed from them, or still within.

        Args:
            followed: The optimiser.
            received: The parameters that have a gradient.
            removed: Loss scale that was taken out.
            within: Loss scale that is still in them.
            step: Steps so far.

        Raises:
            CaptureError: If the captured gradients do not add up to them.
        """
        if not followed.fresh() or (self._settings.changes == "none" and self.all_fitted()):
            return
        followed.watch.look(received, within)
        followed.scale = removed * within
        unfitted = {name: p for name, p in received.items() if name not in self._chord.fitted}
        if not unfitted:
            return
        held = followed.held(list(unfitted))
        check_ranks(held, list(unfitted), self._ranks, next(iter(unfitted.values())))
        if not held or followed.reused:
            return
        gaps = sum_gaps(held, unfitted, removed * self._ranks.world, self._settings.sum_rtol, self._ranks)
        if gaps and not self._settings.allow_unattributed:
            raise CaptureError(f"at optimiser step {step} {gaps}")
        if self._chord.index == 0 and followed.updates.rule is not None and followed.updates.rule.diagonal:
            warn_of_cancelling(held, type(followed.optimizer).__name__)

    def changes(self, followed: FollowedOptimizer, step: int) -> tuple[float, dict[str, Tensor]]:
        """What was done to the gradients since then, as `GradientWatch.compare` has it.

        Args:
            followed: The optimiser.
            step: Steps so far.

        Returns:
            The common factor, and what is left over.

        Raises:
            CaptureError: If more than that was done.
        """
        try:
            return followed.watch.compare(followed.received)
        except ValueError as error:
            raise CaptureError(
                f"gradients were {error} between the backward pass and optimiser step {step}. Clipping is "
                "supported, changes by hand are not."
            ) from error

    def check_finite(self, followed: FollowedOptimizer, factor: float, step: int) -> None:
        """Refuse gradients that are not finite.

        Args:
            followed: The optimiser.
            factor: From `changes`.
            step: Steps so far.

        Raises:
            NonFiniteError: If they are not.
        """
        value = factor
        if self._settings.changes == "none":
            if self._ranks.world == 1 and followed.parts and self._chord.fitted:
                # a loss that is not finite leaves no layer's gradients finite: cheaper to see than in all norms
                value = followed.parts[-1].first_total()
            else:
                value = followed.norm()
        if not math.isfinite(value):
            raise NonFiniteError(not_finite(step, self._chord.first_step))
