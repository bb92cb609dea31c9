"""nnU-Net's planning rules: from a fingerprint of the data to patch, topology and intensities of a 3D U-Net.

The rules are those of Isensee et al., Nat Methods 2021;18:203 and its supplement, for the configuration `3d_fullres`,
with the constants that nnunetv2 uses. tests/test_planning.py runs nnunetv2's own planner on the same data sets.
Everything is in the order slices, rows, columns.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.files import atomic_path
from ich_pipeline.manifest import read_manifest
from ich_pipeline.reading import read_mask, read_scan

Size = tuple[int, ...]

ANISOTROPIC = 3  # an axis this many times coarser than the others, with as many times fewer voxels, is special
COARSEST_PERCENTILE = 10  # what such an axis is resampled to; the other axes to the median
SMALLEST_EDGE = 4  # voxels of the deepest feature map along each axis
LARGEST_PATCH_VOXELS = 256**3  # where the search begins
FIRST_FILTERS, MOST_FILTERS = 32, 320
CONVOLUTIONS = 2  # a level, on each side
CLASSES = 2
# Feature-map values of a network whose training takes 8 GB at batch size 2.
REFERENCE_VALUES, REFERENCE_GB, SMALLEST_BATCH = 560_000_000, 8.0, 2
LARGEST_SHARE_IN_BATCH = 0.05  # of all voxels of the data set
LEAST_LEVELS = 3  # fewer are no U-Net for MONAI's DynUNet
PERCENTILES = (0.5, 99.5)  # of hemorrhage: what is darker or brighter is clipped


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What the plan is made from.

    Attributes:
        shapes: (N, 3) whole images, one row a case.
        spacings_mm: (N, 3); between slices along their normal.
        window_hu: PERCENTILES of the intensities in hemorrhage, every bleeding case counting the same.
        mean_hu: their mean.
        std_hu: their standard deviation.
    """

    shapes: NDArray[np.int64]
    spacings_mm: NDArray[np.float64]
    window_hu: tuple[float, float]
    mean_hu: float
    std_hu: float


@dataclass(frozen=True)
class Plan:
    """A network, and the data it is given; the names are those of the bundles' keys."""

    spacing_mm: tuple[float, ...]
    patch_size: Size
    batch_size: int
    filters: Size
    kernels: tuple[Size, ...]
    strides: tuple[Size, ...]
    supervised: int
    window_hu: tuple[float, float]
    mean_hu: float
    std_hu: float


def take_fingerprint(manifest: Path | str, on_case: Callable[[str], object] | None = None) -> Fingerprint:
    """Read the labelled cases of a manifest outside the split `test`.

    Args:
        manifest: with `image` and `label`.
        on_case: called with the id of each case that was read.

    Raises:
        ManifestError: it cannot be used, has no such case, or none of them bleeds.
        ReadError: a scan or label that cannot be read whole.
    """
    records = [r for r in read_manifest(manifest, require_label=True, check_grids=True) if r.split != "test"]
    if not records:
        raise ManifestError(f"{manifest}: no cases outside the split test; expected at least one to plan for.")
    shapes, spacings, values, weights = [], [], [], []
    for record in records:
        assert record.label is not None
        scan, (label, _) = (
            read_scan(record.image, record.case_id, record.series),
            read_mask(record.label, record.case_id),
        )
        grid = scan.grid
        shapes.append([grid.shape[axis] for axis in (grid.slice_axis, *grid.plane_axes)])
        spacings.append([grid.slice_spacing_mm, *(grid.edge_mm[axis] for axis in grid.plane_axes)])
        hu, counts = np.unique(scan.image_hu[label.values > 0], return_counts=True)
        values.append(hu)
        weights.append(counts / max(1, counts.sum()))
        if on_case:
            on_case(record.case_id)
    hu, weight = np.concatenate(values).astype(np.float64), np.concatenate(weights)
    if not len(hu):
        raise ManifestError(f"{manifest}: no hemorrhage in {len(records)} labels; expected some to plan for.")
    order = np.argsort(hu, kind="stable")
    hu, weight = hu[order], weight[order] / weight.sum()
    low, high = (float(hu[np.searchsorted(np.cumsum(weight), p / 100).clip(0, len(hu) - 1)]) for p in PERCENTILES)
    mean = float(hu @ weight)
    std = float(np.sqrt((hu - mean) ** 2 @ weight))
    if not (low < high and std > 0):
        raise ManifestError(f"{manifest}: all hemorrhage is {mean:g} HU; expected a spread. Are these scans in HU?")
    return Fingerprint(np.array(shapes), np.array(spacings), (low, high), mean, std)


def target_spacing_mm(shapes: NDArray[np.int64], spacings_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median spacing of each axis; of one much coarser axis a low percentile, so that few slices are made up."""
    target: NDArray[np.float64] = np.median(spacings_mm, axis=0)
    size = np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest_other = target[others].max()
    if target[worst] > ANISOTROPIC * coarsest_other and size[worst] * ANISOTROPIC < size[others].min():
        low = np.percentile(spacings_mm[:, worst], COARSEST_PERCENTILE)
        target[worst] = low if low >= coarsest_other else coarsest_other + 1e-5
    return target


def topology(spacing_mm: Sequence[float], patch_size: Sequence[float]) -> tuple[list[Size], list[Size], Size]:
    """Which axes each level halves and convolves, as long as there is something to halve.

    An axis is halved while its spacing is below twice the finest, and convolved from the level on where it is so.

    Returns:
        Kernels and strides of each level, and the patch rounded up to what the strides divide.
    """
    axes = range(len(spacing_mm))
    edge_mm, size, kernel = list(spacing_mm), list(patch_size), [1] * len(spacing_mm)
    kernels: list[Size] = []
    strides: list[Size] = [(1,) * len(spacing_mm)]
    while True:
        large = [axis for axis in axes if size[axis] >= 2 * SMALLEST_EDGE]
        halved = [axis for axis in large if edge_mm[axis] / min(edge_mm[a] for a in large) < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 3 * SMALLEST_EDGE):
            break
        kernel = [3 if k == 3 or edge_mm[axis] / min(edge_mm) < 2 else 1 for axis, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in axes))
        for axis in halved:
            edge_mm[axis], size[axis] = 2 * edge_mm[axis], -(-size[axis] // 2)
    kernels.append((3,) * len(spacing_mm))
    factors = np.prod(strides, axis=0)
    return kernels, strides, tuple(int(-(-n // f) * f) for n, f in zip(patch_size, factors, strict=True))


def _filters(levels: int) -> Size:
    return tuple(min(MOST_FILTERS, FIRST_FILTERS * 2**level) for level in range(levels))


def _values(patch_size: Size, strides: Sequence[Size]) -> int:
    """Values in the feature maps of all convolutions for one patch: what memory is estimated from."""
    filters, size, total = _filters(len(strides)), np.array(patch_size), CLASSES * int(np.prod(patch_size))
    for level, (features, stride) in enumerate(zip(filters, strides, strict=True)):
        size = size // stride
        # The way down; but for the deepest level the way up too, whose first step is the transposed convolution.
        maps = CONVOLUTIONS + (CONVOLUTIONS + 1 if level < len(strides) - 1 else 0)
        total += maps * features * int(np.prod(size))
    return total


def make_plan(fingerprint: Fingerprint, memory_gb: float = REFERENCE_GB) -> Plan:
    """The full-resolution 3D network for this data and this much memory of a GPU.

    Raises:
        ConfigError: no memory, or images so small that they cannot be halved twice.
    """
    if not memory_gb > 0:
        raise ConfigError(f"{memory_gb:g} GB: expected more than 0")
    spacing = target_spacing_mm(fingerprint.shapes, fingerprint.spacings_mm)
    resampled = np.rint(fingerprint.spacings_mm / spacing * fingerprint.shapes)
    # The coarsest axis is planned first: where axes are equal, their order decides.
    coarsest = int(np.argmax(spacing))
    order = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
    spacing_mm, shape = spacing[order], np.median(resampled, axis=0)[order]

    aspect = (1 / spacing_mm) * (LARGEST_PATCH_VOXELS * np.prod(spacing_mm)) ** (1 / 3)
    first = [min(round(float(a)), float(n)) for a, n in zip(aspect, shape, strict=True)]
    kernels, strides, patch = topology(spacing_mm.tolist(), first)
    if len(strides) < LEAST_LEVELS:
        size = np.median(fingerprint.shapes, axis=0).astype(int).tolist()
        raise ConfigError(
            f"images of {' x '.join(map(str, size))} voxels can be halved {len(strides) - 1} times, expected "
            f"{LEAST_LEVELS - 1} or more: they are too small for a U-Net."
        )
    allowed = REFERENCE_VALUES * memory_gb / REFERENCE_GB
    while _values(patch, strides) > allowed:
        axis = int(np.argsort(np.array(patch) / shape)[-1])
        smaller = list(patch)
        smaller[axis] -= int(np.prod(strides, axis=0)[axis])
        # A shorter axis may be halved less often: then a smaller step does.
        step = int(np.prod(topology(spacing_mm.tolist(), smaller)[1], axis=0)[axis])
        smaller[axis] = patch[axis] - step
        kernels, strides, patch = topology(spacing_mm.tolist(), smaller)
        if len(strides) < LEAST_LEVELS:
            raise ConfigError(f"{memory_gb:g} GB are too little for any network here. Give more with --memory-gb.")
    fits = round(allowed / _values(patch, strides) * SMALLEST_BATCH)
    share = round(float(np.prod(shape)) * len(resampled) * LARGEST_SHARE_IN_BATCH / float(np.prod(patch)))

    back = np.argsort(order)

    def turned(size: Size) -> Size:
        return tuple(int(size[axis]) for axis in back)

    return Plan(
        spacing_mm=tuple(spacing.tolist()),
        patch_size=turned(patch),
        batch_size=max(SMALLEST_BATCH, min(fits, share)),
        filters=_filters(len(strides)),
        kernels=tuple(map(turned, kernels)),
        strides=tuple(map(turned, strides)),
        supervised=len(strides) - LEAST_LEVELS,
        window_hu=fingerprint.window_hu,
        mean_hu=fingerprint.mean_hu,
        std_hu=fingerprint.std_hu,
    )


def write_plan(path: Path, plan: Plan, fingerprint: Fingerprint, memory_gb: float) -> None:
    """Write a plan as YAML that `variant=FILE` takes; what it was made from stands in comments."""
    size, spacing_mm = np.median(fingerprint.shapes, axis=0), np.median(fingerprint.spacings_mm, axis=0)
    halvings = np.log2(np.prod(plan.strides, axis=0)).astype(int)
    notes = [
        "nnU-Net's 3d_fullres for one data set, by `ich-pipeline plan`. Order: slices, rows, columns.",
        f"{len(fingerprint.shapes)} cases; median {' x '.join(f'{n:g}' for n in size)} voxels of "
        f"{' x '.join(f'{s:.3g}' for s in spacing_mm)} mm; {memory_gb:g} GB.",
        f"{len(plan.strides)} levels; halvings along the axes: {', '.join(map(str, halvings))}.",
    ]
    content = {
        "spacing_mm": [round(s, 6) for s in plan.spacing_mm],
        "patch_size": list(plan.patch_size),
        "batch_size": plan.batch_size,
        "filters": list(plan.filters),
        "kernels": [list(k) for k in plan.kernels],
        "strides": [list(s) for s in plan.strides],
        "supervised": plan.supervised,
        "window_hu": [round(h, 3) for h in plan.window_hu],
        "mean_hu": round(plan.mean_hu, 3),
        "std_hu": round(plan.std_hu, 3),
    }
    with atomic_path(path) as temporary:
        lines = [f"# {note}\n" for note in notes]
        lines += [f"{key}: {json.dumps(value)}\n" for key, value in content.items()]  # a line a key, as YAML reads it
        temporary.write_text("".join(lines))
