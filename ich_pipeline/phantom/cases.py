"""One phantom from its seed: a head, its hemorrhages and its scan."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.detection import boxes_of_mask
from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom import variety
from ich_pipeline.phantom.anatomy import Brain, Interior, Person, build_brain, build_head
from ich_pipeline.phantom.background import bleed_into
from ich_pipeline.phantom.bleeds import Bleed, Plan
from ich_pipeline.phantom.fields import Array, Texture, share, smoothstep
from ich_pipeline.phantom.scanner import Lattice, Protocol, Push, draw_protocol, scan_hu, shares
from ich_pipeline.phantom.settings import PhantomCase, PhantomSettings
from ich_pipeline.phantom.truth import label_of, volumes_of
from ich_pipeline.records import NativeMask, NiftiForms, Scan

DEFAULT = PhantomSettings()


def make_case(
    case_id: str, seed: int, settings: PhantomSettings = DEFAULT, background: Scan | None = None
) -> PhantomCase:
    """Make one synthetic head CT with its truth; the same arguments give the same voxels.

    Args:
        seed: of everything drawn.
        settings: ranges to draw from.
        background: a real scan to put the hemorrhages into instead of a synthetic head; its grid is kept.

    Raises:
        ReadError: no skull with a brain in it can be found in the background.
        ConfigError: the settings leave no subtype that can be put into the background.
    """
    if background is not None:
        return bleed_into(case_id, seed, settings, background)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
    head_rng, texture_rng, bleed_rng, scan_rng, noise_rng, variety_rng = streams
    person = Person.draw(head_rng, settings.age_years)
    protocol = draw_protocol(scan_rng, settings)
    plans = [] if bleed_rng.random() < settings.clean_fraction else bl.plan_bleeds(bleed_rng, settings, list(Subtype))
    if settings.varied:
        person = variety.varied_person(person, variety_rng)
        protocol = variety.varied_protocol(protocol, variety_rng)
        plans = variety.varied_plans(plans, settings, variety_rng)
    head_hu, inside = build_head(person, head_rng, Texture(texture_rng))
    if settings.varied:
        variety.add_to_skull(head_hu, inside, variety_rng)
    findings_rng = variety_rng if settings.varied else None
    brain, made = _bleeding_brain(inside, person, plans, head_rng, bleed_rng, protocol, findings_rng)
    flat = head_hu.reshape(-1)
    bone = flat[inside.index]
    hu = np.where(inside.share < 1, bone + inside.share * (brain.hu - CSF_FILL), brain.hu)
    flat[inside.index] = hu
    push = _mass_effect(plans, made, inside, bleed_rng)
    lattice = Lattice(protocol, scan_rng, push)
    image_hu = scan_hu(lattice, head_hu, noise_rng)
    case = with_truth(case_id, seed, person, protocol, lattice, inside, made, image_hu)
    case.truth["bleeds"] = [asdict(plan) for plan in plans]
    case.truth["midline_shift_mm"] = round(push.shift_mm, 3) if push else 0.0
    return case


CSF_FILL = 7  # what build_head fills the cavity with


def _bleeding_brain(
    inside: Interior,
    person: Person,
    plans: Sequence[Plan],
    head_rng: np.random.Generator,
    rng: np.random.Generator,
    protocol: Protocol,
    findings_rng: np.random.Generator | None,
) -> tuple[Brain, list[Bleed]]:
    """Extra-axial blood first, as the brain makes way for it; then the brain; then blood in it, painted over.

    With `findings_rng` the brain holds findings that are no hemorrhage as well.
    """
    room = bl.no_room(inside)
    made: list[Bleed] = []
    by_kind = {plan.subtype: plan for plan in plans}
    for subtype in (Subtype.EDH, Subtype.SDH):
        if subtype in by_kind:
            plan = by_kind[subtype]
            half = share(plan.side * inside.x - 1.2) * ~inside.infratentorial
            bleed, thickness = bl.extra_axial(inside, plan, rng, half)
            made.append(bleed)
            np.maximum(room.clot_mm, thickness, out=room.clot_mm)
    order = None
    if Subtype.SAH in by_kind:
        order, room.widen_mm = bl.subarachnoid_reach(inside, by_kind[Subtype.SAH], rng)
    room.ventricle_scale = _ventricle_scale(plans, rng)
    brain = build_brain(inside, person, head_rng, room)
    if findings_rng is not None:
        variety.add_findings(inside, brain, findings_rng)
    free = 1 - np.clip(sum((b.blood for b in made), np.zeros_like(brain.hu)), 0, 1) - brain.barrier
    free = np.maximum(free, 0)
    if Subtype.IPH in by_kind:
        made.append(_clots(inside, brain, by_kind[Subtype.IPH], rng, free))
        free = np.maximum(free - made[-1].blood, 0)
    if Subtype.IVH in by_kind:
        cast = rng.random() < bl.CAST_CHANCE
        made.append(bl.intraventricular(inside, brain, by_kind[Subtype.IVH], rng, protocol.gravity, free, cast))
    if order is not None:
        made.append(bl.subarachnoid(inside, brain, by_kind[Subtype.SAH], order, free))
    if findings_rng is not None:
        variety.vary_bleeds(inside, made, plans, findings_rng, free)
    bl.mix_bleeds(brain.hu, made)
    return brain, made


def _clots(inside: Interior, brain: Brain, plan: Plan, rng: np.random.Generator, free: Array) -> Bleed:
    sites = bl.iph_sites(plan, rng)
    tissue = (1 - brain.ventricle) * (1 - 0.6 * brain.cistern) * free * smoothstep(inside.depth_mm, 0.5, 2)
    low = sites[0][2] < -30 and sites[0][1] < -10
    tissue *= inside.infratentorial if low else ~inside.infratentorial
    if not low:  # the falx holds a clot back where it reaches; the brain below it does not
        tissue *= smoothstep(np.sign(sites[0][0]) * inside.x, -3, 0) if len(sites) == 1 else 1
    return bl.intraparenchymal(inside, plan, rng, tissue.astype(np.float32), brain.white, sites)


def _ventricle_scale(plans: Sequence[Plan], rng: np.random.Generator) -> tuple[float, float]:
    """(right, left): a mass narrows the ventricle on its side and may block the other; blood in them widens both."""
    scale = [1.0, 1.0]
    for plan in plans:
        near = 0 if plan.side > 0 else 1
        if plan.subtype in (Subtype.IVH, Subtype.SAH):
            widening = 1 + rng.uniform(0, 0.35) * (1 if plan.subtype is Subtype.IVH else 0.6)
            scale = [s * widening for s in scale]
        else:
            pressure = min(plan.volume_ml / 100, 1.0)
            scale[near] *= 1 - 0.55 * pressure
            scale[1 - near] *= 1 + 0.15 * pressure
    return scale[0], scale[1]


def _mass_effect(
    plans: Sequence[Plan], made: Sequence[Bleed], inside: Interior, rng: np.random.Generator
) -> Push | None:
    """Midline shift that grows with volume (about 1 mm in 10 mL, Zazulia et al., Stroke 1999;30:1167, order only)."""
    masses = [p for p in plans if p.subtype in (Subtype.EDH, Subtype.IPH, Subtype.SDH)]
    if not masses:
        return None
    shift = sum(-p.side * p.volume_ml * rng.uniform(0.05, 0.15) for p in masses)
    lesions = []
    for bleed in made:
        if bleed.subtype is Subtype.IPH:
            weight = bleed.blood / max(float(bleed.blood.sum()), 1e-6)
            x, y, z = (float((weight * axis).sum()) for axis in (inside.x, inside.y, inside.z))
            radius = (3 * float(bleed.blood.sum()) / (4 * np.pi)) ** (1 / 3)
            lesions.append(((x, y, z), radius + 2, 0.08 * radius))
    return Push(float(np.clip(shift, -14, 14)), (float(rng.normal(5, 10)), 12.0), tuple(lesions))


def with_truth(
    case_id: str,
    seed: int,
    person: Person,
    protocol: Protocol,
    lattice: Lattice,
    inside: Interior,
    made: Sequence[Bleed],
    image_hu: NDArray[np.int16],
) -> PhantomCase:
    """A case of a scan and the bleeds that were put into its head: their labels, volumes and boxes."""
    grid = Grid(protocol.shape, protocol.affine)
    volumes: dict[str, Array] = {}
    for bleed in made:
        own = inside.volume(bleed.blood)
        volumes[bleed.subtype.name] = own + volumes[bleed.subtype.name] if bleed.subtype.name in volumes else own
    volumes["brain"] = inside.volume(inside.share)
    edema = [bleed.edema for bleed in made if bleed.edema is not None]
    if edema:
        volumes["edema"] = inside.volume(edema[0])
    sampled = shares(lattice, volumes)
    brain = sampled.pop("brain") >= 0.5
    swollen = sampled.pop("edema") if edema else np.zeros(grid.shape, np.float32)
    label = label_of(sampled, grid.shape) * brain
    normal = protocol.rotation[:, 0]  # of the head's own plane x = 0, before it was deformed
    truth = {
        "seed": seed,
        "background": None,
        "age": round(person.age, 1),
        "atrophy": round(person.atrophy, 3),
        "tilt_deg": round(protocol.tilt_deg, 4),
        "slice_mm": protocol.slice_mm,
        "pixel_mm": protocol.pixel_mm,
        "noise_hu": round(protocol.noise_hu, 3),
        "field_cut": protocol.cut,
        "gravity_head": [round(float(g), 5) for g in protocol.gravity],
        "mid_plane": {"normal": normal.round(6).tolist(), "offset_mm": round(float(normal @ protocol.shift_mm), 4)},
    } | volumes_of(sampled, label, swollen, grid)
    forms = scanner_forms(grid)
    scan = Scan(case_id, image_hu, grid, forms, Path(f"{case_id}.nii.gz"))
    boxes = boxes_of_mask(case_id, NativeMask(label, grid), subtypes=True, regions=False)
    return PhantomCase(scan, label, (swollen >= 0.5) & (label == 0), brain, boxes, truth)


def scanner_forms(grid: Grid) -> NiftiForms:
    """sform code 1; a qform only where there is no shear, which it cannot hold."""
    upright = grid.tilt_deg < 1e-3
    return NiftiForms(grid.affine, 1, grid.affine if upright else None, 1 if upright else 0)
