"""Heads, oracle networks and whole small bundles, for tests that need a network whose answer is known.

The oracle calls what has the HU of clotted blood, away from bone, hemorrhage: its masks are right without training.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scan_files import SHAPE, SPACING, centred, grid_points, head_hu
from torch import nn
from torch.nn import functional as F

from ich_pipeline.bundles import resource
from ich_pipeline.files import sha256_of
from ich_pipeline.geometry import Grid
from ich_pipeline.networks.cascade_unet import CascadeUNet
from ich_pipeline.training import OF_WEIGHTS, UNCALIBRATED

# After the brain window [-5, 85] HU, scaled to [0, 1]: tissue of scan_files.head_hu is 0.39 to 0.55, blood 0.78.
BLOOD = (0.66, 0.9)


class OracleStage(nn.Module):
    """Logits 10 and -10 by intensity, with a parameter so that there are weights to save; counts its calls."""

    def __init__(self, low: float = BLOOD[0], high: float = BLOOD[1], delay_s: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))
        self.low, self.high, self.delay_s = low, high, delay_s
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(image.shape))
        time.sleep(self.delay_s)
        near_bone = F.max_pool3d(image, (3, 5, 5), 1, (1, 2, 2)) > 0.97
        blood = (image > self.low) & (image < self.high) & ~near_bone
        logit = torch.where(blood, self.gain, -self.gain)
        return torch.cat([-logit, logit], dim=1)


class OracleCascade(CascadeUNet):
    """The cascade with oracles for stages; halving limits are those of five levels (4, 16, 16)."""

    def __init__(self, delay_s: float = 0.0, **settings: Any) -> None:
        super().__init__(filters=[2] * 5, **settings)
        self.coarse_stage, self.fine_stage = OracleStage(), OracleStage(delay_s=delay_s)


def oracle_bundle(folder: Path, delay_s: float = 0.0, **settings: Any) -> Path:
    """cascade3d with an oracle for a network and the window scaled to [0, 1]; weights and hash in place.

    A subprocess needs this folder of tests on PYTHONPATH.
    """
    shutil.copytree(resource("bundles") / "cascade3d", folder, ignore=shutil.ignore_patterns("models", "__pycache__"))
    file = folder / "configs" / "inference.yaml"
    config = yaml.safe_load(file.read_text())
    config["network_def"] = {"_target_": "heads.OracleCascade", "delay_s": delay_s, "coarse_scale": 1, "resize": False}
    (scale,) = (s for s in config["preprocessing"]["transforms"] if s["_target_"] == "ScaleIntensityRanged")
    scale["b_min"] = 0.0
    # The operating point and the flag of the weights that ship are not the oracle's.
    config |= UNCALIBRATED | {"spacing_mm": [11.0, 2.0, 2.0], "mode": "fast", "amp": "off"} | settings
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    metadata = folder / "configs" / "metadata.json"
    of_shipped = {"trained_on_phantoms", "trained_slice_mm", *OF_WEIGHTS}
    kept = {key: value for key, value in json.loads(metadata.read_text()).items() if key not in of_shipped}
    metadata.write_text(json.dumps(kept))
    save_weights(folder, OracleCascade(coarse_scale=1, resize=False))
    return folder


def save_weights(bundle: Path, network: nn.Module) -> Path:
    """Put a network's state into a bundle, and its hash into the metadata."""
    weights = bundle / "models" / "model.pt"
    weights.parent.mkdir(exist_ok=True)
    torch.save(network.state_dict(), weights)
    metadata = bundle / "configs" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"weights_sha256": sha256_of(weights)}))
    return weights


def bleeding_head(
    lesion_centre_mm: tuple[float, float, float] = (-25, 20, 8),
    lesion_radius_mm: float = 15.0,
    matrix: Any = SPACING,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """HU and label of a head with one spherical bleed of 65 HU; a radius of 0 gives a head without."""
    grid = Grid(shape, centred(matrix, shape))
    points = grid_points(grid)
    image_hu = head_hu(points)
    image_hu[image_hu == 65] = 30
    label = np.linalg.norm(points - np.array(lesion_centre_mm), axis=-1) < lesion_radius_mm
    image_hu[label] = 65
    return image_hu.astype(np.int16), label.astype(np.uint8), grid


def save_nifti(path: Path, values: NDArray[Any], grid: Grid) -> Path:
    image = nib.Nifti1Image(values, grid.affine)
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 0)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def write_heads(folder: Path, n: int, labels: Path | None = None) -> list[Path]:
    """`n` heads with a bleed that moves and grows from one to the next; every fourth has none."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(n):
        radius_mm = 0.0 if number % 4 == 3 else 11.0 + number
        image_hu, label, grid = bleeding_head((-25.0 + 6 * number, 15.0, 5.0), radius_mm)
        paths.append(save_nifti(folder / f"head{number}.nii.gz", image_hu, grid))
        if labels:
            labels.mkdir(exist_ok=True)
            save_nifti(labels / f"head{number}.nii.gz", label, grid)
    return paths
