"""The hemorrhage of one patient, as a mask without its scan, in the head of another: shapes that no generator drew.

Mask and head meet first by what is known of head scans: both fields of view are centred on a head and end above its
vertex. A rigid registration then moves the mask until as little as possible of it lies outside the skull's inside.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from ich_pipeline.errors import ReadError
from ich_pipeline.geometry import Affine
from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom.anatomy import Interior
from ich_pipeline.phantom.background import RealHead, bled_into, find_head
from ich_pipeline.phantom.fields import Array, Texture, smoothstep
from ich_pipeline.phantom.settings import PhantomCase
from ich_pipeline.records import NativeMask, Scan

BLOOD_HU = (50.0, 78.0)
EDEMA_CHANCE, EDEMA_MM, EDEMA_FROM_ML = 0.6, (1.5, 8.0), 2.0
SKULL_MM = 25.0  # that the top slice of a scan lies above the inner vertex, in the middle
SAMPLE = 4000  # points of a mask that its registration looks at
# A millimetre outside the skull counts as much as this much of a shift, or a turn, from where the scan had it.
TRUST_MM, TRUST_DEG = 25.0, 8.0
MOST_CUT = 0.35


@dataclass(frozen=True)
class Placement:
    """Where a mask went.

    Attributes:
        shift_mm, turn_deg: lengths of the registration's translation and rotation.
        cut_share: of the mask's volume that lay outside the skull's inside and was cut off.
    """

    shift_mm: float
    turn_deg: float
    cut_share: float


def transplant(case_id: str, mask: NativeMask, background: Scan, seed: int) -> tuple[PhantomCase, Placement]:
    """Put the hemorrhage of a mask into a real scan of another head.

    Args:
        mask: above 0 is blood.
        background: a scan without hemorrhage, with even slices.
        seed: of the blood's HU, its texture and edema.

    Returns:
        The case, whose label has the value of IPH whatever kind of bleed the mask showed, and where the mask went.

    Raises:
        ReadError: the mask is empty or fits the head badly, or no brain is found in the background.
    """
    if not mask.values.any():
        raise ReadError(f"{case_id}: the mask is empty, expected a hemorrhage. Leave it out.")
    head = find_head(background)
    rng, texture_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    inside = replace(head.inside, texture=Texture(texture_rng))
    to_mask, shift_mm, turn_deg = _register(mask, head)
    points = np.stack([inside.x, inside.y, inside.z]).astype(np.float64) + _origin_mm(head)[:, None]
    at = to_mask[:3, :3] @ points + to_mask[:3, 3:]
    blood = ndimage.map_coordinates((mask.values > 0).astype(np.float32), at, order=1, output=np.float32)
    blood *= inside.share
    held_ml = float(blood.sum(dtype=np.float64)) * inside.voxel_ml
    cut = 1 - held_ml / mask.grid.foreground_ml(mask.values)
    if cut > MOST_CUT:
        raise ReadError(f"{case_id}: {cut:.0%} of the mask lie outside the skull, expected at most {MOST_CUT:.0%}.")
    hu = np.float32(rng.uniform(*BLOOD_HU)) + 2.5 * inside.noise(11)
    with_edema = held_ml >= EDEMA_FROM_ML and rng.random() < EDEMA_CHANCE
    edema = _rim(inside, blood, float(rng.uniform(*EDEMA_MM))) if with_edema else None
    bleed = bl.Bleed(Subtype.IPH, blood, hu.astype(np.float32), edema)
    case = bled_into(case_id, background, head, inside, [bleed])
    case.truth.update(seed=seed, bleeds=[])
    return case, Placement(shift_mm, turn_deg, round(max(cut, 0.0), 4))


def _origin_mm(head: RealHead) -> NDArray[np.float64]:
    """RAS mm of the scan at the origin of the head's own frame."""
    first = np.array(np.unravel_index(int(head.inside.index[0]), head.inside.shape))
    at = head.fine_affine[:3, :3] @ first + head.fine_affine[:3, 3]
    return np.asarray(at - [head.inside.x[0], head.inside.y[0], head.inside.z[0]], dtype=np.float64)


def _register(mask: NativeMask, head: RealHead) -> tuple[Affine, float, float]:
    """(4, 4) from RAS mm of the head's scan to voxels of the mask; length of the shift, and angle of the turn."""
    corners = mask.grid.corners_mm()
    middle, top = corners.mean(axis=0), corners[:, 2].max()
    inside, origin = head.inside, _origin_mm(head)
    middle_of_head = (0.0, float(inside.y.min() + inside.y.max()) / 2)
    goal = origin + np.array([*middle_of_head, float(inside.z.max()) + SKULL_MM])
    start = goal - [middle[0], middle[1], top]
    voxels = np.argwhere(mask.values > 0)
    step = max(1, len(voxels) // SAMPLE)
    points = mask.grid.to_mm(voxels[::step]) + start
    pivot = points.mean(axis=0)
    distance = ndimage.distance_transform_edt(inside.volume(inside.share) < 0.5).astype(np.float32)
    to_fine = np.linalg.inv(head.fine_affine)

    def moved(parameters: NDArray[np.float64], given: NDArray[np.float64]) -> NDArray[np.float64]:
        turn = _rotation(parameters[3:])
        return np.asarray((given - pivot) @ turn.T + pivot + parameters[:3])

    def cost(parameters: NDArray[np.float64]) -> float:
        at = moved(parameters, points) @ to_fine[:3, :3].T + to_fine[:3, 3]
        # Beyond the grid the distance goes on growing: its nearest voxel's and the way to it.
        inner = np.clip(at, 0, np.array(distance.shape) - 1)
        beyond = np.abs(at - inner).sum(axis=1)
        outside = ndimage.map_coordinates(distance, inner.T, order=1, output=np.float32) + beyond
        trust = np.sum((parameters[:3] / TRUST_MM) ** 2) + np.sum((np.degrees(parameters[3:]) / TRUST_DEG) ** 2)
        return float(outside.mean() + 0.5 * trust)

    best = optimize.minimize(cost, np.zeros(6), method="Powell", options={"maxiter": 12, "xtol": 0.02, "ftol": 1e-4}).x
    turn = _rotation(best[3:])
    forward = np.eye(4)
    forward[:3, :3] = turn
    forward[:3, 3] = turn @ (start - pivot) + pivot + best[:3]
    to_mask = np.linalg.inv(mask.grid.affine) @ np.linalg.inv(forward)
    angle = float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))
    return to_mask, round(float(np.linalg.norm(best[:3])), 2), round(angle, 2)


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.spatial.transform import Rotation

    return np.asarray(Rotation.from_euler("xyz", angles).as_matrix())


def _rim(inside: Interior, blood: Array, width_mm: float) -> Array:
    """Share of edema around blood: ragged, and none near the skull."""
    away = ndimage.distance_transform_edt(inside.volume(blood) < 0.5).reshape(-1)[inside.index].astype(np.float32)
    ragged = width_mm * np.clip(1 + 0.5 * inside.noise(16), 0, 2)
    rim = smoothstep(ragged - away, -0.8, 0.8) * smoothstep(inside.depth_mm, 2, 6)
    return (rim * (1 - blood)).astype(np.float32)
