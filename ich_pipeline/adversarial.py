"""Adversarial training of a segmentation network (Li et al., JBHI 2021, section II-C and figure 4).

The generator G is the segmentation network. It is trained with weighted Dice alone first; then both take turns:

    G* = argmin over G of max over D of L_GAN(G, D) + L_dice(G)
    L_GAN = E log D(x, y) + E log(1 - D(x, G(x)))

D is conditional: it sees the image x with a mask, and says for each patch whether the mask is a reader's. As usual
(Goodfellow et al., NIPS 2014, section 3) G maximises log D(x, G(x)) instead of minimising log(1 - D(x, G(x))), which
has no gradient where D is sure. Figure 4 prints the weight beta of the GAN term without its value.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import AdversarialTrainer, IterationEvents
from monai.losses import DiceLoss, PatchAdversarialLoss
from monai.utils import AdversarialIterationEvents, AdversarialKeys, CommonKeys
from torch import nn
from torch.optim import Optimizer

from ich_pipeline.engines import AutocastInferer
from ich_pipeline.errors import ConfigError, IchError
from ich_pipeline.training import n_processes

LOSSES = {
    AdversarialKeys.RECONSTRUCTION_LOSS: "dice_loss",
    AdversarialKeys.GENERATOR_LOSS: "gan_loss",
    AdversarialKeys.DISCRIMINATOR_LOSS: "discriminator_loss",
}


class WeightedDiceLoss(DiceLoss):
    """1 - 2 w sum(p y) / (sum(p^2) + sum(y^2)) of the foreground, over the whole batch (figure 4).

    The weight w, whose value the paper does not give, is a factor of the whole term: it says what Dice weighs against
    the GAN term.

    Args:
        weight: w.
    """

    def __init__(self, weight: float = 1.0) -> None:
        # One pixel, not 1e-5: else a false alarm on a patch without blood would change the loss by nothing.
        super().__init__(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
            smooth_nr=1.0,
            smooth_dr=1.0,
        )
        self.dice_weight = weight

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """(B, 2, ...) logits and (B, 1, ...) label to a number."""
        return 1 - self.dice_weight * (1 - super().forward(logits, label))


class GanLoss:
    """L_GAN for either side, as binary cross-entropy over patches.

    Args:
        weight: beta, of the generator's term against Dice.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.loss = weight, PatchAdversarialLoss(criterion="bce")

    def generator(self, fake_logits: torch.Tensor) -> torch.Tensor:
        """Small where the discriminator takes the prediction for a reader's mask."""
        return self.weight * self.loss(fake_logits, target_is_real=True, for_discriminator=False)

    def discriminator(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Small where it tells them apart."""
        real = self.loss(real_logits, target_is_real=True, for_discriminator=True)
        return (real + self.loss(fake_logits, target_is_real=False, for_discriminator=True)) / 2


class GeneratorInferer(AutocastInferer):
    """The generator's forward pass: what the discriminator is told beside the mask is none of its business."""

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """(B, C, R, C) image to (B, 2, R, C) logits."""
        return super().__call__(inputs, network)


class DiscriminatorInferer(AutocastInferer):
    """The discriminator's forward pass, on image and mask together."""

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of patches.

        Args:
            inputs: (B, 1, R, C) mask, or (B, 2, R, C) logits of a prediction, whose foreground probability is taken.
            network: MONAI's `PatchDiscriminator`, which gives its features too.
            kwargs: `condition`, the (B, C, R, C) image.
        """
        mask = torch.softmax(inputs, dim=1)[:, 1:] if inputs.shape[1] == 2 else inputs
        return super().__call__(torch.cat([kwargs["condition"], mask], dim=1), network)[-1].float()


def conditional_batch(
    batch: Mapping[str, torch.Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple[()], dict[str, torch.Tensor]]:
    """Image and label, and the image as the condition of the discriminator."""
    image, label = (batch[key].to(device, non_blocking=non_blocking) for key in ("image", "label"))
    return image, label, (), {"condition": image}


class PretrainedAdversarialTrainer(AdversarialTrainer):
    """MONAI's `AdversarialTrainer` for segmentation: weighted Dice alone first, then both networks in turn.

    Its label is what the discriminator takes for real, and `state.metrics` holds the means of this epoch's losses so
    far: `dice_loss`, `gan_loss`, `discriminator_loss`. Handlers of a supervised trainer work on it: the generator is
    `network`, and BACKWARD_COMPLETED comes between its backward pass and its step.

    Args:
        pretrain_epochs: epochs with Dice alone.
        adversarial: whether the discriminator ever comes in; without it all epochs are with Dice alone.
        kwargs: of `AdversarialTrainer`.

    Raises:
        ConfigError: several processes train, each of which would have a discriminator of its own.
    """

    def __init__(self, pretrain_epochs: int, adversarial: bool, **kwargs: Any) -> None:
        if adversarial and n_processes() > 1:
            raise ConfigError(
                f"adversarial=true in {n_processes()} processes, expected one: the discriminator is not shared. Start "
                "without torchrun."
            )
        self.pretrain_epochs, self.adversarial = pretrain_epochs, adversarial
        self._sums: dict[str, list[float]] = {}
        super().__init__(**kwargs)
        self.add_event_handler(AdversarialIterationEvents.GENERATOR_BACKWARD_COMPLETED, self._generator_backward)
        self.add_event_handler(AdversarialIterationEvents.GENERATOR_MODEL_COMPLETED, self._labels_are_real)
        self.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._count_losses)

    @property
    def network(self) -> nn.Module:
        """The generator."""
        return self.state.g_network

    @property
    def optimizer(self) -> Optimizer:
        """That of the generator."""
        return self.state.g_optimizer

    @property
    def loss_function(self) -> Any:
        """The generator's loss but for the GAN term."""
        return self.state.recon_loss_function

    @property
    def inferer(self) -> Any:
        """That of the generator."""
        return self.g_inferer

    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        if self.adversarial and engine.state.epoch > self.pretrain_epochs:
            return super()._iteration(engine, batchdata)
        image, label, _, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking)
        self.network.train()
        self.optimizer.zero_grad()
        logits = self.g_inferer(image, self.network)
        loss = self.loss_function(logits, label)
        output = {CommonKeys.IMAGE: image, CommonKeys.LABEL: label, CommonKeys.PRED: logits, CommonKeys.LOSS: loss}
        engine.state.output = output | {AdversarialKeys.RECONSTRUCTION_LOSS: loss}
        loss.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimizer.step()
        return engine.state.output

    def _generator_backward(self, engine: Any) -> None:
        output = engine.state.output
        terms = (output[AdversarialKeys.RECONSTRUCTION_LOSS], output[AdversarialKeys.GENERATOR_LOSS])
        output[CommonKeys.LOSS] = torch.stack([term.detach() for term in terms]).sum()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

    def _labels_are_real(self, engine: Any) -> None:
        # MONAI's trainer takes the image for what a generator should make; here it makes a mask of the image.
        output = engine.state.output
        output[AdversarialKeys.REALS] = (output[CommonKeys.LABEL] > 0).float()

    def _epoch_started(self, engine: Engine) -> None:
        self._sums = {}

    def _count_losses(self, engine: Engine) -> None:
        for key, name in LOSSES.items():
            if key in engine.state.output:
                value = float(engine.state.output[key].detach())
                if not math.isfinite(value):
                    raise IchError(
                        f"epoch {engine.state.epoch}, step {engine.state.iteration}: {name} {value:g}. The training "
                        "has diverged: lower learning_rate= or discriminator_learning_rate=, or give amp=off."
                    )
                self._sums.setdefault(name, []).append(value)
                engine.state.metrics[name] = sum(self._sums[name]) / len(self._sums[name])
