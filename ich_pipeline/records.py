"""What travels between the steps: a case, its scan, its mask."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ich_pipeline.errors import GeometryError
from ich_pipeline.geometry import Affine, Grid


@dataclass(frozen=True, eq=False)
class NiftiForms:
    """sform and qform of a NIfTI file with their codes (0 unknown, 1 scanner, 2 aligned), written back as read.

    A qform of None is computed from the affine when written (rotation only, so it drops shear; its code is then 0).
    `qform_fields` are quatern_b, c, d and qoffset_x, y, z as stored: with `pixdim` they give back the same bits, which
    a qform computed from a matrix does not.

    `version` is that of the header: what NIfTI-2 says in float64, the float32 of NIfTI-1 cannot give back, least of all
    a qform turned by nearly half a circle.
    """

    sform: Affine
    sform_code: int
    qform: Affine | None = None
    qform_code: int = 0
    xyzt_units: int = 2
    pixdim: tuple[float, ...] | None = None
    qform_fields: tuple[float, ...] | None = None
    version: int = 1


@dataclass(frozen=True)
class SeriesInfo:
    """The DICOM series that a scan was read from, so that it can be found again.

    Attributes:
        uid: SeriesInstanceUID.
        number: SeriesNumber; empty where the header has none.
        kernel: ConvolutionKernel; empty where the header has none.
        slices: how many slices the scan has.
    """

    uid: str
    number: str
    kernel: str
    slices: int

    def columns(self) -> dict[str, str]:
        """Columns of volumes.csv."""
        return {f"series_{name}": str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class Scan:
    """One head CT on its native grid.

    Attributes:
        image_hu: (I, J, K) int16 or float32, Hounsfield units.
        forms: how the mask's header is to be written; the affine in `grid` decides geometry.
        source: the file, or the folder or ZIP file of the DICOM series.
        series: which one was read, for DICOM.
        flags: short names of things a reader of the result should know; they never change the number.
    """

    case_id: str
    image_hu: NDArray[Any]
    grid: Grid
    forms: NiftiForms
    source: Path
    series: SeriesInfo | None = None
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.image_hu.shape != self.grid.shape:
            raise GeometryError(f"{self.case_id}: image {self.image_hu.shape} and grid {self.grid.shape} differ")


@dataclass(frozen=True, eq=False)
class NativeMask:
    """A mask on the scan's own grid; `values` is bool or uint8 (I, J, K), non-zero is hemorrhage."""

    values: NDArray[Any]
    grid: Grid

    def __post_init__(self) -> None:
        if self.values.shape != self.grid.shape:
            raise GeometryError(f"mask {self.values.shape} and grid {self.grid.shape} differ")


@dataclass(frozen=True)
class CaseRecord:
    """One row of a manifest, or one scan found in a folder. Paths are absolute."""

    case_id: str
    image: Path
    label: Path | None = None
    patient_id: str = ""
    split: str = ""
    fold: int | None = None
    extra: dict[str, str] = field(default_factory=dict)
    edema: Path | None = None

    @property
    def series(self) -> str | None:
        """SeriesInstanceUID or SeriesNumber to read, from a manifest's column `series`; None leaves it to the rules."""
        return self.extra.get("series") or None

    def item(self) -> dict[str, str]:
        """The case in a MONAI data list: `case_id`, `image`, and what else there is of `label` and `series`."""
        others = {"label": self.label and str(self.label), "series": self.series}
        return {"case_id": self.case_id, "image": str(self.image)} | {
            key: value for key, value in others.items() if value
        }
