"""A tiny data set to train on: made-up heads on a coarse grid, each with one bleed of known place and size."""

from pathlib import Path

import nibabel as nib
import numpy as np
from scan_files import SHAPE, SPACING, centred, grid_points

from ich_pipeline.geometry import Grid
from ich_pipeline.manifest import write_manifest
from ich_pipeline.records import CaseRecord

# A network of a few thousand weights on patches of a few thousand voxels: an epoch takes a fraction of a second.
TINY = (
    *("filters=[4,4,4,4]", "coarse_scale=1", "spacing_mm=[11.0,4.5,4.0]", "patch_size=[8,32,32]"),
    *("fine_size=[4,16,16]", "margin=[1,2,2]", "roi_size=[8,32,32]", "batch_size=2", "iterations=4", "workers=0"),
    *("restart_epochs=3", "learning_rate=0.01", "amp=off", "device=cpu", "preset=null"),
)


def write_cases(folder: Path, splits: str = "train train train train val val test") -> Path:
    """Write a case for each word of `splits`, and the manifest; returns its path. The second case is clean."""
    folder.mkdir(parents=True, exist_ok=True)
    random_state = np.random.default_rng(0)
    affine = centred(SPACING, SHAPE)
    points = grid_points(Grid(SHAPE, affine))
    radius = np.linalg.norm(points / (70, 88, 75), axis=-1)
    records = []
    for n, split in enumerate(splits.split()):
        centre_mm, radius_mm = random_state.uniform(-30, 30, 3), random_state.uniform(14, 24)
        bleed = (np.linalg.norm(points - centre_mm, axis=-1) < radius_mm) & (n != 1)
        image_hu = np.select([bleed, radius < 0.9, radius < 1], [65.0, 30.0, 950.0], default=-1000.0)
        image_hu += random_state.normal(0, 3, SHAPE)
        paths = {}
        for name, values in (("image", image_hu.astype(np.int16)), ("label", bleed.astype(np.uint8))):
            paths[name] = folder / f"{name}-{n}.nii.gz"
            image = nib.Nifti1Image(values, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, paths[name])
        records.append(CaseRecord(f"case-{n}", patient_id=f"patient-{n}", split=split, **paths))
    write_manifest(folder / "cases.csv", records)
    return folder / "cases.csv"
