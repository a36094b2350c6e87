"""How many features a chord's first stage gets, learned from how well the chord before it was kept.

The energies that features are shared out by are those of single examples. Where these mostly cancel, as the rows of a
batch do under batch norm, their sum may be badly kept although hardly any energy is missing. What a chord's sketch has
really lost of its displacement is known when it closes: one directional derivative on a few probes.
"""

from __future__ import annotations

import math

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network, in_parts, take_rows
from lightning_pathkernel.sketch import SketchSettings

__all__ = ["FeatureBudget", "sketch_error"]

_PROBES = 64
"""Most probes that are asked."""
_SLOWEST, _FASTEST = 0.7, 3.0
"""What the features of one chord may be of those of the chord before it, least and most."""


def sketch_error(network: Network, probes: object, chord: Chord, at_once: int) -> float:
    """What the first stage has lost of a chord's displacement, as probes see it from the middle of the chord.

    Args:
        network: The network.
        probes: Probes; the first few are asked.
        chord: With first-stage rows.
        at_once: Probes in one pass.

    Returns:
        ``|J (A - E)| / |J A|`` over outputs and probes, with ``A`` the examples' part of the displacement and ``E``
        what their rows add up to; 0 where nothing moved.
    """
    whole = {n: d - chord.decay.get(n, 0) - chord.residual.get(n, 0) for n, d in chord.delta.items()}
    kept = chord.examples_direction()
    lost = {name: value - kept[name] if name in kept else value for name, value in whole.items()}
    weights, sums = chord.weights(0.5), [0.0, 0.0]
    for part in in_parts(take_rows(probes, slice(_PROBES)), at_once):
        slopes = network.jvps(part, weights, chord.end_buffers, [whole, lost])
        sums = [total + float(slope.double().square().sum()) for total, slope in zip(sums, slopes, strict=True)]
    all_of_it, gap = map(math.sqrt, sums)
    return gap / all_of_it if all_of_it > 0 else 0.0


class FeatureBudget:
    """Features of the first stage, from chord to chord.

    Args:
        settings: ``features`` and ``most`` bound them, ``tolerance`` is the error aimed at.
        sketch_dim: Numbers kept in the end: never fewer.
        matrices: Weight matrices of the network.

    Attributes:
        features: Of the next chord.
    """

    def __init__(self, settings: SketchSettings, sketch_dim: int, matrices: int) -> None:
        self._least = max(settings.features or 0, sketch_dim)
        self._most = max(settings.most * matrices, self._least)
        self._tolerance = settings.tolerance
        # the first chord has none before it to learn from
        self.features = min(4 * self._least, self._most)

    def learn(self, error: float) -> None:
        """Take in the error of a chord; it falls about as the features rise.

        Args:
            error: Its `sketch_error`; not finite for the most features.
        """
        # damped: one chord's error says little of the next one's
        factor = (error / self._tolerance) ** 0.75 if math.isfinite(error) else _FASTEST
        wanted = self.features * min(max(factor, _SLOWEST), _FASTEST)
        self.features = min(max(int(wanted), self._least), self._most)
