"""The window of Hounsfield units that a network sees: the same for every scan, or that of the series' own header."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from ich_pipeline.dicom.window import series_window_hu
from ich_pipeline.errors import ReadError
from ich_pipeline.reading import default_case_id

DICOM = "dicom"


class WindowHUd(MapTransform):
    """Clip a scan to a window and scale it to 0 to 1.

    Args:
        keys: scans that `ReadScand` read.
        window_hu: (lowest, highest), or `dicom`: that of the series, the first if it has several (Rajapakse et al.,
            section II-A).

    Raises:
        ReadError: `dicom` for a scan that is no DICOM series, or one without a window.
    """

    def __init__(
        self, keys: KeysCollection, window_hu: Sequence[float] | str, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window_hu = window_hu

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Window every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            low, high = self._window_of(d[key].meta, d) if self.window_hu == DICOM else map(float, self.window_hu)
            d[key] = ((d[key] - low) / (high - low)).clamp(0, 1)
        return d

    def _window_of(self, meta: Mapping[str, Any], data: Mapping[Hashable, Any]) -> tuple[float, float]:
        path = Path(meta["filename_or_obj"])
        case_id, series = str(data.get("case_id") or default_case_id(path)), json.loads(meta["series"])
        if series is None:
            raise ReadError(
                f"{case_id}: window_hu=dicom, but the scan is no DICOM series. Give a window, such as window_hu=[0,80]."
            )
        return series_window_hu(path, case_id, series["uid"])
