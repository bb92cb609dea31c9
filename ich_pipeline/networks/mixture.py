"""Acute blood by a Gaussian mixture of the brain's Hounsfield units: no training, every head is fitted by itself.

After Kärkkäinen et al., "Unsupervised acute intracranial hemorrhage segmentation with mixture models" (ICHI 2021),
which Rajapakse et al. (IEEE Access 2024, table 1) list as EM: without skull and calcifications, healthy tissue and
blood follow different normal distributions, and expectation-maximisation parts them. Simpler than the paper, which fits
voxels one by one: one mixture for the whole head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cc3d
import numpy as np
import torch
from monai.inferers import SimpleInferer
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.mixture import GaussianMixture
from torch import nn

from ich_pipeline.errors import ReadError

AIR_HU, BONE_HU = -200, 150
# What lies between is brain, fluid or blood; above it is calcium.
SOFT_HU = (-10, 100)
# Gaps of the skull (sutures, thin temporal bone) that are closed, and necks of soft tissue that are cut.
GAP_MM, NECK_MM = 5.0, 3.0
# Voxels as near as this to bone or calcium are part bone.
RIM_MM = 1.0
# Where the classes start: fluid, white matter, grey matter, blood. EM moves them.
START_HU = (8.0, 28.0, 38.0, 65.0)
FITTED_VOXELS = 100_000
# Of a window's width: what is above is bone or calcium.
CLIPPED = 250 / 255
# In HU: less than the noise of any scan. Keeps a class of equal voxels from width 0.
LEAST_WIDTH_HU = 1.0
# Probabilities are looked up in a table this fine: exact ones took as long as the fit.
STEP_HU = 0.05


class BrainMixture(nn.Module):
    """Probability that a voxel inside the skull belongs to a class of the mixture that is as dense as blood.

    Args:
        spacing_mm: of the model grid: slices, rows, columns.
        blood_hu: a class whose mean reaches this is blood. A head without such a class has none.
        smoothing_mm: sigma of the Gaussian in plane that takes the noise off, inside the brain alone.
    """

    def __init__(self, spacing_mm: Sequence[float], blood_hu: float = 45.0, smoothing_mm: float = 1.0) -> None:
        super().__init__()
        self.pixel_mm = (float(spacing_mm[1]), float(spacing_mm[2]))
        self.blood_hu = blood_hu
        self.smoothing_mm = smoothing_mm

    def forward(self, image_hu: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, R, C) Hounsfield units in, probability of blood of the same shape out."""
        scores = [self._blood(image[0]) for image in image_hu.detach().cpu().float().numpy()]
        return image_hu * 0 + torch.as_tensor(np.stack(scores)[:, None], device=image_hu.device)

    def _blood(self, image_hu: NDArray[np.float32]) -> NDArray[np.float32]:
        score = np.zeros(image_hu.shape, np.float32)
        brain = brain_mask(image_hu, self.pixel_mm)
        if np.count_nonzero(brain) < len(START_HU):
            return score
        smooth_hu = smooth_inside(image_hu, brain, [self.smoothing_mm / edge for edge in self.pixel_mm])[brain]
        score[brain] = blood_probability(smooth_hu, self.blood_hu)
        return score


class MixtureInferer(SimpleInferer):
    """Runs the mixture, and tells a head without blood from one in which no brain was found.

    Args:
        spacing_mm: of the model grid: slices, rows, columns.
    """

    def __init__(self, spacing_mm: Sequence[float]) -> None:
        super().__init__()
        self.pixel_mm = (float(spacing_mm[1]), float(spacing_mm[2]))

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(B, 1, S, R, C) Hounsfield units in, what the network gives out.

        Raises:
            ReadError: no brain inside a closed skull.
        """
        scores = network(inputs, *args, **kwargs)
        for image_hu, score in zip(inputs, scores, strict=True):
            if not score.any() and not brain_mask(image_hu[0].cpu().numpy(), self.pixel_mm).any():
                raise ReadError(
                    "found no brain inside a ring of bone, expected some in one slice at least. Segment a skull that "
                    "is open all the way, or no head at all, by another bundle."
                )
        return scores


class CropMixture(nn.Module):
    """The mixture fitted to one crop of one slice, as a second stage (Rajapakse et al., section II-A).

    The window's ends are left out: air below, and above CLIPPED bone and calcium, which the paper takes out at 250 of
    255 grey values. There is nothing to train.

    Args:
        window_hu: what 0 and 1 of a crop stand for.
        blood_hu: see `BrainMixture`.
    """

    torch_only = True  # scikit-learn fits it

    def __init__(self, window_hu: Sequence[float], blood_hu: float = 45.0) -> None:
        super().__init__()
        self.low_hu, self.high_hu = float(window_hu[0]), float(window_hu[1])
        self.blood_hu = blood_hu

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) crops in [0, 1] to (N, 2, H, W) logits."""
        scores = [self._blood(crop[0]) for crop in crops.detach().cpu().float().numpy()]
        blood = torch.as_tensor(np.stack(scores), device=crops.device)[:, None]
        return torch.logit(torch.cat([1 - blood, blood], dim=1), eps=1e-6) / 2

    def _blood(self, crop: NDArray[np.float32]) -> NDArray[np.float32]:
        score = np.zeros(crop.shape, np.float32)
        soft = (crop > 0) & (crop <= CLIPPED)
        if np.count_nonzero(soft) >= len(START_HU):
            values_hu = self.low_hu + crop[soft] * (self.high_hu - self.low_hu)
            score[soft] = blood_probability(values_hu, self.blood_hu)
        return score


def brain_mask(image_hu: NDArray[Any], pixel_mm: Sequence[float]) -> NDArray[np.bool_]:
    """What the skull encloses, without bone, calcium and their rims.

    Slices in which bone and the edge of the image close no ring (the vertex, the neck) hold nothing.

    Args:
        image_hu: (S, R, C) Hounsfield units.
        pixel_mm: edges of a pixel: rows, columns.

    Returns:
        (S, R, C); the largest piece alone, all False where there is no skull.
    """
    ring_of = image_hu > BONE_HU
    # A head that reaches beyond the field of view ends there.
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        ring_of[edge] |= image_hu[edge] > AIR_HU
    inside = np.zeros_like(ring_of)
    for n, ring in enumerate(ring_of):
        inside[n] = ndimage.binary_fill_holes(_near(_near(ring, GAP_MM, pixel_mm), -GAP_MM, pixel_mm) | ring)
    soft = inside & (image_hu > SOFT_HU[0]) & (image_hu < SOFT_HU[1])
    dense = image_hu >= SOFT_HU[1]
    soft &= ~np.stack([_near(plane, RIM_MM, pixel_mm) for plane in dense])
    core = np.stack([_near(plane, -NECK_MM, pixel_mm) for plane in soft])
    if not core.any():
        return core
    core = cc3d.largest_k(core, k=1, connectivity=6) > 0
    return soft & np.stack([_near(plane, NECK_MM, pixel_mm) for plane in core])


def _near(plane: NDArray[np.bool_], distance_mm: float, pixel_mm: Sequence[float]) -> NDArray[np.bool_]:
    """A mask grown by a distance in plane, or with a negative one shrunk by it."""
    if distance_mm < 0:
        return ~_near(~plane, -distance_mm, pixel_mm)
    if not plane.any():
        return plane
    return ndimage.distance_transform_edt(~plane, sampling=pixel_mm) <= distance_mm


def smooth_inside(image_hu: NDArray[Any], mask: NDArray[np.bool_], sigma_px: Sequence[float]) -> NDArray[np.float32]:
    """Gaussian mean in plane over the voxels of a mask alone, so that no bone leaks in; 0 outside."""
    sigma = (0.0, *sigma_px)
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma)
    total = ndimage.gaussian_filter(np.where(mask, image_hu, 0).astype(np.float32), sigma)
    return np.where(mask, total / np.maximum(weight, 1e-6), 0).astype(np.float32)


def blood_probability(values_hu: NDArray[np.float32], blood_hu: float) -> NDArray[np.float32]:
    """Probability of each value to come from a class with a mean of at least `blood_hu`, by expectation-maximisation.

    Args:
        values_hu: (n,) of a brain without bone and calcium; at least four.
        blood_hu: see `BrainMixture`.

    Returns:
        (n,), 0 for all when no class is as dense. 0 below the densest class that is not blood as well: a wide class of
        blood would otherwise take in what is less dense than any tissue.
    """
    every = max(1, len(values_hu) // FITTED_VOXELS)
    mixture = GaussianMixture(
        n_components=len(START_HU),
        means_init=np.array(START_HU)[:, None],
        weights_init=np.full(len(START_HU), 1 / len(START_HU)),
        precisions_init=np.full((len(START_HU), 1, 1), 1 / 36),
        reg_covar=LEAST_WIDTH_HU**2,
        tol=1e-4,
        max_iter=200,
        random_state=0,
    ).fit(values_hu[::every, None])
    means = mixture.means_[:, 0]
    blood = means >= blood_hu
    if not blood.any():
        return np.zeros_like(values_hu)
    table_hu = np.arange(values_hu.min(), values_hu.max() + STEP_HU, STEP_HU)
    table = mixture.predict_proba(table_hu[:, None])[:, blood].sum(axis=1)
    table[table_hu <= means[~blood].max(initial=-np.inf)] = 0
    return np.interp(values_hu, table_hu, table).astype(np.float32)
