"""The scanner: where its slices lie in the head, and what it does to the HU on the way.

Sampling: a scan is made on a lattice of 1 mm pixels and thin sub-slices that has the scan's own (sheared) axes, is
averaged over the slice thickness and read at the scan's pixels with a cubic kernel, which is the in-plane point spread.
Errors: beam hardening and the local noise level come from forward and back projection of each slice at 2.6 mm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, sparse

from ich_pipeline.geometry import Affine
from ich_pipeline.phantom.anatomy import ORIGIN_MM
from ich_pipeline.phantom.fields import Array, apply_along, cubic_matrix, smoothstep
from ich_pipeline.phantom.settings import PhantomSettings

LATTICE_MM = 1.0
SUBSLICE_MM = 1.6
CONTROL_MM = 9.0
WARP_MM = 1.6  # standard deviation of the random deformation of each head
MARGIN_MM = 9.0
PROJECTION_PIXELS, PROJECTION_MM, PROJECTION_ANGLES = 96, 2.6, 90
WATER_PER_MM = 0.0195  # attenuation at the mean energy of a 120 kV beam behind a head
BONE_FROM_HU = 250
HARDENING = 0.0105  # share of the squared bone integral that a water correction leaves; sets a bar of 5 to 20 HU
MIDDLE_INTEGRAL = 3.4  # attenuation through the middle of a head: 160 mm of tissue and the calvaria twice
PADDING_HU = (-1024, -2000, -3024)


@dataclass(frozen=True)
class Degradation:
    """What a scanner and a restless patient add to a plain image; the defaults add nothing.

    Attributes:
        hardening: beam hardening against that of the plain phantom.
        glare: share of each pixel's light that spreads over its surroundings, with a deviation of glare_mm.
        edge_gain: how much of the finest detail is added once more, as sharp kernels do.
        blur_mm: deviation of a further blur in plane.
        slow_noise_hu: deviation of noise some millimetres wide.
        gain, offset_hu: calibration; gain acts on HU + 1000.
        moved_mm: how far the head lay apart in two halves of the views of some slices.
    """

    hardening: float = 1.0
    glare: float = 0.0
    glare_mm: float = 3.0
    edge_gain: float = 0.0
    blur_mm: float = 0.0
    slow_noise_hu: float = 0.0
    gain: float = 1.0
    offset_hu: float = 0.0
    moved_mm: float = 0.0

    def apply(self, image_hu: Array, pixel_mm: float, rng: np.random.Generator) -> Array:
        """The image (I, J, K) with all of it but hardening, which `scan_hu` sees to."""

        def smoothed(values: Array, sigma_mm: float) -> Array:
            return ndimage.gaussian_filter(values, (sigma_mm / pixel_mm, sigma_mm / pixel_mm, 0))

        if self.slow_noise_hu:
            slow = smoothed(rng.standard_normal(image_hu.shape, dtype=np.float32), float(rng.uniform(1, 3)))
            image_hu = image_hu + slow * np.float32(self.slow_noise_hu / max(float(slow.std()), 1e-6))
        if self.moved_mm:
            first, stop = sorted(rng.integers(0, image_hu.shape[2] + 1, 2))
            angle = rng.uniform(0, 2 * np.pi)
            shift = [self.moved_mm / pixel_mm * float(f(angle)) for f in (np.cos, np.sin)]
            part = image_hu[:, :, first:stop]
            weight = float(rng.uniform(0.2, 0.5))
            image_hu = image_hu.copy()
            image_hu[:, :, first:stop] += weight * (ndimage.shift(part, (*shift, 0), order=1, mode="nearest") - part)
        if self.glare:
            image_hu = image_hu + np.float32(self.glare) * (smoothed(image_hu, self.glare_mm) - image_hu)
        if self.edge_gain:
            image_hu = image_hu + np.float32(self.edge_gain) * (image_hu - smoothed(image_hu, 0.7))
        if self.blur_mm:
            image_hu = smoothed(image_hu, self.blur_mm)
        return (image_hu + 1000) * np.float32(self.gain) + np.float32(self.offset_hu - 1000)


PLAIN = Degradation()


@dataclass(frozen=True, eq=False)
class Protocol:
    """Geometry and settings of one scan.

    Attributes:
        rotation: (3, 3) turns head coordinates, times head_scale, into the scanner's; shift_mm is added after.
        affine: (4, 4) index to scanner RAS mm, with the gantry tilt as shear.
        signs: direction of the first two array axes against right and anterior.
        u_mm, v_mm: in-plane position of every pixel along the first two axes.
        centres_mm: along-table position of every slice at v = 0.
    """

    rotation: NDArray[np.float64]
    head_scale: float
    shift_mm: NDArray[np.float64]
    tilt_deg: float
    slice_mm: float
    pixel_mm: float
    affine: Affine
    u_mm: NDArray[np.float64]
    v_mm: NDArray[np.float64]
    centres_mm: NDArray[np.float64]
    noise_hu: float
    sharpness: float
    padding_hu: int | None
    headrest: str
    cut: bool
    degradation: Degradation = PLAIN

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the scan."""
        return len(self.u_mm), len(self.v_mm), len(self.centres_mm)

    @property
    def gravity(self) -> NDArray[np.float64]:
        """Down, for a supine head, in the head's own frame."""
        return self.rotation.T @ np.array([0.0, -1.0, 0.0])


def draw_protocol(rng: np.random.Generator, settings: PhantomSettings) -> Protocol:
    """Draw pose, tilt, coverage, pixel and slice size, dose and padding of one scan."""
    n = settings.matrix
    angles = rng.normal(0, (5.0, 3.0, 4.0))  # nod, lean, turn in degrees
    tilted = rng.random() < settings.tilt_fraction
    tilt = float(rng.uniform(*settings.tilt_deg)) if tilted else 0.0
    if tilted:
        angles[0] += 0.5 * tilt  # tilt is used where the chin is up
    rotation = _rotation(*np.radians(angles))
    shift = rng.normal(0, (4.0, 6.0, 0.0))
    pixel = float(rng.uniform(*settings.pixel_mm)) * 512 / n
    thickness = float(rng.choice(settings.slice_mm))
    step = thickness / np.cos(np.radians(tilt))
    bottom, top = -84 + rng.normal(0, 7), 82 + rng.uniform(0, 10)
    centres = np.arange(bottom, top, step)
    cut = bool(rng.random() < settings.cut_fraction)
    centre = rng.normal(0, 4, 2) + (0, 4) + (rng.choice((-1, 1), 2) * rng.uniform(18, 40, 2) if cut else 0)
    signs = [(-1, -1), (-1, 1), (1, 1)][int(rng.integers(3))]
    offsets = (np.arange(n) - (n - 1) / 2) * pixel
    u, v = centre[0] + signs[0] * offsets, centre[1] + signs[1] * offsets
    cosine, sine = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    direction = float(rng.choice((-1, 1)))
    tilt, sine = direction * tilt + 0.0, direction * sine
    table_mm = float(rng.uniform(-400, 400))
    affine = np.eye(4)
    affine[:3, 0] = (signs[0] * pixel, 0, 0)
    affine[:3, 1] = (0, signs[1] * pixel * cosine, signs[1] * pixel * sine)
    affine[:3, 2] = (0, 0, step)
    affine[:3, 3] = (u[0], v[0] * cosine, v[0] * sine + centres[0])
    affine[2, 3] += table_mm
    return Protocol(
        rotation=rotation,
        head_scale=float(np.clip(rng.normal(0.975, 0.03), 0.9, 1.05)),
        shift_mm=np.array([shift[0], shift[1], table_mm]),
        tilt_deg=tilt,
        slice_mm=thickness,
        pixel_mm=pixel,
        affine=affine,
        u_mm=u,
        v_mm=v,
        centres_mm=centres + table_mm,
        noise_hu=float(rng.uniform(*settings.noise_hu) * (5 / thickness) ** 0.35),
        sharpness=float(rng.uniform(0.6, 1.0)),
        padding_hu=int(rng.choice(PADDING_HU)) if rng.random() < settings.circle_fraction else None,
        headrest=str(rng.choice(("cup", "flat", "none"), p=(0.6, 0.25, 0.15))),
        cut=cut,
    )


def _rotation(nod: float, lean: float, turn: float) -> NDArray[np.float64]:
    (cx, cy, cz), (sx, sy, sz) = np.cos([nod, lean, turn]), np.sin([nod, lean, turn])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return _product(about_z, about_x, about_y)


def _product(*matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    result = matrices[0]
    for matrix in matrices[1:]:
        result = np.array(
            [[sum(a * b for a, b in zip(row, column, strict=True)) for column in matrix.T] for row in result]
        )
    return result


class Lattice:
    """The thin-sliced lattice of one scan, and where each of its points lies in the grid of the head.

    Args:
        push_mm: displacement of the head's tissue as a function of head coordinates (3, ...), or None: a mass effect.
    """

    def __init__(self, protocol: Protocol, rng: np.random.Generator, push_mm: "Push | None" = None) -> None:
        self.protocol = protocol
        self.sub = max(1, round(protocol.slice_mm / SUBSLICE_MM))
        (u0, u1), (v0, v1) = _head_extent(protocol)
        self.u = np.arange(u0, u1 + LATTICE_MM, LATTICE_MM)
        self.v = np.arange(v0, v1 + LATTICE_MM, LATTICE_MM)
        step = np.linalg.norm(protocol.affine[:3, 2])
        offsets = ((np.arange(self.sub) + 0.5) / self.sub - 0.5) * step
        self.w = (protocol.centres_mm[:, None] + offsets).ravel()
        self._coordinates = self._head_coordinates(rng, push_mm)

    def _head_coordinates(self, rng: np.random.Generator, push_mm: "Push | None") -> Array:
        """(3, U, V, W) voxel coordinates in the head grid: affine and deformation in one spline of control points."""
        knots = [_knots(axis) for axis in (self.u, self.v, self.w)]
        u, v, w = np.meshgrid(*knots, indexing="ij")
        tilt = np.radians(self.protocol.tilt_deg)
        world = np.stack([u, v * np.cos(tilt), w + v * np.sin(tilt)]) - self.protocol.shift_mm[:, None, None, None]
        inverse = self.protocol.rotation.T / self.protocol.head_scale
        head = np.stack([row[0] * world[0] + row[1] * world[1] + row[2] * world[2] for row in inverse])
        if push_mm is not None:
            head = head - push_mm(head)
        smooth = ndimage.gaussian_filter(rng.standard_normal(head.shape), (0, 2.5, 2.5, 2.5), mode="nearest")
        head = head + smooth * (WARP_MM / smooth.std())
        values = (head - ORIGIN_MM[:, None, None, None]).astype(np.float32)
        for axis, (fine, knot) in enumerate(zip((self.u, self.v, self.w), knots, strict=True), start=1):
            matrix = cubic_matrix((fine - knot[0]) / (knot[1] - knot[0]), len(knot), sharpness=0.0)
            values = apply_along(matrix, values, axis)
        return np.ascontiguousarray(values)

    def sample(self, volume: Array, outside: float = 0.0) -> Array:
        """Slices (U, V, K) of a volume on the head grid: linear between its voxels, mean over the slice thickness."""
        part = self._where(volume) if outside == 0 else (slice(None),) * 3
        thin = np.full((len(self.u), len(self.v), len(self.w)), outside, np.float32)
        thin[part] = ndimage.map_coordinates(
            volume, self._coordinates[:, *part], order=1, output=np.float32, mode="constant", cval=outside
        )
        return thin.reshape(len(self.u), len(self.v), -1, self.sub).mean(axis=3)

    def _where(self, volume: Array) -> tuple[slice, ...]:
        """Part of the lattice that can meet what is not 0 in a volume: a clot is small, and reading is dear."""
        box = ndimage.find_objects((volume > 0).view(np.uint8))
        if not box:
            return (slice(0, 0),) * 3
        stride = 3
        coarse = self._coordinates[:, ::stride, ::stride, ::stride]
        inside = np.ones(coarse.shape[1:], bool)
        for axis, cut in enumerate(box[0]):
            inside &= (coarse[axis] > cut.start - 2 - 2 * stride) & (coarse[axis] < cut.stop + 1 + 2 * stride)
        used = ndimage.find_objects(inside.view(np.uint8))
        if not used:
            return (slice(0, 0),) * 3
        return tuple(slice(max((c.start - 1) * stride, 0), (c.stop + 1) * stride) for c in used[0])

    def to_pixels(self, slices: Array, sharpness: float) -> Array:
        """Read lattice slices at the scan's pixels: (U, V, K) to (I, J, K)."""
        rows = cubic_matrix((self.protocol.u_mm - self.u[0]) / LATTICE_MM, len(self.u), sharpness)
        columns = cubic_matrix((self.protocol.v_mm - self.v[0]) / LATTICE_MM, len(self.v), sharpness)
        return apply_along(columns, apply_along(rows, slices, 0), 1)


def _knots(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.arange(axis[0] - 2 * CONTROL_MM, axis[-1] + 3 * CONTROL_MM, CONTROL_MM)


def _head_extent(protocol: Protocol) -> tuple[tuple[float, float], tuple[float, float]]:
    """In-plane bounds (mm) of what the scan sees of the head: its pixels, or the head where that is smaller."""
    half_u, (back, front) = 94.0, (-114.0, 124.0)
    bounds = []
    for pixels, low, high in ((protocol.u_mm, -half_u, half_u), (protocol.v_mm, back, front)):
        bounds.append((max(pixels.min() - 3, low), min(pixels.max() + 3, high)))
    return bounds[0], bounds[1]


@dataclass(frozen=True)
class Push:
    """Mass effect as a smooth displacement: away from a center, and of the midline; nothing moves at the skull.

    Attributes:
        shift_mm: of the midline to the right (negative: left) at its most.
        level_mm: (y, z) where that is.
        lesions: (centre, radius, strength) of clots that push tissue outwards, mm.
    """

    shift_mm: float
    level_mm: tuple[float, float]
    lesions: tuple[tuple[tuple[float, float, float], float, float], ...] = ()

    def __call__(self, head: NDArray[np.float64]) -> NDArray[np.float64]:
        """Displacement (3, ...) in mm at head coordinates (3, ...)."""
        x, y, z = head
        edge = np.sqrt((x / 62) ** 2 + ((y + 8) / 76) ** 2 + (np.maximum(z, -z * 1.4) / 66) ** 2)
        loose = 1 - np.asarray(smoothstep(edge, 0.15, 0.95))
        moved = np.zeros_like(head)
        moved[0] = (
            self.shift_mm * np.exp(-(((y - self.level_mm[0]) / 42) ** 2) - ((z - self.level_mm[1]) / 34) ** 2) * loose
        )
        for centre, radius, strength in self.lesions:
            away = head - np.array(centre)[:, None, None, None]
            distance = np.sqrt((away**2).sum(axis=0)) + 1
            size = strength * np.where(distance < radius, distance / radius, np.exp(-(distance - radius) / 18))
            moved += away / distance * size * loose
        return moved


def scan_hu(lattice: Lattice, head_hu: Array, rng: np.random.Generator) -> NDArray[np.int16]:
    """The CT of a head: (I, J, K) int16 HU with partial volume, beam hardening, noise, headrest and padding."""
    protocol = lattice.protocol
    slices = lattice.sample(head_hu, outside=-1000)
    hardening_hu, noise_scale = _projected_errors(lattice, slices)
    image = lattice.to_pixels(slices + 1000, protocol.sharpness) - 1000
    _add_headrest(image, protocol)
    image += _from_projection(protocol, hardening_hu) * np.float32(protocol.degradation.hardening)
    image += _noise(protocol, rng) * (protocol.noise_hu * _from_projection(protocol, noise_scale))
    if protocol.degradation is not PLAIN:
        image = protocol.degradation.apply(image, protocol.pixel_mm, rng)
    np.clip(image, -1024, 3071, out=image)
    result = np.rint(image).astype(np.int16)
    if protocol.padding_hu is not None:
        n, m = protocol.shape[:2]
        radius = np.hypot((np.arange(n) - (n - 1) / 2)[:, None] / (n / 2), (np.arange(m) - (m - 1) / 2) / (m / 2))
        result[radius > 1] = protocol.padding_hu
    return result


def _projected_errors(lattice: Lattice, slices: Array) -> tuple[Array, Array]:
    """Beam hardening in HU and relative noise, (P, P, K) on the projection grid.

    A water-corrected projection is short by a term in the bone integral b: beta b (b + 0.5 w), with w the integral of
    soft tissue (after Joseph and Spital, J Comput Assist Tomogr 1978;2:100). Filtered backprojection of that term gives
    the dark bands between dense bones and the cupping below the calvaria. The variance of a projection grows as
    exp(b + w); its backprojection gives the local noise (Kak and Slaney 1988, equation 5.115).
    """
    project, filtered = _projector()
    centre_u, centre_v = lattice.protocol.u_mm.mean(), lattice.protocol.v_mm.mean()
    at = (np.arange(PROJECTION_PIXELS) - (PROJECTION_PIXELS - 1) / 2) * PROJECTION_MM
    coarse = slices
    for axis, (centre, fine) in enumerate(((centre_u, lattice.u), (centre_v, lattice.v))):
        coarse = apply_along(_box_matrix(at + centre, fine), coarse + 1000 * (axis == 0), axis)
    k = coarse.shape[2]
    flat = np.ascontiguousarray(coarse.reshape(-1, k)) / 1000  # attenuation relative to water
    bone = np.maximum(flat - (1 + BONE_FROM_HU / 1000), 0)
    per_pixel = WATER_PER_MM * PROJECTION_MM
    both = project @ np.concatenate([bone, flat - bone], axis=1) * np.float32(per_pixel)
    bone_integral, soft_integral = both[:, :k], both[:, k:]
    missing = -np.float32(HARDENING) * bone_integral * (bone_integral + 0.5 * soft_integral)
    views = filtered(missing)
    variance = np.exp(bone_integral + soft_integral)
    back = project.T @ np.concatenate([views, variance], axis=1)
    hardening = back[:, :k] * np.float32(1000 / WATER_PER_MM)
    # The scanner's calibration on a head-sized skull takes out the mean in soft tissue.
    soft = (flat > 0.9) & (flat < 1.15)
    hardening -= (hardening * soft).sum(axis=0) / np.maximum(soft.sum(axis=0), 1)
    typical = np.float32(PROJECTION_ANGLES) * np.exp(np.float32(MIDDLE_INTEGRAL))
    noise = np.clip(np.sqrt(back[:, k:] / typical), 0.35, 4.0)
    shape = (PROJECTION_PIXELS, PROJECTION_PIXELS, k)
    return np.clip(hardening, -60, 60).reshape(shape), noise.reshape(shape)


def _box_matrix(at: NDArray[np.float64], fine: NDArray[np.float64]) -> sparse.csr_array:
    """Mean of the 1 mm samples in each projection pixel; parts without samples count as air."""
    overlap = np.minimum(at[:, None] + PROJECTION_MM / 2, fine + 0.5) - np.maximum(
        at[:, None] - PROJECTION_MM / 2, fine - 0.5
    )
    return sparse.csr_array((np.clip(overlap, 0, None) / PROJECTION_MM).astype(np.float32))


@lru_cache(maxsize=1)
def _projector():  # type: ignore[no-untyped-def]
    """Parallel-beam system matrix (rays, pixels), and the ramp filter with the scale of its backprojection."""
    n, bins = PROJECTION_PIXELS, int(PROJECTION_PIXELS * 1.5)
    centre = (np.arange(n) - (n - 1) / 2).astype(np.float32)
    angles = np.arange(PROJECTION_ANGLES) * np.pi / PROJECTION_ANGLES
    pixels = np.arange(n * n)
    rows, weights = [], []
    for number, angle in enumerate(angles):
        position = (centre[:, None] * np.cos(angle) + centre * np.sin(angle)).ravel() + (bins - 1) / 2
        low = np.floor(position).astype(np.intp)
        right = (position - low).astype(np.float32)
        rows += [number * bins + low, number * bins + low + 1]
        weights += [1 - right, right]
    columns = np.tile(pixels, 2 * len(angles))
    matrix = sparse.csr_array(
        (np.concatenate(weights), (np.concatenate(rows), columns)), shape=(len(angles) * bins, n * n)
    )
    padded = 2 * bins
    at = np.arange(padded)
    at = np.minimum(at, padded - at)
    # Sampled ramp (Kak and Slaney, equation 3.61), which keeps the mean that a ramp cut in frequency loses.
    kernel = np.where(at % 2 == 1, -1 / (np.pi * np.maximum(at, 1)) ** 2, 0)
    kernel[0] = 0.25
    ramp = fft.rfft(kernel).real.astype(np.float32)[None, :, None]

    def filtered(views: Array) -> Array:
        sinogram = views.reshape(PROJECTION_ANGLES, bins, -1)
        spectrum = fft.rfft(sinogram, n=padded, axis=1) * ramp
        result = fft.irfft(spectrum, n=padded, axis=1)[:, :bins]
        scale = np.float32(np.pi / PROJECTION_ANGLES / PROJECTION_MM)
        return (result * scale).reshape(views.shape).astype(np.float32)

    return matrix, filtered


def _from_projection(protocol: Protocol, values: Array) -> Array:
    """Read the projection grid, which is centred on the field of view, at the scan's pixels."""
    for axis, pixels in enumerate((protocol.u_mm, protocol.v_mm)):
        at = (pixels - pixels.mean()) / PROJECTION_MM + (PROJECTION_PIXELS - 1) / 2
        values = apply_along(
            cubic_matrix(np.clip(at, 1, PROJECTION_PIXELS - 2.001), PROJECTION_PIXELS, 0.0), values, axis
        )
    return values


def _noise(protocol: Protocol, rng: np.random.Generator) -> Array:
    """Unit noise with the spectrum of filtered backprojection, f times the square of a soft kernel's response."""
    n, m, k = protocol.shape
    frequency = np.hypot(fft.fftfreq(n, protocol.pixel_mm)[:, None], fft.rfftfreq(m, protocol.pixel_mm)).astype(
        np.float32
    )
    cutoff = 0.36 + 0.16 * protocol.sharpness  # per mm
    amplitude = np.sqrt(frequency) * np.exp(-((frequency / cutoff) ** 2))
    # Variance of filtered white noise by Parseval; the half spectrum counts twice but for its first column.
    double = np.where(np.arange(frequency.shape[1]) == 0, 1, 2)
    amplitude /= np.sqrt((amplitude**2 * double).sum() / (n * m))
    white = rng.standard_normal((k, n, m), dtype=np.float32)
    colored = fft.irfft2(fft.rfft2(white) * amplitude, s=(n, m))
    return np.moveaxis(colored, 0, 2)


def _add_headrest(image: Array, protocol: Protocol) -> None:
    """A thin shell under or around the head, with foam inside; the head lies on top of it."""
    if protocol.headrest == "none":
        return
    u, v = protocol.u_mm[:, None], protocol.v_mm[None, :]
    middle, back = protocol.shift_mm[0], protocol.shift_mm[1] - 109
    if protocol.headrest == "cup":
        radius = np.hypot((u - middle) / 108, (v - back - 118) / 122)
        shell = (1 - np.abs(radius - 1) * 110 / 1.2).astype(np.float32)
        shell = np.where(v < back + 92, np.clip(shell, 0, 1), 0)
        foam = np.where((np.abs(radius - 0.975) < 0.022) & (v < back + 80), 60, 0)
        profile = 850 * shell + foam
    else:
        plate = np.clip(1.5 - np.abs(v - back + 6 + 0 * u), 0, 1)
        second = np.clip(1.5 - np.abs(v - back + 34 + 0 * u), 0, 1)
        profile = 800 * np.maximum(plate, second) * (np.abs(u - middle) < 125)
    profile = profile.astype(np.float32)[..., None]
    image += profile * np.clip((-500 - image) / 500, 0, 1)


def shares(lattice: Lattice, volumes: Mapping[str, Array]) -> dict[str, Array]:
    """Slices of several share maps at the scan's pixels, by name; a B-spline keeps them between 0 and 1."""
    return {name: lattice.to_pixels(lattice.sample(volume), sharpness=0.0) for name, volume in volumes.items()}
