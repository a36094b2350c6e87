"""LightningModules that train in all the ways of the table."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.networks import token_loss


class Learner(pl.LightningModule):
    """Cross entropy by whatever optimiser; batches are inputs, targets and ids."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.net, self.row = net, optimizer
        self.witness: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        outputs = self(batch[0])
        if self.witness is not None:
            self.witness.see(batch, outputs)
        return token_loss(outputs, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", token_loss(self(batch[0]), batch[1]))

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        return self.row.make(self.trained())


class WarmUp(Learner):
    """A rate that rises step by step and falls again."""

    interval = "step"

    def configure_optimizers(self) -> Any:
        optimizer = self.row.make(self.trained())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (0.25, 0.5, 1.0, 0.7)[step % 4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class ByEpoch(WarmUp):
    """The same rates, each for a whole epoch."""

    interval = "epoch"


class Groups(Learner):
    """The first two parameters have a rate and a decay of their own."""

    def configure_optimizers(self) -> Any:
        trained, own = self.trained(), {"lr": 0.3 * self.row.lr}
        if hasattr(self.row.reference, "weight_decay"):
            own["weight_decay"] = 0.2
        return self.row.make([{"params": trained[:2], **own}, {"params": trained[2:]}])


class Manual(Learner):
    """Zero, backward, step, by hand."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


class ManualClipping(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), 0.2, "norm")
        self.optimizers().step()


class ManualAccumulation(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class SeveralSteps(Manual):
    """Two steps on every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


class InPlace(Manual):
    """Gradients are filled with zeros, where others set them to None."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad(set_to_none=False)
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


class TwoOptimizers(Manual):
    """Two optimisers take turns, each with parameters of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            for each in self.optimizers():
                each.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        trained = self.trained()
        half = len(trained) // 2
        return [self.row.make(trained[:half]), self.row.make(trained[half:])]


class Overflowing(Learner):
    """The third batch's loss is beyond float16, so that its step is skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (1e30 if batch_idx == 2 else 1.0)


class Recomputing(Learner):
    """Activations are computed anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False) if self.training else self.net(x)


class TwoLoaders(Learner):
    """Learns from two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["one"]) + 0.5 * self.loss(batch["two"])


class SeveralLosses(Learner):
    """Another loss of the same outputs, and a penalty."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self(batch[0])
        if self.witness is not None:
            self.witness.see(batch, outputs)
        near = F.mse_loss(outputs, F.one_hot(batch[1], outputs.shape[1]).to(outputs))
        return token_loss(outputs, batch[1]) + 0.3 * near + 1e-2 * outputs.square().sum()


class Thaw(BaseFinetuning):
    """The first layer joins in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.5 * pl_module.row.lr)


class StopEarly(pl.Callback):
    """Asks for the end after the first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def half_precision() -> MixedPrecision:
    """Float16 on the CPU, with a scale that changes."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2))
