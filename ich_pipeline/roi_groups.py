"""Heights that part the bleeds of a data set into groups of equal size (Chang et al., JBHI 2023, section III-C)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import ManifestError
from ich_pipeline.files import atomic_path
from ich_pipeline.manifest import read_manifest


def region_heights(
    manifest: Path | str, spacing_mm: Sequence[float], on_case: Callable[[str], object] | None = None
) -> NDArray[np.float64]:
    """Heights of the boxes around every region of every slice, as training makes them, in pixels of the model grid.

    Args:
        manifest: cases outside the split `test` are read.
        spacing_mm: see `ModelGrid`.
        on_case: called with the id of each case that was read.

    Raises:
        ManifestError: it cannot be used, or holds no hemorrhage.
        ReadError: a label that cannot be read whole.
    """
    from ich_pipeline.networks.pesa_rcnn import region_targets
    from ich_pipeline.transforms import ModelGrid, ReadMaskd

    records = [r for r in read_manifest(manifest, require_label=True) if r.split != "test"]
    heights: list[float] = []
    for record in records:
        label = ReadMaskd("label")({"label": str(record.label)})["label"]
        slices = ModelGrid(spacing_mm)(label, mask=True).as_tensor().movedim(1, 0)
        heights += [float(y1 - y0) for each in region_targets(slices) for _, y0, _, y1 in each["boxes"].tolist()]
        if on_case:
            on_case(record.case_id)
    if not heights:
        raise ManifestError(f"{manifest}: no hemorrhage in {len(records)} labels; expected some to group by height.")
    return np.array(heights)


def equal_count_heights(heights: NDArray[np.float64], n_groups: int) -> list[float]:
    """Heights, falling, below which lie (n - 1) / n, ..., 1 / n of all.

    Raises:
        ManifestError: two of them are equal: too few bleeds, or too many of one height.
    """
    ordered = np.sort(heights)
    found = [float(ordered[len(ordered) * n // n_groups]) for n in range(n_groups - 1, 0, -1)]
    if len(set(found)) < len(found):
        raise ManifestError(
            f"{len(heights)} regions of {ordered[0]:g} to {ordered[-1]:g} pixels part at the heights {found}; expected "
            f"{n_groups - 1} different ones. Give more cases, or fewer groups (align_sizes=, mask_depths=)."
        )
    return found


def write_groups(
    path: Path, heights: NDArray[np.float64], group_heights: Sequence[float], spacing_mm: Sequence[float]
) -> None:
    """Write the heights as YAML that `variant=FILE` takes; what they were made from stands in a comment."""
    notes = (
        f"# By `ich-pipeline plan`: {len(heights)} regions of {heights.min():g} to {heights.max():g} pixels of "
        f"{spacing_mm[1]:g} mm; for training with the same spacing_mm, so the same preset.\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(f"{notes}group_heights: {json.dumps(list(group_heights))}\n")
