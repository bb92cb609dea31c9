"""UNet++ with an encoder trained on ImageNet (Li et al., JBHI 2021, section II-B): Inception or VGG, and frozen.

Network and weights are those of segmentation-models-pytorch (MIT), the extra `smp`.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ich_pipeline.errors import ConfigError

IMAGENET = "imagenet"


class PretrainedUNetPlusPlus(nn.Module):
    """UNet++ on (B, in_channels, R, C) with rows and columns that are multiples of 32; gives logits of two classes.

    Built without weights, so that a trained bundle fetches none; `with_encoder_weights` gives them before training.

    Args:
        encoder_name: an encoder of segmentation-models-pytorch that has five levels.
        in_channels: 1, or 2 with the mirror image.
        decoder_channels: of five levels, the deepest first.

    Raises:
        ConfigError: the extra is not installed, or it has no such encoder.
    """

    def __init__(self, encoder_name: str, in_channels: int, decoder_channels: list[int]) -> None:
        super().__init__()
        self.encoder_name, self.in_channels, self.frozen = encoder_name, in_channels, False
        try:
            self.net = _library().UnetPlusPlus(
                encoder_name,
                encoder_weights=None,
                in_channels=in_channels,
                classes=2,
                decoder_channels=decoder_channels,
            )
        except KeyError as error:
            raise ConfigError(f"encoder_name={encoder_name}: {error.args[0]}") from error

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, R, C) to (B, 2, R, C) logits."""
        return self.net(image)

    def freeze_encoder(self) -> None:
        """Train the decoder alone. Running means stay as well: they belong to the weights."""
        self.frozen = True
        self.net.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PretrainedUNetPlusPlus":
        """Training or evaluation mode; a frozen encoder is always in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.net.encoder.eval()
        return self


def _library() -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise ConfigError('UNet++ needs the extra `smp`: pip install "ich-pipeline[smp]"') from error
    return segmentation_models_pytorch


def with_encoder_weights(network: nn.Module, weights: str | None, device: torch.device) -> nn.Module:
    """A network on its device, its encoder with weights and then frozen; a network without such an encoder as it is.

    The library adds up (one channel) or repeats (two) the first convolution's weights for red, green and blue.

    Args:
        network: what `network_def` builds.
        weights: `imagenet`: fetched by the library, or from its cache; a file: a state dict of the library's encoder
            for three channels; None: the encoder is trained from scratch with the rest.
        device: of training.

    Raises:
        ConfigError: the weights cannot be fetched or read, or are of another encoder.
    """
    if isinstance(network, PretrainedUNetPlusPlus) and weights is not None:
        encoder = _encoder(network.encoder_name, str(weights))
        encoder.set_in_channels(network.in_channels, pretrained=True)
        network.net.encoder.load_state_dict(encoder.state_dict())
        network.freeze_encoder()
    return network.to(device)


def _encoder(name: str, weights: str) -> Any:
    get_encoder = _library().encoders.get_encoder
    ways_out = "Name a file, encoder_weights=FILE, or train from scratch with encoder_weights=null."
    if weights == IMAGENET:
        try:
            return get_encoder(name, in_channels=3, depth=5, weights=IMAGENET)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"encoder_weights=imagenet: {name} cannot be fetched ({reason}). {ways_out}") from error
    if not Path(weights).is_file():
        raise ConfigError(f"encoder_weights={weights}: no such file. {ways_out}")
    encoder = get_encoder(name, in_channels=3, depth=5, weights=None)
    try:
        encoder.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (RuntimeError, UnpicklingError, AttributeError) as error:
        raise ConfigError(f"encoder_weights={weights}: not weights of {name}: {error}") from error
    return encoder
