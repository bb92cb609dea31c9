"""MONAI transforms for head CT that MONAI lacks: reading, the way to the model grid and back,
and writing.

The model grid keeps the scan's own axis directions (permuted and flipped to `axcodes`), so gantry tilt stays shear
there and resampling is separable: three small matrices, one an axis. Thick slices are never interpolated: whole
numbers of thin slices are averaged. Going back is linear interpolation of a score, to be thresholded afterwards on
the native grid (labels carried back by nearest neighbour read a 1 mL lesion 11 % high).
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cc3d
import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageWriter, MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import TraceKeys
from numpy.typing import NDArray
from torch.nn import functional as F

from ich_pipeline.errors import ConfigError, GeometryError
from ich_pipeline.geometry import Affine, Grid, require_same_grid
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord, NativeMask, NiftiForms, Scan, SeriesInfo
from ich_pipeline.restoring import write_mask

Box = tuple[tuple[int, int], ...]  # (start, stop) for each array axis, in voxels

BONE_HU = 200
# The box is looked for on every fourth voxel in plane (about 2 mm): the skull is thicker than that almost everywhere,
# and the margin covers what is missed.
BOX_STRIDE = 4
BOX_MARGIN_MM = 8.0
# A largest piece of bone smaller than this is not a skull (a fragment, a calibration rod): the whole image is kept.
SMALLEST_SKULL_MM = 90.0
# More than float32 rounds off, less than one sample of any group.
TIE = 1e-3
# Nor is one that does not hold most of what is neither air nor bone: a thick table beside the head.
TISSUE_HU = (0, 80)
LEAST_TISSUE_SHARE = 0.5


class ReadScand(MapTransform):
    """Read scans with `reading.read_scan`: a path becomes a (1, I, J, K) MetaTensor in HU on the native grid.

    An item `series` beside the image names the DICOM series to read.

    Instead of `LoadImaged`, which turns a reader's refusal into text about readers. The metadata carries the affine in
    float64 and the NIfTI forms, so that `NativeMaskWriter` writes a mask with exactly the header of its scan.

    Raises:
        ReadError: not a head CT in HU that can be read whole.
        GeometryError: its grid is broken or implausible.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the scan of every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = tensor_of(read_scan(d[key], series=d.get("series")), str(d[key]))
        return d


class ReadMaskd(MapTransform):
    """Read label files with `reading.read_mask`: a path becomes a (1, I, J, K) uint8 MetaTensor on its own grid.

    Raises:
        ReadError: not a file of whole numbers that can be read whole.
        GeometryError: its grid is broken or implausible.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the label of every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            mask, forms = read_mask(d[key])
            d[key] = mask_tensor_of(mask, forms, str(d[key]))
        return d


def tensor_of(scan: Scan, name: str) -> MetaTensor:
    """A scan as `ReadScand` gives it; `scan_of` is the way back. `name` is its file, or what errors call it."""
    meta = _metadata(scan.grid, scan.forms) | {
        "filename_or_obj": name,
        "flags": ";".join(scan.flags),
        "series": json.dumps(scan.series and asdict(scan.series)),
    }
    return _tensor(scan.image_hu, meta)


def mask_tensor_of(mask: NativeMask, forms: NiftiForms, name: str) -> MetaTensor:
    """A mask as `ReadMaskd` gives it."""
    return _tensor(mask.values, _metadata(mask.grid, forms) | {"filename_or_obj": name})


def _tensor(values: NDArray[np.generic], meta: dict[str, Any]) -> MetaTensor:
    # An array over the file's own bytes is read-only, which PyTorch does not have.
    writable = values if values.flags.writeable else values.copy()
    image = MetaTensor(torch.from_numpy(writable)[None], meta=meta)
    image.affine = torch.as_tensor(meta["original_affine"])
    return image


def _metadata(grid: Grid, forms: NiftiForms) -> dict[str, Any]:
    return {
        "original_affine": grid.affine.copy(),
        "spatial_shape": np.array(grid.shape),
        "space": "RAS",
        # As text: DataLoader collates and decollates strings unchanged, and JSON keeps every bit of a float.
        "forms": json.dumps(asdict(forms), default=lambda array: array.tolist()),
        "slice_positions": "" if grid.slice_positions is None else json.dumps(grid.slice_positions.tolist()),
    }


def _grid_of(shape: Sequence[int], affine: Any, meta: Mapping[str, Any]) -> Grid:
    """A grid of native slices, which lie as the metadata of `ReadScand` or `ReadMaskd` says."""
    positions = meta.get("slice_positions")
    i, j, k = (int(n) for n in shape)
    return Grid((i, j, k), np.asarray(affine, dtype=np.float64), np.array(json.loads(positions)) if positions else None)


def native_grid(image: MetaTensor) -> Grid:
    """Grid of the scan or mask that `ReadScand` or `ReadMaskd` read, wherever the image has been taken since."""
    return _grid_of(image.meta["spatial_shape"], image.meta["original_affine"], image.meta)


def _forms_from(text: str) -> NiftiForms:
    values = json.loads(text)
    arrays = {key: np.array(values[key]) for key in ("sform", "qform") if values[key] is not None}
    tuples = {key: tuple(values[key]) for key in ("pixdim", "qform_fields") if values[key] is not None}
    return NiftiForms(**{**values, **arrays, **tuples})


def scan_of(image: MetaTensor, case: CaseRecord) -> Scan:
    """The scan behind what `ReadScand` gave: its memory is shared."""
    meta, series = image.meta, json.loads(image.meta["series"])
    return Scan(
        case_id=case.case_id,
        image_hu=image.as_tensor()[0].numpy(),
        grid=_grid_of(image.shape[1:], meta["original_affine"], meta),
        forms=_forms_from(meta["forms"]),
        source=case.image,
        series=SeriesInfo(**series) if series else None,
        flags=tuple(flag for flag in meta["flags"].split(";") if flag),
    )


class NativeMaskWriter(ImageWriter):
    """`restoring.write_mask` as a writer for MONAI's `SaveImaged`: nothing is resampled, the header is the scan's.

    Works on masks of scans that `ReadScand` read and `Invertd` brought back.
    """

    def __init__(self, output_dtype: Any = np.uint8, scale: Any = None, **kwargs: Any) -> None:
        super().__init__(output_dtype=np.uint8, affine=None, channel_dim=None)

    def set_data_array(self, data_array: Any, channel_dim: Any = 0, **kwargs: Any) -> None:
        """Take a (1, I, J, K) or (I, J, K) mask.

        Raises:
            GeometryError: more than one channel.
            ValueError: not whole numbers from 0 to 255: a score whose fraction would be cut off.
        """
        values = np.asarray(data_array)
        if values.ndim == 4 and values.shape[0] != 1:
            raise GeometryError(f"mask with {values.shape[0]} channels, expected one. Take the foreground first.")
        mask = values.astype(np.uint8, copy=False)
        if mask is not values and not np.array_equal(mask, values):
            raise ValueError(
                f"mask values from {values.min():g} to {values.max():g}, expected whole numbers from 0 to 255. "
                "Threshold scores before saving them as a mask."
            )
        self.data_obj = mask[0] if mask.ndim == 4 else mask

    def set_metadata(self, meta_dict: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the metadata that `ReadScand` gave, with the affine as the inverted transforms left it.

        Raises:
            GeometryError: the mask has not come back to its scan's grid.
        """
        if meta_dict is None or "forms" not in meta_dict:
            raise GeometryError("mask without its scan's header: read scans with ich_pipeline.transforms.ReadScand")
        name = str(meta_dict.get("filename_or_obj", "scan"))
        native = _grid_of(meta_dict["spatial_shape"], meta_dict["original_affine"], meta_dict)
        found = _grid_of(self.data_obj.shape, meta_dict["affine"], meta_dict)
        require_same_grid(name, "mask", found, native)
        self.grid, self.forms = native, _forms_from(meta_dict["forms"])

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, whole or not at all."""
        write_mask(Path(filename), self.data_obj, self.grid, self.forms)


def head_box(image_hu: NDArray[Any], grid: Grid) -> Box:
    """Box around the largest piece of bone: the skull, without table, headrest and air.

    Args:
        image_hu: (I, J, K) Hounsfield units.
        grid: its grid.

    Returns:
        (start, stop) for each axis in voxels; the whole image where no piece of bone is as large as a skull and around
        most of the soft tissue.
    """
    whole: Box = tuple((0, n) for n in image_hu.shape)
    steps = [max(1, round(BOX_STRIDE * 0.5 / edge)) for edge in grid.edge_mm]
    coarse_hu = image_hu[tuple(slice(None, None, s) for s in steps)]
    bone = coarse_hu > BONE_HU
    if not bone.any():
        return whole
    pieces = cc3d.connected_components(np.asfortranarray(bone), connectivity=26)
    statistics = cc3d.statistics(pieces)
    largest = int(np.argmax(statistics["voxel_counts"][1:])) + 1
    skull = list(statistics["bounding_boxes"][largest])
    # Thick slices part the skull at the vertex: every slice with bone above or below its largest piece belongs to it.
    skull[grid.slice_axis] = slice(None)
    slices = np.flatnonzero(bone[tuple(skull)].any(axis=tuple({0, 1, 2} - {grid.slice_axis})))
    skull[grid.slice_axis] = slice(int(slices[0]), int(slices[-1]) + 1)
    box = []
    for axis, piece in enumerate(skull):
        margin = int(np.ceil(BOX_MARGIN_MM / grid.edge_mm[axis]))
        start, stop = piece.start * steps[axis] - margin, piece.stop * steps[axis] + margin
        box.append((max(0, start), min(image_hu.shape[axis], stop)))
    in_plane_mm = [
        (b - a) * e for axis, ((a, b), e) in enumerate(zip(box, grid.edge_mm, strict=True)) if axis != grid.slice_axis
    ]
    tissue = (coarse_hu > TISSUE_HU[0]) & (coarse_hu < TISSUE_HU[1])
    held = tissue[tuple(slice(-(-a // s), -(-b // s)) for (a, b), s in zip(box, steps, strict=True))]
    is_head = min(in_plane_mm) >= SMALLEST_SKULL_MM and held.sum() >= LEAST_TISSUE_SHARE * tissue.sum()
    return tuple(box) if is_head else whole


def interpolation_matrix(n_in: int, at: NDArray[np.float64], step: float) -> NDArray[np.float32]:
    """Weights of linear interpolation along one axis, with the triangle widened when it steps over samples.

    Args:
        n_in: samples given.
        at: (n_out,) input coordinates of the samples wanted (0 is the first given sample's centre).
        step: input samples from output to output.

    Returns:
        (n_out, n_in) weights; each row adds up to 1 (positions outside take the nearest sample).
    """
    at = np.clip(at, 0, n_in - 1)[:, None]
    weights = np.clip(1 - np.abs(at - np.arange(n_in)[None, :]) / max(1.0, step), 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def averaging_matrix(n_in: int, group: int, *, tie: bool = False) -> NDArray[np.float32]:
    """Weights that average whole groups of neighbouring samples; a last, shorter group averages what it has.

    Args:
        n_in: samples given.
        group: samples in a group.
        tie: the samples are 0 or 1 and will be cut at one half: let the first samples weigh a trace more. Of groups
            that are half full, those at one end of a bleed count then and those at the other do not; if all counted,
            2.5 mm slices in pairs would make a label of 30 mL 6 % larger.
    """
    weights = np.zeros((-(-n_in // group), n_in), dtype=np.float32)
    for row, first in enumerate(range(0, n_in, group)):
        n = len(weights[row, first : first + group])
        weights[row, first : first + group] = (1 + (TIE * np.linspace(1, -1, n) if tie and n > 1 else 0)) / n
    return weights


def apply_along_axes(image: torch.Tensor, matrices: Sequence[NDArray[np.float32] | None]) -> torch.Tensor:
    """Multiply each spatial axis of a (C, ...) tensor by its matrix; None leaves an axis as it is.

    The axis that shrinks most goes first: it makes the others cheap.
    """
    wanted = [(axis, matrix) for axis, matrix in enumerate(matrices) if matrix is not None]
    for axis, matrix in sorted(wanted, key=lambda item: item[1].shape[0] / item[1].shape[1]):
        before, after = image.shape[: axis + 1], image.shape[axis + 2 :]
        weights = torch.as_tensor(matrix, device=image.device)
        if after:
            product = torch.matmul(weights, image.reshape(-1, image.shape[axis + 1], after.numel()))
        else:
            product = torch.matmul(image, weights.T)
        image = product.reshape(*before, matrix.shape[0], *after)
    return image


def interpolate_in_plane(image: torch.Tensor, size: Sequence[int], slice_axis: int) -> torch.Tensor:
    """Resample two axes of a (C, ...) tensor linearly, ends fixed: output o lies at input (o + 1/2) n / size - 1/2.

    The triangle is widened when it steps over samples, as in `interpolation_matrix`, at a fourteenth of the time.

    Args:
        image: with three spatial axes.
        size: wanted length of each; that of the slice axis is as it is.
        slice_axis: the third axis.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    planes = image.movedim(slice_axis + 1, 1)
    in_plane = [n for axis, n in enumerate(size) if axis != slice_axis]
    return F.interpolate(planes, size=in_plane, mode="bilinear", antialias=True).movedim(1, slice_axis + 1)


class ModelGrid(InvertibleTransform):
    """From the native grid to the model grid: crop to the head, turn, average slices, resample in plane.

    Args:
        spacing_mm: wanted slice, row and column spacing in the order of `axcodes`. In plane it is reached to
            within half a pixel over the image. Across slices round(wanted / native) slices are averaged, so slices
            thicker than that stay as they are.
        axcodes: directions of the model grid's axes; the default gives (slices, rows, columns) as radiologists look.

    The inverse takes any (C, ...) score on the model grid back to the whole native grid by linear interpolation; what
    lies outside the crop is 0.
    """

    def __init__(self, spacing_mm: Sequence[float], axcodes: str = "SPL") -> None:
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.axcodes = axcodes

    def __call__(self, image: MetaTensor, box: Box | None = None, mask: bool = False) -> MetaTensor:
        """Take one (1, I, J, K) image to the model grid.

        Args:
            image: native image; its affine says where it lies.
            box: native voxels to keep; None keeps all.
            mask: threshold the interpolated mask (non-zero is 1) at one half.
        """
        affine = np.asarray(image.affine, dtype=np.float64)
        native_shape = tuple(image.shape[1:])
        box = box or tuple((0, n) for n in native_shape)
        axes, flips = _orientation(affine, self.axcodes)
        crop = image.as_tensor()[(slice(None), *[slice(a, b) for a, b in box])]
        crop = crop.permute(0, *[a + 1 for a in axes])
        crop = crop.flip([a + 1 for a, flip in enumerate(flips) if flip])
        crop = (crop > 0).float() if mask else crop.float()
        grid = Grid(native_shape, affine)
        averaging: list[NDArray[np.float32] | None] = [None] * 3
        axis_maps = [(0.0, 1.0)] * 3
        size = list(crop.shape[1:])
        for axis, native_axis in enumerate(axes):
            n = crop.shape[axis + 1]
            if native_axis == grid.slice_axis:
                group = max(1, round(self.spacing_mm[axis] / grid.slice_spacing_mm))
                averaging[axis] = averaging_matrix(n, group, tie=mask) if group > 1 else None
                size[axis] = -(-n // group)
                axis_maps[axis] = ((group - 1) / 2, float(group))
            else:
                size[axis] = max(1, round(n * grid.edge_mm[native_axis] / self.spacing_mm[axis]))
                step = n / size[axis]
                axis_maps[axis] = ((step - 1) / 2, step)
        resampled = interpolate_in_plane(apply_along_axes(crop, averaging), size, axes.index(grid.slice_axis))
        if mask:
            resampled = (resampled >= 0.5).float()
        out = MetaTensor(resampled.contiguous(), meta=image.meta, applied_operations=image.applied_operations)
        out.affine = torch.as_tensor(_model_affine(affine, box, axes, flips, axis_maps))
        extra = {"box": box, "axes": axes, "flips": flips, "axis_maps": axis_maps, "affine": affine}
        self.push_transform(out, orig_size=native_shape, extra_info=extra)
        return out

    def inverse(self, score: MetaTensor) -> MetaTensor:
        """Take a (C, ...) score on the model grid back to the native grid; 0 outside the crop."""
        info = self.pop_transform(score)
        extra = info[TraceKeys.EXTRA_INFO]
        box, axes, flips = extra["box"], extra["axes"], extra["flips"]
        shape = tuple(int(n) for n in info[TraceKeys.ORIG_SIZE])
        values = score.as_tensor().float()
        out = torch.zeros((values.shape[0], *shape), dtype=torch.float32, device=values.device)
        held = _held(values)
        if held is not None:
            matrices, target = [], []
            for axis, native_axis in enumerate(axes):
                start, step = extra["axis_maps"][axis]
                n_crop = box[native_axis][1] - box[native_axis][0]
                # Only the native samples between the non-zero scores' outer neighbours can differ from zero.
                first = max(0, int(np.floor(start + (held[axis][0] - 1) * step)))
                last = min(n_crop, int(np.ceil(start + held[axis][1] * step)) + 1)
                if held[axis] == (0, values.shape[axis + 1]):
                    first, last = 0, n_crop
                n = values.shape[axis + 1]
                centres = start + step * np.arange(n)
                # A last, shorter group of slices has its centre before the place that the model grid gives it: up to
                # half a group, which a bleed that goes on to the scan's end would show in its volume.
                centres[-1] = ((n - 1) * step + n_crop - 1) / 2
                at = np.interp(np.arange(first, last), centres, np.arange(n))
                matrices.append(interpolation_matrix(n, at, 1.0 / step)[:, held[axis][0] : held[axis][1]])
                a, b = (n_crop - last, n_crop - first) if flips[axis] else (first, last)
                target.append((native_axis, a + box[native_axis][0], b + box[native_axis][0]))
            part = apply_along_axes(values[(slice(None), *[slice(a, b) for a, b in held])], matrices)
            part = part.flip([a + 1 for a, flip in enumerate(flips) if flip])
            part = part.permute(0, *[int(a) + 1 for a in np.argsort(axes)])
            out[(slice(None), *[slice(a, b) for _, a, b in sorted(target)])] = part
        restored = MetaTensor(out, meta=score.meta, applied_operations=score.applied_operations)
        restored.affine = torch.as_tensor(extra["affine"])
        return restored


def _held(values: torch.Tensor) -> Box | None:
    """Box of the non-zero part of a (C, ...) tensor, None when all is zero."""
    nonzero = values != 0
    slice_by_row, row_by_column = nonzero.any(dim=3).any(dim=0), nonzero.flatten(0, 1).any(dim=0)
    box = []
    for along in (slice_by_row.any(dim=1), row_by_column.any(dim=1), row_by_column.any(dim=0)):
        held = torch.nonzero(along)
        if not len(held):
            return None
        box.append((int(held[0]), int(held[-1]) + 1))
    return tuple(box)


def _orientation(affine: Affine, axcodes: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """For each model axis the native axis it comes from, and whether it runs backwards."""
    native = nib.orientations.io_orientation(affine)
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    change = nib.orientations.ornt_transform(native, wanted)
    axes = [0] * 3
    flips = [False] * 3
    for native_axis, (model_axis, direction) in enumerate(change):
        axes[int(model_axis)] = native_axis
        flips[int(model_axis)] = bool(direction < 0)
    return tuple(axes), tuple(flips)


def _model_affine(
    affine: Affine,
    box: Box,
    axes: Sequence[int],
    flips: Sequence[bool],
    axis_maps: Sequence[tuple[float, float]],
) -> Affine:
    """Affine of the model grid: native coordinate of model index o is start + o * step, from the crop's right end."""
    to_native = np.zeros((4, 4))
    to_native[3, 3] = 1
    for axis, native_axis in enumerate(axes):
        start, step = axis_maps[axis]
        first, stop = box[native_axis]
        to_native[native_axis, axis] = -step if flips[axis] else step
        to_native[native_axis, 3] = stop - 1 - start if flips[axis] else first + start
    return affine @ to_native


class ModelGridd(MapTransform, InvertibleTransform):
    """`ModelGrid` for dictionaries: one head box, found in the scan, for the scan and its label.

    Args:
        keys: the scan first; the keys after it are masks on its grid and become binary.
        spacing_mm: see `ModelGrid`.
        axcodes: see `ModelGrid`.
        crop_head: keep only the box around the skull.
        hu_range: (lowest, highest); the scan becomes 1 from lowest to highest HU and 0 elsewhere, on the native grid.
            Here and not in a transform before, because the skull is looked for in HU.
        allow_missing_keys: as everywhere in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: Sequence[float],
        axcodes: str = "SPL",
        crop_head: bool = True,
        hu_range: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.crop_head = crop_head
        self.hu_range = hu_range
        self.grid = ModelGrid(spacing_mm, axcodes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take every key to the model grid.

        Raises:
            GeometryError: a mask is on another grid than its scan.
        """
        d = dict(data)
        scan = d[self.keys[0]]
        grid = _grid_of(scan.shape[1:], scan.affine, scan.meta)
        box = head_box(scan.numpy()[0], grid) if self.crop_head else None
        if self.hu_range is not None:
            d[self.keys[0]] = (scan >= self.hu_range[0]) & (scan <= self.hu_range[1])
        for key in self.key_iterator(d):
            found = _grid_of(d[key].shape[1:], d[key].affine, d[key].meta)
            require_same_grid(str(scan.meta.get("filename_or_obj", "scan")), str(key), found, grid)
            d[key] = self.grid(d[key], box, mask=key != self.keys[0])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take every key back to its native grid."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.grid.inverse(d[key])
        return d


class PadToSized(MapTransform):
    """Pad the far ends of each key to at least `size` with its own minimum: air in a scan, background in a label."""

    def __init__(self, keys: KeysCollection, size: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.size = tuple(size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pad every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            padding = [
                p for n, size in zip(image.shape[:0:-1], self.size[::-1], strict=True) for p in (0, max(0, size - n))
            ]
            d[key] = torch.nn.functional.pad(image, padding, value=float(image.min())) if any(padding) else image
        return d


class ForegroundProbabilityd(MapTransform):
    """Softmax over the two output channels, foreground only: (2, ...) logits to a (1, ...) probability."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the logits of every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = torch.softmax(d[key].float(), dim=0)[1:]
        return d


class Calibrated(MapTransform):
    """Temperature scaling (Guo et al., ICML 2017, section 4.2) of a foreground probability: logits divided by it.

    Order is kept, and so are 0 and 1; 1 changes nothing.

    Args:
        temperature: above 1 makes a network less sure of itself.
    """

    def __init__(self, keys: KeysCollection, temperature: float = 1.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: expected a number above 0")
        self.temperature = float(temperature)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change every key, (1, ...) in [0, 1]."""
        d = dict(data)
        for key in self.key_iterator(d):
            if self.temperature != 1.0:
                d[key] = calibrated(d[key], self.temperature)
        return d


class RemoveSmalld(MapTransform):
    """Take lesions (26-connected) smaller than a volume out of a mask on its native grid.

    Args:
        min_ml: lesions of less are removed; 0 removes none.
    """

    def __init__(self, keys: KeysCollection, min_ml: float = 0.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not min_ml >= 0:
            raise ConfigError(f"min_lesion_ml={min_ml}: expected 0 or more")
        self.min_ml = float(min_ml)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change every key, a (1, I, J, K) mask."""
        d = dict(data)
        for key in self.key_iterator(d):
            mask = d[key]
            if self.min_ml and bool(mask.any()):
                grid = _grid_of(mask.shape[1:], mask.affine, mask.meta)
                lesions, volumes_ml = lesions_of(mask.numpy()[0] > 0, grid)
                mask *= torch.as_tensor((volumes_ml >= self.min_ml)[lesions])[None]
        return d


class RemoveUnsured(MapTransform):
    """Take lesions (26-connected) out of a mask whose probability is high nowhere: thresholding with hysteresis.

    So a low threshold can outline a lesion, and a high one say whether it is one.

    Args:
        probability_key: (1, ...) what the mask was cut from.
        min_peak: lesions are removed whose largest probability is less; 0 removes none.
    """

    def __init__(
        self,
        keys: KeysCollection,
        probability_key: str = "probability",
        min_peak: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= min_peak <= 1:
            raise ConfigError(f"min_lesion_peak={min_peak}: expected 0 to 1")
        self.probability_key, self.min_peak = probability_key, float(min_peak)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change every key, a (1, ...) mask."""
        d = dict(data)
        for key in self.key_iterator(d):
            mask = d[key]
            if self.min_peak and bool(mask.any()):
                lesions = cc3d.connected_components(np.asfortranarray(mask.numpy()[0] > 0), connectivity=26)
                sure = np.zeros(int(lesions.max()) + 1, bool)
                sure[lesions[d[self.probability_key].numpy()[0] >= self.min_peak]] = True
                mask *= torch.as_tensor(sure[lesions])[None]
        return d


def calibrated(probability: Any, temperature: float) -> Any:
    """A probability (array or tensor) whose logit is divided by a temperature."""
    odds, against = probability ** (1 / temperature), (1 - probability) ** (1 / temperature)
    return odds / (odds + against)


def lesions_of(found: NDArray[np.bool_], grid: Grid, first_slice: int = 0) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Lesions (26-connected) of a mask, or of a box of it: their numbers from 1 by voxel, and mL by number, 0 for none.

    Args:
        found: three axes, those of the grid.
        first_slice: of the grid, that the box begins with.
    """
    lesions = cc3d.connected_components(np.asfortranarray(found), connectivity=26)
    if grid.slice_positions is None:
        volumes_ml = np.bincount(lesions.ravel(order="K")) * grid.voxel_volume_mm3 / 1000
    else:
        numbers = range(int(lesions.max()) + 1)
        volumes_ml = np.array([grid.foreground_ml(lesions == n, first_slice) for n in numbers])
    volumes_ml[0] = 0
    return lesions, volumes_ml
