"""Pictures: what was outlined, on the scan; and how volumes agree over a cohort.

A montage is a paletted image: grey levels below, a few colours on top. It encodes three times faster than RGB, and a
picture for each case must not eat the time that the network left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.abc2 import Box, SegmentMm, caliper_lines_mm, lesion_box
from ich_pipeline.agreement import VolumeAgreement
from ich_pipeline.files import atomic_path
from ich_pipeline.geometry import Grid
from ich_pipeline.precision_recall import PrecisionRecall
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import VolumeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

# Brain window: centre 40 HU, width 90 HU.
WINDOW_HU = (-5.0, 85.0)
HEAD_HU = -300
TILES = (4, 3)  # columns, rows
TILE_PX = 256
NOTICE = "research use only"

_GREYS = 251
_MASK, _LABEL, _A, _B = 251, 252, 253, 254
_COLOURS = {_MASK: (255, 92, 72), _LABEL: (64, 214, 160), _A: (255, 214, 64), _B: (96, 190, 255)}
_PALETTE = [channel for grey in range(_GREYS) for channel in (round(grey * 255 / (_GREYS - 1)),) * 3]
_PALETTE += [channel for colour in _COLOURS.values() for channel in colour] + [0, 0, 0]
_WHITE, _DIM = _GREYS - 1, 160
_LINE_PX = 22
_MARGIN_PX = 10


def montage(
    image_hu: NDArray[Any],
    mask: NativeMask,
    *,
    case_id: str,
    label: NativeMask | None = None,
    report: VolumeReport | None = None,
    flags: Sequence[str] = (),
    tiles: tuple[int, int] = TILES,
    tile_px: int = TILE_PX,
) -> "Image":
    """Axial slices in brain window, the patient's right on the left, with outlines, A and B, and a caption.

    Slices surround the bleed of mask and label, or spread over the head where there is none. Pixels have their true
    proportions. A and B are drawn on the index slice (abc2.py).

    Args:
        image_hu: (I, J, K) on the grid of `mask`, in any orientation.
        label: reference outline in a second colour.
        report: numbers for the caption.
        flags: short names for a line of their own below; no line where there are none.
        tiles: columns and rows.
        tile_px: width and height of a tile.

    Returns:
        Paletted image; write_png writes it.

    Raises:
        ValueError: image, mask and label differ in shape.
    """
    shapes = [each.shape for each in (image_hu, mask.values, *([label.values] if label else []))]
    if len(set(shapes)) > 1:
        raise ValueError(f"{case_id}: image, mask and label have shapes {shapes}, expected one. Resample them first.")
    import PIL.Image
    import PIL.ImageDraw

    view = _axial_view(image_hu, mask.grid, tile_px)
    columns, rows = tiles
    lines = caliper_lines_mm(mask)
    index_slice = view.slice_of(lines[0]) if lines else None
    slices = _choose_slices(view, [each for each in (mask, label) if each], index_slice, columns * rows)
    caption_px = (3 if flags else 2) * _LINE_PX + 2 * _MARGIN_PX
    canvas = np.zeros((caption_px + rows * tile_px, columns * tile_px), np.uint8)
    corners = [(n % columns * tile_px, caption_px + n // columns * tile_px) for n in range(len(slices))]
    for k, (left, top) in zip(slices, corners, strict=True):
        canvas[top : top + tile_px, left : left + tile_px] = _tile(view, k, image_hu, mask, label)
    picture = PIL.Image.fromarray(canvas)
    draw = PIL.ImageDraw.Draw(picture)
    for k, corner in zip(slices, corners, strict=True):
        _mark_tile(draw, view, k, corner, lines if k == index_slice else None)
    names = {"mask": _MASK} | ({"label": _LABEL} if label else {}) | ({"A": _A, "B": _B} if lines else {})
    _write_caption(draw, picture.width, case_id, _numbers(mask, report), names, flags)
    picture.putpalette(_PALETTE)
    return picture


@dataclass(frozen=True, eq=False)
class _View:
    """How a grid is shown: axial slices, anterior up, the patient's right on the left.

    Attributes:
        axes: array axes along slices, picture rows and picture columns.
        flips: whether that axis runs against superior, posterior or left, and is shown reversed.
        crop: range of picture rows and columns, in array index, that holds the head.
        size_px: height and width of the head in a tile of `tile_px`.
    """

    grid: Grid
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    slices: slice
    crop: tuple[slice, slice]
    size_px: tuple[int, int]
    tile_px: int

    def plane(self, values: NDArray[np.generic], k: int) -> NDArray[np.generic]:
        """Slice `k` cropped to the head, as shown."""
        across, rows, _ = self.axes
        index: list[Any] = [slice(None)] * 3
        index[across] = k
        plane = values[tuple(index)]
        plane = plane if rows < self.axes[2] else plane.T
        plane = plane[self.crop]
        return plane[:: -1 if self.flips[1] else 1, :: -1 if self.flips[2] else 1]

    def slice_of(self, line_mm: SegmentMm) -> int:
        """Index of the slice that a line in RAS+ mm lies in."""
        return round(float(self.grid.to_index(np.array(line_mm[0]))[self.axes[0]]))

    def to_px(self, line_mm: SegmentMm) -> list[tuple[float, float]]:
        """Ends of a line in RAS+ mm as (x, y) in a tile."""
        index = self.grid.to_index(np.array(line_mm)) + 0.5
        places = []
        for side, (axis, flip, size) in enumerate(zip(self.axes[1:], self.flips[1:], self.size_px, strict=True)):
            start, stop = self.crop[side].start, self.crop[side].stop
            share = (index[:, axis] - start) / (stop - start)
            places.append((1 - share if flip else share) * size + (self.tile_px - size) // 2)
        return [(float(x), float(y)) for y, x in zip(*places, strict=True)]


def _axial_view(image_hu: NDArray[Any], grid: Grid, tile_px: int) -> _View:
    across = grid.slice_axis
    rows, columns = grid.plane_axes
    steps = grid.affine[:3, :3]
    flips = (bool(steps[2, across] < 0), bool(steps[1, rows] > 0), bool(steps[0, columns] > 0))
    head = _head_box(image_hu)
    crop = (head[rows], head[columns])
    extent_mm = [
        (side.stop - side.start) * grid.edge_mm[axis] for side, axis in zip(crop, (rows, columns), strict=True)
    ]
    height, width = (max(1, round(extent / max(extent_mm) * tile_px)) for extent in extent_mm)
    return _View(grid, (across, rows, columns), flips, head[across], crop, (height, width), tile_px)


def _head_box(image_hu: NDArray[Any]) -> Box:
    """Box of what is denser than air, found on every fourth voxel; the whole image where nothing is."""
    step = 4
    found = lesion_box(np.ascontiguousarray(image_hu[::step, ::step, ::step] > HEAD_HU))
    if found is None:
        i, j, k = (slice(0, n) for n in image_hu.shape)
        return i, j, k
    i, j, k = (
        slice(max(0, (side.start - 1) * step), min(n, side.stop * step + 1))
        for side, n in zip(found, image_hu.shape, strict=True)
    )
    return i, j, k


def _choose_slices(view: _View, masks: Sequence[NativeMask], index_slice: int | None, n: int) -> list[int]:
    """At most n slices from below upwards: neighbours while they cover the bleed, else spread evenly.

    The index slice is always among them.
    """
    across = view.axes[0]
    total = view.grid.shape[across]

    def turn(k: int) -> int:
        """Slice index to height above the lowest slice, and back."""
        return total - 1 - k if view.flips[0] else k

    boxes = [box[across] for each in masks if (box := lesion_box(each.values))]
    shown = slice(min(box.start for box in boxes), max(box.stop for box in boxes)) if boxes else view.slices
    low, high = sorted((turn(shown.start), turn(shown.stop - 1)))
    span = high - low + 1
    if boxes and span <= n:
        start = min(max(0, (low + high + 1 - n) // 2), max(0, total - n))
        heights = set(range(start, min(total, start + n)))
    else:  # the middles of n equal parts
        heights = {low + int((part + 0.5) * span / n) for part in range(n)}
    if index_slice is not None and (index_height := turn(index_slice)) not in heights:
        heights.remove(min(heights, key=lambda height: abs(height - index_height)))
        heights.add(index_height)
    return [turn(height) for height in sorted(heights)]


def _tile(view: _View, k: int, image_hu: NDArray[Any], mask: NativeMask, label: NativeMask | None) -> NDArray[np.uint8]:
    from PIL import Image

    low, high = WINDOW_HU
    height, width = view.size_px
    # Windowed before it is reduced: 1000 HU of bone averaged into brain would swallow a thin subdural.
    plane_hu = view.plane(image_hu, k).clip(low, high).astype(np.float32)
    shown_hu = np.asarray(Image.fromarray(plane_hu).resize((width, height), Image.Resampling.BILINEAR))
    shown = ((shown_hu - low) * ((_GREYS - 1) / (high - low))).astype(np.uint8)
    for each, colour in ((label, _LABEL), (mask, _MASK)):
        if each is not None:
            plane = view.plane(each.values, k) != 0
            if plane.any():
                shown[_outline(plane, (width, height))] = colour
    tile = np.zeros((view.tile_px, view.tile_px), np.uint8)
    top, left = (view.tile_px - height) // 2, (view.tile_px - width) // 2
    tile[top : top + height, left : left + width] = shown
    return tile


def _outline(plane: NDArray[np.bool_], size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels just outside a slice's mask at the size of the picture, so that the smallest bleed is not painted over."""
    from PIL import Image

    scaled = Image.fromarray(plane.astype(np.uint8) * 255).resize(size_px, Image.Resampling.BOX)
    inside = np.asarray(scaled) >= 128
    inside = inside if inside.any() else np.asarray(scaled) > 0
    around = np.zeros_like(inside)
    around[1:] |= inside[:-1]
    around[:-1] |= inside[1:]
    around[:, 1:] |= inside[:, :-1]
    around[:, :-1] |= inside[:, 1:]
    return around & ~inside


def _mark_tile(
    draw: "ImageDraw", view: _View, k: int, corner: tuple[int, int], lines: tuple[SegmentMm, SegmentMm] | None
) -> None:
    """Sides, slice number and, on the index slice, A and B. Grey text is smooth, as the greys are a ramp."""
    left, top = corner
    grey = _WHITE if lines else _DIM
    draw.text((left + 6, top + 4), "R", fill=_DIM, font=_font(12))
    draw.text((left + view.tile_px - 6, top + 4), "L", fill=_DIM, font=_font(12), anchor="ra")
    draw.text((left + 6, top + view.tile_px - 20), f"slice {k + 1}", fill=grey, font=_font(12))
    for line_mm, colour in zip(lines or (), (_A, _B), strict=bool(lines)):
        draw.line([(left + x, top + y) for x, y in view.to_px(line_mm)], fill=colour, width=2)


def _write_caption(
    draw: "ImageDraw", width: int, case_id: str, numbers: str, colours: dict[str, int], flags: Sequence[str]
) -> None:
    """Case, notice, numbers and flags; on the right what the colours mean."""
    below = _MARGIN_PX + _LINE_PX
    draw.text((_MARGIN_PX, _MARGIN_PX), case_id, fill=_WHITE, font=_font(17))
    after_case = _MARGIN_PX + int(draw.textlength(case_id, font=_font(17))) + 16
    draw.text((after_case, _MARGIN_PX + 3), NOTICE, fill=_DIM, font=_font(14))
    draw.text((_MARGIN_PX, below), numbers, fill=_WHITE, font=_font(14))
    if flags:
        draw.text((_MARGIN_PX, below + _LINE_PX), "flags: " + ", ".join(flags), fill=_DIM, font=_font(14))
    x = width - _MARGIN_PX
    for name, colour in reversed(colours.items()):
        draw.text((x, _MARGIN_PX), name, fill=_WHITE, font=_font(14), anchor="ra")
        x -= int(draw.textlength(name, font=_font(14))) + 16
        draw.rectangle((x, _MARGIN_PX + 4, x + 10, _MARGIN_PX + 14), fill=colour)
        x -= 14


def _numbers(mask: NativeMask, report: VolumeReport | None) -> str:
    if report is None:
        return "" if mask.values.any() else "no hemorrhage outlined"
    if not report.n_lesions:
        return "0.00 mL: no hemorrhage outlined"
    lesions = "1 lesion" if report.n_lesions == 1 else f"{report.n_lesions} lesions"
    return (
        f"{report.volume_ml:.2f} mL in {lesions}   ABC/2 {report.abc2_ml:.1f}   Kothari {report.abc2_kothari_ml:.1f}   "
        f"Tada {report.tada_ml:.1f} mL   A {report.a_mm:.1f}   B {report.b_mm:.1f}   C {report.c_mm:.1f} mm"
    )


@lru_cache
def _font(size_px: int) -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


def bland_altman_plot(
    reference_ml: Sequence[float | None],
    estimate_ml: Sequence[float | None],
    agreement: VolumeAgreement,
    *,
    reference_name: str,
    estimate_name: str,
) -> "Figure":
    """Difference against mean, with bias, 95 % limits and their bootstrap intervals from `agreement`.

    A pair without a number (None) has no dot; the title counts it.
    """
    figure, axes = _figure()
    x, y = np.asarray(reference_ml, dtype=np.float64), np.asarray(estimate_ml, dtype=np.float64)
    axes.scatter((x + y) / 2, y - x, **_DOTS)
    for name, words in (("limit_high_ml", "+1.96 SD"), ("bias_ml", "bias"), ("limit_low_ml", "-1.96 SD")):
        estimate = agreement.statistics[name]
        if estimate.value is None:
            continue
        axes.axhline(estimate.value, color=_INK, linewidth=1, linestyle="-" if name == "bias_ml" else "--")
        if estimate.low is not None and estimate.high is not None:
            axes.axhspan(estimate.low, estimate.high, color=_INK, alpha=0.1, linewidth=0)
        axes.annotate(
            f"{words} {estimate.value:+.1f} mL",
            (1, estimate.value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )
    axes.set_xlabel(f"mean of {estimate_name} and {reference_name} (mL)")
    axes.set_ylabel(f"{estimate_name} less {reference_name} (mL)")
    axes.set_title(_cohort(agreement), loc="left")
    return figure


def volume_scatter(
    reference_ml: Sequence[float | None],
    estimate_ml: Sequence[float | None],
    agreement: VolumeAgreement,
    *,
    reference_name: str,
    estimate_name: str,
) -> "Figure":
    """Estimate against reference with the line of equality and the threshold of `agreement` in both directions.

    Axes are linear to 1 mL and logarithmic above, so that a missed bleed at 0 mL stays in the picture.
    """
    figure, axes = _figure()
    x, y = np.asarray(reference_ml, dtype=np.float64), np.asarray(estimate_ml, dtype=np.float64)
    axes.scatter(x, y, **_DOTS)
    top = 1.2 * float(np.nanmax([1.0, *x, *y]))
    axes.plot([0, top], [0, top], color=_INK, linewidth=1)
    for line in (axes.axhline, axes.axvline):
        line(agreement.threshold_ml, color=_INK, linewidth=0.8, linestyle=":")
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000) if tick <= top]
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=1)
        getattr(axes, f"set_{axis}lim")(-0.1, top)
        getattr(axes, f"set_{axis}ticks")(ticks, [f"{tick}" for tick in ticks], minor=False)
        getattr(axes, f"set_{axis}ticks")([], minor=True)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{reference_name} (mL)")
    axes.set_ylabel(f"{estimate_name} (mL)")
    axes.set_title(_cohort(agreement), loc="left")
    ccc = agreement.statistics["ccc"].value
    axes.annotate(
        f"{'' if ccc is None else f'CCC {ccc:.3f}'}\n"
        f"crossing {agreement.threshold_ml:g} mL: {agreement.only_estimate_above} up, "
        f"{agreement.only_reference_above} down",
        (0.03, 0.97),
        xycoords="axes fraction",
        va="top",
    )
    return figure


def precision_recall_plot(curve: PrecisionRecall) -> "Figure":
    """Precision against recall of a cohort's voxels, with the average precision and its interval."""
    figure, axes = _figure()
    axes.plot(curve.recall, curve.precision, color="#2f6db5", linewidth=1.5, drawstyle="steps-pre")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall of labelled volume", ylabel="precision of predicted volume")
    axes.set_aspect("equal")
    ap = curve.average_precision
    bounds = "" if ap.low is None else f" [{ap.low:.3f}, {ap.high:.3f}]"
    axes.set_title(
        f"{curve.n} scans, voxels pooled" + ("" if ap.value is None else f": average precision {ap.value:.3f}{bounds}"),
        loc="left",
    )
    return figure


def reliability_plot(bins: Mapping[str, NDArray[np.float64]], error: Mapping[str, float]) -> "Figure":
    """Share of blood against probability, before and after calibration.

    Args:
        bins: by name, (n, 3) mean probability, share of blood, mL.
        error: by the same names, the expected calibration error.
    """
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":")
    for (name, each), color in zip(bins.items(), ("#9a9a9a", "#2f6db5"), strict=True):
        axes.plot(
            each[:, 0], each[:, 1], color=color, marker="o", markersize=4, label=f"{name}: error {error[name]:.3f}"
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of hemorrhage", ylabel="share that is hemorrhage")
    axes.set_aspect("equal")
    axes.legend(frameon=False)
    return figure


_INK = "#333333"
_DOTS: dict[str, Any] = {"s": 14, "color": "#2f6db5", "alpha": 0.55, "linewidths": 0}


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window system, no global state, safe in threads
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _cohort(agreement: VolumeAgreement) -> str:
    missing = f", {agreement.missing} without a number" if agreement.missing else ""
    return f"{agreement.n} scans of {agreement.n_patients} patients{missing}"


def write_png(path: Path | str, picture: "Image | Figure") -> None:
    """Write a montage (fast rather than small) or a plot as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        if hasattr(picture, "savefig"):
            picture.savefig(temporary, format="png", dpi=150)
        else:
            picture.save(temporary, format="PNG", compress_level=1)
