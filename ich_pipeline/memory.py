"""What a case may take of this machine."""

from collections.abc import Sequence

import numpy as np

from ich_pipeline.errors import ReadError

# From the file to its mask, with the largest bundle: docs/speed.md has 512 x 512 x 400.
BYTES_PER_VOXEL = 48


def check_memory(case_id: str, shape: Sequence[int]) -> None:
    """Refuse a scan that this machine cannot take now: the kernel would end the whole batch, not the case.

    Raises:
        ReadError: the scan needs more than what is free.
    """
    import psutil  # a light command never comes here

    needed, free = BYTES_PER_VOXEL * float(np.prod(shape, dtype=float)), psutil.virtual_memory().available
    if needed > free:
        raise ReadError(
            f"{case_id}: {tuple(shape)} voxels need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            "free. Crop the scan to the head, give thicker slices, or use a machine with more memory."
        )
