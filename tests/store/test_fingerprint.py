"""A machine is of one architecture: any other is refused, and every difference named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_pathkernel import KernelMachine, verify
from lightning_pathkernel.chord_io import chord_name
from lightning_pathkernel.fingerprint import check_module, describe_module, load_constants
from lightning_pathkernel.store import read_tensors
from tests.helpers import Classifier
from tests.store.artifacts import CONSTANTS, network, record, refused, reseal


def renamed(module: Classifier) -> None:
    module.net._modules["last"] = module.net._modules.pop("5")


def extra_buffer(module: Classifier) -> None:
    module.register_buffer("mine", torch.zeros(2))


def wider(module: Classifier) -> None:
    module.net[1] = nn.Linear(64, 13)


def without_norm(module: Classifier) -> None:
    module.net[2] = nn.Identity()


def only_half_frozen(module: Classifier) -> None:
    module.net[4].bias.requires_grad_(True)
    module.net[1].weight.requires_grad_(False)


MUTATIONS: dict[str, tuple[Callable[[Classifier], object], set[str]]] = {
    "renamed layer": (
        renamed,
        {f"parameter 'net.5.{p}' is missing from the module" for p in ("weight", "bias")}
        | {f"parameter 'net.last.{p}' is not in the artifact" for p in ("weight", "bias")},
    ),
    "another width": (
        wider,
        {"'net.1.weight': shape [13, 64], expected [12, 64]", "'net.1.bias': shape [13], expected [12]"},
    ),
    "another dtype": (
        lambda module: module.net[5].double(),
        {f"'net.5.{p}': dtype float64, expected float32" for p in ("weight", "bias")},
    ),
    "buffer of another dtype": (
        lambda module: module.net[2].__setattr__("num_batches_tracked", torch.tensor(0.0)),
        {"'net.2.num_batches_tracked': dtype float32, expected int64"},
    ),
    "extra buffer": (extra_buffer, {"buffer 'mine' is not in the artifact"}),
    "missing layer": (
        without_norm,
        {f"parameter 'net.2.{p}' is missing from the module" for p in ("weight", "bias")}
        | {
            f"buffer 'net.2.{b}' is missing from the module"
            for b in ("running_mean", "running_var", "num_batches_tracked")
        },
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_module_is_refused_and_every_difference_named(name: str, run: Path) -> None:
    mutate, expected = MUTATIONS[name]
    module = network()
    mutate(module)
    with refused() as caught:
        KernelMachine.load(run / "machine", module)
    found = str(caught.value).removeprefix("the module is not the one this machine was made of: ")
    assert set(found.split("; ")) == expected


def test_every_single_difference_is_refused() -> None:
    module = network()
    check_module(module, describe_module(module))
    changes: dict[str, Callable[[dict, str], object]] = {
        "renamed": lambda group, name: group.update({name + "_": group.pop(name)}),
        "missing": lambda group, name: group.pop(name),
        "shape": lambda group, name: group[name]["shape"].append(1),
        "dtype": lambda group, name: group[name].update(dtype="bfloat16"),
    }
    for kind, names_ in describe_module(module).items():
        for name in names_:
            for change in changes.values():
                expected = describe_module(module)
                change(expected[kind], name)
                with refused(re.escape(repr(name))):
                    check_module(module, expected)


def test_loading_leaves_the_given_module_as_it_is(run: Path) -> None:
    module = network()
    for tensor_ in module.state_dict().values():
        tensor_.fill_(7)
    module.train()
    machine = KernelMachine.load(run / "machine", module)
    machine.predict(torch.rand(3, 1, 8, 8))
    assert all(bool((t == 7).all()) for t in module.state_dict().values())
    assert module.training
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["net.4.weight", "net.4.bias"]
    assert all(p.grad is None for p in module.parameters())


def test_what_is_frozen_is_the_artifacts_choice(run: Path) -> None:
    """A module as its class makes it will do, whatever was frozen in training."""
    module = network()
    only_half_frozen(module)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = (KernelMachine.load(run / "machine", m).predict(x) for m in (module, network()))
    assert torch.equal(found, expected)
    assert not module.net[1].weight.requires_grad


def test_frozen_weights_are_the_artifacts(run: Path) -> None:
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module = network()
    expected = KernelMachine.load(run / "machine", module).network_outputs(x)
    for tensor_ in module.state_dict().values():
        tensor_.fill_(7)
    assert torch.equal(KernelMachine.load(run / "machine", module).network_outputs(x), expected)


def test_constants_must_be_the_modules(run: Path) -> None:
    values, _ = read_tensors(run / "machine" / CONSTANTS)
    assert sorted(values) == ["net.2.num_batches_tracked", "net.4.bias", "net.4.weight"]
    wrong = {
        "net.4.bias": {**values, "net.4.bias": torch.zeros(9)},
        "net.4.weight": {**values, "net.4.weight": values["net.4.weight"].double()},
        "net.1.bias": {**values, "net.1.bias": torch.zeros(12)},
        "net.2.num_batches_tracked": {n: t for n, t in values.items() if not n.startswith("net.2")},
    }
    for name, given in wrong.items():
        with refused(name):
            load_constants(network(), given)


def test_chords_of_another_network_are_refused(run: Path, machine: Path, tmp_path: Path) -> None:
    """Under a manifest that describes ours."""
    other = record(tmp_path / "other", network(width=13)) / "machine"
    for i in range(4):
        (machine / chord_name(i)).write_bytes((other / chord_name(i)).read_bytes())
    reseal(machine)
    verify(machine)
    with refused(r"'net\.[12]\."):
        KernelMachine.load(machine, network())


# every single mutation of a module


def tensors_of(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Kind, owner and own name of every parameter and buffer."""
    found: list[tuple[str, nn.Module, str]] = []
    for owner in module.modules():
        found += [("parameter", owner, name) for name in owner._parameters]
        found += [("buffer", owner, name) for name in owner._buffers]
    return found


def changed(owner: nn.Module, kind: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    held = owner._parameters if kind == "parameter" else owner._buffers
    value = change(held[name].detach())
    held[name] = nn.Parameter(value, value.is_floating_point()) if kind == "parameter" else value


def moved(owner: nn.Module, kind: str, name: str) -> None:
    held = owner._parameters if kind == "parameter" else owner._buffers
    held[f"{name}_"] = held.pop(name)


SINGLE: dict[str, Callable[[nn.Module, str, str], object]] = {
    "renamed": moved,
    "missing": lambda owner, kind, name: (owner._parameters if kind == "parameter" else owner._buffers).pop(name),
    "extra parameter": lambda owner, kind, name: owner.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "extra buffer": lambda owner, kind, name: owner.register_buffer("more", torch.zeros(1)),
    "extra buffer of integers": lambda owner, kind, name: owner.register_buffer("more", torch.zeros(1).long()),
    "one dimension more": lambda owner, kind, name: changed(owner, kind, name, lambda t: t.unsqueeze(0)),
    "one number more": lambda owner, kind, name: changed(
        owner, kind, name, lambda t: torch.cat([t.reshape(1, *t.shape) if not t.dim() else t] * 2)
    ),
    "transposed": lambda owner, kind, name: changed(
        owner, kind, name, lambda t: t.T.contiguous() if t.dim() == 2 else t.reshape(-1, 1)
    ),
    **{
        f"of {dtype}": lambda owner, kind, name, d=dtype: changed(owner, kind, name, lambda t: t.to(d))
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)
    },
    "a buffer of a parameter, or the other way round": lambda owner, kind, name: (
        owner._buffers.update({name: owner._parameters.pop(name).detach()})
        if kind == "parameter"
        else owner._parameters.update({name: nn.Parameter(owner._buffers.pop(name), False)})
    ),
}


@pytest.mark.parametrize("mutation", SINGLE)
def test_every_single_mutation_of_every_tensor_of_the_module_is_refused_and_named(mutation: str, run: Path) -> None:
    count = len(tensors_of(network()))
    assert count == 11
    for index in range(count):
        module = network()
        kind, owner, name = tensors_of(module)[index]
        prefix = next(n for n, m in module.named_modules() if m is owner)
        SINGLE[mutation](owner, kind, name)
        expected = f"{prefix}.more" if mutation.startswith("extra") else f"{prefix}.{name}"
        with refused(rf"^the module is not the one this machine was made of: .*'{re.escape(expected)}'") as caught:
            KernelMachine.load(run / "machine", module)
        told = str(caught.value).partition(": ")[2].split("; ")
        assert len(told) <= 2, told
        assert all(f"'{expected}" in each for each in told), "nothing else is blamed"
