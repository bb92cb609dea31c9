"""What heads and scans hold besides anatomy and blood: findings that are no hemorrhage, and scanners that differ.

Only phantoms with `PhantomSettings.varied` have any of it. Chances are much higher than in patients: a network that is
to leave these alone has to see them often. HU of calcium, contrast medium and metal are those of the usual teaching
tables at 120 kV; chances, places and sizes are drawn widely on purpose and claim nothing about populations.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom.anatomy import AIR, ORIGIN_MM, SHAPE, Brain, Interior, Person, tentorium_height
from ich_pipeline.phantom.bleeds import Bleed, Plan
from ich_pipeline.phantom.fields import Array, capsule, ellipsoid, share, smoothstep
from ich_pipeline.phantom.scanner import Degradation, Protocol
from ich_pipeline.phantom.settings import PhantomSettings

Point = tuple[float, float, float]

METAL_HU = (3000.0, 14000.0)
# Blood from hyperacute in anaemia to dense clot.
BLOOD_HU = (40.0, 95.0)
SMALL_CHANCE, SMALL_ML = 0.3, 10.0
ALONG_MENINGES_CHANCE, LEVEL_CHANCE = 0.08, 0.08
# Circle of Willis and the larger arteries of the right side, (start, end, radii) in mm; those of the left mirror them.
ARTERIES: tuple[tuple[Point, Point, tuple[float, float]], ...] = (
    ((0, -14, -48), (0, -9, -25), (1.8, 1.6)),
    ((0, -9, -25), (13, -18, -20), (1.2, 1.1)),
    ((13, -18, -20), (19, -34, -12), (1.1, 0.8)),
    ((9, 2, -30), (9, 4, -20), (2.1, 1.9)),
    ((9, 4, -20), (29, 6, -17), (1.6, 1.3)),
    ((29, 6, -17), (38, 2, -6), (1.3, 0.9)),
    ((9, 4, -20), (2, 13, -17), (1.2, 1.0)),
    ((2, 13, -17), (1.5, 34, -3), (1.0, 0.9)),
    ((1.5, 34, -3), (1.5, 28, 20), (0.9, 0.7)),
)
DEEP_PAIRS: tuple[Point, ...] = ((20, 3, 2), (12, -14, 4), (16, -58, -42), (23, -42, 11), (33, -45, -10))


def varied_person(person: Person, rng: np.random.Generator) -> Person:
    """The same head with tissue of other HU, thicker or denser meninges, and more or less calcification."""
    shift = float(rng.normal(0, 1.5))
    contrast = float(rng.uniform(0.6, 1.4))
    middle = 33.0 + shift
    names = ("pineal", "choroid", "basal_ganglia", "falx", "carotid")
    calcified = frozenset(name for name in names if name in person.calcified or rng.random() < 0.3)
    return replace(
        person,
        csf_hu=float(rng.uniform(2, 14)),
        grey_hu=middle + 5.2 * contrast,
        white_hu=middle - 5.2 * contrast,
        brainstem_hu=middle + float(rng.uniform(-4, 2)),
        dura_hu=float(rng.uniform(45, 75)),
        venous_hu=float(rng.uniform(45, 82)),
        dura_mm=float(max(0.0, rng.normal(0, 0.5))),
        bone_hu=float(rng.uniform(900, 1900)),
        marrow_hu=float(rng.uniform(200, 900)),
        skull_mm=float(rng.uniform(3.5, 11.0)),
        scalp_mm=float(rng.uniform(2.5, 11.0)),
        calcified=calcified,
        calcium=float(np.exp(rng.uniform(np.log(0.3), np.log(3)))),
        calcium_size=float(rng.uniform(0.6, 1.9)),
        leukoaraiosis=float(np.clip(person.leukoaraiosis + rng.normal(0, 0.4), 0, 1.3)),
    )


def varied_plans(plans: Sequence[Plan], settings: PhantomSettings, rng: np.random.Generator) -> list[Plan]:
    """The same bleeds, some of them small, with blood of any density."""
    changed = []
    for plan in plans:
        low, high = settings.volume_ml
        volume = plan.volume_ml
        if rng.random() < SMALL_CHANCE:
            volume = float(np.exp(rng.uniform(np.log(max(low, 0.01)), np.log(min(SMALL_ML, high)))))
        hu = float(np.clip(plan.blood_hu + rng.normal(0, 6), *BLOOD_HU))
        changed.append(replace(plan, volume_ml=volume, blood_hu=hu))
    return changed


def add_findings(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Paint findings that are no hemorrhage into the HU of a brain, before it bleeds."""
    hu = brain.hu
    hu += np.float32(rng.uniform(0, 3.5)) * inside.noise(float(rng.uniform(25, 90)))
    # The skull's glare and the cupping below it.
    hu += np.float32(rng.uniform(0, 14)) * np.exp(-np.maximum(inside.depth_mm, 0) / np.float32(rng.uniform(2, 14)))
    for chance, paint in FINDINGS:
        if rng.random() < chance:
            paint(inside, brain, rng)


def _near(inside: Interior, low: Sequence[float], high: Sequence[float], reach: float) -> NDArray[np.intp]:
    keep = np.ones(inside.x.shape, bool)
    for axis, a, b in zip((inside.x, inside.y, inside.z), low, high, strict=True):
        keep &= (axis > a - reach) & (axis < b + reach)
    return np.flatnonzero(keep)


def _lump(
    inside: Interior, brain: Brain, centre: Sequence[float], size: Sequence[float], value: float, rough: float = 0.8
) -> None:
    """Paint an ellipsoid with an uneven surface."""
    near = _near(inside, centre, centre, max(size) + 3)
    x, y, z = inside.x[near], inside.y[near], inside.z[near]
    lump = ellipsoid(x, y, z, centre, size) + np.float32(rough) * inside.texture(x, y, z, 6)
    brain.hu[near] += share(lump) * (np.float32(value) - brain.hu[near])


def _rod(
    inside: Interior,
    brain: Brain,
    start: Sequence[float],
    end: Sequence[float],
    radii: tuple[float, float],
    value: float,
) -> None:
    low, high = np.minimum(start, end), np.maximum(start, end)
    near = _near(inside, low.tolist(), high.tolist(), max(radii) + 1)
    rod = share(capsule(inside.x[near], inside.y[near], inside.z[near], start, end, radii))
    brain.hu[near] += rod * (np.float32(value) - brain.hu[near])


def _somewhere(inside: Interior, rng: np.random.Generator, depth_mm: tuple[float, float]) -> Point:
    """A point of the cavity, at a depth below the inner table."""
    found = np.flatnonzero((inside.depth_mm > depth_mm[0]) & (inside.depth_mm < depth_mm[1]) & (inside.z > -60))
    one = found[int(rng.integers(found.size))]
    return float(inside.x[one]), float(inside.y[one]), float(inside.z[one])


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _specks(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Calcified granulomas, vessel walls, cavernomas: small, anywhere, faint or dense."""
    for _ in range(1 + int(rng.poisson(2))):
        size = _log_uniform(rng, 0.8, 5) * rng.uniform(0.6, 1.5, 3)
        _lump(inside, brain, _somewhere(inside, rng, (3, 90)), size.tolist(), _log_uniform(rng, 60, 900))


def _pair(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Faint calcification of both sides: as bright as blood, and only its twin tells."""
    place = np.array(DEEP_PAIRS[int(rng.integers(len(DEEP_PAIRS)))])
    size, value = rng.uniform(2, 7) * rng.uniform(0.6, 1.5, 3), _log_uniform(rng, 45, 130)
    for side in (-1, 1):
        centre = place * (side, 1, 1) + rng.normal(0, 1, 3)
        own = size * rng.uniform(0.75, 1.25)
        _lump(inside, brain, centre.tolist(), own.tolist(), value * float(rng.uniform(0.85, 1.15)))


def _plaque(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Calcified or ossified dura: a plate in the falx or tentorium, or a lump on the inner table."""
    kind = rng.choice(["falx", "tentorium", "table"])
    value = _log_uniform(rng, 90, 1100)
    if kind == "falx":
        centre = (0.0, float(rng.uniform(-60, 60)), float(rng.uniform(25, 60)))
        size = (float(rng.uniform(0.8, 2.5)), float(rng.uniform(3, 14)), float(rng.uniform(3, 10)))
    elif kind == "tentorium":
        x, y = float(rng.uniform(-40, 40)), float(rng.uniform(-70, -40))
        height = float(tentorium_height(np.array(x), np.array(y)))
        centre, size = (
            (x, y, height),
            (float(rng.uniform(3, 9)), float(rng.uniform(3, 9)), float(rng.uniform(0.7, 1.6))),
        )
    else:
        centre, round_ = _somewhere(inside, rng, (0, 2.5)), float(rng.uniform(2, 7))
        size = (round_, round_, round_)
    _lump(inside, brain, centre, size, value)


def _arteries(inside: Interior, brain: Brain, rng: np.random.Generator, value: float | None = None) -> None:
    """Arteries at the base: a dense one by thick blood, a clot or a hard wall, or all of them."""
    dense = float(rng.uniform(46, 82)) if value is None else value
    wide = float(rng.uniform(0.8, 1.7))
    for start, end, radii in ARTERIES:
        for side in (-1, 1):
            if value is None and rng.random() < 0.4:
                continue
            a, b = ((side * p[0], *p[1:]) for p in (start, end))
            _rod(inside, brain, a, b, (radii[0] * wide, radii[1] * wide), dense)


def _contrast(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Contrast medium: arteries, choroid plexus, dura, and a little in all tissue."""
    strength = float(rng.uniform(0.2, 1))
    brain.hu += np.float32(5 * strength) * (1 - brain.csf)
    brain.hu += brain.barrier * np.float32(35 * strength)
    _arteries(inside, brain, rng, value=60 + 300 * strength)
    for side in (-1, 1):
        _lump(inside, brain, (side * 22, -42, 11), (3, 5, 4), 45 + 70 * strength)
    for _ in range(12):  # branches in sulci
        a = np.array(_somewhere(inside, rng, (1, 12)))
        b = a + rng.normal(0, 9, 3)
        _rod(inside, brain, a.tolist(), b.tolist(), (0.9, 0.6), 50 + 160 * strength)


def _infarct(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Low density that blood does not explain: infarct of any age, edema of something unseen."""
    for _ in range(1 + int(rng.random() < 0.3)):
        centre = _somewhere(inside, rng, (0, 60))
        radius = _log_uniform(rng, 4, 34)
        near = _near(inside, centre, centre, radius * 1.7 + 6)
        x, y, z = inside.x[near], inside.y[near], inside.z[near]
        away = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
        edge = float(rng.uniform(0.6, 8))
        amount = smoothstep(radius - away + 0.25 * radius * inside.texture(x, y, z, 18), -edge, edge)
        amount *= (np.sign(x) == np.sign(centre[0])) * (1 - brain.csf[near])
        low = np.minimum(brain.hu[near], np.float32(rng.uniform(8, 27)))
        brain.hu[near] += np.float32(rng.uniform(0.6, 1)) * amount * (low - brain.hu[near])


def _lacunes(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 6))):
        size = rng.uniform(1.2, 5, 3)
        centre = (
            float(rng.choice((-1, 1)) * rng.uniform(8, 32)),
            float(rng.uniform(-30, 28)),
            float(rng.uniform(-8, 28)),
        )
        _lump(inside, brain, centre, size.tolist(), float(rng.uniform(8, 20)))


def _fluid(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """A hygroma or an arachnoid cyst: water at the brain's surface."""
    side = int(rng.choice((-1, 1)))
    if rng.random() < 0.5:
        plan = Plan(Subtype.SDH, _log_uniform(rng, 8, 70), side, 0.0, "fluid")
        half = share(side * inside.x - 1.2) * ~inside.infratentorial
        water, _ = bl.extra_axial(inside, plan, rng, half)
        brain.hu += water.blood * (np.float32(rng.uniform(4, 18)) - brain.hu)
        return
    size = rng.uniform(6, 26, 3)
    _lump(inside, brain, _somewhere(inside, rng, (1, 12)), size.tolist(), float(rng.uniform(4, 14)), rough=0.3)


def _mass(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """A tumour or abscess in edema: hardly denser than brain, solid or a ring."""
    radius = _log_uniform(rng, 5, 22)
    centre = _somewhere(inside, rng, (radius * 0.3, 60))
    swollen = radius + float(rng.uniform(2, 16))
    near = _near(inside, centre, centre, swollen + 6)
    x, y, z = inside.x[near], inside.y[near], inside.z[near]
    away = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
    edema = smoothstep(swollen - away + 3 * inside.texture(x, y, z, 15), -2, 2) * (1 - brain.csf[near])
    brain.hu[near] += edema * np.minimum(bl.EDEMA_HU - brain.hu[near], 0)
    body = smoothstep(radius - away + 1.5 * inside.texture(x, y, z, 9), -1, 1)
    value = np.full(near.shape, rng.uniform(34, 46), np.float32)
    if rng.random() < 0.5:  # a ring
        value = np.where(away < radius * rng.uniform(0.5, 0.85), np.float32(rng.uniform(10, 26)), value)
    brain.hu[near] += body * (value - brain.hu[near])


def _wire(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """A ventricular drain or an electrode from the skull inwards."""
    side = int(rng.choice((-1, 1)))
    start = (side * float(rng.uniform(18, 45)), float(rng.uniform(-40, 50)), 60.0)
    end = (side * float(rng.uniform(4, 14)), float(rng.uniform(-12, 16)), float(rng.uniform(-8, 12)))
    value, radius = (_log_uniform(rng, 150, 700), 1.4) if rng.random() < 0.6 else (float(rng.uniform(*METAL_HU)), 0.8)
    _rod(inside, brain, start, end, (radius, radius), value)


def _clip(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """An aneurysm clip or coil at the base."""
    start, end, _ = ARTERIES[int(rng.integers(len(ARTERIES)))]
    along = rng.random()
    side = rng.choice((-1, 1))
    centre = [side * (start[0] + along * (end[0] - start[0]))] + [
        a + along * (b - a) for a, b in zip(start[1:], end[1:], strict=True)
    ]
    size = rng.uniform(0.8, 4) * rng.uniform(0.5, 1.5, 3)
    _lump(inside, brain, centre, size.tolist(), float(rng.uniform(*METAL_HU)))


def _gas(inside: Interior, brain: Brain, rng: np.random.Generator) -> None:
    """Air after surgery or a fracture, under the forehead and in pockets."""
    for _ in range(int(rng.integers(1, 5))):
        size = rng.uniform(1, 7) * rng.uniform(0.5, 1.6, 3)
        centre = (float(rng.uniform(-30, 30)), float(rng.uniform(45, 70)), float(rng.uniform(-5, 40)))
        _lump(inside, brain, centre, size.tolist(), AIR, rough=0.4)


Paint = Callable[[Interior, Brain, np.random.Generator], None]
FINDINGS: tuple[tuple[float, Paint], ...] = (
    (0.25, _infarct),
    (0.15, _lacunes),
    (0.08, _fluid),
    (0.06, _mass),
    (0.4, _specks),
    (0.25, _pair),
    (0.3, _plaque),
    (0.3, _arteries),
    (0.06, _contrast),
    (0.05, _wire),
    (0.05, _clip),
    (0.04, _gas),
)


def along_meninges(inside: Interior, plan: Plan, rng: np.random.Generator, free: Array) -> Bleed:
    """Subdural blood on one side of the falx, or on the tentorium: the thin bright line that a thick falx resembles."""
    if rng.random() < 0.6:
        height = plan.side * inside.x
        reaches = (inside.z > -10) & (np.hypot((inside.y + 4) / 60, (inside.z - 2) / 34) > 1.02)
        centre, size = (float(rng.uniform(-50, 55)), float(rng.uniform(25, 55))), rng.uniform(15, 45, 2)
        along = np.hypot((inside.y - centre[0]) / size[0], (inside.z - centre[1]) / size[1])
        reaches &= ~inside.infratentorial
    else:
        height = inside.z - tentorium_height(inside.x, inside.y)
        reaches = (inside.y < -6 - 0.62 * np.abs(inside.x)) & (plan.side * inside.x > 3)
        centre, size = (plan.side * float(rng.uniform(12, 40)), float(rng.uniform(-70, -40))), rng.uniform(12, 30, 2)
        along = np.hypot((inside.x - centre[0]) / size[0], (inside.y - centre[1]) / size[1])
    thick = float(rng.uniform(1.8, 6)) * np.clip(1 - along**4, 0, 1)
    blood = share(thick - height) * share(height - 0.3) * reaches * (thick > 0.5) * free * inside.share
    hu = plan.blood_hu + 2 * inside.noise(14)
    return Bleed(Subtype.SDH, blood.astype(np.float32), hu.astype(np.float32))


def vary_bleeds(
    inside: Interior, made: list[Bleed], plans: Sequence[Plan], rng: np.random.Generator, free: Array
) -> None:
    """Add what the plain phantoms do not bleed like: along the meninges, and a level in a clot."""
    for bleed in made:
        if bleed.subtype is Subtype.IPH and rng.random() < LEVEL_CHANCE and bleed.blood.any():
            middle = float(np.average(inside.y, weights=bleed.blood))
            bleed.blood_hu = bleed.blood_hu + 16 * (smoothstep(middle - inside.y, -1.5, 1.5) - 0.6)
    if plans and rng.random() < ALONG_MENINGES_CHANCE:
        made.append(along_meninges(inside, plans[0], rng, free))


def add_to_skull(head_hu: Array, inside: Interior, rng: np.random.Generator) -> None:
    """Operate on the skull, swell the scalp, and fix metal to either."""
    for chance, paint in ((0.1, _opening), (0.15, _scalp), (0.08, _outer_metal)):
        if rng.random() < chance:
            paint(head_hu, inside, rng)


def _cone(head_hu: Array, keep: NDArray[np.bool_], rng: np.random.Generator) -> tuple[NDArray[np.intp], Array]:
    """Flat indices of some voxels of a head, and their angle from a random direction in its upper half."""
    index = np.flatnonzero(keep)
    points = np.stack(np.unravel_index(index, SHAPE)).astype(np.float32) + ORIGIN_MM[:, None].astype(np.float32)
    towards = rng.normal(size=3)
    towards[2] = abs(towards[2]) * 0.8 + 0.15
    towards /= np.linalg.norm(towards)
    length = np.maximum(np.sqrt((points**2).sum(axis=0)), 1)
    cosine = (points * towards[:, None].astype(np.float32)).sum(axis=0) / length
    return index, np.arccos(np.clip(cosine, -1, 1))


def _outside(head_hu: Array, inside: Interior, low: float, high: float) -> NDArray[np.bool_]:
    """Voxels above the base and outside the cavity with HU in a range."""
    keep = (head_hu > low) & (head_hu < high)
    keep[:, :, : int(-10 - ORIGIN_MM[2])] = False
    keep.reshape(-1)[inside.index] = False
    return keep


def _opening(head_hu: Array, inside: Interior, rng: np.random.Generator) -> None:
    """A craniectomy, a flap that was put back, or a burr hole."""
    index, angle = _cone(head_hu, _outside(head_hu, inside, 150, 4000), rng)
    flat = head_hu.reshape(-1)
    kind = rng.choice(["removed", "replaced", "hole"])
    radius = 0.1 if kind == "hole" else float(rng.uniform(0.3, 0.8))
    if kind == "replaced":
        flat[index[np.abs(angle - radius) < 0.018]] = float(rng.uniform(0, 50))
        rim = index[np.abs(angle - radius) < 0.03]
        for one in rng.choice(rim, 4) if rim.size else ():
            _block(head_hu, np.unravel_index(int(one), SHAPE), 1, float(rng.uniform(*METAL_HU)))
    else:
        flat[index[angle < radius]] = float(rng.uniform(15, 60))


def _scalp(head_hu: Array, inside: Interior, rng: np.random.Generator) -> None:
    """A swelling or bruise of the scalp: blood, but not in the skull."""
    index, angle = _cone(head_hu, _outside(head_hu, inside, -200, 80), rng)
    amount = smoothstep(float(rng.uniform(0.2, 0.6)) - angle, 0, 0.08)
    flat = head_hu.reshape(-1)
    flat[index] += amount * (np.float32(rng.uniform(25, 72)) - flat[index])


def _outer_metal(head_hu: Array, inside: Interior, rng: np.random.Generator) -> None:
    """Staples and clips in the scalp, fillings in teeth, a plate."""
    index = np.flatnonzero(_outside(head_hu, inside, -200, 80))
    for one in rng.choice(index, int(rng.integers(1, 6))) if index.size else ():
        _block(head_hu, np.unravel_index(int(one), SHAPE), int(rng.integers(0, 2)), float(rng.uniform(*METAL_HU)))
    if rng.random() < 0.5:
        for side in (-1, 1):
            at = np.array([side * rng.uniform(12, 26), rng.uniform(60, 85), rng.uniform(-98, -84)]) - ORIGIN_MM
            _block(head_hu, at.round().astype(int), 2, float(rng.uniform(*METAL_HU)))


def _block(head_hu: Array, at: Sequence[int] | NDArray[np.intp] | tuple[np.intp, ...], half: int, value: float) -> None:
    low = np.clip(np.array(at) - half, 0, np.array(SHAPE) - 1)
    high = np.minimum(np.array(at) + half + 1, SHAPE)
    head_hu[tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))] = value


def varied_protocol(protocol: Protocol, rng: np.random.Generator) -> Protocol:
    """The same scan by another scanner: kernel, glare, calibration, beam hardening, motion."""
    return replace(protocol, sharpness=float(rng.uniform(0.2, 1.0)), degradation=draw_degradation(rng))


def draw_degradation(rng: np.random.Generator) -> Degradation:
    """What a scanner adds, each drawn alone; much of it is often absent."""
    return Degradation(
        hardening=_log_uniform(rng, 0.25, 3),
        glare=float(rng.uniform(0, 0.06)) if rng.random() < 0.6 else 0.0,
        glare_mm=float(rng.uniform(1.5, 5)),
        edge_gain=float(rng.uniform(0, 0.9)) if rng.random() < 0.3 else 0.0,
        blur_mm=float(rng.uniform(0, 0.8)) if rng.random() < 0.5 else 0.0,
        slow_noise_hu=float(rng.uniform(0, 2)),
        gain=float(rng.normal(1, 0.004)),
        offset_hu=float(rng.normal(0, 1.5)),
        moved_mm=float(rng.uniform(1, 6)) if rng.random() < 0.08 else 0.0,
    )
