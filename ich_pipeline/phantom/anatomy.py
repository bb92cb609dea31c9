"""A head in its own frame: skull, face and brain as shares of tissue on a 1 mm grid.

Frame: RAS mm, origin between the foramina of Monro, x right, y anterior, z superior, the base of the skull roughly as
in a scan along the orbitomeatal line. Sizes are those of adult anatomy atlases, rounded; each head is drawn around
them. HU are those of the usual teaching tables at 120 kV: grey 37-39, white 27-29, CSF 4-10, muscle 55, fat -95,
cortical bone 1100-1600, diploe 400-700.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ich_pipeline.phantom.fields import Array, Texture, capsule, ellipsoid, share, smoothstep

X_MM = np.arange(-92, 93, dtype=np.float32)
Y_MM = np.arange(-110, 122, dtype=np.float32)
Z_MM = np.arange(-100, 92, dtype=np.float32)
SHAPE = (X_MM.size, Y_MM.size, Z_MM.size)
ORIGIN_MM = np.array([X_MM[0], Y_MM[0], Z_MM[0]])
CAVITY_CENTRE_MM = (0.0, -8.0, 0.0)
VOXEL_ML = 1e-3

AIR, FAT, MUSCLE, SKIN, DURA, VENOUS = -1000, -95, 55, 35, 52, 56
CSF, GREY, WHITE, BRAINSTEM = 7, 38.5, 28, 31
BONE, MARROW = 1420, 520


@dataclass(frozen=True)
class Person:
    """What differs from head to head.

    Attributes:
        atrophy: 0 (young) to 1 (severe): width of sulci, cisterns and ventricles.
        ventricle_scale: radius of the (right, left) lateral ventricle against a middle-aged one.
        skull_mm: mean thickness of the calvaria; scalp_mm of what lies on it.
        calcified: which of pineal, choroid, basal_ganglia, falx, carotid are.
        leukoaraiosis: 0 to 1, low density around the ventricles.
        old_infarct: a wedge of CSF density, no hemorrhage.
        csf_hu, grey_hu, white_hu, brainstem_hu, dura_hu, venous_hu, bone_hu, marrow_hu: of each tissue.
        dura_mm: how much thicker than ordinary each half of falx and tentorium is.
        calcium, calcium_size: HU and diameter of calcifications against the ordinary ones.
    """

    age: float
    atrophy: float
    ventricle_scale: tuple[float, float]
    skull_mm: float
    scalp_mm: float
    calcified: frozenset[str]
    leukoaraiosis: float
    old_infarct: bool
    sinus_fluid: bool
    haematocrit: float
    csf_hu: float = CSF
    grey_hu: float = GREY
    white_hu: float = WHITE
    brainstem_hu: float = BRAINSTEM
    dura_hu: float = DURA
    venous_hu: float = VENOUS
    bone_hu: float = BONE
    marrow_hu: float = MARROW
    dura_mm: float = 0.0
    calcium: float = 1.0
    calcium_size: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, age_years: tuple[float, float]) -> "Person":
        """Draw a person; atrophy, white matter lesions and calcification follow age."""
        age = float(rng.uniform(*age_years))
        atrophy = float(np.clip((age - 25) / 75 + rng.normal(0, 0.14), 0.02, 1.1))
        base = 0.62 + 0.75 * atrophy + rng.normal(0, 0.06)
        chance = {"pineal": 0.3 + 0.006 * age, "choroid": 0.009 * age, "basal_ganglia": 0.002 * age}
        chance |= {"falx": 0.002 * age, "carotid": 0.012 * age - 0.35}
        return cls(
            age=age,
            atrophy=atrophy,
            ventricle_scale=(base * float(rng.uniform(0.85, 1.15)), base * float(rng.uniform(0.85, 1.15))),
            skull_mm=float(rng.uniform(5.5, 8.0)),
            scalp_mm=float(rng.uniform(4.0, 8.0)),
            calcified=frozenset(name for name, p in chance.items() if rng.random() < p),
            leukoaraiosis=float(np.clip((age - 50) / 45 + rng.normal(0, 0.25), 0, 1)),
            old_infarct=bool(rng.random() < 0.1),
            sinus_fluid=bool(rng.random() < 0.12),
            haematocrit=float(rng.uniform(0.35, 0.48)),
        )


@dataclass(eq=False)
class Interior:
    """The points inside the skull, as flat arrays: all that brain and hemorrhage are computed on.

    Attributes:
        index: (n,) flat index into the grid of `shape`.
        x, y, z: (n,) float32 RAS mm, origin near the middle of the brain.
        depth_mm: (n,) distance to the inner table, positive inside.
        voxel_ml: volume that one point stands for.
        infratentorial: (n,) bool.
    """

    shape: tuple[int, int, int]
    index: NDArray[np.intp]
    x: Array
    y: Array
    z: Array
    depth_mm: Array
    voxel_ml: float
    infratentorial: NDArray[np.bool_]
    texture: Texture

    @cached_property
    def share(self) -> Array:
        """Share of each voxel that lies inside the inner table."""
        return share(self.depth_mm)

    def volume(self, values: Array) -> Array:
        """Put flat values back on the grid, 0 elsewhere."""
        grid = np.zeros(self.shape, np.float32)
        grid.reshape(-1)[self.index] = values
        return grid

    def noise(self, wavelength_mm: float) -> Array:
        """A new random field of unit variance at the points."""
        return self.texture(self.x, self.y, self.z, wavelength_mm)


@dataclass(eq=False)
class Room:
    """What the brain makes way for.

    Attributes:
        clot_mm: (n,) thickness of extra-axial blood above each point; the brain's surface starts below it.
        widen_mm: (n,) how much wider blood makes the subarachnoid space.
        ventricle_scale: (right, left) factor for compressed or dilated ventricles.
    """

    clot_mm: Array
    widen_mm: Array
    ventricle_scale: tuple[float, float] = (1.0, 1.0)


@dataclass(eq=False)
class Brain:
    """Shares of tissue at the points of an `Interior`, and the HU that they mix to."""

    hu: Array
    csf: Array
    ventricle: Array
    cistern: Array
    white: Array
    falx: Array
    barrier: Array = field(repr=False)  # falx and tentorium, which blood does not cross


def build_head(person: Person, rng: np.random.Generator, texture: Texture) -> tuple[Array, Interior]:
    """Everything but the brain: HU on the 1 mm grid (the cavity filled with CSF), and the points of the cavity."""
    base = _SkullBase()
    x, y, z = X_MM[:, None, None], Y_MM[None, :, None], Z_MM[None, None, :]
    cavity_mm = _calvaria_depth(x, y, z)
    hu = np.full(SHAPE, AIR, np.float32)
    _soft_tissue(hu, cavity_mm, person, texture)
    _calvaria(hu, cavity_mm, base, person, texture)
    _base_and_face(hu, cavity_mm, base, person, rng, texture)
    interior = _interior(cavity_mm, base, texture)
    flat = hu.reshape(-1)
    outside = np.maximum(flat[interior.index], MUSCLE)
    flat[interior.index] = outside + interior.share * (CSF - outside)
    return hu, interior


def _calvaria_depth(x: Array, y: Array, z: Array) -> Array:
    """Distance to the inner table as if the skull had no base: an egg, wide behind and narrow in front."""
    _, cy, cz = CAVITY_CENTRE_MM
    width = 66.5 - 13 * smoothstep(y, -15, 80) - 4 * smoothstep(-y, 50, 95)
    height = np.where(z > cz, 69, 92).astype(np.float32)
    power = 2.35
    level = (np.abs(x) / width) ** power + (np.abs(y - cy) / 82.0) ** power
    level = level.astype(np.float32) + ((np.abs(z - cz) / height) ** power).astype(np.float32)
    np.power(level, np.float32(1 / power), out=level)
    radius = np.sqrt((x * x + (y - cy) ** 2).astype(np.float32) + (z - cz) ** 2)
    return radius * (1 / np.maximum(level, 1e-3) - 1)


class _SkullBase:
    """The floor of the cavity as a height over (x, y): three fossae, the ridges between them and the foramen."""

    def __init__(self) -> None:
        x, y = np.abs(X_MM)[:, None], Y_MM[None, :]
        sphenoid, petrous = y - (20 + 0.22 * x), (y - (-2 - 0.62 * x)) / 1.18
        self.behind_petrous = petrous < 0
        anterior = -19 + 5 * np.exp(-(((x - 28) / 14) ** 2)) - 8 * np.exp(-((x / 7) ** 2))
        floor = np.where(sphenoid > 0, anterior, np.where(petrous > 0, -46 + 0.12 * np.maximum(x - 30, 0), -77.0))
        body = (x < 14) & (y > -4) & (y < 20)
        floor = np.where(body, -31.0, floor)
        clivus = (x < 17) & (y <= -4) & (y > -24)
        floor = np.where(clivus, -28 + (y + 4) * 2.4, floor)
        floor = gaussian_filter(floor.astype(np.float32), 2.5)
        ridge = -26 - 0.05 * x - 1.1 * np.abs(petrous)
        floor = np.where((x > 12) & (x < 66), np.maximum(floor, ridge), floor)
        wing = -20 - 1.1 * np.abs(sphenoid)
        floor = np.where((x > 7) & (x < 56), np.maximum(floor, wing), floor)
        dorsum = -23 - 1.5 * np.abs(y + 3) - 0.6 * np.maximum(x - 6, 0)
        floor = np.where(x < 11, np.maximum(floor, dorsum), floor)
        floor = gaussian_filter(floor, 1.0)
        foramen = 1 - np.hypot(x / 15, (y + 38) / 18)
        self.floor_mm: Array = np.where(foramen > 0, -200, floor).astype(np.float32)
        thick = np.where(sphenoid > 0, 2.5, np.where(petrous > 0, 4.0, 5.0))
        thick = np.where(clivus | body, 9.0, thick)
        thick = np.where((np.abs(petrous) < 11) & (x > 12) & (x < 60), 16.0, thick)
        self.bone_mm: Array = gaussian_filter(thick.astype(np.float32), 2.0)
        self.bone_mm[foramen > 0] = 0
        slope = np.hypot(*np.gradient(np.maximum(self.floor_mm, -80)))
        self.cosine: Array = (1 / np.sqrt(1 + slope**2)).astype(np.float32)
        # Below this height the wall of the skull gives way to face and neck.
        wall = np.interp(Y_MM, [-90, -40, -22, 20, 42, 80], [-76, -74, -54, -52, -30, -18])
        self.wall_end_mm: Array = np.broadcast_to(wall, floor.shape).astype(np.float32)


def _interior(cavity_mm: Array, base: _SkullBase, texture: Texture) -> Interior:
    above_mm = (Z_MM[None, None, :] - base.floor_mm[..., None]) * base.cosine[..., None]
    depth = np.minimum(cavity_mm, above_mm)
    index = np.flatnonzero(depth > -0.5)
    i, j, k = np.unravel_index(index, SHAPE)
    x, y, z = X_MM[i], Y_MM[j], Z_MM[k]
    behind = base.behind_petrous[i, j] & (y < -4)
    tentorium = tentorium_height(x, y)
    below = behind & (z < tentorium) | ((np.abs(x) < 18) & (y < -2) & (z < -16))
    return Interior(SHAPE, index, x, y, z, depth.reshape(-1)[index], VOXEL_ML, below, texture)


def tentorium_height(x: Array, y: Array) -> Array:
    """Height of the tentorium: a tent from the transverse sinuses up to the straight sinus."""
    return 6 + 0.52 * np.minimum(y + 38, 0) - 0.36 * np.abs(x) + 0.0015 * x * x


def _soft_tissue(hu: Array, cavity_mm: Array, person: Person, texture: Texture) -> None:
    """Skin, fat and muscle of scalp, face and neck, painted as one; bone and air go on top."""
    x, y, z = X_MM[:, None, None], Y_MM[None, :, None], Z_MM[None, None, :]
    low = slice(0, int(np.searchsorted(Z_MM, 5)))
    body = cavity_mm + np.float32(person.skull_mm + person.scalp_mm)
    zl = z[..., low]
    face = ellipsoid(x, y, zl, (0, 36, -62), (64, 62, 66)) * 1.0
    nose = capsule(x, y, zl, (0, 92, -28), (0, 108, -62), (6, 12))
    neck = np.minimum(1 - np.sqrt((x / 64) ** 2 + ((y + 22) / 72) ** 2), 1).astype(np.float32) * 64
    neck = np.minimum(neck, -50 - zl)
    ears = np.float32(4) - np.sqrt(
        (np.hypot((y + 22) / 1.0, (zl + 42) / 1.6) - 14) ** 2 + ((np.abs(x) - 80) / 1.6) ** 2
    )
    for part in (face, nose, neck, ears):
        np.maximum(body[..., low], part, out=body[..., low])
    index = np.flatnonzero((body > -0.5) & ((cavity_mm < 1) | (z < -12)))
    i, j, k = np.unravel_index(index, SHAPE)
    px, py, pz = X_MM[i], Y_MM[j], Z_MM[k]
    depth = body.reshape(-1)[index]
    # Muscle bellies lie in fat: temporalis and neck deep to it, sheets of both in the face.
    planes = np.abs(texture(px, py, pz * 0.5, 24)) + 0.35 * texture(px, py, pz, 11)  # fat between bellies of muscle
    deep = smoothstep(depth, 3.5, 8) * smoothstep(-pz, -15, 30) * (1 - 0.7 * smoothstep(py, 45, 75))
    muscle = smoothstep(planes + deep - 1.0, -0.4, 0.1) * smoothstep(deep, 0.02, 0.3)
    tissue = FAT + muscle * (MUSCLE - FAT)
    skin = share(2.0 - depth)
    tissue += skin * (SKIN - tissue)
    hu.reshape(-1)[index] = AIR + share(depth) * (tissue - AIR)


def _calvaria(hu: Array, cavity_mm: Array, base: _SkullBase, person: Person, texture: Texture) -> None:
    """Inner and outer table with diploe between; thin at the temples and at random spots, thick behind."""
    thickest = person.skull_mm + 6
    wall = (cavity_mm < 1) & (cavity_mm > -thickest) & (base.wall_end_mm[..., None] - 2 < Z_MM)
    index = np.flatnonzero(wall)
    i, j, k = np.unravel_index(index, SHAPE)
    x, y, z = X_MM[i], Y_MM[j], Z_MM[k]
    outward = -cavity_mm.reshape(-1)[index]
    temple = smoothstep(np.abs(x), 48, 62) * smoothstep(-z, -25, 15) * smoothstep(y, -45, -10)
    thick = person.skull_mm * (1 + 0.16 * texture(x, y, z, 60)) - 3.0 * temple
    thick += 4 * np.exp(-((x / 14) ** 2 + ((z + 28) / 14) ** 2)) * (y < 0)  # external occipital protuberance
    thick += 1.5 * smoothstep(y, 55, 75) - 1.2 * np.maximum(texture(x, y, z, 22) - 1.2, 0)
    thick = np.maximum(thick, 1.8)
    bone = share(outward) * share(thick - outward) * share(z - base.wall_end_mm[i, j])
    table = 0.24 * thick + 0.5
    cortical = np.maximum(share(table - outward), share(outward - thick + table))
    marrow = np.float32(person.marrow_hu) + 110 * texture(x, y, z, 7) + 130 * texture(x, y, z, 30)
    value = marrow + cortical * (np.float32(person.bone_hu) - marrow)
    coronal = np.abs(y - 22 + 0.25 * z + 1.5 * texture(x, y, z, 12))
    lambdoid = np.abs(y + 72 - 0.45 * np.abs(x) + 0.3 * (z - 30))
    suture = np.maximum(share(0.6 - coronal) * (z > 5), share(0.6 - lambdoid) * (z > -20))
    value -= 650 * suture * (np.abs(x) > 3)
    flat = hu.reshape(-1)
    flat[index] += bone * (value - flat[index])


def _paint(hu: Array, centre: tuple[float, ...], reach: tuple[float, ...]) -> tuple[Array, Array, Array, Array]:
    """A view of the grid around a place, and open coordinates for it."""
    cut = []
    axes = []
    for axis, middle, half in zip((X_MM, Y_MM, Z_MM), centre, reach, strict=True):
        inside = slice(*np.searchsorted(axis, [middle - half - 2, middle + half + 3]))
        cut.append(inside)
        axes.append(axis[inside])
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return hu[tuple(cut)], x, y, z


def _base_and_face(
    hu: Array, cavity_mm: Array, base: _SkullBase, person: Person, rng: np.random.Generator, texture: Texture
) -> None:
    """Skull base, then what is hollowed out of it: orbits, sinuses, nose, mastoid cells, ear canals."""
    low = slice(0, int(np.searchsorted(Z_MM, 2)))
    below = base.floor_mm[..., None] - Z_MM[low]
    inside = cavity_mm[..., low] + np.float32(person.skull_mm)
    bone = share(below + 0.3) * share(base.bone_mm[..., None] - below) * share(inside)
    part = hu[..., low]
    index = np.flatnonzero(bone > 0)
    i, j, k = np.unravel_index(index, part.shape)
    x, y, z = X_MM[i], Y_MM[j], Z_MM[low][k]
    depth_in_bone = np.minimum(below.reshape(-1)[index], base.bone_mm[i, j] - below.reshape(-1)[index])
    spongy = smoothstep(depth_in_bone, 1.5, 4)
    value = 1250 - spongy * (620 - 180 * texture(x, y, z, 6))
    dense = np.exp(-(((np.abs(x) - 27) / 16) ** 2) - ((y + 20) / 16) ** 2)  # otic capsule, the densest bone
    value += 600 * dense * spongy
    part[i, j, k] += bone.reshape(-1)[index] * (value - part[i, j, k])
    for side in (-1, 1):
        _face_side(hu, side, person, rng, texture)
    _midface(hu, person, rng, texture)


def _blend(view: Array, amount: Array, value: Array | float) -> None:
    view += amount * (value - view)


def _face_side(hu: Array, side: int, person: Person, rng: np.random.Generator, texture: Texture) -> None:
    view, x, y, z = _paint(hu, (side * 30, 58, -33), (24, 38, 22))
    orbit = np.maximum(
        ellipsoid(x, y, z, (side * 31, 62, -33), (19, 22, 17)),
        capsule(x, y, z, (side * 31, 62, -33), (side * 14, 26, -30), (15, 4)),
    )
    _blend(view, share(orbit + 2) * smoothstep(-y, -84, -74), 1000)
    _blend(view, share(orbit), FAT)
    for dx, dz in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        muscle = capsule(x, y, z, (side * 31 + dx, 62, -33 + dz), (side * 15, 30, -30), (2.2, 1.2))
        _blend(view, share(muscle), 58)
    _blend(view, share(capsule(x, y, z, (side * 30, 60, -33), (side * 13, 27, -29), (2.3, 2.0))), 38)
    globe = ellipsoid(x, y, z, (side * 32, 70, -33), (12, 12, 12))
    _blend(view, share(globe), 45)
    _blend(view, share(globe - 1.3), 9)
    _blend(view, share(ellipsoid(x, y, z, (side * 32, 78.5, -33), (4.5, 2.3, 4.5))), 78)

    view, x, y, z = _paint(hu, (side * 30, 55, -70), (19, 22, 20))
    antrum = ellipsoid(x, y, z, (side * 30, 55, -69), (14, 18, 16))
    _blend(view, share(antrum + 1.6), 900)
    _blend(view, share(antrum), AIR)
    if person.sinus_fluid:
        _blend(view, share(antrum) * smoothstep(-y, -52, -51), 18)

    for start, end, radii, value in (
        ((50, 4, -54), (47, 14, -99), (6, 4), 900),  # mandible
        ((56, 44, -50), (66, 6, -50), (3.5, 2.5), 1100),  # zygomatic arch
        ((50, 52, -36), (52, 50, -58), (5, 7), 1100),  # zygoma
        ((19, -28, -82), (21, -24, -95), (8, 9), 800),  # occipital condyle and atlas
    ):
        centre = tuple(
            side * (a + b) / 2 if axis == 0 else (a + b) / 2 for axis, (a, b) in enumerate(zip(start, end, strict=True))
        )
        reach = tuple(abs(a - b) / 2 + max(radii) for a, b in zip(start, end, strict=True))
        view, x, y, z = _paint(hu, centre, reach)
        a, b = (side * start[0], *start[1:]), (side * end[0], *end[1:])
        rod = capsule(x, y, z, a, b, radii)
        _blend(view, share(rod), np.where(rod > 1.8, 0.5 * value, value).astype(np.float32))

    view, x, y, z = _paint(hu, (side * 56, -34, -48), (14, 20, 22))
    mastoid = ellipsoid(x, y, z, (side * 55, -34, -48), (12, 17, 19))
    full_x, full_y, full_z = np.broadcast_arrays(x, y, z)
    cells = texture(full_x, full_y, full_z, wavelength_mm=9)
    _blend(view, share(mastoid), 800)
    _blend(view, share(mastoid - 2) * smoothstep(cells, -0.25, 0.25), AIR + (200 if rng.random() < 0.1 else 0))
    view, x, y, z = _paint(hu, (side * 62, -16, -46), (24, 5, 5))
    canal = capsule(x, y, z, (side * 40, -16, -46), (side * 88, -17, -47), (4, 3))
    _blend(view, share(canal), AIR)


def _midface(hu: Array, person: Person, rng: np.random.Generator, texture: Texture) -> None:
    view, x, y, z = _paint(hu, (0, 62, -58), (15, 42, 34))
    full_x, full_y, full_z = np.broadcast_arrays(x, y, z)
    cells = texture(full_x, full_y, full_z, wavelength_mm=13)
    nose = np.minimum(ellipsoid(x, y, z, (0, 64, -64), (13.5, 40, 32)), -42 - z)
    _blend(view, share(nose + 1), 500)
    _blend(view, share(nose), AIR)
    _blend(view, share(nose) * share(2.2 - np.abs(cells) * 4.5), 40)
    _blend(view, share(nose) * share(0.8 - np.abs(x - 1.5 * np.sin(y / 9))), 250)
    ethmoid = np.minimum(np.minimum(13 - np.abs(x), (z + 46)), np.minimum(-25 - z, np.minimum(y - 28, 78 - y)))
    walls = share(0.7 - np.abs(cells) * 2.2)
    _blend(view, share(ethmoid + 1.2), 700)
    _blend(view, share(ethmoid), AIR + np.maximum(walls, share(0.7 - np.abs(x))) * 1450)
    view, x, y, z = _paint(hu, (0, 10, -44), (17, 16, 13))
    sphenoid = ellipsoid(x, y, z, (1.5, 11, -44), (14, 13, 9.5))
    _blend(view, share(sphenoid + 1.3), 900)
    _blend(view, share(sphenoid), AIR)
    _blend(view, share(sphenoid) * share(0.7 - np.abs(x - 2)), 400)
    view, x, y, z = _paint(hu, (0, -38, -92), (24, 24, 9))
    atlas = np.minimum(3.5 - np.abs(np.hypot(x, y + 38) - 18.5), 8 - np.abs(z + 92))
    _blend(view, share(atlas), np.where(atlas > 1.5, 450, 1000))
    size = float(rng.uniform(0.5, 1.25))
    view, x, y, z = _paint(hu, (0, 78, -8), (30, 12, 22))
    frontal = np.maximum(
        ellipsoid(x, y, z, (12, 77 - 0.4 * abs(size), -9), (16 * size, 5.5, 16 * size)),
        ellipsoid(x, y, z, (-13, 77 - 0.4 * abs(size), -10), (15 * size, 5.5, 13 * size)),
    )
    _blend(view, share(frontal + 2.4), 1200)
    _blend(view, share(frontal), AIR)


def build_brain(inside: Interior, person: Person, rng: np.random.Generator, room: Room) -> Brain:
    """Grey and white matter, CSF spaces, meninges and calcification at the points of the cavity."""
    x, y, z = inside.x, inside.y, inside.z
    wave = 2.0 * np.sin(y / 31 + float(rng.uniform(0, 6))) * smoothstep(z, 0, 40)
    xm = x - wave.astype(np.float32)  # distance from the midline, which is never quite straight
    supra = ~inside.infratentorial
    depth = inside.depth_mm - room.clot_mm
    atrophy = np.float32(person.atrophy)

    scale = tuple(a * b for a, b in zip(person.ventricle_scale, room.ventricle_scale, strict=True))
    ventricle_mm = _ventricles(xm, y, z, scale, float(atrophy))
    cistern_mm = _cisterns(inside, float(atrophy)) + 0.5 * room.widen_mm
    sulcus_mm, sylvian_mm = _sulci(inside, xm, depth, atrophy, room)
    fissure_mm = 0.5 + 1.6 * atrophy * (0.4 + smoothstep(y, 0, 50)) + room.widen_mm * 0.5 - np.abs(xm)
    above_callosum = np.hypot((y + 4) / 60, (z - 2) / 34) - 1  # the falx ends in an arc over the corpus callosum
    fissure_mm = np.where(supra & (above_callosum > -0.05) & (z > -22), fissure_mm, -9).astype(np.float32)
    gap_mm = 0.5 + 2.0 * atrophy * (1 + 0.3 * smoothstep(y, 10, 60)) + room.widen_mm - depth
    gap_mm -= 1.4 * inside.infratentorial

    ventricle = share(ventricle_mm)
    cistern = share(np.maximum(np.maximum(cistern_mm, sylvian_mm), fissure_mm))
    csf = np.maximum(np.maximum(ventricle, cistern), np.maximum(share(sulcus_mm), share(gap_mm)))
    csf = np.where(depth < -room.clot_mm, 1, csf).astype(np.float32)

    outer_mm = np.maximum(np.maximum(sulcus_mm, sylvian_mm), np.maximum(fissure_mm, gap_mm))
    cortex = share(3.0 + 0.5 * inside.noise(14) + outer_mm)
    grey = np.where(supra, np.maximum(cortex, _deep_grey(np.abs(xm), y, z)), 0).astype(np.float32)
    hu = np.float32(person.white_hu) + grey * np.float32(person.grey_hu - person.white_hu)
    folia = smoothstep(inside.noise(7) + 0.35, -0.6, 0.6)
    cerebellum = np.float32(person.brainstem_hu) + 5.5 * folia * smoothstep(
        -np.hypot((np.abs(x) - 20) / 1.6, z + 45), -26, -12
    )
    hu = np.where(supra, hu, cerebellum).astype(np.float32)
    hu -= 9 * person.leukoaraiosis * smoothstep(ventricle_mm + 1.5 * inside.noise(20), -11, -2) * (1 - grey) * supra
    hu += 0.7 * inside.noise(24)
    if person.old_infarct:
        hu = _old_infarct(inside, hu, rng)
    hu += csf * (np.float32(person.csf_hu) - hu)
    white = ((1 - grey) * (1 - csf) * supra).astype(np.float32)
    falx, barrier = _meninges(inside, hu, person, xm, above_callosum, supra)
    _calcify(inside, hu, person, rng, falx)
    return Brain(hu, csf * (1 - barrier), ventricle, cistern, white, falx, barrier)


def _ventricles(xm: Array, y: Array, z: Array, scale: tuple[float, ...], atrophy: float) -> Array:
    """Signed distance to the ventricles, positive inside: four horns and a body each side, third, aqueduct, fourth."""
    side = np.where(xm > 0, scale[0], scale[1]).astype(np.float32)
    ax = np.abs(xm)
    near = np.flatnonzero((ax < 48) & (y > -82) & (y < 50) & (z > -60) & (z < 42))
    ax, py, pz, grow = ax[near], y[near], z[near], side[near] - 1
    lateral = np.full(near.shape, -30, np.float32)
    for start, end, radii in (
        ((7, 31, 2), (8, 12, 12), (3.6, 4.6)),
        ((13, 27, 3), (10, 10, 13), (2.6, 3.6)),
        ((8, 12, 12), (13, -24, 20), (4.6, 4.4)),
        ((13, -24, 20), (23, -40, 11), (4.6, 6.6)),
        ((23, -40, 11), (23, -68, 3), (5.6, 2.0)),
        ((23, -40, 11), (31, -26, -14), (5.6, 1.8)),
        ((31, -26, -14), (29, -4, -22), (1.8, 1.6)),
    ):
        rod = capsule(ax, py, pz, start, end, radii) + grow * (0.5 * (radii[0] + radii[1]) + 1)
        np.maximum(lateral, rod, out=lateral)
    lateral = np.minimum(lateral, ax - 0.9)  # septum pellucidum
    third = ellipsoid(ax, py, pz, (0, -6, -3), (1.3 + 3.4 * atrophy, 14, 10))
    channel = capsule(ax, py, pz, (0, -21, -8), (0, -34, -28), (1.0, 1.2))
    fourth = ellipsoid(ax, py, pz, (0, -37, -36), (7 + 2 * atrophy, 4 + 1.5 * atrophy, 10))
    result = np.full(y.shape, -30, np.float32)
    result[near] = np.maximum(np.maximum(lateral, third), np.maximum(channel, fourth))
    return result


def _cisterns(inside: Interior, atrophy: float) -> Array:
    """Signed distance to the basal cisterns, positive inside."""
    ax, y, z = np.abs(inside.x), inside.y, inside.z
    result = np.full(y.shape, -30, np.float32)
    near = np.flatnonzero((ax < 40) & (y > -95) & (y < 30) & (z < 16))
    ax, py, pz = ax[near], y[near], z[near]
    extra = 1.6 * atrophy - 0.6
    midbrain = np.hypot(ax / 18, (py + 24) / 15)
    ragged = 0.9 * inside.texture(ax, py, pz, 15)
    ambient = 1.1 + extra + ragged - 16 * np.abs(midbrain - 1.07) - 2.5 * smoothstep(py, -22, -12)
    ambient = np.minimum(ambient, 9 - np.abs(pz + 10))
    star = 12 + extra + 2.5 * np.cos(5 * np.arctan2(py - 5, ax)) - np.hypot(ax, py - 5)
    suprasellar = np.minimum(star, 5 - np.abs(pz + 22))
    parts = [
        ambient,
        suprasellar,
        ellipsoid(ax, py, pz, (0, -39, -3), (9 + extra, 4 + extra, 7)),
        ellipsoid(ax, py, pz, (0, -10, -38), (11, 3.2 + extra, 15)),
        ellipsoid(ax, py, pz, (19, -20, -40), (7, 4 + extra, 6)),
        ellipsoid(ax, py, pz, (0, -70, -68), (11 + 3 * extra, 5 + extra, 8)),
        np.minimum(np.minimum(np.hypot(ax, py + 38) - 8.5, 15 - np.hypot(ax, py + 38)), -66 - pz),  # around the medulla
    ]
    result[near] = np.maximum.reduce(parts)
    return result


def _sulci(inside: Interior, xm: Array, depth: Array, atrophy: np.float32, room: Room) -> tuple[Array, Array]:
    """Signed distance to sulci and to the Sylvian fissure, positive inside.

    Sulci are the zero level of a band-limited field that is read on the skull above each point, so that its sheets run
    inwards; the wavelength sets two sulci in 25 mm.
    """
    x, y, z = inside.x, inside.y, inside.z
    radius = np.sqrt(x * x + (y + 8) ** 2 + z * z) + 1
    outward = ((radius + 0.75 * np.maximum(depth, 0)) / radius).astype(np.float32)
    wavelength = 27.0
    level = inside.texture(x * outward, (y + 8) * outward, z * outward, wavelength)
    reach = 14 + 4 * inside.noise(40)
    half_width = (0.25 + 1.35 * atrophy) * np.maximum(1 - depth / np.maximum(reach, 4) * 0.8, 0) + 0.6 * room.widen_mm
    half_width *= np.clip(1 - room.clot_mm / 9, 0.1, 1)  # effaced under a clot
    sulcus = half_width - np.abs(level) * np.float32(wavelength / (2 * np.pi) * 0.9)
    sulcus = np.minimum(sulcus, reach - depth)
    sulcus -= np.where(inside.infratentorial, 1.2, 0)
    bend = inside.noise(30)
    ax = np.abs(xm) + 2.2 * bend
    lateral = np.minimum(np.minimum(ax - 33, 28 - y), y + 30)
    sheet = 0.5 + 1.5 * atrophy + 0.5 * room.widen_mm - 0.8 * np.abs(z + 3 + 0.35 * (y - 5) + 3 * bend)
    insula = 0.6 + 1.4 * atrophy + 0.5 * room.widen_mm - 0.9 * np.abs(ax - 37 + 0.1 * y)
    insula = np.minimum(insula, np.minimum(14 - np.abs(z - 4), 18 - np.abs(y - 4)))
    sylvian = np.maximum(np.minimum(sheet, lateral), insula)
    sylvian = np.where(inside.infratentorial, -9, sylvian)
    return sulcus.astype(np.float32), sylvian.astype(np.float32)


def _deep_grey(ax: Array, y: Array, z: Array) -> Array:
    """Share of caudate, lentiform nucleus and thalamus."""
    result = np.zeros(y.shape, np.float32)
    near = np.flatnonzero((ax < 40) & (np.abs(y) < 40) & (np.abs(z - 4) < 24))
    ax, py, pz = ax[near], y[near], z[near]
    nuclei = np.maximum.reduce(
        [
            ellipsoid(ax, py, pz, (14, 20, 7), (5.5, 10, 9)),
            ellipsoid(ax - 0.25 * py, py, pz, (25, 3, 2), (6, 17, 10)),
            ellipsoid(ax + 0.2 * py, py, pz, (8, -13, 4), (7.5, 14, 9)),
        ]
    )
    result[near] = share(0.7 * nuclei)
    return result


def _old_infarct(inside: Interior, hu: Array, rng: np.random.Generator) -> Array:
    """A wedge of old infarct at the surface, of CSF density in the middle."""
    direction = rng.normal(size=3) * (1, 1, 0.4)
    centre = direction / np.linalg.norm(direction) * (52, 62, 45)
    distance = np.sqrt((inside.x - centre[0]) ** 2 + (inside.y - centre[1]) ** 2 + (inside.z - centre[2]) ** 2)
    amount = smoothstep(-distance + 5 * inside.noise(22), -float(rng.uniform(10, 24)), -6) * ~inside.infratentorial
    return (hu + 0.9 * amount * (11 - hu)).astype(np.float32)


def _meninges(
    inside: Interior, hu: Array, person: Person, xm: Array, above_callosum: Array, supra: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Paint falx, tentorium and dural sinuses; return the falx, and falx and tentorium together."""
    x, y, z, depth = inside.x, inside.y, inside.z, inside.depth_mm
    reaches = (above_callosum > 0.02) & (z > -18) & supra
    falx = share(np.float32(0.15 + person.dura_mm) - np.abs(xm)) * reaches
    height = tentorium_height(x, y)
    behind = (y < -6 - 0.62 * np.abs(x)) & (np.hypot(x / 21, (y + 20) / 24) > 1)
    tentorium = share(np.float32(0.1 + person.dura_mm) - 0.9 * np.abs(z - height)) * behind
    near_middle = 4.2 - np.hypot(xm, 1.1 * np.maximum(depth, 0) + 0.5)
    sagittal = share(near_middle) * ((z > 20) | (y < -70)) * (z > -24)
    transverse = share(3.4 - np.hypot(np.maximum(depth, 0), 0.8 * (z - height))) * (y < -45) * (np.abs(x) < 62)
    straight = share(1.8 - np.hypot(x, z - height)) * (y < -40)
    barrier = np.maximum(falx, tentorium).astype(np.float32)
    hu += barrier * (np.float32(person.dura_hu) - hu)
    sinuses = np.maximum(np.maximum(sagittal, transverse), straight) * (depth > -0.5)
    hu += sinuses * (np.float32(person.venous_hu) - hu)
    return falx.astype(np.float32), barrier


def _calcify(inside: Interior, hu: Array, person: Person, rng: np.random.Generator, falx: Array) -> None:
    x, y, z = inside.x, inside.y, inside.z
    jitter = rng.uniform(-1.5, 1.5, (8, 3))
    spots: list[tuple[str, tuple[float, float, float], tuple[float, float, float], float]] = [
        ("pineal", (0, -34, 3), (2.2, 2.6, 2.2), 330),
        *(("choroid", (s * 22, -42, 11), (2.6, 4.5, 3.2), 230) for s in (-1, 1)),
        *(("basal_ganglia", (s * 19, 3, 1), (3.5, 7, 4), 120) for s in (-1, 1)),
        *(("carotid", (s * 10, 2, -29), (2.0, 6, 2.0), 450) for s in (-1, 1)),
        ("falx", (0, 50, 40), (1.8, 9, 6), 500),
    ]
    for (name, centre, axes, value), shift in zip(spots, jitter, strict=True):
        size = np.array(axes) * rng.uniform(0.6, 1.2) * person.calcium_size
        if name not in person.calcified:
            continue
        middle = np.array(centre) + shift * (name != "falx")
        reach = size + 3
        near = np.flatnonzero(
            (np.abs(x - middle[0]) < reach[0]) & (np.abs(y - middle[1]) < reach[1]) & (np.abs(z - middle[2]) < reach[2])
        )
        px, py, pz = x[near], y[near], z[near]
        lump = ellipsoid(px, py, pz, middle, size) + 0.8 * inside.texture(px, py, pz, 6)
        if name == "falx":
            lump = np.minimum(lump, 4 * falx[near] - 0.5)
        hu[near] += share(lump) * (np.float32(value * person.calcium) - hu[near])
