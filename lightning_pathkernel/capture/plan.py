"""Who answers for which parameter: every trainable parameter is assigned to the module that owns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_pathkernel.capture import attention, conv, embedding, linear, norm  # noqa: F401  (they register rules)
from lightning_pathkernel.capture.errors import CaptureError
from lightning_pathkernel.capture.rules import LayerRule, layer_rules

__all__ = ["CaptureError", "CapturePlan", "OwnedLayer", "compiled_modules", "plan_capture"]

_WHOLE = (nn.MultiheadAttention,)
"""Layers that use their children's parameters without calling the children."""


@dataclass(frozen=True)
class OwnedLayer:
    """A module and the parameters it answers for.

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
    """All owned layers of a model, and the parameters planned for under their canonical names."""

    layers: tuple[OwnedLayer, ...]
    parameters: Mapping[str, nn.Parameter]


def plan_capture(model: nn.Module, everything: bool = False) -> CapturePlan:
    """Assign every trainable parameter of ``model`` to the modules that use it.

    Args:
        model: The network as it is trained.
        everything: Plan for all parameters, those too that do not require gradients now, for a fit that will unfreeze
            them. A parameter that does not require gradients when a batch comes costs that batch nothing.

    Returns:
        The plan; tied parameters appear once among the parameters and with every module that uses them.

    Raises:
        CaptureError: If the model has modules whose gradients cannot be taken, all of them named.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or (everything and _moves(p))}
    canonical = {id(p): name for name, p in parameters.items()}
    layers: list[OwnedLayer] = []
    refused: list[str] = []
    skipped: set[int] = set()
    rules = layer_rules()
    for path, module in model.named_modules():
        if id(module) in skipped:
            continue
        own = _own_parameters(module, skipped)
        owned = {name: canonical[id(p)] for name, p in own.items() if id(p) in canonical}
        if not owned:
            continue
        reason = _refusal(module, [own[name] for name in owned])
        if reason:
            refused.append(f"{path or '(the model)'!r} ({type(module).__name__}): {reason}")
        layers.append(OwnedLayer(path, module, rules.get(type(module)) if _plain(module, owned) else None, owned))
    if refused:
        raise CaptureError("No per-example gradients for " + "; ".join(refused))
    if not layers:
        raise CaptureError("The model has no trainable parameter: there is no path to record.")
    return CapturePlan(tuple(layers), parameters)


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _own_parameters(module: nn.Module, skipped: set[int]) -> dict[str, nn.Parameter]:
    """The parameters a module answers for by itself; the submodules it answers for are added to ``skipped``."""
    if isinstance(module, _WHOLE):
        skipped.update(id(child) for child in module.modules())
        return dict(module.named_parameters(remove_duplicate=False))
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if is_parametrized(module):
        computed = cast(nn.ModuleDict, module.parametrizations)
        skipped.update(id(child) for child in computed.modules())
        own.update(computed.named_parameters("parametrizations", remove_duplicate=False))
    return own


def _plain(module: nn.Module, owned: Mapping[str, str]) -> bool:
    """Whether nothing computes a weight of ``module``: old-style weight norm, spectral norm and pruning do by hooks.

    They leave the class as it is, turn ``weight`` into an attribute, and keep parameters ``weight_g``, ``weight_orig``.

    Args:
        module: The module.
        owned: Its parameters, by their name within it.

    Returns:
        Whether its class says how its parameters are used.
    """
    for name in owned:
        path, _, leaf = name.rpartition(".")
        if "parametrizations" in path or isinstance(
            vars(module.get_submodule(path)).get(leaf.rpartition("_")[0]), Tensor
        ):
            return False
    return True


def _refusal(module: nn.Module, owned: list[nn.Parameter]) -> str | None:
    if any(is_lazy(p) for p in owned):
        return "its parameters have no shape yet; run one batch through the model before fitting"
    if any(p.is_complex() for p in owned):
        return "complex parameters are not supported; own real and imaginary parts and join them by torch.complex"
    if isinstance(module, nn.SyncBatchNorm):
        return "statistics shared by several devices are not supported; use BatchNorm, on one device it is the same"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "sparse gradients are not supported; pass sparse=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm changes weights outside the optimiser; pass max_norm=None"
    return None


def compiled_modules(model: nn.Module) -> list[str]:
    """Modules with trainable parameters that run as compiled graphs, in which hooks on layers cannot be relied on.

    A graph compiled before the hooks were attached never calls them; one compiled afterwards is broken up at every
    layer, so that nothing is gained by it and training differs from the training without hooks by rounding.

    Args:
        model: The network as it is trained.

    Returns:
        Their names within the model, ``(the model)`` for itself; none for a compiled part that is frozen.
    """
    return [path or "(the model)" for path, module in model.named_modules() if _compiled(module) and _trains(module)]


def _compiled(module: nn.Module) -> bool:
    methods = (vars(module).get(name) for name in ("forward", "training_step"))
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Lightning's mark on a module compiled as a whole
        or any(hasattr(method, "_torchdynamo_orig_callable") for method in methods)
    )


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
