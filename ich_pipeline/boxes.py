"""Boxes for a second stage: where they come from, their way to the model grid, and nothing outside them.

Boxes lie in native axial slices (`detection.Box`). Between the transforms they travel as text in the scan's metadata,
which a DataLoader leaves as it is; on the model grid they are the image's second channel.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from ich_pipeline.bundles import Bundle, is_bundle
from ich_pipeline.detection import ANY, Box, boxes_of_mask, read_boxes
from ich_pipeline.errors import ConfigError, ManifestError, own_errors
from ich_pipeline.files import sha256_of
from ich_pipeline.geometry import Affine, Grid, require_same_grid
from ich_pipeline.reading import default_case_id, read_mask
from ich_pipeline.records import CaseRecord, NativeMask, Scan
from ich_pipeline.transforms import native_grid, scan_of

META = "boxes"
WHOLE, LABEL, NETWORK = "whole", "label", "network"
SOURCES = (NETWORK, LABEL, WHOLE)
# Edges that are whole numbers but for rounding in float64 stay whole.
EDGE_TOLERANCE = 1e-6


# What finds boxes: a network with everything that it needs before and after.
Detector = Callable[[Scan], Sequence[Box]]


class BoxSource(Protocol):
    """Where the boxes of a scan come from.

    Attributes:
        merged: the boxes of a slice become one, the smallest around them all; else they stay as they are.
    """

    merged: bool

    def __call__(self, case_id: str, scan: MetaTensor, label: Any) -> Sequence[Box]:
        """Boxes of a (1, I, J, K) native scan; `label` is its mask, a path of it, or None."""


class WholeSlices:
    """Every slice is one box: a single stage."""

    merged = True

    def __call__(self, case_id: str, scan: MetaTensor, label: Any) -> Sequence[Box]:
        """A box a slice."""
        grid = native_grid(scan)
        n_i, n_j = plane_shape(grid)
        return [Box(case_id, k, ANY, 0, 0, n_i, n_j) for k in range(grid.shape[grid.slice_axis])]


class LabelBoxes:
    """The reference mask's boxes: what a detector that is always right would find."""

    merged = True

    def __call__(self, case_id: str, scan: MetaTensor, label: Any) -> Sequence[Box]:
        """Boxes around the label.

        Raises:
            ManifestError: there is no label.
            GeometryError: it is on another grid than its scan.
        """
        if label is None:
            raise ManifestError(
                f"{case_id}: no label, which boxes=label takes the boxes from. Name a manifest with labels, or other "
                "boxes."
            )
        grid = native_grid(scan)
        if isinstance(label, MetaTensor):
            mask = NativeMask(label.numpy()[0], native_grid(label))
        else:
            mask, _ = read_mask(label, case_id)
        require_same_grid(case_id, "label", mask.grid, grid)
        return boxes_of_mask(case_id, mask, regions=False)


class FileBoxes:
    """A table of boxes, such as one that a person corrected: nothing outside any of them is segmented.

    Args:
        path: see `detection.read_boxes`.
    """

    merged = False

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.by_case: dict[str, list[Box]] = {}
        for box in read_boxes(self.path):
            self.by_case.setdefault(box.case_id, []).append(box)

    def __call__(self, case_id: str, scan: MetaTensor, label: Any) -> Sequence[Box]:
        """The rows of a case; none where it has no row.

        Raises:
            ManifestError: a box reaches out of the scan.
        """
        held = self.by_case.get(case_id, [])
        require_inside(held, native_grid(scan), self.path.name)
        return held


class DetectorBoxes:
    """What a detector finds.

    Args:
        detector: called with every scan.
    """

    merged = True

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def __call__(self, case_id: str, scan: MetaTensor, label: Any) -> Sequence[Box]:
        """Boxes of a scan."""
        return self.detector(scan_of(scan, CaseRecord(case_id, Path(scan.meta["filename_or_obj"]))))


def open_detector(folder: Path | str, device: str | torch.device = "auto") -> Detector:
    """The detector of a trained bundle; its weights have a hash of their own in its metadata.

    Raises:
        ConfigError: no such bundle, or its weights are not those of its metadata.
    """
    bundle = find_detector(folder)
    parser = ConfigParser({**bundle.config("inference"), "bundle_root": str(bundle.path), "device": str(device)})
    with own_errors():
        return parser.get_parsed_content("finder")


def find_detector(folder: Path | str) -> Bundle:
    """The bundle of a trained detector.

    Raises:
        ConfigError: there is none.
    """
    bundle = Bundle(Path(folder).resolve())
    if not (is_bundle(bundle.path) and bundle.finds_boxes and bundle.weights):
        raise ConfigError(
            f"boxes=network: no trained detector at {folder}. Train one (ich-pipeline train bundle=yolov5_transdeeplab "
            "stage=detector) and name its folder (detector=runs/NAME/bundle), give boxes=FILE.csv with boxes of your "
            "own, or boxes=whole for whole slices."
        )
    return bundle


def box_source(boxes: str, detector: Path | str, device: str | torch.device = "auto") -> BoxSource:
    """The source that a config's `boxes` names: `network`, `label`, `whole`, or the path of a table.

    Args:
        boxes: which.
        detector: folder of a trained detector's bundle, read for `network` alone.
        device: of the detector.

    Raises:
        ConfigError: none of these, or `network` without a detector.
        ManifestError: the table cannot be read.
    """
    if boxes == NETWORK:
        return DetectorBoxes(open_detector(detector, device))
    if boxes == LABEL:
        return LabelBoxes()
    table = table_of(boxes)
    return WholeSlices() if table is None else FileBoxes(table)


def table_of(boxes: str) -> Path | None:
    """The table that a config's `boxes` names, None where it names another source.

    Raises:
        ConfigError: neither.
    """
    if boxes in SOURCES:
        return None
    if Path(boxes).suffix.lower() != ".csv":
        raise ConfigError(f"boxes={boxes}: expected {', '.join(SOURCES)} or a table, FILE.csv")
    return Path(boxes)


def check_cases(config: Mapping[str, Any], cases: Sequence[CaseRecord]) -> None:
    """Refuse a table of boxes that names a case which is not there: a mistyped name would leave a scan empty.

    Args:
        config: `inference.yaml`; one without a first stage that finds boxes is passed over.
        cases: all that the table may name.

    Raises:
        ConfigError: `boxes` is no source.
        ManifestError: names the case.
    """
    table = table_of(str(config["boxes"])) if has_boxes(config) else None
    if table is None:
        return
    known = {case.case_id for case in cases}
    unknown = [case_id for case_id in FileBoxes(table).by_case if case_id not in known]
    if unknown:
        some = f"{', '.join(sorted(known)[:5])}{' ...' if len(known) > 5 else ''}"
        raise ManifestError(
            f"{table.name}: boxes of case {unknown[0]!r} ({len(unknown)} such cases), expected cases among {some}. "
            "Correct case_id, or give its scan."
        )


def has_boxes(config: Mapping[str, Any]) -> bool:
    """Whether a bundle's config has a first stage that finds boxes."""
    return {"boxes", "detector"} <= config.keys()


def boxes_sha256(bundle: Bundle, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Hash of what the boxes come from, to be recorded: a table, or a detector's weights; empty for other sources.

    A table that was corrected and a detector that was trained again keep their paths, and give other masks.

    Raises:
        ConfigError: `boxes` is no source, or the detector is not there.
        ManifestError: the table cannot be read.
    """
    if not has_boxes(config):
        return {}
    if config["boxes"] == NETWORK:
        root = {"bundle_root": str(bundle.path), "detector": config["detector"]}
        folder = Path(ConfigParser(root).get_parsed_content("detector"))
        return {"boxes_sha256": find_detector(folder).metadata["weights_sha256"]}
    table = table_of(str(config["boxes"]))
    return {} if table is None else {"boxes_sha256": sha256_of(FileBoxes(table).path)}


def plane_shape(grid: Grid) -> tuple[int, int]:
    """Pixels of an axial slice along the two axes in it, in their order: what a box's i and j count."""
    n_i, n_j = (n for axis, n in enumerate(grid.shape) if axis != grid.slice_axis)
    return n_i, n_j


def require_inside(boxes: Sequence[Box], grid: Grid, where: str) -> None:
    """Refuse boxes that reach out of their scan.

    Raises:
        ManifestError: names case, box and limits.
    """
    n_slices, (n_i, n_j) = grid.shape[grid.slice_axis], plane_shape(grid)
    for box in boxes:
        if not (box.slice < n_slices and box.i0 >= 0 and box.j0 >= 0 and box.i1 <= n_i and box.j1 <= n_j):
            raise ManifestError(
                f"{box.case_id}: {where} has a box i {box.i0:g} to {box.i1:g}, j {box.j0:g} to {box.j1:g} in slice "
                f"{box.slice}, expected i within 0 to {n_i}, j within 0 to {n_j} and slices 0 to {n_slices - 1}. "
                "Correct the table."
            )


def merge_slices(boxes: Sequence[Box]) -> list[Box]:
    """For every slice the smallest box around all of its boxes (Rajapakse et al., section II-D), by slice."""
    merged: dict[int, Box] = {}
    for box in boxes:
        held = merged.setdefault(box.slice, box)
        low = {name: min(getattr(held, name), getattr(box, name)) for name in ("i0", "j0")}
        high = {name: max(getattr(held, name), getattr(box, name)) for name in ("i1", "j1")}
        merged[box.slice] = replace(held, subtype=ANY, **low, **high)
    return [merged[k] for k in sorted(merged)]


def boxes_on_model_grid(
    boxes: Sequence[Box], grid: Grid, model_affine: Affine, model_shape: Sequence[int]
) -> NDArray[np.bool_]:
    """Native boxes on the model grid: one box a slice, rounded outwards to whole pixels.

    Both grids share their axes' directions (`transforms.ModelGrid`), tilted or not, so each axis goes by itself: edges
    by a scale and a shift, and a native slice to the one that it was averaged into. Uneven slices change nothing: both
    grids count slices.

    Args:
        boxes: of one case, corners in pixels of native slices.
        grid: native.
        model_affine: of the model grid.
        model_shape: likewise; slices first.

    Returns:
        bool, True inside.
    """
    to_native = np.linalg.inv(grid.affine) @ np.asarray(model_affine, dtype=np.float64)
    across = grid.slice_axis
    in_plane = [axis for axis in range(3) if axis != across]
    inside = np.zeros(tuple(model_shape), bool)
    for box in boxes:
        # A slice stands for its middle: its edges would touch the neighbours.
        native = {
            across: (box.slice + 0.5, box.slice + 0.5),
            in_plane[0]: (box.i0, box.i1),
            in_plane[1]: (box.j0, box.j1),
        }
        part: list[slice] = [slice(0)] * 3
        for axis, edges in native.items():
            model_axis = int(np.argmax(np.abs(to_native[axis, :3])))
            step, start = to_native[axis, model_axis], to_native[axis, 3]
            low, high = sorted((edge - 0.5 - start) / step + 0.5 for edge in edges)
            first = int(np.floor(low + EDGE_TOLERANCE))
            stop = first + 1 if axis == across else int(np.ceil(high - EDGE_TOLERANCE))
            part[model_axis] = slice(max(0, first), max(0, stop))
        inside[tuple(part)] = True
    for plane in inside:
        box_of = rectangle(plane)
        if box_of:
            plane[box_of] = True
    return inside


def rectangle(plane: Any) -> tuple[slice, slice] | None:
    """Smallest rectangle around what is not zero in a plane (array or tensor), None where all is."""
    rows, columns = (np.flatnonzero(np.asarray((plane != 0).any(axis).tolist())) for axis in (1, 0))
    if not rows.size:
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def boxes_on_native_grid(boxes: Sequence[Box], grid: Grid) -> NDArray[np.bool_]:
    """Native boxes as a mask of their scan, fractions of pixels included."""
    inside = np.zeros(grid.shape, bool)
    planes = np.moveaxis(inside, grid.slice_axis, 0)
    for box in boxes:
        i0, j0 = (max(0, int(np.floor(edge + EDGE_TOLERANCE))) for edge in (box.i0, box.j0))
        i1, j1 = (max(0, int(np.ceil(edge - EDGE_TOLERANCE))) for edge in (box.i1, box.j1))
        planes[box.slice, i0:i1, j0:j1] = True
    return inside


def _kept_boxes(image: MetaTensor) -> list[Box]:
    return [Box("scan", int(k), ANY, *corners) for k, *corners in json.loads(image.meta[META])]


class FindBoxesd(MapTransform):
    """Find the boxes of a scan that `ReadScand` read, on its native grid; they go into its metadata.

    A list of `Box` in the item `boxes` is taken instead, and every box then stays as it is: a person gave it.

    Args:
        keys: the scan.
        boxes: see `box_source`.
        detector: likewise.
        device: likewise.
    """

    def __init__(
        self,
        keys: KeysCollection,
        boxes: str,
        detector: Path | str = "",
        device: str | torch.device = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source = box_source(str(boxes), detector, device)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Find boxes.

        Raises:
            ManifestError: see the sources.
        """
        d = dict(data)
        given = d.pop("boxes", None)
        for key in self.key_iterator(d):
            scan = d[key]
            case_id = str(d.get("case_id") or default_case_id(Path(scan.meta["filename_or_obj"])))
            if given is not None:
                require_inside(given, native_grid(scan), "the item `boxes`")
                found = list(given)
            else:
                found = list(self.source(case_id, scan, d.get("label")))
                found = merge_slices(found) if self.source.merged else found
            rows = [(box.slice, box.i0, box.j0, box.i1, box.j1) for box in found]
            scan.meta[META] = json.dumps([[float(number) for number in row] for row in rows])
        return d


class BoxChanneld(MapTransform):
    """Add the boxes of `FindBoxesd` to a scan on the model grid: (1, S, R, C) becomes (2, S, R, C), 1 inside."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the channel to every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            affine = np.asarray(image.affine, dtype=np.float64)
            inside = boxes_on_model_grid(_kept_boxes(image), native_grid(image), affine, image.shape[1:])
            both = torch.cat([image.as_tensor(), torch.as_tensor(inside[None], dtype=torch.float32)])
            d[key] = MetaTensor(both, meta=image.meta, applied_operations=image.applied_operations)
        return d


class KeepInBoxesd(MapTransform):
    """Zero a score outside the boxes of its scan, on the native grid: interpolation carried it over their edges."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Zero every key outside."""
        d = dict(data)
        for key in self.key_iterator(d):
            score = d[key]
            inside = boxes_on_native_grid(_kept_boxes(score), native_grid(score))
            d[key] = score * torch.as_tensor(inside[None], dtype=score.dtype, device=score.device)
        return d
