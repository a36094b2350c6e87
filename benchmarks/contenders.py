"""One training step with per-example gradients, as each library does it.

Every contender has its own copy of the network and trains it with AdamW on one batch. The peers only form the
per-example gradients: none of them is asked to sketch or to store, which is in their favour. dattri sketches and
keeps what it sketched, of linear layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.networks import NETWORKS
from benchmarks.recorded import recorded_step
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.network import Network
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings

__all__ = ["CONTENDERS", "DISTRIBUTIONS", "PEERS", "PLAIN", "RECORDED", "Settings", "Step", "missing"]

Step = Callable[[], None]
PLAIN, RECORDED = "plain", "recorded"
PEERS = {"Opacus": "opacus", "BackPACK": "backpack", "vmap(grad)": "torch.func", "dattri DVEmb": "dattri"}
"""Contender -> the module that it needs."""
DISTRIBUTIONS = ("opacus", "backpack-for-pytorch", "dattri")


class Settings:
    """What is the same for all contenders.

    Args:
        network: Name of one of `benchmarks.networks.NETWORKS`.
        sketch_dim: Numbers kept per example and step, where a contender keeps any.
        nodes: Optimiser steps at which our recorder closes a chord.
        probes: Rows of the batch that our recorder takes for probes, as often over as it takes.
    """

    def __init__(self, network: str, sketch_dim: int, nodes: list[int], probes: int) -> None:
        self.network, self.sketch_dim, self.nodes, self.probes = network, sketch_dim, nodes, probes

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
        """The network at its first weights, AdamW, and the batch: the same for every contender."""
        torch.manual_seed(0)
        model, x, y = NETWORKS[self.network]()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3), x, y


def missing(name: str) -> str | None:
    """Why a contender cannot run here, or None if it can."""
    try:
        import_module(PEERS.get(name, "torch"))
    except ImportError as error:
        return f"not installed ({error})"
    return None


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _one_output(model: nn.Module, batch: Any) -> Tensor:
    """Logits ``[n, K]``: of a sequence those of its last position."""
    logits: Tensor = model(batch)
    return logits if logits.dim() == 2 else logits[:, -1]


def _plain(settings: Settings) -> Step:
    model, optimizer, x, y = settings.build()

    def step() -> None:
        optimizer.zero_grad()
        _loss(model(x), y).backward()
        optimizer.step()

    return step


def _recorded(settings: Settings) -> Step:
    model, optimizer, x, y = settings.build()
    ids = torch.arange(len(x))
    probes = x.repeat(-(-settings.probes // len(x)), *[1] * (x.dim() - 1))[: settings.probes]
    options = RecorderSettings(settings.nodes, settings.sketch_dim)
    network = Network(model, plan_capture(model), _one_output)
    recorder = PathRecorder(network, optimizer, options, probes, lambda chord: None)
    recorder.capture.attach()

    def step() -> None:
        recorded_step(recorder, optimizer, ids, lambda: _loss(model(x), y))

    return step


def _opacus(settings: Settings) -> Step:
    from opacus.grad_sample import GradSampleModule

    model, optimizer, x, y = settings.build()
    wrapped = GradSampleModule(model, loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad()
        _loss(wrapped(x), y).backward()
        _check(model, {name: getattr(p, "grad_sample", None) for name, p in model.named_parameters()}, len(x))
        optimizer.step()
        for p in model.parameters():
            p.grad_sample = None

    return step


def _backpack(settings: Settings) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, optimizer, x, y = settings.build()
    model, loss = extend(model), extend(nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        with backpack(BatchGrad()):
            loss(model(x).flatten(0, -2), y.flatten()).backward()
        _check(model, {name: getattr(p, "grad_batch", None) for name, p in model.named_parameters()}, len(x))
        optimizer.step()
        for p in model.parameters():
            del p.grad_batch

    return step


def _vmap(settings: Settings) -> Step:
    model, optimizer, x, y = settings.build()
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return _loss(functional_call(model, weights, (one[None],)), target[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        gradients = per_example({name: p.detach() for name, p in parameters.items()}, x, y)
        _check(model, gradients, len(x))
        for name, p in parameters.items():  # their mean is the gradient: no further backward pass
            p.grad = gradients[name].mean(0)
        optimizer.step()

    return step


def _dattri(settings: Settings) -> Step:
    from dattri.algorithm.dvemb import DVEmbAttributor
    from dattri.task import AttributionTask

    model, optimizer, x, y = settings.build()

    def loss(module: nn.Module, data: Any, device: object) -> Tensor:
        return _loss(module(data[0]), data[1])

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    attributor = DVEmbAttributor(task, proj_dim=settings.sketch_dim * linear, factorization_type="kronecker")
    ids = torch.arange(len(x))

    def step() -> None:
        attributor.cache_gradients(epoch=0, batch_data=(x, y), indices=ids, learning_rate=1e-3)
        optimizer.zero_grad()
        _loss(model(x), y).backward()
        optimizer.step()

    return step


def _check(model: nn.Module, gradients: dict[str, Any], n: int) -> None:
    """Every parameter has a gradient of every example."""
    names = [name for name, _ in model.named_parameters()]
    without = [name for name in names if gradients.get(name) is None or len(gradients[name]) != n]
    if without:
        raise RuntimeError(
            f"no per-example gradient of {len(without)} of {len(names)} parameters, {without[0]!r} the first"
        )


CONTENDERS: dict[str, Callable[[Settings], Step]] = {
    PLAIN: _plain,
    RECORDED: _recorded,
    "Opacus": _opacus,
    "BackPACK": _backpack,
    "vmap(grad)": _vmap,
    "dattri DVEmb": _dattri,
}
