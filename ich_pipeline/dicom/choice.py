"""Which of the series in a folder is the scan: by fixed rules, or refused with what there is to choose from."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.dicom.headers import Image, image_types
from ich_pipeline.errors import ReadError

# Kernels for bone and lung by the names that vendors give them; what is not here counts as soft.
SHARP_KERNELS = (
    # Siemens: letters, then sharpness from 10 to 90, then scan mode (H60s, B70f, U90u, J70h, Hr60f, Br64d, Bl57f).
    r"(H|B|U|S|T|I|J|HR|HC|BR|BL|BV|UR|UB|QR)(5[5-9]|[6-9]\d)[A-Z]?",
    r"(BONE|EDGE|LUNG|ULTRA).*",  # GE: BONE, BONEPLUS, EDGE, LUNG
    r"Y[A-Z]",  # Philips: YA, YB, ...; soft ones are UA, UB, A, B
    r"FC(3\d|5\d|8\d)(-.*)?",  # Toshiba and Canon: FC30 bone, FC50 lung, FC80 inner ear; FC20 is brain
)
HEAD_PARTS = re.compile(r"HEAD|BRAIN|SKULL")
# Of series alike but for their steps the one nearest to this is read: networks and readers learnt on about 5 mm slices
# (HemSeg-500, and what docs/input.md names), and thin slices are noisier than anything in those.
PREFERRED_STEP_MM = 5.0
SAME_STEP = 0.02  # two steps are one when their ratio is nearer to 1 than this
SAME_REGION = 0.85  # share of the common range of series that each of them must show


@dataclass(frozen=True, eq=False)
class Candidate:
    """A series that may be the scan."""

    images: Sequence[Image]

    @property
    def header(self) -> Any:
        """Of its first slice."""
        return self.images[0].header

    @cached_property
    def normal(self) -> NDArray[np.float64] | None:
        """Slice normal in LPS by the first slice, or None where its header has none."""
        try:
            return np.cross(*np.reshape(np.array(self.header.ImageOrientationPatient, float), (2, 3)))
        except Exception:  # absent or damaged
            return None

    @cached_property
    def centres_lps_mm(self) -> NDArray[np.float64] | None:
        """(K, 3) centres of the slices, or None where headers do not place them all."""
        try:
            return np.array([_centre_lps_mm(image.header) for image in self.images])
        except Exception:  # absent, too short, or damaged
            return None

    @cached_property
    def distances_mm(self) -> NDArray[np.float64]:
        """Places along the normal that hold a slice, rising; empty where headers do not place them all."""
        if self.normal is None or self.centres_lps_mm is None:
            return np.empty(0)
        return np.unique((self.centres_lps_mm @ self.normal).round(2))

    @property
    def step_mm(self) -> float:
        """Median step; 0 where there is none."""
        return float(np.median(np.diff(self.distances_mm))) if len(self.distances_mm) > 1 else 0.0

    @property
    def is_axial(self) -> bool:
        """Whether its planes are nearer to axial than to coronal or sagittal."""
        return self.normal is not None and bool(np.argmax(np.abs(self.normal)) == 2)

    def has_type(self, word: str) -> bool:
        """Whether any slice has this ImageType value."""
        return any(word in image_types(image.header) for image in self.images)

    @property
    def has_contrast(self) -> bool:
        """Whether any slice names a contrast agent."""
        return any(has_contrast(image) for image in self.images)

    def matches(self, series: str) -> bool:
        """Whether it goes by this SeriesInstanceUID or SeriesNumber."""
        return series in (str(self.header.get("SeriesInstanceUID", "")), str(self.header.get("SeriesNumber", "")))

    def describe(self) -> str:
        """Number, slices, kernel, step and UID, to choose by."""
        number, uid = self.header.get("SeriesNumber"), self.header.get("SeriesInstanceUID")
        return (
            f"number {'?' if number is None else number}, {len(self.images)} slices, kernel "
            f"{kernel_of(self.header) or 'unknown'}, step {self.step_mm:.3g} mm, UID {uid or '?'}"
        )


# Each narrows the series down to those that have the lowest value; `choose_series` says it in words.
PREFERENCES: tuple[Callable[[Candidate], bool], ...] = (
    lambda c: len(c.distances_mm) == 1,
    lambda c: c.has_type("SECONDARY"),
    lambda c: not c.is_axial,
    lambda c: not c.has_type("ORIGINAL"),
    lambda c: not HEAD_PARTS.search(str(c.header.get("BodyPartExamined") or "").upper()),
    lambda c: c.has_contrast,
    lambda c: is_sharp(kernel_of(c.header)),
)


def choose_series(
    case_id: str, what: str, images: Sequence[Image], left_out: Counter[str], series: str | None = None
) -> Candidate:
    """The series to read among CT slices.

    One that `series` names; otherwise these rules, each among what the ones before left: more than one position,
    PRIMARY over SECONDARY, axial planes over reformats, ORIGINAL over DERIVED, body part head over others or none,
    without contrast agent, soft kernel over sharp. If several are left that show the same region, the one whose step is
    nearest to 5 mm.

    Args:
        case_id: named in errors.
        what: name of the folder or file, for errors.
        images: CT slices; localizers and other classes are left out already.
        left_out: how many of what were.
        series: SeriesInstanceUID or SeriesNumber.

    Raises:
        ReadError: no series, slices of several patients or studies, a `series` that is not there, or several series
            that the rules do not tell apart.
    """
    if not images:
        held = ", ".join(f"{n} x {reason}" for reason, n in left_out.items()) or "no DICOM file"
        raise ReadError(f"{case_id}: {what} holds {held}, expected a series of CT images. Check the folder.")
    for name, unit in (("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        n_values = len({str(image.header.get(name) or "") for image in images})
        if n_values > 1:
            raise ReadError(
                f"{case_id}: {what} holds CT images of {n_values} {unit} (by {name}), expected one. Give each a folder "
                "of its own."
            )
    by_uid: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        by_uid[str(image.header.get("SeriesInstanceUID") or "")].append(image)
    candidates = [Candidate(group) for group in by_uid.values()]
    if series is not None:
        chosen = [each for each in candidates if each.matches(series)]
        if len(chosen) != 1:
            raise _ambiguous(case_id, what, chosen or candidates, f"{len(chosen)} CT series {series}")
        return chosen[0]
    for preference in PREFERENCES:
        lowest = min(map(preference, candidates))
        candidates = [each for each in candidates if preference(each) == lowest]
    if len(candidates) > 1:
        _require_one_region(case_id, what, candidates)
        distance = [abs(np.log(each.step_mm / PREFERRED_STEP_MM)) for each in candidates]
        candidates = [each for each, d in zip(candidates, distance, strict=True) if d < min(distance) + SAME_STEP]
    if len(candidates) > 1:
        raise _ambiguous(case_id, what, candidates, f"{len(candidates)} CT series alike")
    return candidates[0]


def _require_one_region(case_id: str, what: str, candidates: Sequence[Candidate]) -> None:
    """Thick or thin is a choice only between series of the same slices of the patient, not between head and neck."""
    ranges = [
        (each.centres_lps_mm[:, 2].min() - each.step_mm / 2, each.centres_lps_mm[:, 2].max() + each.step_mm / 2)
        for each in candidates
        if each.centres_lps_mm is not None and each.step_mm > 0
    ]
    whole_mm = max(high for _, high in ranges) - min(low for low, _ in ranges) if ranges else 0.0
    if len(ranges) < len(candidates) or min(high - low for low, high in ranges) < SAME_REGION * whole_mm:
        raise _ambiguous(case_id, what, candidates, f"{len(candidates)} CT series of unlike extent")


def _ambiguous(case_id: str, what: str, candidates: Sequence[Candidate], found: str) -> ReadError:
    listed = "; ".join(each.describe() for each in candidates)
    return ReadError(
        f"{case_id}: {what} holds {found}, expected one that can be told from the others: {listed}. Name one "
        "in a manifest's column `series`, or put it in a folder of its own."
    )


def _centre_lps_mm(header: Any) -> NDArray[np.float64]:
    row, column = np.reshape(np.array(header.ImageOrientationPatient, float), (2, 3))
    row_spacing_mm, column_spacing_mm = (float(n) for n in header.PixelSpacing)
    across_mm, down_mm = (int(header.Columns) - 1) * column_spacing_mm, (int(header.Rows) - 1) * row_spacing_mm
    return np.array(header.ImagePositionPatient, float) + (row * across_mm + column * down_mm) / 2


def kernel_of(header: Any) -> str:
    """ConvolutionKernel, several values joined by `/`; empty where the header has none."""
    kernel = header.get("ConvolutionKernel") or ""
    return kernel.strip() if isinstance(kernel, str) else "/".join(str(part) for part in kernel)


def is_sharp(kernel: str) -> bool:
    """Whether a kernel is for bone or lung."""
    name = kernel.split("/")[0].replace(" ", "").upper()
    return any(re.fullmatch(pattern, name) for pattern in SHARP_KERNELS)


def has_contrast(image: Image) -> bool:
    """Whether a slice names a contrast agent."""
    agent = str(image.header.get("ContrastBolusAgent") or "").strip().upper()
    return agent not in ("", "NONE", "NO") or bool(image.header.get("ContrastBolusAgentSequence"))
