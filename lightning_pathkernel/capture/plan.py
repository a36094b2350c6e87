"""Who answers for which parameter: every trainable parameter is assigned to the module that owns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_pathkernel.capture import conv, embedding, linear, norm  # noqa: F401  (they register their rules)
from lightning_pathkernel.capture.rules import LayerRule, layer_rules

__all__ = ["CaptureError", "CapturePlan", "OwnedLayer", "plan_capture"]

_WHOLE = (nn.MultiheadAttention,)
"""Layers that use their children's parameters without calling the children."""


class CaptureError(RuntimeError):
    """Per-example gradients cannot be taken from this model or this step."""


@dataclass(frozen=True)
class OwnedLayer:
    """A module and the trainable parameters it answers for.

    Attributes:
        path: Its name within the model.
        module: The module.
        rule: Its rule, or None for the fallback.
        parameters: Name within the module -> canonical name within the model (one name per tied parameter).
    """

    path: str
    module: nn.Module
    rule: LayerRule | None
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class CapturePlan:
    """All owned layers of a model, and its trainable parameters under their canonical names."""

    layers: tuple[OwnedLayer, ...]
    parameters: Mapping[str, nn.Parameter]


def plan_capture(model: nn.Module) -> CapturePlan:
    """Assign every trainable parameter of ``model`` to the modules that use it.

    Args:
        model: The network as it is trained.

    Returns:
        The plan; tied parameters appear once among the parameters and with every module that uses them.

    Raises:
        CaptureError: If the model has modules whose gradients cannot be taken, all of them named.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    canonical = {id(p): name for name, p in parameters.items()}
    layers: list[OwnedLayer] = []
    refused: list[str] = []
    skipped: set[int] = set()
    rules = layer_rules()
    for path, module in model.named_modules():
        if id(module) in skipped:
            continue
        whole = isinstance(module, _WHOLE)
        if whole:
            skipped.update(id(child) for child in module.modules())
        owned = {
            name: canonical[id(p)]
            for name, p in module.named_parameters(recurse=whole, remove_duplicate=False)
            if id(p) in canonical
        }
        if not owned:
            continue
        reason = _refusal(module)
        if reason:
            refused.append(f"{path or '(the model)'!r} ({type(module).__name__}): {reason}")
        layers.append(OwnedLayer(path, module, rules.get(type(module)), owned))
    if refused:
        raise CaptureError("No per-example gradients for " + "; ".join(refused))
    if not layers:
        raise CaptureError("The model has no trainable parameter: there is no path to record.")
    return CapturePlan(tuple(layers), parameters)


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, ParametrizationList):
        return "parametrised weights have no rule yet; remove the parametrisation before fitting"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "sparse gradients are not supported; pass sparse=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm changes weights outside the optimiser; pass max_norm=None"
    return None
