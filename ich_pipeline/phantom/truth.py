"""What is known of a phantom: the label of its voxels and the volumes of its blood."""

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.phantom.fields import Array


def label_of(blood: dict[str, Array], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Voxels at least half full of blood, with the subtype that has the most of it."""
    label = np.zeros(shape, np.uint8)
    most = np.zeros(shape, np.float32)
    total = np.zeros(shape, np.float32)
    for name, amount in blood.items():
        more = amount > most
        label[more] = Subtype[name]
        np.maximum(most, amount, out=most)
        total += amount
    label[total < 0.5] = 0
    return label


def volumes_of(blood: dict[str, Array], label: NDArray[np.uint8], edema: Array, grid: Grid) -> dict[str, object]:
    """Continuous volume by subtype in the field of view, and that of the label's voxels, in mL."""
    ml = grid.voxel_volume_mm3 / 1000
    continuous = {name: round(float(amount.sum(dtype=np.float64)) * ml, 5) for name, amount in sorted(blood.items())}
    counted = {s.name: round(int((label == s).sum()) * ml, 5) for s in Subtype if (label == s).any()}
    return {
        "volume_ml": continuous,
        "label_volume_ml": counted,
        "edema_ml": round(float(edema.sum(dtype=np.float64)) * ml, 5),
    }
