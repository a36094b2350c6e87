"""Linear maps from gradients to few numbers, built from two thin factors per parameter."""

from lightning_pathkernel.sketch.fit import (
    SKETCHES,
    SideMoments,
    SketchSettings,
    fit_second_stage,
    fit_sketch,
    fit_sketches,
    register_sketch,
)
from lightning_pathkernel.sketch.kronecker import KroneckerSketch
from lightning_pathkernel.sketch.rounding import from_grid, pivots_of, rounded_sketches, rounded_stage, to_grid
from lightning_pathkernel.sketch.scale import rank_one_log

__all__ = [
    "SKETCHES",
    "KroneckerSketch",
    "SideMoments",
    "SketchSettings",
    "fit_second_stage",
    "fit_sketch",
    "fit_sketches",
    "from_grid",
    "pivots_of",
    "rank_one_log",
    "register_sketch",
    "rounded_sketches",
    "rounded_stage",
    "to_grid",
]
