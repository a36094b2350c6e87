"""Per-example gradients from the user's own backward pass."""

from lightning_pathkernel.capture.gradients import (
    DenseGradient,
    FactoredGradient,
    OuterGradient,
    PerExampleGradient,
    VectorGradient,
    matrix_shape,
)
from lightning_pathkernel.capture.groups import RowGroup
from lightning_pathkernel.capture.hooks import GradientCapture
from lightning_pathkernel.capture.plan import CaptureError, CapturePlan, compiled_modules, plan_capture
from lightning_pathkernel.capture.rules import LayerCall, layer_rules, register_layer_rule

__all__ = [
    "CaptureError",
    "CapturePlan",
    "DenseGradient",
    "FactoredGradient",
    "GradientCapture",
    "LayerCall",
    "OuterGradient",
    "PerExampleGradient",
    "RowGroup",
    "VectorGradient",
    "compiled_modules",
    "layer_rules",
    "matrix_shape",
    "plan_capture",
    "register_layer_rule",
]
