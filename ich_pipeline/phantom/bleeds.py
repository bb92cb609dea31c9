"""Hemorrhages as shares of blood at the points inside a skull.

Every shape is a field that orders the points by when blood would reach them; the field is cut at the level that holds
the drawn volume. Volume and shape are drawn apart; walls, falx and tentorium hold blood back by weighing nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.labels import Subtype
from ich_pipeline.phantom.anatomy import Brain, Interior, Room
from ich_pipeline.phantom.fields import Array, share, smoothstep
from ich_pipeline.phantom.settings import PhantomSettings

# Median volume and log-normal spread of clinical series, rounded; large ones are rarer than in those, being unsurvived.
VOLUME_ML = {
    Subtype.EDH: (18.0, 1.0),
    Subtype.IPH: (12.0, 1.25),
    Subtype.IVH: (6.0, 1.1),
    Subtype.SAH: (7.0, 1.0),
    Subtype.SDH: (24.0, 1.0),
}
# A subtype that holds more than this has killed, or does not fit its space.
MOST_ML = {Subtype.IVH: 60.0, Subtype.SAH: 45.0}
ACUTE_HU = (58.0, 76.0)
LATE_HU = (45.0, 58.0)
ISODENSE_HU = (36.0, 46.0)
LATE_CHANCE = 0.25
CAST_CHANCE = 0.35
ISODENSE_CHANCE = 0.2
EDEMA_HU = 20


@dataclass(eq=False)
class Bleed:
    """One hemorrhage: share of blood and its HU at each point, and share of edema around it."""

    subtype: Subtype
    blood: Array
    blood_hu: Array
    edema: Array | None = None


@dataclass(frozen=True)
class Plan:
    """What one kind of hemorrhage is to be: total volume, side (1 right, -1 left), HU and age."""

    subtype: Subtype
    volume_ml: float
    side: int
    blood_hu: float
    stage: str


def plan_bleeds(rng: np.random.Generator, settings: PhantomSettings, allowed: Sequence[Subtype]) -> list[Plan]:
    """Draw which subtypes a bleeding scan holds, how much of each and how old.

    Args:
        allowed: subtypes that the head can take; others keep their weight out of the draw.
    """
    weights = np.array([settings.subtype_weights.get(s.name, 0.0) for s in allowed])
    kinds = 1 + int(rng.choice(len(settings.kinds_probability), p=np.array(settings.kinds_probability)))
    kinds = min(kinds, int((weights > 0).sum()))
    chosen = rng.choice(len(allowed), size=kinds, replace=False, p=weights / weights.sum())
    side = int(rng.choice((-1, 1)))
    plans = []
    for number in sorted(chosen):
        subtype = allowed[number]
        median, spread = VOLUME_ML[subtype]
        low, high = settings.volume_ml
        volume = float(np.clip(median * np.exp(spread * rng.normal()), low, min(high, MOST_ML.get(subtype, high))))
        late = rng.random() < LATE_CHANCE
        stage, hu = ("subacute", LATE_HU) if late else ("acute", ACUTE_HU)
        if subtype is Subtype.SDH and rng.random() < ISODENSE_CHANCE:
            stage, hu = "isodense", ISODENSE_HU
        if subtype is Subtype.SAH:
            hu = (hu[0] - 2, hu[1] - 6)  # diluted by CSF
        own_side = side if rng.random() < 0.75 else -side
        plans.append(Plan(subtype, volume, own_side, float(rng.uniform(*hu)), stage))
    return plans


def cut_at_volume(order: Array, weight: Array, volume_ml: float, voxel_ml: float, limit: float) -> float:
    """Level of `order` (mm) below which `weight` adds up to a volume, by a histogram; at most `limit`."""
    inside = (weight > 0) & (order < limit)
    if not inside.any():
        return limit
    low = float(order[inside].min())
    counts, edges = np.histogram(order[inside], bins=800, range=(low, limit), weights=weight[inside])
    reached = np.searchsorted(np.cumsum(counts) * voxel_ml, volume_ml)
    return float(edges[min(int(reached) + 1, len(edges) - 1)])


def extra_axial(inside: Interior, plan: Plan, rng: np.random.Generator, hemisphere: Array) -> tuple[Bleed, Array]:
    """A subdural crescent or epidural lens on one side, and its thickness above each point in mm.

    Args:
        hemisphere: (n,) share of each point that blood on the plan's side may fill: falx and tentorium hold it back.
    """
    if plan.subtype is Subtype.SDH:
        blood, thickness = _crescent(inside, plan, rng, hemisphere)
    else:
        blood, thickness = _lens(inside, plan, rng, hemisphere)
    swirl = 2.0 * inside.noise(16) * (2.2 if rng.random() < 0.15 else 1.0)  # fresh blood that has not clotted
    hu = plan.blood_hu + swirl
    if plan.subtype is Subtype.SDH and rng.random() < 0.15:  # cells settle in an old collection that bled again
        hu += 14 * (smoothstep(-inside.y, -10, 40) - 0.6)
    return Bleed(plan.subtype, blood, hu.astype(np.float32)), thickness


def _crescent(inside: Interior, plan: Plan, rng: np.random.Generator, hemisphere: Array) -> tuple[Array, Array]:
    """Blood that follows the skull over most of a hemisphere, sutures or not, and stops at the falx."""
    x, y, z = inside.x, inside.y, inside.z
    radius = np.maximum(np.sqrt(x * x + y * y + z * z), 1)
    towards = np.array([plan.side * rng.uniform(0.75, 1.0), rng.uniform(-0.5, 0.5), rng.uniform(0.0, 0.55)])
    towards /= np.linalg.norm(towards)
    angle = np.arccos(np.clip((x * towards[0] + y * towards[1] + z * towards[2]) / radius, -1, 1))
    thick_mm = rng.uniform(2.2, 3.6) * np.sqrt(1 + plan.volume_ml / 50)
    reach = min(np.sqrt(1000 * plan.volume_ml / (np.pi * thick_mm)) / 66, 1.35)  # angle, on a skull of 72 mm radius
    profile = np.exp(-((angle / reach) ** 4)) * (1 + 0.18 * inside.noise(38))
    profile *= smoothstep(plan.side * x, 0, 14) * ~inside.infratentorial
    return _layer(inside, plan.volume_ml, hemisphere, lambda thickest: thickest * profile * (profile > 0.04), thick_mm)


def _lens(inside: Interior, plan: Plan, rng: np.random.Generator, hemisphere: Array) -> tuple[Array, Array]:
    """Blood that strips the dura off the bone: a sharp biconvex cap whose edge is held by the sutures around it."""
    x, y, z = inside.x, inside.y, inside.z
    towards = np.array([plan.side * rng.uniform(0.6, 1.0), rng.uniform(-0.75, 0.75), rng.uniform(-0.15, 0.7)])
    towards /= np.linalg.norm(towards)
    along = x * towards[0] + y * towards[1] + z * towards[2]
    off_axis = np.sqrt(np.maximum(x * x + y * y + z * z - along**2, 0)) * (1 + 0.05 * inside.noise(45))
    beneath = along > 0
    aspect = rng.uniform(1.3, 2.3)  # half width against thickness
    # A paraboloid cap of thickness t and half width a t holds pi a^2 t^3 / 2.
    start_mm = (2000 * plan.volume_ml / (np.pi * aspect**2)) ** (1 / 3)

    def cap(thickest: float) -> Array:
        return thickest * (1 - (off_axis / (aspect * thickest)) ** 2) * beneath

    return _layer(inside, plan.volume_ml, hemisphere, cap, start_mm)


def _layer(
    inside: Interior, volume_ml: float, allowed: Array, shape: Callable[[float], Array], start_mm: float
) -> tuple[Array, Array]:
    """Blood below the skull down to `shape(thickest)`, with the thickness that holds the volume; and that thickness."""
    thickest = float(start_mm)
    for _ in range(6):
        thickness = np.maximum(shape(thickest), 0).astype(np.float32)
        blood = share(thickness - inside.depth_mm) * (thickness > 0.2) * allowed * inside.share
        held_ml = float(blood.sum(dtype=np.float64)) * inside.voxel_ml
        if abs(held_ml - volume_ml) < 0.03 * volume_ml:
            break
        thickest *= float(np.clip(np.sqrt(volume_ml / max(held_ml, 1e-3)), 0.5, 1.8))
    return blood, thickness


def subarachnoid_reach(inside: Interior, plan: Plan, rng: np.random.Generator) -> tuple[Array, Array]:
    """Where a subarachnoid bleed spreads: its order field in mm, and how much it widens the space it fills."""
    aneurysm = rng.random() < 0.6
    if aneurysm:
        centre = np.array([plan.side * rng.uniform(0, 26), rng.uniform(-6, 16), rng.uniform(-24, -10)])
    else:
        towards = np.array([plan.side * rng.uniform(0.3, 1), rng.uniform(-0.9, 0.9), rng.uniform(0.1, 0.9)])
        centre = towards / np.linalg.norm(towards) * (58, 70, 62)
    distance = np.sqrt((inside.x - centre[0]) ** 2 + (inside.y - centre[1]) ** 2 + (inside.z - centre[2]) ** 2)
    order = (distance + 7 * inside.noise(32) + 5 * inside.noise(14)).astype(np.float32)
    reach = 16 + 11 * plan.volume_ml**0.42
    return order, (rng.uniform(1.0, 2.2) * smoothstep(reach - order, 0, 12)).astype(np.float32)


def subarachnoid(inside: Interior, brain: Brain, plan: Plan, order: Array, free: Array) -> Bleed:
    """Blood in sulci and cisterns, not in ventricles, thinning out where CSF has washed it away."""
    space = np.maximum(brain.csf - brain.ventricle, 0) * inside.share * free
    level = cut_at_volume(order, space, plan.volume_ml, inside.voxel_ml, 85)
    blood = space * smoothstep(level - order, -3, 3)
    washed = np.clip(1 - 0.12 * np.abs(inside.noise(18)) - 0.1 * smoothstep(order - level, -12, 0), 0.6, 1)
    return Bleed(plan.subtype, blood, (7 + (plan.blood_hu - 7) * washed).astype(np.float32))


def intraventricular(
    inside: Interior,
    brain: Brain,
    plan: Plan,
    rng: np.random.Generator,
    gravity: NDArray[np.float64],
    free: Array,
    cast: bool,
) -> Bleed:
    """Blood in the ventricles: settled to a level, or a cast that fills one lateral ventricle first.

    Args:
        gravity: unit vector in the head's frame that points down in the scanner, to the back of a supine head.
        cast: clotted in place, not settled.
    """
    x, y, z = inside.x, inside.y, inside.z
    space = np.where(brain.ventricle > 0.02, brain.ventricle * inside.share * free, 0).astype(np.float32)
    height = -(x * gravity[0] + y * gravity[1] + z * gravity[2]).astype(np.float32)
    if cast:
        order = 0.35 * height + 4 * inside.noise(17) + 16 * (x * plan.side < -1) + 6 * (np.abs(x) < 4)
    else:
        # Each horn drains into its own lowest point; the side with less lags by its share.
        order = height + np.where(x * plan.side > 0, 0, rng.uniform(0, 14)) + 5 * (np.abs(x) < 3)
    order = order.astype(np.float32)
    most_ml = 0.92 * float(space.sum()) * inside.voxel_ml
    level = cut_at_volume(order, space, min(plan.volume_ml, most_ml), inside.voxel_ml, float(order.max()) + 1)
    blood = space * share(level - order if not cast else (level - order) / 2)
    hu = plan.blood_hu + (2 * inside.noise(12) if cast else 5 * smoothstep(level - order, 0, 25))
    return Bleed(plan.subtype, blood.astype(np.float32), hu.astype(np.float32))


def intraparenchymal(
    inside: Interior,
    plan: Plan,
    rng: np.random.Generator,
    tissue: Array,
    white: Array,
    sites: Sequence[Sequence[float]],
) -> Bleed:
    """One or more clots with lobes and ragged edges, each in a rim of edema that prefers white matter.

    Args:
        tissue: (n,) share of each point that a clot may replace.
        white: (n,) share of white matter.
        sites: centre of each clot in mm; the first holds most of the volume.
    """
    parts = rng.dirichlet(np.r_[6.0, np.ones(len(sites) - 1)]) * plan.volume_ml
    parts[::-1].sort()
    blood = np.zeros(inside.x.shape, np.float32)
    edema = np.zeros_like(blood)
    for site, volume_ml in zip(sites, np.maximum(parts, 0.15), strict=True):
        radius = (3000 * volume_ml / (4 * np.pi)) ** (1 / 3)
        rim = float(rng.uniform(1.5, 9.0)) * min(1.0, radius / 12) * (1.3 if plan.stage == "subacute" else 1.0)
        reach = 3.2 * radius + rim + 5
        near = np.flatnonzero(
            (np.abs(inside.x - site[0]) < reach)
            & (np.abs(inside.y - site[1]) < reach)
            & (np.abs(inside.z - site[2]) < reach)
        )
        order = _lobes(inside, near, np.asarray(site, np.float32), radius, rng)
        free = tissue[near] * (1 - blood[near])
        level = cut_at_volume(order, free, volume_ml, inside.voxel_ml, 2.2 * radius)
        blood[near] += share(level - order) * free
        px, py, pz = inside.x[near], inside.y[near], inside.z[near]
        width = rim * (0.35 + 0.65 * white[near]) * np.clip(1 + 0.5 * inside.texture(px, py, pz, 16), 0, 2)
        swollen = smoothstep(level + width - order, -0.8, 0.8) * tissue[near]
        edema[near] = np.maximum(edema[near], swollen)
    edema *= 1 - blood
    hu = plan.blood_hu + 2.5 * inside.noise(11) + (4 * inside.noise(22) if rng.random() < 0.3 else 0)
    return Bleed(plan.subtype, blood, hu.astype(np.float32), edema)


def _lobes(inside: Interior, near: NDArray[np.intp], site: Array, radius: float, rng: np.random.Generator) -> Array:
    """Distance from a union of one to five tilted ellipsoids with a rough surface, in mm."""
    p = np.stack([inside.x[near], inside.y[near], inside.z[near]]) - site[:, None]
    p = p.astype(np.float32)
    total = np.zeros(near.shape, np.float32)
    sharpness = np.float32(5 / radius)
    count = 1 + int(rng.binomial(4, np.clip(0.15 + radius / 60, 0, 0.7)))
    for lobe in range(count):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        stretch = np.exp(rng.normal(0, 0.24, 3))
        size = radius * (1.0 if lobe == 0 else float(rng.uniform(0.35, 0.8)))
        away = rng.normal(size=3)
        away *= 0.0 if lobe == 0 else radius * float(rng.uniform(0.6, 1.15)) / np.linalg.norm(away)
        inverse = (turn / (size * stretch / np.cbrt(stretch.prod()))).T.astype(np.float32)
        q = _matmul3(inverse, p - away[:, None].astype(np.float32))
        distance = (np.sqrt(np.einsum("ij,ij->j", q, q)) - 1) * np.float32(size)
        total += np.exp(-sharpness * np.clip(distance, -2 * radius, 3 * radius))
    order = -np.log(total) / sharpness
    x, y, z = inside.x[near], inside.y[near], inside.z[near]
    rough = float(rng.uniform(0.06, 0.2)) * radius
    order += rough * inside.texture(x, y, z, float(np.clip(1.1 * radius, 7, 26)))
    order += 0.5 * rough * inside.texture(x, y, z, float(np.clip(0.5 * radius, 4, 12)))
    return order.astype(np.float32)


def _matmul3(matrix: Array, points: Array) -> Array:
    """3x3 times (3, n), written out: BLAS may sum in another order under another load."""
    return np.stack([row[0] * points[0] + row[1] * points[1] + row[2] * points[2] for row in matrix])


def iph_sites(plan: Plan, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Where intraparenchymal bleeds sit: putamen, thalamus, lobes, cerebellum, pons, about as often as in patients."""
    side = plan.side
    kind = rng.choice(["putamen", "thalamus", "lobar", "cerebellum", "pons"], p=[0.3, 0.16, 0.38, 0.1, 0.06])
    if kind == "pons" and plan.volume_ml > 12:
        kind = "thalamus"
    if kind == "cerebellum" and plan.volume_ml > 35:
        kind = "lobar"
    lobes = [(32, 42, 16), (48, -8, -20), (38, -30, 42), (26, -66, 14), (34, 8, 44), (46, -42, 4), (18, 56, -6)]
    middle = {
        "putamen": (26, 2, 4),
        "thalamus": (13, -14, 5),
        "lobar": lobes[int(rng.integers(len(lobes)))],
        "cerebellum": (20, -60, -44),
        "pons": (1, -20, -34),
    }[str(kind)]
    spread = {"lobar": 7.0, "putamen": 4.0, "cerebellum": 5.0}.get(str(kind), 2.0)
    first = np.array(middle) * (side, 1, 1) + rng.normal(0, spread, 3)
    sites = [(float(first[0]), float(first[1]), float(first[2]))]
    if kind == "lobar" and rng.random() < 0.35:  # contusions come in groups
        for _ in range(int(rng.integers(1, 5))):
            other = np.array(lobes[int(rng.integers(len(lobes)))]) * (side if rng.random() < 0.7 else -side, 1, 1)
            other = other + rng.normal(0, 6, 3)
            sites.append((float(other[0]), float(other[1]), float(other[2])))
    return sites


def mix_bleeds(hu: Array, bleeds: Sequence[Bleed]) -> None:
    """Paint edema, then blood, into HU in place. Where bleeds meet, the first keeps its share."""
    for bleed in bleeds:
        if bleed.edema is not None:
            low = np.minimum(hu, np.float32(EDEMA_HU) + 0.15 * (hu - EDEMA_HU))
            hu += bleed.edema * (low - hu)
    taken = np.zeros_like(hu)
    bare_hu = hu.copy()
    for bleed in bleeds:
        bleed.blood = np.minimum(bleed.blood, 1 - taken)
        taken += bleed.blood
        hu += bleed.blood * (bleed.blood_hu - bare_hu)


def no_room(inside: Interior) -> Room:
    """A skull in which nothing displaces the brain."""
    return Room(np.zeros_like(inside.x), np.zeros_like(inside.x))
