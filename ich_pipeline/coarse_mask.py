"""The coarse mask on its way: inferers that run one or both stages on their own grids, and the training grid."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type
from torch import nn

from ich_pipeline.networks.coarse_mask_unet import CoarseMaskUNet, coarse_probability, to_coarse_grid


def _plain(image: torch.Tensor) -> torch.Tensor:
    # MetaTensor bookkeeping costs more than some of the steps below.
    return image.as_tensor() if isinstance(image, MetaTensor) else image


class CoarseInferer(Inferer):
    """One dense network alone: the coarse stage while it is trained.

    Args:
        size: grid of the coarse stage, (slices, rows, columns).
    """

    def __init__(self, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        """(B, 1, S, R, C) head on the model grid in, foreground probability of the same shape out."""
        probability = coarse_probability(_plain(inputs), lambda slices: torch.sigmoid(network(slices)), self.size)
        return convert_to_dst_type(probability, inputs)[0]


class CoarseMaskInferer(Inferer):
    """The coarse stage on the whole head, then the fine stage in a sliding window over image and coarse mask.

    Args:
        roi_size: window of the fine stage in (slices, rows, columns).
        overlap: share of a window that the next one covers again.
        blending: `gaussian` or `constant` weights where windows overlap.

    Attributes:
        regions: (B, 1, S, R, C) bool of the last call: the coarse mask.
    """

    def __init__(self, roi_size: Sequence[int], overlap: float = 0.5, blending: str = "gaussian") -> None:
        self.regions: torch.Tensor | None = None
        self.window = SlidingWindowInferer(roi_size, overlap=overlap, mode=blending, padding_mode="replicate")

    def __call__(self, inputs: torch.Tensor, network: CoarseMaskUNet, *args: object, **kwargs: object) -> torch.Tensor:
        """Foreground probability.

        Args:
            inputs: (B, 1, S, R, C) head on the model grid; or (B, 2, ...) with the coarse mask as it was made by a
                network that has not seen this case, which is then taken as it is.
            network: in evaluation mode.

        Returns:
            (B, 1, S, R, C) float32 in [0, 1].
        """
        given = _plain(inputs)
        if given.shape[1] == 1:
            given = torch.cat([given, network.coarse_mask(given)], dim=1)
        self.regions = given[:, 1:] > 0.5
        logits = self.window(given, network.fine_stage)
        return convert_to_dst_type(torch.softmax(logits.float(), dim=1)[:, 1:], inputs)[0]


class CoarseGridd(MapTransform):
    """A training case on the grid of the coarse stage.

    Args:
        keys: the image first, which `to_coarse_grid` takes there; the keys after it are masks.
        size: (slices, rows, columns).
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.size = tuple(size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize every (1, S, R, C) key; a mask is thresholded at one half."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key][None]
            if key == self.keys[0]:
                d[key] = to_coarse_grid(image, self.size)[0]
            else:
                resized = nn.functional.interpolate(image.float(), size=self.size, mode="trilinear")
                d[key] = (resized[0] >= 0.5).float()
        return d
