"""What a set of phantoms is drawn from, and what a phantom is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.detection import Box
from ich_pipeline.errors import ConfigError
from ich_pipeline.labels import Subtype
from ich_pipeline.records import Scan

# Matrix sizes below this give pixels of several millimetres, above it memory runs out; both are a mistyped number.
MATRIX_RANGE = (64, 1024)


@dataclass(frozen=True)
class PhantomSettings:
    """Ranges that a case is drawn from. Fractions are of all cases, ranges are (low, high), uniform between.

    Attributes:
        clean_fraction: scans without hemorrhage.
        subtype_weights: how often a bleeding scan holds each subtype, by name; weight 0 leaves it out.
        kinds_probability: chance of one, two, ... subtypes in a bleeding scan.
        volume_ml: smallest and largest volume that a subtype is drawn at; between, it is log-normal.
        matrix: pixels along each side of a slice.
        pixel_mm: pixel size at 512 x 512; another matrix keeps the field of view.
        slice_mm: slice thickness, equal to the spacing of the planes; each value is as likely.
        tilt_fraction: scans with gantry tilt.
        tilt_deg: the tilt of those.
        cut_fraction: scans whose field of view cuts the head.
        circle_fraction: scans with padding outside the circular reconstruction field.
        age_years: age, which sets atrophy and white matter lesions.
        noise_hu: standard deviation in the middle of the brain at 5 mm slices.
        varied: findings that are no hemorrhage, tissue of any HU and scanners of any kind (variety.py).

    Raises:
        ConfigError: a range, share or name that cannot be.
    """

    clean_fraction: float = 0.25
    subtype_weights: Mapping[str, float] = field(
        default_factory=lambda: {"EDH": 0.12, "IPH": 0.4, "IVH": 0.16, "SAH": 0.26, "SDH": 0.28}
    )
    kinds_probability: tuple[float, ...] = (0.6, 0.28, 0.12)
    volume_ml: tuple[float, float] = (0.3, 120.0)
    matrix: int = 512
    pixel_mm: tuple[float, float] = (0.42, 0.52)
    slice_mm: tuple[float, ...] = (2.5, 3.0, 4.0, 5.0, 5.0, 5.0, 6.0, 8.0)
    tilt_fraction: float = 0.35
    tilt_deg: tuple[float, float] = (3.0, 25.0)
    cut_fraction: float = 0.08
    circle_fraction: float = 0.4
    age_years: tuple[float, float] = (20.0, 92.0)
    noise_hu: tuple[float, float] = (2.5, 5.5)
    varied: bool = False

    def __post_init__(self) -> None:
        for name in ("clean_fraction", "tilt_fraction", "cut_fraction", "circle_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"phantom setting {name} is {getattr(self, name)}, expected 0 to 1.")
        for name in ("volume_ml", "pixel_mm", "tilt_deg", "age_years", "noise_hu"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ConfigError(f"phantom setting {name} is {(low, high)}, expected 0 <= low <= high.")
        if min(self.slice_mm, default=0) <= 0 or self.pixel_mm[0] <= 0 or self.tilt_deg[1] > 45:
            raise ConfigError("phantom settings slice_mm and pixel_mm must be positive and tilt_deg at most 45.")
        if not MATRIX_RANGE[0] <= self.matrix <= MATRIX_RANGE[1]:
            raise ConfigError(
                f"phantom setting matrix is {self.matrix}, expected {MATRIX_RANGE[0]} to {MATRIX_RANGE[1]}."
            )
        unknown = set(self.subtype_weights) - set(Subtype.__members__)
        weights = list(self.subtype_weights.values())
        if unknown or not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"phantom setting subtype_weights is {dict(self.subtype_weights)}, expected names of "
                f"{', '.join(Subtype.__members__)} with weights of 0 or more, not all 0."
            )
        if min(self.kinds_probability, default=-1) < 0 or abs(sum(self.kinds_probability) - 1) > 1e-6:
            raise ConfigError(f"phantom setting kinds_probability is {self.kinds_probability}, expected a sum of 1.")

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON holds them, so that two sets can be compared."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# What the shipped weights were trained on, and are tested on: `ich-pipeline phantom --varied`.
VARIED = PhantomSettings(
    clean_fraction=0.3,
    volume_ml=(0.05, 150.0),
    pixel_mm=(0.38, 0.6),
    slice_mm=(0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 6.0, 7.0, 8.0),
    cut_fraction=0.12,
    noise_hu=(1.0, 8.0),
    varied=True,
)
# As a stream has them: pixels as small as model grids can hold, not as scanners store.
STREAMED = replace(VARIED, matrix=256)


@dataclass(frozen=True, eq=False)
class PhantomCase:
    """One synthetic scan and its truth, all (I, J, K) on the scan's grid.

    Attributes:
        label: uint8, values of `labels.Subtype`; a voxel counts where hemorrhage fills at least half of it, and holds
            the subtype with the largest share.
        edema: bool, at least half filled by edema.
        brain: bool, inside the inner table of the skull: brain, CSF, vessels, meninges and hemorrhage.
        boxes: one around each subtype in every slice that holds it, by slice.
        truth: what the case was drawn at: `volume_ml` by subtype (continuous: the sum of shares, not of voxels), age,
            seed, tilt, `bleeds` (as planned: subtype, volume, side, HU, stage) and more; JSON-able.
    """

    scan: Scan
    label: NDArray[np.uint8]
    edema: NDArray[np.bool_]
    brain: NDArray[np.bool_]
    boxes: list[Box]
    truth: dict[str, Any]
