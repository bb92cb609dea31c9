"""Smooth random fields, soft edges and spline matrices: the arithmetic that the phantom is made with."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, ndimage, sparse

Array = NDArray[np.floating[Any]]  # float32 wherever it is large

TEXTURE_CELLS = 64
CELLS_PER_WAVELENGTH = 8


class Texture:
    """Band-limited Gaussian noise of unit variance, looked up at any wavelength.

    One periodic cube of noise, band-passed around one wavelength, is drawn once; every field is a look-up in it at its
    own scale and offset. The period is eight wavelengths.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        n = TEXTURE_CELLS
        frequency = np.sqrt(
            fft.fftfreq(n)[:, None, None] ** 2
            + fft.fftfreq(n)[None, :, None] ** 2
            + fft.rfftfreq(n)[None, None, :] ** 2
        )
        centre = 1 / CELLS_PER_WAVELENGTH
        band = np.exp(-(((frequency - centre) / (0.3 * centre)) ** 2))
        spectrum = fft.rfftn(rng.standard_normal((n, n, n), dtype=np.float32)) * band
        noise = fft.irfftn(spectrum, s=(n, n, n)).astype(np.float32)
        self._noise: Array = np.pad(noise / noise.std(), (0, 1), mode="wrap")
        self._rng = rng

    def __call__(self, x: Array, y: Array, z: Array, wavelength_mm: float) -> Array:
        """A new field at points in mm (arrays of one shape); each call draws its own place in the cube."""
        scale = np.float32(CELLS_PER_WAVELENGTH / wavelength_mm)
        offset = self._rng.uniform(0, TEXTURE_CELLS, 3).astype(np.float32)
        turns = [(p * scale + o) * np.float32(1 / TEXTURE_CELLS) for p, o in zip((x, y, z), offset, strict=True)]
        cells = np.stack([(t - np.floor(t)) * np.float32(TEXTURE_CELLS) for t in turns])
        return ndimage.map_coordinates(self._noise, cells, order=1, output=np.float32, mode="nearest")


def share(inside_mm: Array) -> Array:
    """Share of a 1 mm voxel that a surface leaves inside, from the signed distance of its centre (positive inside)."""
    return np.clip(inside_mm + np.float32(0.5), 0, 1)


def smoothstep(x: ArrayLike, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, a cubic between."""
    t = np.clip((np.asarray(x, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def ellipsoid(x: Array, y: Array, z: Array, centre: ArrayLike, semi_axes: ArrayLike) -> Array:
    """Signed distance to an ellipsoid in mm, positive inside; first order, exact on a sphere's radius."""
    (cx, cy, cz), (a, b, c) = np.asarray(centre, np.float32), np.asarray(semi_axes, np.float32)
    level = np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + ((z - cz) / c) ** 2)
    return (1 - level) * np.float32(min(a, b, c))


def capsule(x: Array, y: Array, z: Array, start: ArrayLike, end: ArrayLike, radii: tuple[float, float]) -> Array:
    """Signed distance to a rod from `start` to `end` whose radius runs linearly, positive inside."""
    a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
    axis = b - a
    along = ((x - a[0]) * axis[0] + (y - a[1]) * axis[1] + (z - a[2]) * axis[2]) / (axis @ axis)
    along = np.clip(along, 0, 1)
    gap = (x - a[0] - along * axis[0]) ** 2 + (y - a[1] - along * axis[1]) ** 2 + (z - a[2] - along * axis[2]) ** 2
    return np.float32(radii[0]) + along * np.float32(radii[1] - radii[0]) - np.sqrt(gap)


def cubic_matrix(positions: ArrayLike, n: int, sharpness: float) -> sparse.csr_array:
    """Matrix that reads `n` samples at fractional `positions`; what lies outside reads 0.

    The kernel is the cubic family of Mitchell and Netravali (SIGGRAPH 1988, equation 8) on the line B + 2C = 1, with
    B = 1 - sharpness: 0 is the cubic B-spline, 1 the interpolating Catmull-Rom spline.
    """
    at = np.asarray(positions, dtype=np.float64)
    first = np.floor(at).astype(np.intp)
    b, c = 1 - sharpness, sharpness / 2
    rows, columns, weights = [], [], []
    for step in (-1, 0, 1, 2):
        d = np.abs(at - first - step)
        near = ((12 - 9 * b - 6 * c) * d**3 + (-18 + 12 * b + 6 * c) * d**2 + 6 - 2 * b) / 6
        far = ((-b - 6 * c) * d**3 + (6 * b + 30 * c) * d**2 + (-12 * b - 48 * c) * d + 8 * b + 24 * c) / 6
        column = first + step
        inside = (column >= 0) & (column < n)
        rows.append(np.flatnonzero(inside))
        columns.append(column[inside])
        weights.append(np.where(d < 1, near, far)[inside])
    entries = np.concatenate(weights).astype(np.float32), (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_array(entries, shape=(len(at), n))


def apply_along(matrix: sparse.csr_array, values: NDArray[np.float32], axis: int) -> Array:
    """Multiply one axis of an array by a sparse matrix (never threaded, so the same bits on any machine load)."""
    moved = np.moveaxis(values, axis, 0)
    product = matrix @ np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
    return np.moveaxis(product.reshape(matrix.shape[0], *moved.shape[1:]), 0, axis)
