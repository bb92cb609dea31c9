"""The window that a series' header asks a viewer for; no other step of reading looks at it, so it may be damaged."""

import math
from pathlib import Path

import pydicom

from ich_pipeline.dicom.archive import as_folder
from ich_pipeline.dicom.stack import find_slices
from ich_pipeline.errors import ReadError

ELEMENTS = ("WindowCenter", "WindowWidth")
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def series_window_hu(path: Path, case_id: str, series: str | None = None) -> tuple[float, float]:
    """Lowest and highest HU of the window in the first slice of a series, the first where it names several.

    DICOM PS3.3 C.11.2.1.2.1: of centre c and width w it goes from c - 1/2 - (w - 1) / 2 to c - 1/2 + (w - 1) / 2.

    Args:
        path: see `read_series`, as the others.
        case_id: likewise.
        series: likewise.

    Raises:
        ReadError: no window, or one that is not two numbers with a width above 1.
    """
    with as_folder(path, case_id) as folder:
        image = find_slices(folder, case_id, series).images[0]
        with pydicom.config.disable_value_validation():
            found = _window(image.path, image.frame)
    centre, width = found
    if not (math.isfinite(centre) and math.isfinite(width) and width > 1):
        raise ReadError(
            f"{case_id}: WindowCenter and WindowWidth {found} in {image.path.name}, expected two numbers, the width "
            "above 1. Give a window, such as window_hu=[0,80]."
        )
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _window(file: Path, frame: int) -> tuple[float, float]:
    """Centre and width; NaN where there is none."""
    try:
        dataset = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=[*ELEMENTS, *GROUPS])
        places = [dataset]
        for name, item in zip(GROUPS, (0, frame), strict=True):
            group = dataset[name].value[item] if name in dataset else {}
            places += list(group["FrameVOILUTSequence"].value) if "FrameVOILUTSequence" in group else []
        holders = [place for place in places if all(place.get(name) not in (None, "") for name in ELEMENTS)]
        centre, width = (_first(holders[-1].get(name)) for name in ELEMENTS)
    except Exception:  # pydicom raises many kinds on damaged values
        return math.nan, math.nan
    return centre, width


def _first(value: object) -> float:
    values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
    return float(str(values[0]))
