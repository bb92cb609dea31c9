"""Coarse-to-fine inference: stage one finds regions, stage two looks at them (Xu et al., section 4.1)."""

from collections.abc import Callable, Sequence
from itertools import combinations

import cc3d
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer, sliding_window_inference
from monai.utils import convert_to_dst_type
from torch import nn
from torch.nn import functional as F

from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.cascade_unet import CascadeUNet, Window, window_around

MODES = ("fast", "full")
# A stage of the published size holds seven tensors of 32 channels at once: 0.88 kB a voxel in float32, 4.1 GiB here.
LARGEST_WINDOW_VOXELS = 5_000_000
SLAB_OVERLAP = 8  # slices: an image of the size that calls for slabs is an image of many slices


class CascadeInferer(Inferer):
    """Both stages over one head.

    `mode="fast"`: stage one takes the whole head in one window, stage two one window a region. `mode="full"`: the
    published sliding window for both stages over everything (with a network that resizes, stage two still takes the
    region only, as published). When stage one finds nothing, stage two looks at the whole head.

    Args:
        roi_size: sliding window in (slices, rows, columns); published 16 x 320 x 320.
        overlap: share of a window that the next one covers again; published one half.
        blending: `gaussian` or `constant` (published: plain average) weights where windows overlap.
        mode: `fast` or `full`.
        coarse_threshold: probability above which stage one's voxel belongs to a region.
        mirror_axes: spatial axes of test-time mirroring (2 is left-right); every combination is averaged.
        sw_batch_size: windows in one forward pass.

    Attributes:
        regions: (B, 1, S, R, C) bool of the last call: what stage one found, before any mirroring.
    """

    def __init__(
        self,
        roi_size: Sequence[int] = (16, 320, 320),
        overlap: float = 0.5,
        blending: str = "constant",
        mode: str = "full",
        coarse_threshold: float = 0.5,
        mirror_axes: Sequence[int] = (),
        sw_batch_size: int = 1,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        self.regions: torch.Tensor | None = None
        self.mode = mode
        self.coarse_threshold = coarse_threshold
        self.mirror_axes = tuple(mirror_axes)
        self.window = SlidingWindowInferer(
            roi_size=roi_size, overlap=overlap, mode=blending, sw_batch_size=sw_batch_size
        )

    def __call__(self, inputs: torch.Tensor, network: CascadeUNet, *args: object, **kwargs: object) -> torch.Tensor:
        """Foreground probability.

        Args:
            inputs: (B, 1, S, R, C) on the model grid, any size.
            network: in evaluation mode.

        Returns:
            (B, 1, S, R, C) float32 in [0, 1]; exactly 0 where stage two did not look.
        """
        # MetaTensor bookkeeping costs more than some of the steps below.
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        flips = [c for n in range(len(self.mirror_axes) + 1) for c in combinations(self.mirror_axes, n)]
        total = torch.zeros_like(image)
        self.regions = torch.zeros_like(image, dtype=torch.bool)
        for axes in flips:
            dims = [axis + 2 for axis in axes]
            for item in range(image.shape[0]):
                score, region = self._one_head(image[item : item + 1].flip(dims), network)
                total[item : item + 1] += score.flip(dims)
                if not axes:
                    self.regions[item, 0] = region
        return convert_to_dst_type(total / len(flips), inputs)[0]

    def look_in(self, inputs: torch.Tensor, network: CascadeUNet, box: Window) -> torch.Tensor:
        """Stage two in a box that a user drew, whatever stage one says of it; not mirrored.

        Args:
            inputs: (1, 1, S, R, C) on the model grid, any size.
            network: in evaluation mode.
            box: voxels of `inputs`.

        Returns:
            (1, 1, S, R, C) float32 in [0, 1]; 0 outside the window that stage two takes to see all of the box.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        shape = image.shape[2:]
        image = _pad(image, network)
        low, high = [s.start for s in box], [s.stop for s in box]
        window = window_around(low, high, image.shape[2:], network.margin, network.divisible)
        score = torch.zeros_like(image)
        score[(..., *window)] = _foreground(self._look(image, window, network))
        return convert_to_dst_type(score[..., : shape[0], : shape[1], : shape[2]], inputs)[0]

    def coarse_probability(self, image: torch.Tensor, network: CascadeUNet) -> torch.Tensor:
        """Stage one's foreground probability of a padded head, on the model grid."""
        reduced = network.reduce(image)
        logits = self._slide(reduced, network.coarse_stage) if self.mode == "full" else network.coarse_stage(reduced)
        return network.enlarge(_foreground(logits))

    def _one_head(self, image: torch.Tensor, network: CascadeUNet) -> tuple[torch.Tensor, torch.Tensor]:
        """Score, and what stage one found."""
        shape = image.shape[2:]
        image = _pad(image, network)
        region = self.coarse_probability(image, network)[0, 0] > self.coarse_threshold
        score = torch.zeros_like(image)
        if self.mode == "full" and not network.resize:
            score = _foreground(self._slide(image, network.fine_stage))
        else:
            for window in find_windows(region.cpu().numpy(), network):
                score[(..., *window)] = _foreground(self._look(image, window, network))
        return score[..., : shape[0], : shape[1], : shape[2]], region[: shape[0], : shape[1], : shape[2]]

    def _look(self, image: torch.Tensor, window: Window, network: CascadeUNet) -> torch.Tensor:
        """Stage two's logits in one window, in slabs of slices where all of it would take too much memory."""
        crop = image[(..., *window)]
        slabs = -(-crop.numel() // LARGEST_WINDOW_VOXELS)
        if network.resize or slabs == 1:
            return network.fine_in(image, window)
        slices = -(-(-(-crop.shape[2] // slabs) + SLAB_OVERLAP) // network.divisible[0]) * network.divisible[0]
        slab = (min(slices, crop.shape[2]), *crop.shape[3:])
        return sliding_window_inference(crop, slab, 1, network.fine_stage, SLAB_OVERLAP / slab[0], mode="gaussian")

    def _slide(self, image: torch.Tensor, stage: nn.Module) -> torch.Tensor:
        # Air up to one whole window: MONAI would pad with 0, which after normalisation is tissue.
        shape = image.shape[2:]
        image = _pad_to(image, [max(n, size) for n, size in zip(shape, self.window.roi_size, strict=True)])
        return self.window(image, skip_air(stage, image))[..., : shape[0], : shape[1], : shape[2]]


def _foreground(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits.float(), dim=1)[:, 1:]


def _pad(image: torch.Tensor, network: CascadeUNet) -> torch.Tensor:
    """Pad the far ends with air so that both stages can halve it."""
    multiples = [d * s for d, s in zip(network.divisible, (1, network.coarse_scale, network.coarse_scale), strict=True)]
    return _pad_to(image, [-(-n // m) * m for n, m in zip(image.shape[2:], multiples, strict=True)])


def _pad_to(image: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Pad the far ends with air, the image's minimum."""
    padding = [p for n, size in zip(image.shape[:1:-1], shape[::-1], strict=True) for p in (0, size - n)]
    return F.pad(image, padding, value=float(image.min())) if any(padding) else image


def find_windows(region: np.ndarray, network: CascadeUNet) -> list[Window]:
    """Windows for stage two: one a 26-connected region, enlarged; those that overlap become one.

    Args:
        region: bool (S, R, C), what stage one found on the model grid.
        network: says margin and what window sizes it can halve.

    Returns:
        Windows that do not overlap; the whole image when the region is empty.
    """
    if not region.any():
        return [(slice(0, region.shape[0]), slice(0, region.shape[1]), slice(0, region.shape[2]))]
    boxes = cc3d.statistics(cc3d.connected_components(region, connectivity=26))["bounding_boxes"][1:]
    windows = [
        window_around([s.start for s in b], [s.stop for s in b], region.shape, network.margin, network.divisible)
        for b in boxes
    ]
    merged: list[Window] = []
    while windows:
        window = windows.pop()
        touching = next((other for other in merged if _overlap(window, other)), None)
        if touching is None:
            merged.append(window)
            continue
        merged.remove(touching)
        low = [min(a.start, b.start) for a, b in zip(window, touching, strict=True)]
        high = [max(a.stop, b.stop) for a, b in zip(window, touching, strict=True)]
        windows.append(window_around(low, high, region.shape, (0, 0, 0), network.divisible))
    return merged


def _overlap(one: Window, other: Window) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def skip_air(stage: nn.Module, image: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Predictor for MONAI's sliding window that runs the stage only on windows with soft tissue in them.

    After the brain window air and bone lie at the image's two ends, so what lies strictly between is soft tissue. A
    window without any is certain background (logits 10 and -10).
    """
    low, high = image.min(), image.max()

    def predict(windows: torch.Tensor) -> torch.Tensor:
        keep = ((windows > low) & (windows < high)).flatten(1).any(dim=1)
        logits = torch.full((windows.shape[0], 2, *windows.shape[2:]), -10.0, device=windows.device)
        logits[:, 0] = 10.0
        if keep.any():
            logits[keep] = stage(windows[keep]).float()
        return logits

    return predict
