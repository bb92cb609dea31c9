"""Heads in which only the other side tells a bleed from what is no bleed.

Choroid plexus, basal ganglia and the edge of the tentorium are as bright as old blood, on both sides alike; one small
bleed of the same brightness and size lies beside them, on one side.
"""

import numpy as np

from ich_pipeline.labels import Subtype
from ich_pipeline.phantom.anatomy import Interior, Person, build_brain, build_head
from ich_pipeline.phantom.bleeds import Bleed, no_room
from ich_pipeline.phantom.cases import CSF_FILL, DEFAULT, with_truth
from ich_pipeline.phantom.fields import Array, Texture, ellipsoid, share
from ich_pipeline.phantom.scanner import Lattice, draw_protocol, scan_hu
from ich_pipeline.phantom.settings import PhantomCase, PhantomSettings
from ich_pipeline.records import Scan

BRIGHT_HU = (46.0, 54.0)  # brain is 28 to 38, noise 3 to 5
# Right-sided places in the head's frame, mm; each has its twin on the left.
PLACES_MM = {
    "choroid": (22.0, -42.0, 11.0),
    "basal_ganglia": (22.0, 3.0, 2.0),
    "tentorium": (30.0, -48.0, -12.0),
}
RADIUS_MM = (4.0, 9.0)
# From the middle of a structure to that of the bleed: it may touch it, and never hides it.
BESIDE_MM = (11.0, 22.0)


def look_alike_case(
    case_id: str, seed: int, settings: PhantomSettings = DEFAULT, background: Scan | None = None
) -> PhantomCase:
    """Make one such head with its truth, as `make_case` does; the share of clean heads is that of the settings.

    Raises:
        ValueError: a background was given.
    """
    if background is not None:
        raise ValueError(f"{case_id}: look-alikes have a head of their own, expected no background")
    head_rng, texture_rng, bleed_rng, scan_rng, noise_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)
    )
    person = Person.draw(head_rng, settings.age_years)
    protocol = draw_protocol(scan_rng, settings)
    head_hu, inside = build_head(person, head_rng, Texture(texture_rng))
    brain = build_brain(inside, person, head_rng, no_room(inside))
    for place in PLACES_MM.values():
        size = bleed_rng.uniform(*RADIUS_MM) * bleed_rng.uniform(0.7, 1.3, 3)
        value = bleed_rng.uniform(*BRIGHT_HU)
        for side in (1, -1):
            _paint(brain.hu, _lump(inside, np.array(place) * (side, 1, 1), size), value)
    made = []
    if bleed_rng.random() >= settings.clean_fraction:
        beside = np.array(list(PLACES_MM.values())[bleed_rng.integers(len(PLACES_MM))])
        away = bleed_rng.normal(size=3)
        away *= bleed_rng.uniform(*BESIDE_MM) / np.linalg.norm(away)
        centre = (beside + away) * (bleed_rng.choice((-1, 1)), 1, 1)
        centre[0] = np.sign(centre[0]) * max(abs(centre[0]), 12.0)  # across the middle it would be its own twin
        blood = _lump(inside, centre, bleed_rng.uniform(*RADIUS_MM) * bleed_rng.uniform(0.7, 1.3, 3)) * inside.share
        value = bleed_rng.uniform(*BRIGHT_HU)
        _paint(brain.hu, blood, value)
        made.append(Bleed(Subtype.IPH, blood, np.full_like(blood, value)))
    flat = head_hu.reshape(-1)
    bone = flat[inside.index]
    flat[inside.index] = np.where(inside.share < 1, bone + inside.share * (brain.hu - CSF_FILL), brain.hu)
    lattice = Lattice(protocol, scan_rng)
    return with_truth(case_id, seed, person, protocol, lattice, inside, made, scan_hu(lattice, head_hu, noise_rng))


def _lump(inside: Interior, centre: Array, size: Array) -> Array:
    return share(ellipsoid(inside.x, inside.y, inside.z, centre, size)).astype(np.float32)


def _paint(hu: Array, amount: Array, value: float) -> None:
    hu += amount * (np.float32(value) - hu)
