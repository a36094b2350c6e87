"""What real training loops do between a loss and a step: manual optimisation, several optimisers, scaling, clipping."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.capture import CaptureError
from tests.helpers import Classifier, digits, fit


def recorder(root: Path, **options: Any) -> PathKernelCallback:
    return PathKernelCallback(**{"dirpath": str(root / "run"), "nodes": 8, "probes": 100, "sketch_dim": 512, **options})


def plain_and_recorded(
    make: Any, tmp_path: Path, options: dict[str, Any] | None = None, **trainer: Any
) -> tuple[pl.LightningModule, KernelMachine, pl.Trainer]:
    """Fit with and without the callback: bit-identical, or the test fails."""
    torch.manual_seed(3)
    module, plain = make(), None
    plain = copy.deepcopy(module)
    callbacks = trainer.pop("callbacks", lambda: [])
    fit(plain, callbacks(), tmp_path, **trainer)
    path_kernel = recorder(tmp_path, **(options or {}))
    trained = fit(module, [path_kernel, *callbacks()], tmp_path, **trainer)
    for (name, a), b in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    forward_fn = (options or {}).get("forward_fn")
    return module, KernelMachine.load(path_kernel.machine_dir, make(), forward_fn=forward_fn), trained


def closes(machine: KernelMachine, module: pl.LightningModule, rtol: float = 1e-4) -> dict[str, float]:
    """The ledger adds up to the trained network's outputs; the machine's fidelity."""
    x, y = digits()[1].tensors
    why = machine.explain(x[:30], target=y[:30], top_k=3)
    with torch.no_grad():
        outputs = machine._network.forward_fn(module.eval(), [x[:30], y[:30]])
    expected = outputs.gather(1, y[:30, None])[:, 0]
    gap = (sum(why.ledger.values()) - expected).abs().max() / outputs.abs().max()
    assert float(gap) < rtol, f"the ledger misses the network by {gap:.2e}"
    return machine.fidelity(DataLoader(digits()[1], 50))


# manual optimisation


class Manual(Classifier):
    """One of several ways to step by hand."""

    def __init__(self, way: str, **options: Any) -> None:
        super().__init__(**options)
        self.way = way
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        getattr(self, self.way)(batch, batch_idx)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def once(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()

    def clipped(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), 0.3, "norm")
        self.optimizers().step()

    def two_losses(self, batch: Any, batch_idx: int) -> None:
        """Two backward passes through one graph."""
        self.optimizers().zero_grad()
        outputs = self(batch[0])
        self.manual_backward(F.cross_entropy(outputs, batch[1]), retain_graph=True)
        self.manual_backward(0.01 * outputs.square().mean())
        self.optimizers().step()

    def several_steps(self, batch: Any, batch_idx: int) -> None:
        for _ in range(3):
            self.once(batch, batch_idx)

    def same_gradient_twice(self, batch: Any, batch_idx: int) -> None:
        self.once(batch, batch_idx)
        self.optimizers().step()

    def own_accumulation(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 3)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def never_zeroed(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.optimizers().step()

    def zeroed_in_place(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad(set_to_none=False)
        self.manual_backward(self.loss(batch))
        self.optimizers().step()

    def gradient_penalty(self, batch: Any, batch_idx: int) -> None:
        """A gradient taken by the training step itself, for a number that is only logged."""
        x = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(self(x), batch[1])
        (inner,) = torch.autograd.grad(loss, x, retain_graph=True)
        self.log("steepness", inner.norm())
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


WAYS = [
    "once", "clipped", "two_losses", "several_steps", "same_gradient_twice", "own_accumulation", "zeroed_in_place",
    "gradient_penalty",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_manual_optimisation(way: str, tmp_path: Path) -> None:
    rate = {"lr": 0.04, "momentum": 0.5} if way != "same_gradient_twice" else {"lr": 0.04}
    module, machine, trainer = plain_and_recorded(lambda: Manual(way, **rate), tmp_path)
    found = closes(machine, module)
    assert found["fidelity"] > 0.97, found
    assert found["error_unattributed"] < 1e-3, found
    assert machine.chords[-1].last_step == trainer.global_step


def test_a_backward_pass_past_lightning_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class Direct(Manual):
        def once(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.loss(batch).backward()
            self.optimizers().step()

    module = Direct("once")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CaptureError, match=r"the hooks did not fire. Call self\.manual_backward\(loss\)"):
        fit(module, [recorder(tmp_path)], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))


def test_gradients_used_again_across_a_node_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="used gradients again that an earlier step had used, across a node"):
        fit(Manual("never_zeroed", lr=0.001), [recorder(tmp_path)], tmp_path)


class Critic(pl.LightningModule):
    """A small GAN on the digits: two optimisers, one path. Outputs are of the critic and of both networks together."""

    def __init__(self, toggle: bool = False) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64))
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))
        self.automatic_optimization = False
        self.toggle = toggle

    def forward(self, x: Tensor) -> Tensor:
        fake = self.generator(x[:, 0, 2:4, 2:4].flatten(1))
        return torch.cat([self.critic(x), self.critic(fake), fake[:, 20:24]], 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        noise = torch.randn(len(batch[0]), 4)
        ones = torch.ones(len(noise), 1)
        if self.toggle:
            self.toggle_optimizer(critic)
        fake = self.generator(noise)
        real_loss = F.binary_cross_entropy_with_logits(self.critic(batch[0]), ones)
        fake_loss = F.binary_cross_entropy_with_logits(self.critic(fake.detach()), 0 * ones)
        critic.zero_grad()
        self.manual_backward(real_loss + fake_loss)
        critic.step()
        if self.toggle:
            self.untoggle_optimizer(critic)
            self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(self.critic(self.generator(noise)), ones))
        generator.step()
        if self.toggle:
            self.untoggle_optimizer(generator)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.5),
        ]


@pytest.mark.parametrize("toggle", [False, True])
def test_two_optimisers_make_one_path_and_one_ledger(toggle: bool, tmp_path: Path) -> None:
    module, machine, trainer = plain_and_recorded(lambda: Critic(toggle), tmp_path, {"nodes": 16})
    x = digits()[1].tensors[0][:30]
    with torch.no_grad():
        outputs = module.eval()(x)
    for k in range(outputs.shape[1]):
        why = machine.explain(x, target=torch.full((30,), k), top_k=2)
        torch.testing.assert_close(sum(why.ledger.values()), outputs[:, k], rtol=1e-4, atol=1e-5)
    found = machine.fidelity([x])
    assert found["fidelity"] > 0.98, found
    assert found["error_unattributed"] < 0.05, found
    assert machine.chords[-1].last_step == trainer.global_step == 40


def test_a_parameter_of_two_optimisers_is_refused_by_name(tmp_path: Path) -> None:
    class Shared(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net[3].parameters(), lr=0.1)]

    with pytest.raises(MisconfigurationException, match=r"several optimisers move 'net\.3\.bias', 'net\.3\.weight'"):
        fit(Shared("once"), [recorder(tmp_path)], tmp_path)


# clipping by value, precision


def test_clipping_by_value_leaves_the_difference_unattributed(tmp_path: Path, caplog: Any) -> None:
    options = {"gradient_clip_val": 0.015, "gradient_clip_algorithm": "value"}
    module, machine, _ = plain_and_recorded(lambda: Classifier(momentum=0.9), tmp_path, {"sketch_dim": 2048}, **options)
    found = closes(machine, module)
    assert found["error_unattributed"] > 0.05, found
    assert found["error_sketch"] < 0.1, found
    assert "is left unattributed" in caplog.text
    residual = [chord.residual for chord in machine.chords]
    assert all(residual)


def test_gentle_clipping_by_value_changes_nothing(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 50.0, "gradient_clip_algorithm": "value"}
    module, machine, _ = plain_and_recorded(Classifier, tmp_path, **options)
    found = closes(machine, module)
    assert found["fidelity"] > 0.97
    assert found["error_unattributed"] == 0.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bfloat16(optimizer: str, tmp_path: Path) -> None:
    module, machine, _ = plain_and_recorded(lambda: Classifier(optimizer), tmp_path, precision="bf16-mixed")
    found = closes(machine, module)
    assert found["fidelity"] > 0.96, found


class Spike(pl.Callback):
    """Makes some losses overflow float16."""

    def __init__(self, at: set[int]) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.factor = 1e30 if batch_idx in self.at else 1.0


class Scaled(Classifier):
    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4))


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_float16_with_skipped_steps(clip: float | None, accumulate: int, tmp_path: Path) -> None:
    """The scale is in every captured gradient, changes during the fit, and steps that overflow leave no trace."""
    seen: list[float] = []

    class Scale(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(float(trainer.precision_plugin.scaler.get_scale()))

    sides = []
    torch.manual_seed(3)
    first = Scaled(momentum=0.9, lr=0.03)
    for recorded in (False, True):
        module, path_kernel = copy.deepcopy(first), recorder(tmp_path)
        callbacks = [Spike({3, 6}), Scale(), *([path_kernel] if recorded else [])]
        trainer = fit(
            module, callbacks, tmp_path, plugins=[half()], gradient_clip_val=clip, accumulate_grad_batches=accumulate
        )
        sides.append(module)
    for (name, a), b in zip(sides[0].state_dict().items(), sides[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(set(seen)) > 2, "the scale never changed"
    machine = KernelMachine.load(path_kernel.machine_dir, copy.deepcopy(first))
    found = closes(machine, sides[1])
    assert found["fidelity"] > 0.97, found
    skipped = trainer.global_step - machine.chords[-1].last_step
    assert skipped == 4


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_fused_optimiser(fused: bool, tmp_path: Path) -> None:
    """A fused optimiser takes the scale out by itself, and is called when a step is to be skipped."""
    torch.manual_seed(3)
    module, path_kernel = Scaled("adamw", fused=fused), recorder(tmp_path, nodes=12)
    trainer = fit(module, [Spike({3}), path_kernel], tmp_path, plugins=[half()])
    machine = KernelMachine.load(path_kernel.machine_dir, Scaled())
    found = closes(machine, module)
    assert found["fidelity"] > 0.95, found
    assert trainer.global_step - machine.chords[-1].last_step == 2


def test_half_precision_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="precision='bf16-true', whose weights are rounded"):
        fit(Classifier(), [recorder(tmp_path)], tmp_path, precision="bf16-true")


# unfreezing, averaging


class Backbone(Classifier):
    def __init__(self) -> None:
        super().__init__(momentum=0.9, lr=0.03)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.net = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Thaw(BaseFinetuning):
    """Unfreezes the backbone in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.02)


@pytest.mark.parametrize("way", ["own", "lightning"])
def test_parameters_that_are_unfrozen_in_mid_training_join_the_path(way: str, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [Thaw()] if way == "own" else [BackboneFinetuning(1, lambda epoch: 1.5, backbone_initial_lr=0.01)]

    module, machine, _ = plain_and_recorded(Backbone, tmp_path, max_epochs=3, callbacks=callbacks)
    found = closes(machine, module)
    assert found["fidelity"] > 0.97, found
    assert "backbone.1.weight" not in machine.chords[0].delta
    assert all("backbone.1.weight" in chord.start for chord in machine.chords)
    assert float(machine.chords[-1].delta["backbone.1.weight"].norm()) > 0


def test_a_frozen_base_stays_out_of_the_artifact(tmp_path: Path) -> None:
    def make() -> Backbone:
        module = Backbone()
        module.backbone.requires_grad_(False)
        return module

    module, machine, _ = plain_and_recorded(make, tmp_path)
    assert closes(machine, module)["fidelity"] > 0.97
    assert set(machine.chords[0].start) == {"net.weight", "net.bias"}


@pytest.mark.parametrize("callback", [StochasticWeightAveraging(0.01), WeightAveraging()])
def test_averages_of_weights_are_refused_by_name(callback: pl.Callback, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"does not support {type(callback).__name__}"):
        fit(Classifier(), [recorder(tmp_path), callback], tmp_path)


# what is left unattributed when that is allowed


def test_an_optimiser_without_a_rule_is_left_unattributed_when_allowed(tmp_path: Path) -> None:
    class Ruleless(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters(), lr=0.01)

    module, machine, _ = plain_and_recorded(Ruleless, tmp_path, {"unattributed": "allow"})
    found = closes(machine, module)
    assert found["error_unattributed"] == pytest.approx(1, abs=0.05)
    assert found["error_sketch"] < 1e-5
    assert len(machine.example_ids) == 0


def test_one_optimiser_with_a_rule_and_one_without(tmp_path: Path) -> None:
    class Half(Manual):
        def once(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net[1].parameters(), lr=0.1)
            return [first, torch.optim.ASGD(self.net[3].parameters(), lr=0.1)]

    module, machine, _ = plain_and_recorded(lambda: Half("once"), tmp_path, {"unattributed": "allow"})
    found = closes(machine, module)
    assert 0.1 < found["error_unattributed"] < 1, found
    assert found["error_sketch"] < 0.1, found
    assert not any(name in chord.sketches for chord in machine.chords for name in ("net.3.weight", "net.3.bias"))


class Outside(Classifier):
    """Uses a weight outside its module's forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:3](x)
        return F.linear(hidden, self.net[3].weight, self.net[3].bias)


def test_a_gradient_that_no_hook_sees_is_refused_before_the_first_step_or_left_unattributed(tmp_path: Path) -> None:
    module = Outside()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CaptureError, match=r"do not add up to the gradient for 'net\.3\.weight' \(100\.0% unaccounted"):
        fit(module, [recorder(tmp_path / "refused")], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    module, machine, _ = plain_and_recorded(Outside, tmp_path, {"unattributed": "allow"})
    found = closes(machine, module)
    assert 0.1 < found["error_unattributed"] < 1, found
    assert found["error_sketch"] < 0.1, found


def test_weights_moved_by_hand_are_named_and_left_unattributed(tmp_path: Path, caplog: Any) -> None:
    class Shrinks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.current_epoch:
                return
            with torch.no_grad():
                pl_module.net[1].weight.clamp_(-0.1, 0.1)

    module, machine, _ = plain_and_recorded(
        lambda: Classifier(lr=0.1), tmp_path, {"sketch_dim": 2048}, callbacks=lambda: [Shrinks()]
    )
    found = closes(machine, module)
    assert "'net.1.weight' moved otherwise than the recorded gradients say" in caplog.text
    assert found["error_unattributed"] > 0.01, found


def test_memory_of_a_chord_does_not_grow_with_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visits whose weights are final are added up by example: the same machine, whatever the room."""
    monkeypatch.setattr("lightning_pathkernel.recording.open_chord._FOLD", 1 << 12)
    torch.manual_seed(3)
    first = Classifier("adamw", lr=1e-3)
    machines = []
    for room in (1 << 12, 1 << 24):
        monkeypatch.setattr("lightning_pathkernel.recording.open_chord._FOLD", room)
        path_kernel = recorder(tmp_path / str(room), nodes=3)
        fit(copy.deepcopy(first), [path_kernel], tmp_path, max_epochs=6)
        machines.append(KernelMachine.load(path_kernel.machine_dir, first))
    x, y = digits()[1].tensors
    folded, whole = (m.contributions(x[:20], y[:20]) for m in machines)
    assert float(torch.corrcoef(torch.stack([folded.flatten(), whole.flatten()]))[0, 1]) > 0.9999
    torch.testing.assert_close(machines[0].predict(x[:20]), machines[1].predict(x[:20]), rtol=1e-2, atol=1e-2)
    influences = torch.stack([m.self_influence() for m in machines])
    assert float(torch.corrcoef(influences)[0, 1]) > 0.99


# several loaders


class TwoSources(Classifier):
    """Learns from two loaders, in one call of the network or in two."""

    def __init__(self, joined: bool, **options: Any) -> None:
        super().__init__(**options)
        self.joined = joined

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = batch["one"], batch["two"]
        if self.joined:
            return F.cross_entropy(self(torch.cat([one[0], two[0]])), torch.cat([one[1], two[1]]))
        first = F.cross_entropy(self(one[0]), one[1])
        return first + 0.5 * F.cross_entropy(self(two[0]), two[1])


@pytest.mark.parametrize("sizes", [(16, 16), (16, 8)])
@pytest.mark.parametrize("joined", [True, False])
def test_several_loaders_each_keep_their_examples(joined: bool, sizes: tuple[int, int], tmp_path: Path) -> None:
    """Zeroing one loader's images leaves only biases to learn from them: told by every id."""
    training = digits()[0]
    blank = torch.utils.data.TensorDataset(torch.zeros(60, 1, 8, 8), torch.zeros(60, dtype=torch.long))
    loaders = {
        "one": DataLoader(training, sizes[0], shuffle=True),
        "two": DataLoader(blank, sizes[1], shuffle=True),
    }
    module, path_kernel = TwoSources(joined), recorder(tmp_path, sketch_dim=4096, sketch="identity", nodes=100)
    with pytest.warns(UserWarning, match="every step gets its own node"):
        fit(module, [path_kernel], tmp_path, loader=loaders)
    machine = KernelMachine.load(path_kernel.machine_dir, TwoSources(joined))
    assert closes(machine, module)["fidelity"] > 0.99
    assert int(machine.example_ids.max()) == 320 + 60 - 1
    first = machine.chords[0]
    weight = slice(0, 32 * 64)  # of the layer that sees the pixels
    for example, row in zip(first.example_ids.tolist(), first.rows, strict=True):
        assert (float(row[weight].norm()) == 0) == (example >= 320), example


def test_a_loader_whose_rows_cannot_be_told_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class Shuffled(TwoSources):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["one"][0] * 2), batch["one"][1])

    loaders = {name: DataLoader(digits()[0], 16) for name in ("one", "two")}
    with pytest.raises(CaptureError, match=r"cannot tell which loader's rows 'net.3' was called with.*different batch"):
        fit(Shuffled(False), [recorder(tmp_path)], tmp_path, loader=loaders)


@pytest.mark.parametrize("way", ["a part", "in place"])
def test_compiled_modules_are_refused_by_name_before_the_first_step(way: str, tmp_path: Path) -> None:
    module = Classifier()
    if way == "a part":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.net.compile(backend="eager")
    before = copy.deepcopy(list(module.parameters()))
    with pytest.raises(MisconfigurationException, match=r"does not support compiled modules.*found 'net'\. Fit the"):
        fit(module, [recorder(tmp_path)], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("what", ["weights", "buffers"])
def test_what_moves_after_the_last_step_is_a_chord_of_its_own_and_unattributed(what: str, tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 10))

    class Last(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            last = what == "buffers" and self.current_epoch == 1 and batch_idx >= 7
            return None if last else loss  # the forward pass has moved the running statistics all the same

        def on_train_epoch_end(self) -> None:
            if what == "weights" and self.current_epoch == 1:
                self.net[3].weight.data += 0.1

    module, machine, _ = plain_and_recorded(lambda: Last(net=net()), tmp_path, {"sketch_dim": 1024})
    x = digits()[1].tensors[0][:30]
    with torch.no_grad():
        torch.testing.assert_close(machine.network_outputs(x), module.eval()(x), rtol=1e-5, atol=1e-5)
    found = closes(machine, module)
    last = machine.chords[-1]
    if what == "weights":
        assert last.last_step == last.first_step == machine.chords[-2].last_step
    assert (found["error_unattributed"] > 0.05) == (what == "weights"), found


# by hand and in mixed precision; past Lightning; copies


class ByHand(Manual):
    """One or two optimisers, by hand, of which the scaler may make either skip a step."""

    factor = 1.0

    def __init__(self, count: int, optimizer: str = "sgd") -> None:
        super().__init__("step_all", optimizer=optimizer)
        self.count = count

    def step_all(self, batch: Any, batch_idx: int) -> None:
        chosen = self.optimizers() if self.count == 2 else [self.optimizers()]
        for optimizer in chosen:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) * self.factor)
        for optimizer in chosen:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        if self.count == 1:
            return super().configure_optimizers()
        return [
            torch.optim.AdamW(self.net[1].parameters(), lr=3e-3),
            torch.optim.SGD(self.net[3].parameters(), lr=0.05, momentum=0.9),
        ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_manual_optimisation_in_mixed_precision(precision: str, count: int, tmp_path: Path) -> None:
    """Hooks of a step by hand run within the training step's autocast."""
    torch.manual_seed(3)
    first = ByHand(count, "adamw")
    sides = []
    for recorded in (False, True):
        module, path_kernel = copy.deepcopy(first), recorder(tmp_path, nodes=12)
        options = {"precision": "bf16-mixed"} if precision == "bf16" else {"plugins": [half()]}
        callbacks = [*([Spike({3})] if precision == "fp16" else []), *([path_kernel] if recorded else [])]
        fit(module, callbacks, tmp_path, **options)
        sides.append(module)
    for (name, a), b in zip(sides[0].state_dict().items(), sides[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    found = closes(KernelMachine.load(path_kernel.machine_dir, first), sides[1])
    assert found["fidelity"] > 0.95, found


def test_changes_of_scaled_gradients_leave_contributions_in_their_units(tmp_path: Path) -> None:
    """Clipping by value, by hand, at a constant loss scale: as without one."""

    class Clips(Manual):
        def once(self, batch: Any, batch_idx: int) -> None:
            optimizer, scaler = self.optimizers(), getattr(self.trainer.precision_plugin, "scaler", None)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            scale = 1.0 if scaler is None else scaler.get_scale()
            self.clip_gradients(optimizer, 0.02 * scale, "value")
            optimizer.step()

    x, y = digits()[1].tensors
    sizes, found = [], []
    for name in ("full", "half"):
        torch.manual_seed(3)
        module, path_kernel = Clips("once"), recorder(tmp_path / name, nodes=40, sketch="identity", sketch_dim=10**6)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
        plugins = [] if name == "full" else [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        with pytest.warns(UserWarning, match="every step gets its own node"):
            fit(module, [path_kernel], tmp_path, plugins=plugins, max_steps=16)
        machine = KernelMachine.load(path_kernel.machine_dir, Clips("once"))
        sizes.append(float(machine.contributions(x[:20], y[:20]).abs().max()))
        found.append(machine.fidelity([x])["error_unattributed"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[0] > 0.05


class Raw(Manual):
    """Steps of the raw optimiser, past Lightning, in every step or in every second one."""

    def raw(self, batch: Any, batch_idx: int) -> None:
        self.step_by(self.optimizers(use_pl_optimizer=False), batch)

    def alternating(self, batch: Any, batch_idx: int) -> None:
        self.step_by(self.optimizers(use_pl_optimizer=batch_idx % 2 == 0), batch)

    def step_by(self, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("way", ["raw", "alternating"])
def test_steps_of_the_raw_optimiser_are_recorded_too(way: str, tmp_path: Path) -> None:
    module, machine, _ = plain_and_recorded(lambda: Raw(way, optimizer="adamw", weight_decay=2.0), tmp_path)
    found = closes(machine, module)
    assert found["fidelity"] > 0.97, found
    assert machine.chords[-1].last_step == 20


def test_a_raw_step_with_a_closure_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class Past(Classifier):
        def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.optimizer.step(closure=optimizer_closure)

    with pytest.raises(CaptureError, match=r"made past Lightning, by a raw optimiser's step with a closure: call self"):
        fit(Past(), [recorder(tmp_path)], tmp_path)


def test_the_module_and_the_callback_may_be_pickled_and_copied_in_mid_fit(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step in (4, 13):
                copies.append(copy.deepcopy(pl_module.net))
                copies.append(pickle.loads(pickle.dumps(pl_module.net)))
                copies.append(copy.deepcopy(next(c for c in trainer.callbacks if isinstance(c, PathKernelCallback))))
                pickle.dumps(copies[-1])

    module, path_kernel = Classifier(), recorder(tmp_path)
    fit(module, [path_kernel, Keeps()], tmp_path)
    machine = KernelMachine.load(path_kernel.machine_dir, Classifier())
    assert closes(machine, module)["fidelity"] > 0.97
    x = digits()[1].tensors[0]
    assert torch.equal(copies[0](x), copies[1](x))
    fit(Classifier(), [copies[2]], tmp_path)
    assert copies[2].machine_dir == tmp_path / "run-v1" / "machine"


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    both = [recorder(tmp_path / "a"), recorder(tmp_path / "b")]
    with pytest.raises(MisconfigurationException, match="found 2 PathKernelCallbacks in one Trainer: keep one"):
        fit(Classifier(), both, tmp_path)


def test_a_gradient_that_is_taken_away_before_the_step_is_no_change(tmp_path: Path) -> None:
    """As DINO does with its last layer in the first epochs."""

    class Cancels(Manual):
        def once(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            if self.trainer.global_step < 5:
                self.net[3].weight.grad = None
            self.optimizers().step()

    module, machine, _ = plain_and_recorded(lambda: Cancels("once", momentum=0.5, lr=0.04), tmp_path)
    found = closes(machine, module)
    assert found["fidelity"] > 0.97, found
    assert found["error_unattributed"] < 1e-3, found
