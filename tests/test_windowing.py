"""The window that a network sees: given, or that of the series' header."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import another_series, multi_frame
from heads import write_heads
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from scan_files import head_series, save_series

from ich_pipeline.dicom.window import series_window_hu
from ich_pipeline.errors import ConfigError, ReadError
from ich_pipeline.networks.transdeeplab import build_segmenter
from ich_pipeline.transforms import ReadScand
from ich_pipeline.windowing import WindowHUd


def series(folder: Path, **values: Any) -> Path:
    return save_series(another_series(head_series(), **values), folder)


def test_a_given_window_clips_and_scales(tmp_path: Path) -> None:
    (scan,) = write_heads(tmp_path, 1)
    data = ReadScand("image")({"image": str(scan)})
    image_hu = np.asarray(data["image"])
    found = WindowHUd("image", [0, 80])(data)["image"]
    np.testing.assert_allclose(found, np.clip(image_hu / 80, 0, 1), atol=1e-6)
    assert found.meta["forms"] == data["image"].meta["forms"]
    with pytest.raises(ReadError, match=r"head0: window_hu=dicom, but the scan is no DICOM series"):
        WindowHUd("image", "dicom")(ReadScand("image")({"image": str(scan)}))


def test_the_window_of_a_series(tmp_path: Path) -> None:
    folder = series(tmp_path / "one", WindowCenter="40", WindowWidth="81")
    assert series_window_hu(folder, "x") == (-0.5, 79.5)
    data = ReadScand("image")({"image": str(folder), "case_id": "x"})
    found = np.asarray(WindowHUd("image", "dicom")(dict(data))["image"])
    np.testing.assert_allclose(found, np.clip((np.asarray(data["image"]) + 0.5) / 80, 0, 1), atol=1e-6)
    assert series_window_hu(series(tmp_path / "two", WindowCenter=["35", "600"], WindowWidth=["101", "4000"]), "x") == (
        -15.5,
        84.5,
    )


@pytest.mark.parametrize("values", [{}, {"WindowCenter": "40"}, {"WindowCenter": "40", "WindowWidth": "1"}])
def test_a_series_without_a_window_is_refused(tmp_path: Path, values: dict[str, str]) -> None:
    with pytest.raises(ReadError, match=r"x: WindowCenter and WindowWidth .*expected two numbers"):
        series_window_hu(series(tmp_path / "one", **values), "x")


def test_the_window_of_a_multi_frame_image(tmp_path: Path) -> None:
    dataset = multi_frame(head_series())
    window = Dataset()
    window.WindowCenter, window.WindowWidth = "50", "101"
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        frame.FrameVOILUTSequence = Sequence([window])
    assert series_window_hu(save_series([dataset], tmp_path / "multi"), "x") == (-0.5, 99.5)


def test_a_mixture_needs_one_window() -> None:
    with pytest.raises(ConfigError, match="segmenter=em with window_hu=dicom: expected one window in HU"):
        build_segmenter("em", {}, "dicom", 45.0)
