"""Hemorrhages in a real scan: its grid, noise and anatomy stay, only the voxels that bleed change.

Only IPH, SDH and EDH: ventricles and sulci cannot be told reliably from CSF values in every scan (a cadaver's hold
gas), and a label that is wrong about its own space teaches the wrong thing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ich_pipeline.detection import boxes_of_mask
from ich_pipeline.errors import ConfigError, ReadError
from ich_pipeline.geometry import Affine, Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom.anatomy import Interior, tentorium_height
from ich_pipeline.phantom.fields import Array, Texture, share, smoothstep
from ich_pipeline.phantom.settings import PhantomCase, PhantomSettings
from ich_pipeline.phantom.truth import label_of, volumes_of
from ich_pipeline.records import NativeMask, Scan

KINDS = (Subtype.EDH, Subtype.IPH, Subtype.SDH)
FINE_MM, COARSE_MM = 1.0, 2.0
SOFT_HU = (-15, 170)  # brain with CSF and cupping, after smoothing
NECK_MM = 7.0  # openings of the skull narrower than twice this are closed to the search for the brain
BRAIN_ML = (600.0, 2300.0)
VERTEX_MM = 69.0  # height of the inner vertex over the origin of `anatomy`
TREND_MM = 6.0
BRAIN_HU = 32.0
SUBSLICE_MM = 1.6
LOWEST_MM = -50.0  # below lie only base and neck, where the estimate of the inner table is poor


@dataclass(frozen=True, eq=False)
class RealHead:
    """What is estimated from a real scan, once for all cases put into it.

    Attributes:
        fine_affine: of the 1 mm RAS grid that hemorrhages are made on.
        trend_hu: HU of brain without its detail, on the 2 mm grid of `coarse_affine`.
        brain: (I, J, K) bool on the scan's grid.
    """

    inside: Interior
    fine_affine: Affine
    trend_hu: Array
    coarse_affine: Affine
    brain: NDArray[np.bool_]


def bleed_into(case_id: str, seed: int, settings: PhantomSettings, background: Scan) -> PhantomCase:
    """Put drawn hemorrhages into a real scan; see `cases.make_case` for arguments and errors."""
    if not any(settings.subtype_weights.get(kind.name, 0) for kind in KINDS):
        raise ConfigError(
            f"{case_id}: subtype_weights {dict(settings.subtype_weights)} leave nothing for a real background, "
            f"expected weight on one of {', '.join(kind.name for kind in KINDS)}."
        )
    if background.grid.slice_positions is not None:
        # What is put in is made and averaged over slices at even steps.
        raise ReadError(
            f"{case_id}: the slices of {background.case_id} lie unevenly, expected a background with equal steps. Give "
            "another scan."
        )
    head = find_head(background)
    bleed_rng, texture_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    inside = replace(head.inside, texture=Texture(texture_rng))
    clean = bleed_rng.random() < settings.clean_fraction
    plans = [] if clean else bl.plan_bleeds(bleed_rng, settings, KINDS)
    made = [_bleed(inside, plan, bleed_rng) for plan in plans]
    case = bled_into(case_id, background, head, inside, made)
    case.truth.update(seed=seed, bleeds=[asdict(plan) for plan in plans])
    return case


def bled_into(
    case_id: str, background: Scan, head: RealHead, inside: Interior, made: Sequence[bl.Bleed]
) -> PhantomCase:
    """A real scan with hemorrhages that were made at the points of its head."""
    grid = background.grid
    taken = np.zeros_like(inside.x)
    blood: dict[str, Array] = {}
    edema = np.zeros(grid.shape, np.float32)
    change_hu = np.zeros(grid.shape, np.float32)
    for bleed in made:
        bleed.blood = np.minimum(bleed.blood, 1 - taken)
        taken = taken + bleed.blood
        blood[bleed.subtype.name] = _to_native(inside.volume(bleed.blood), head.fine_affine, grid)
        # Share times HU is what averages over a slice; the quotient is the blood's own HU in the voxel.
        change_hu += _to_native(inside.volume(bleed.blood * (bleed.blood_hu - BRAIN_HU)), head.fine_affine, grid)
        if bleed.edema is not None:
            edema = _to_native(inside.volume(bleed.edema * (1 - taken)), head.fine_affine, grid)
    total = sum(blood.values(), np.zeros(grid.shape, np.float32))
    image_hu = _mixed(background, head, total, change_hu, edema)
    label = label_of(blood, grid.shape)
    truth = {
        "background": background.case_id,
        "age": None,
        "tilt_deg": round(grid.tilt_deg, 4),
        "slice_mm": round(grid.slice_spacing_mm, 4),
    } | volumes_of(blood, label, edema, grid)
    scan = Scan(case_id, image_hu, grid, background.forms, background.source, flags=background.flags)
    brain = head.brain | (label > 0)
    boxes = boxes_of_mask(case_id, NativeMask(label, grid), subtypes=True, regions=False)
    return PhantomCase(scan, label, (edema >= 0.5) & (label == 0), brain, boxes, truth)


@lru_cache(maxsize=1)
def find_head(scan: Scan) -> RealHead:
    """Estimate the inside of the skull of a real scan and a frame like that of `anatomy` in it.

    Soft tissue that survives an erosion wider than the openings of the skull, largest part, grown back.

    Raises:
        ReadError: what is found has not the volume of a brain.
    """
    coarse, coarse_affine = _to_ras(scan, COARSE_MM)
    smooth = ndimage.gaussian_filter(coarse, 0.7)
    soft = (smooth > SOFT_HU[0]) & (smooth < SOFT_HU[1])
    core = ndimage.distance_transform_edt(soft, sampling=COARSE_MM) > NECK_MM
    parts, count = ndimage.label(core)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = parts == sizes.argmax() if count else np.zeros_like(core)
    grown = ndimage.distance_transform_edt(~largest, sampling=COARSE_MM) <= NECK_MM + COARSE_MM
    brain = ndimage.binary_closing(grown & soft, iterations=3) & (smooth < SOFT_HU[1])
    brain = ndimage.binary_fill_holes(brain)  # gas and calcification lie in the brain, sinuses do not
    volume_ml = float(brain.sum()) * COARSE_MM**3 / 1000
    if not BRAIN_ML[0] <= volume_ml <= BRAIN_ML[1]:
        raise ReadError(
            f"{scan.case_id}: {volume_ml:.0f} mL found inside the skull, expected {BRAIN_ML[0]:g} to {BRAIN_ML[1]:g}. "
            "Give a CT of a whole head, in HU, with its skull."
        )
    inner = ndimage.distance_transform_edt(brain, sampling=COARSE_MM)
    outer = ndimage.distance_transform_edt(~brain, sampling=COARSE_MM)
    depth = (inner - outer).astype(np.float32) - np.where(brain, 1, -1) * np.float32(COARSE_MM / 2)
    weight = ndimage.gaussian_filter(brain.astype(np.float32), TREND_MM / COARSE_MM)
    trend = ndimage.gaussian_filter(np.where(brain, coarse, 0), TREND_MM / COARSE_MM) / np.maximum(weight, 1e-3)
    inside, fine_affine = _interior(depth, brain, coarse_affine)
    native = _to_native(brain.astype(np.float32), coarse_affine, scan.grid) >= 0.5
    return RealHead(inside, fine_affine, trend.astype(np.float32), coarse_affine, native)


def _interior(depth: Array, brain: NDArray[np.bool_], coarse_affine: Affine) -> tuple[Interior, Affine]:
    """Points of the cavity at 1 mm, from the depth at 2 mm; origin under the vertex, midway between the sides."""
    box = ndimage.find_objects(brain.view(np.uint8))[0]
    low = np.array([max(cut.start - 1, 0) for cut in box])
    high = np.array([min(cut.stop + 1, n) for cut, n in zip(box, brain.shape, strict=True)])
    cropped = depth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    steps = int(COARSE_MM / FINE_MM)
    shape = (
        (cropped.shape[0] - 1) * steps + 1,
        (cropped.shape[1] - 1) * steps + 1,
        (cropped.shape[2] - 1) * steps + 1,
    )
    fine = ndimage.affine_transform(cropped, np.full(3, 1 / steps), output_shape=shape, order=1, output=np.float32)
    fine_affine = np.diag([FINE_MM] * 3 + [1.0])
    fine_affine[:3, 3] = coarse_affine[:3, 3] + COARSE_MM * low
    upper = brain[:, :, box[2].stop - int(80 / COARSE_MM) : box[2].stop]
    sides = ndimage.find_objects(upper.view(np.uint8))[0]
    middle = [coarse_affine[a, 3] + COARSE_MM * (sides[a].start + sides[a].stop - 1) / 2 for a in (0, 1)]
    top = coarse_affine[2, 3] + COARSE_MM * (box[2].stop - 1)
    origin = np.array([middle[0], middle[1] + 8, top - VERTEX_MM])
    index = np.flatnonzero(fine > -0.5)
    ijk = np.unravel_index(index, shape)
    x, y, z = ((n * FINE_MM + fine_affine[a, 3] - origin[a]).astype(np.float32) for a, n in enumerate(ijk))
    below = (z < tentorium_height(x, y)) & (y < -6 - 0.62 * np.abs(x))
    texture = Texture(np.random.default_rng(0))
    return Interior(shape, index, x, y, z, fine.reshape(-1)[index], FINE_MM**3 / 1000, below, texture), fine_affine


def _bleed(inside: Interior, plan: bl.Plan, rng: np.random.Generator) -> bl.Bleed:
    reachable = smoothstep(inside.z, LOWEST_MM - 4, LOWEST_MM)
    if plan.subtype is not Subtype.IPH:
        half = share(plan.side * inside.x - 1.5) * ~inside.infratentorial * reachable
        return bl.extra_axial(inside, plan, rng, half)[0]
    sites = [site for site in bl.iph_sites(plan, rng) if site[2] > LOWEST_MM + 15] or [(plan.side * 26.0, 2.0, 4.0)]
    tissue = smoothstep(inside.depth_mm, 0.5, 3) * reachable
    if len(sites) == 1:
        tissue = tissue * smoothstep(np.sign(sites[0][0]) * inside.x, -3, 0)
    white = smoothstep(inside.depth_mm, 4, 10)
    return bl.intraparenchymal(inside, plan, rng, tissue, white, sites)


def _mixed(scan: Scan, head: RealHead, blood: Array, change_hu: Array, edema: Array) -> NDArray[np.generic]:
    """Replace the scan's detail by that of blood and edema; its noise and its slow trend (cupping) stay."""
    used = ndimage.find_objects(((blood + edema) > 0).view(np.uint8))
    image_hu = scan.image_hu.copy()
    if not used:
        return image_hu
    margin = 4
    box = tuple(slice(max(c.start - margin, 0), c.stop + margin) for c in used[0])
    hu = scan.image_hu[box].astype(np.float32)
    brain = head.brain[box] | (blood[box] > 0)
    # Noise is what a blur of a millimetre or so takes away; the blur sees no bone.
    sigma = [1.2 / edge if axis != scan.grid.slice_axis else 0 for axis, edge in enumerate(scan.grid.edge_mm)]
    weight = ndimage.gaussian_filter(brain.astype(np.float32), sigma)
    detail = ndimage.gaussian_filter(np.where(brain, hu, 0), sigma) / np.maximum(weight, 1e-3)
    trend = _to_native(head.trend_hu, head.coarse_affine, scan.grid)[box]
    changed = hu + blood[box] * (trend - detail) + change_hu[box]
    changed += edema[box] * np.minimum(trend - detail + bl.EDEMA_HU - BRAIN_HU, 0)
    touched = (blood[box] + edema[box]) > 0
    if np.issubdtype(image_hu.dtype, np.integer):
        changed = np.rint(changed)
    image_hu[box][touched] = changed[touched].astype(image_hu.dtype)
    return image_hu


def _to_ras(scan: Scan, spacing_mm: float) -> tuple[Array, Affine]:
    """The scan on an upright RAS grid that holds it whole, linear between its voxels; air outside."""
    corners = scan.grid.corners_mm()
    low, high = corners.min(axis=0), corners.max(axis=0)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = low
    shape = tuple(int(n) for n in np.floor((high - low) / spacing_mm) + 1)
    to_scan = np.linalg.inv(scan.grid.affine) @ affine
    hu = ndimage.affine_transform(
        scan.image_hu, to_scan[:3, :3], to_scan[:3, 3], shape, output=np.float32, order=1, cval=-1000
    )
    return hu, affine


def _to_native(volume: Array, affine: Affine, grid: Grid) -> Array:
    """Mean of a volume over each slice's thickness at the voxels of a grid; 0 outside the volume."""
    used = ndimage.find_objects((volume != 0).view(np.uint8))
    result = np.zeros(grid.shape, np.float32)
    if not used:
        return result
    to_grid = np.linalg.inv(grid.affine) @ affine
    ends = np.stack(np.meshgrid(*[(c.start - 1, c.stop) for c in used[0]], indexing="ij"), -1).reshape(8, 3)
    corners = ends @ to_grid[:3, :3].T + to_grid[:3, 3]
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, np.array(grid.shape) - 1)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2, low + 1, grid.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    to_volume = np.linalg.inv(affine) @ grid.affine
    count = max(1, round(grid.slice_spacing_mm / SUBSLICE_MM))
    for number in range(count):
        start = low.astype(np.float64)
        start[grid.slice_axis] += (number + 0.5) / count - 0.5
        offset = to_volume[:3, :3] @ start + to_volume[:3, 3]
        result[box] += ndimage.affine_transform(
            volume, to_volume[:3, :3], offset, tuple(high - low), output=np.float32, order=1
        )
    result[box] /= count
    return result
