"""Which series of a study is read: the rules one by one, and the setting that overrules them."""

import pytest
from dicom_cases import another_series, brighter, head_series, of_study, save_series

from ich_pipeline.dicom.choice import is_sharp
from ich_pipeline.errors import ReadError
from ich_pipeline.inference import items
from ich_pipeline.reading import read_scan
from ich_pipeline.transforms import ReadScand


@pytest.mark.parametrize(
    ("kernel", "sharp"),
    [
        ("H30s", False),
        ("H31s", False),
        ("H60s", True),
        ("H70h", True),
        ("Hr38f", False),
        ("Hr40f/3", False),
        ("Hr60f/3", True),
        ("B31f", False),
        ("B70f", True),
        ("J40s", False),
        ("U90u", True),
        ("STANDARD", False),
        ("SOFT", False),
        ("STD+", False),
        ("BONE", True),
        ("BONEPLUS", True),
        ("EDGE", True),
        ("LUNG", True),
        ("UA", False),
        ("UB", False),
        ("B", False),
        ("YA", True),
        ("YB", True),
        ("FC21", False),
        ("FC26", False),
        ("FC30", True),
        ("FC81", True),
        ("FC68", False),
        ("", False),
        ("something new", False),
    ],
)
def test_kernels_for_bone_and_lung(kernel, sharp):
    assert is_sharp(kernel) == sharp


def thick_and(*steps_mm: float):
    """Series of the same head with these steps, in one study, numbered from 1."""
    together = []
    for number, step_mm in enumerate(steps_mm, start=1):
        datasets = head_series(0, [step_mm] * round(143 / step_mm))
        together += of_study(datasets, (together or datasets)[0], prefix=f"series {number}", SeriesNumber=number)
    return together


@pytest.mark.parametrize(
    ("steps_mm", "number"),
    [((1.0, 5.0), "2"), ((5.0, 1.0), "1"), ((2.5, 7.0), "2"), ((3.0, 10.0), "1"), ((0.7, 1.4, 2.8), "3")],
)
def test_of_thick_and_thin_the_step_nearest_to_5_mm(tmp_path, steps_mm, number):
    assert read_scan(save_series(thick_and(*steps_mm), tmp_path / "x")).series.number == number


def test_two_of_the_same_step_are_listed(tmp_path):
    with pytest.raises(ReadError, match=r"2 CT series alike.*number 2, 30 slices.*number 3, 30 slices") as refused:
        read_scan(save_series(thick_and(1.0, 5.0, 5.0), tmp_path / "x"))
    assert "number 1" not in str(refused.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Each line beats the next rule: the first series is read although the second would win by what follows.
        ({"ConvolutionKernel": "BONE"}, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}),
        ({"ConvolutionKernel": "BONE"}, {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}),
        ({"BodyPartExamined": "BRAIN", "ConvolutionKernel": "BONE"}, {"BodyPartExamined": "NECK"}),
        ({"ConvolutionKernel": "BONE"}, {"ContrastBolusAgent": "agent"}),
        ({"ConvolutionKernel": "H31s"}, {"ConvolutionKernel": "H60s"}),
        ({"ContrastBolusAgent": "NONE"}, {"ContrastBolusAgent": "agent"}),
    ],
)
def test_rules_in_their_order(tmp_path, first, second):
    series = head_series()
    one, other = (another_series(series, f"s{n}", SeriesNumber=n, **v) for n, v in ((4, first), (5, second)))
    assert read_scan(save_series([*other, *one], tmp_path / "x")).series.number == "4"


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"ConvolutionKernel": "H70h"}, "sharp_kernel"),
        ({"ContrastBolusAgent": "agent"}, "contrast_agent"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "secondary_image"),
        ({"LossyImageCompression": "01"}, "lossy_compression"),
    ],
)
def test_what_is_read_for_want_of_better_is_flagged(tmp_path, values, flag):
    assert read_scan(save_series(another_series(head_series(), **values), tmp_path / "x")).flags == (flag,)


class TestNamedSeries:
    """A manifest's column `series` names one by number or UID."""

    @pytest.fixture
    def study(self, tmp_path):
        soft = head_series()
        self.bone = brighter(another_series(soft, ConvolutionKernel="BONE"))
        return save_series([*soft, *self.bone], tmp_path / "study")

    def test_by_number_and_by_uid(self, study):
        assert read_scan(study).series.number == "2"
        assert read_scan(study, series="9").series.kernel == "BONE"
        assert read_scan(study, series=self.bone[0].SeriesInstanceUID).series.kernel == "BONE"

    def test_one_that_is_not_there(self, study):
        with pytest.raises(ReadError, match=r"holds 0 CT series 7.*: number .*number"):
            read_scan(study, series="7")

    def test_from_a_manifest_to_the_scan(self, tmp_path, study):
        manifest = tmp_path / "cases.csv"
        manifest.write_text("case_id,image,series\nsoft,study,\nbone,study,9\n")
        (item,) = [item for item in items(str(manifest)) if "series" in item]
        assert item == {"case_id": "bone", "image": str(study), "series": "9"}
        assert ReadScand("image")(dict(item))["image"].meta["flags"] == "sharp_kernel"
