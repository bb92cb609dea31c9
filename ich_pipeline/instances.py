"""Slice-wise inference of a network that finds instances, and what its boxes are trained on."""

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import default_prepare_batch
from monai.engines.utils import PrepareBatch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type

from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.pesa_rcnn import PesaRCNN


class InstanceInferer(Inferer):
    """Whole slices of a head, a few at once.

    Args:
        slices_at_once: in one forward pass.
        edema_estimate: also run the CSD U-Net, whose prediction is then `surroundings`.

    Attributes:
        surroundings: (B, 1, S, R, C) probability of hemorrhage or what it has deformed, of the last call; None where
            it was not asked for.
    """

    def __init__(self, slices_at_once: int = 4, edema_estimate: bool = False) -> None:
        self.slices_at_once = slices_at_once
        self.edema_estimate = edema_estimate
        self.surroundings: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor, network: PesaRCNN, *args: object, **kwargs: object) -> torch.Tensor:
        """Largest score x mask probability of the instances at each voxel.

        Args:
            inputs: (B, 1, S, R, C) head on the model grid.
            network: in evaluation mode.

        Returns:
            (B, 1, S, R, C) float32 in [0, 1]; exactly 0 outside every instance's box.

        Raises:
            ConfigError: edema is to be estimated by a network without CSD U-Net.
        """
        if self.edema_estimate and network.csd is None:
            raise ConfigError("edema_estimate=true: this network has no CSD U-Net. Use one trained with use_csd=true.")
        given = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        batch, _, n_slices, *size = given.shape
        parts = given.movedim(2, 1).reshape(batch * n_slices, 1, *size).split(self.slices_at_once)

        def stacked(found: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(found).float().reshape(batch, n_slices, 1, *size).movedim(1, 2)

        self.surroundings = None
        if self.edema_estimate:
            assert network.csd is not None
            self.surroundings = stacked([torch.sigmoid(network.csd(part)) for part in parts])
        return convert_to_dst_type(stacked([network(part)[:, 1:] for part in parts]), inputs)[0]


class RegionBatch(PrepareBatch):
    """A training batch for `TwoStage`: image, label, and where the frozen CSD U-Net sees hemorrhage or edema.

    Args:
        network: with its trained CSD U-Net, or with none.
        threshold: probability from which a pixel belongs to such a region.
    """

    def __init__(self, network: PesaRCNN, threshold: float = 0.5) -> None:
        self.network, self.threshold = network, threshold

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor | None], dict[str, Any]]:
        """Image and label on the device; label and regions are the network's further arguments."""
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)[:2]
        regions = None
        if self.network.csd is not None:
            with torch.no_grad():
                regions = torch.sigmoid(self.network.csd.eval()(image)) >= self.threshold
        return image, label, (label, regions), {}
