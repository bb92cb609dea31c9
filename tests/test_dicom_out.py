"""SEG and SR: every voxel on its slice, every number that of the table, the patient in them and nowhere else."""

import csv
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_cases import LEGACY_CONVERTED, multi_frame
from heads import oracle_bundle
from pydicom.dataset import Dataset
from scan_files import (
    LESION_CENTRE_MM,
    LPS_RAS,
    ct_slices,
    grid_points,
    head_series,
    save_series,
    slice_positions,
)

from ich_pipeline import cli, dicom_out
from ich_pipeline.dicom.identifiers import COLUMNS, read_identifiers
from ich_pipeline.dicom.stack import Slices, find_slices, single_grid
from ich_pipeline.dicom_out import METHODS, Algorithm, measurement_report, segmentation, write_results
from ich_pipeline.errors import ConfigError, GeometryError, ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.privacy import Privacy
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.report import failed_row
from ich_pipeline.settings import Settings
from ich_pipeline.volumetry import label_lesions, measure

ALGORITHM = Algorithm("cascade3d", "0.1.0", "ab" * 32)
UNEVEN = (4.0, 4.0, 4.0, 4.0, 1.1, 7.0, 7.0, 7.0, 7.0, 7.0)
TIMES = ("InstanceCreation", "Content", "Contribution")  # elements that say when a file was made begin like this


def feet_first(tilt_deg=12.0):
    centres, orientation = slice_positions(tilt_deg, [11.0] * 13)
    return ct_slices(centres, orientation * np.array([[-1], [1]]))


def coronal():
    centres = np.zeros((16, 3))
    centres[:, 1] = np.arange(16) * 11.0 - 82
    return ct_slices(centres, np.array([[1.0, 0, 0], [0, 0, -1.0]]))


SERIES = {
    "plain": lambda: head_series(0),
    "tilt": lambda: head_series(18.5),
    "tilt the other way": lambda: head_series(-18.5),
    "feet first": feet_first,
    "coronal": coronal,
    "uneven": lambda: head_series(18.5, UNEVEN),
    "odd number of pixels": lambda: ct_slices(*slice_positions(5, [11.0] * 13), matrix=(49, 43)),
}


def saved(datasets, folder: Path) -> Slices:
    return find_slices(save_series(datasets, folder), "case")


def lopsided_mask(slices: Slices) -> NativeMask:
    """A ball, a row of voxels and a far corner: three lesions that no flip or swap of axes maps on themselves."""
    first = slices.images[0].header
    shape = (int(first.Columns), int(first.Rows), len(slices.images))
    i, j, k = np.indices(shape)
    values = ((i - 15) ** 2 + (j - 31) ** 2 + (3 * (k - 4)) ** 2 < 50).astype(np.uint8)
    values[30:37, 5, 8] = 1
    values[-1, -1, 1] = 1
    affine = np.diag([4.0, 4.5, 11.0, 1.0])  # of no account here: frames have the positions of their slices
    return NativeMask(values, Grid(shape, affine))


def written(dataset: Dataset, path: Path) -> Dataset:
    dicom_out._write(path, dataset)
    return pydicom.dcmread(path)


def functional_group(name: str, frame: Dataset, seg: Dataset) -> Dataset:
    """What all frames have in common may stand once."""
    return (frame if name in frame else seg.SharedFunctionalGroupsSequence[0])[name].value[0]


def frames(seg: Dataset) -> list[tuple[int, str, np.ndarray, np.ndarray]]:
    """Segment number, UID of the slice, position and (rows, columns) pixels, unpacked here and not by highdicom."""
    n, rows, columns = int(seg.NumberOfFrames), seg.Rows, seg.Columns
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")[: n * rows * columns]
    return [
        (
            int(functional_group("SegmentIdentificationSequence", group, seg).ReferencedSegmentNumber),
            str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID),
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
            pixels,
        )
        for group, pixels in zip(seg.PerFrameFunctionalGroupsSequence, bits.reshape(n, rows, columns), strict=True)
    ]


@pytest.fixture
def tilted(tmp_path) -> tuple[Slices, NativeMask]:
    folder = save_series(head_series(18.5), tmp_path / "case")
    slices = find_slices(folder, "case")
    return slices, replace(lopsided_mask(slices), grid=single_grid(slices))


def both(slices: Slices, mask: NativeMask) -> tuple[Dataset | None, Dataset]:
    report = measure(slices.case_id, mask)
    seg = segmentation(slices, label_lesions(mask), report, ALGORITHM)
    return seg, measurement_report(slices, report, ALGORITHM, seg)


class TestSegmentation:
    @pytest.mark.parametrize("name", SERIES)
    def test_every_voxel_is_on_its_slice(self, tmp_path, name):
        datasets = SERIES[name]()
        np.random.default_rng(0).shuffle(datasets)
        slices = saved(datasets, tmp_path / "case")
        mask = lopsided_mask(slices)
        seg = written(both(slices, mask)[0], tmp_path / "case.seg.dcm")
        slice_of = {str(each.header.SOPInstanceUID): k for k, each in enumerate(slices.images)}
        lesions = np.zeros(mask.grid.shape, int)
        for number, uid, position, pixels in frames(seg):
            np.testing.assert_array_equal(position, slices.positions_lps_mm[slice_of[uid]])
            assert pixels.any()
            lesions[:, :, slice_of[uid]] += number * pixels.T
        np.testing.assert_array_equal(lesions, label_lesions(mask))
        assert len(seg.SegmentSequence) == 3

    @pytest.mark.parametrize("name", ["tilt", "tilt the other way", "feet first", "coronal"])
    def test_frames_lie_where_the_nifti_mask_lies(self, tmp_path, name):
        slices = find_slices(save_series(SERIES[name](), tmp_path / "x"), "x")
        grid = single_grid(slices)
        mask = replace(lopsided_mask(slices), grid=grid)
        seg = written(both(slices, mask)[0], tmp_path / "x.seg.dcm")
        shared = seg.SharedFunctionalGroupsSequence[0]
        row, column = np.reshape(np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float), (2, 3))
        row_mm, column_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        points = []
        for _, _, position, pixels in frames(seg):
            r, c = np.nonzero(pixels)
            points.append(position + c[:, None] * column_mm * row + r[:, None] * row_mm * column)
        expected = grid_points(grid)[mask.values > 0]
        found = np.concatenate(points) * LPS_RAS
        np.testing.assert_allclose(
            found[np.lexsort(found.T.round(3))], expected[np.lexsort(expected.T.round(3))], atol=1e-4
        )

    def test_highdicom_reads_it_back(self, tilted, tmp_path):
        slices, mask = tilted
        written(both(slices, mask)[0], tmp_path / "x.seg.dcm")
        seg = hd.seg.segread(tmp_path / "x.seg.dcm")
        pixels = seg.get_pixels_by_source_instance(
            [each.header.SOPInstanceUID for each in slices.images],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
        np.testing.assert_array_equal(pixels.transpose(2, 1, 0), label_lesions(mask))

    def test_says_what_it_is_and_what_made_it(self, tilted, tmp_path):
        seg = written(both(*tilted)[0], tmp_path / "x.seg.dcm")
        assert seg.SOPClassUID.name == "Segmentation Storage"
        assert (seg.SegmentationType, seg.SegmentsOverlap, seg.Modality) == ("BINARY", "NO", "SEG")
        assert seg.FrameOfReferenceUID == tilted[0].images[0].header.FrameOfReferenceUID
        assert seg.StudyInstanceUID == tilted[0].images[0].header.StudyInstanceUID
        assert seg.SeriesInstanceUID != tilted[0].images[0].header.SeriesInstanceUID
        for number, segment in enumerate(seg.SegmentSequence, start=1):
            assert (segment.SegmentNumber, segment.SegmentLabel) == (number, f"Hemorrhage {number}")
            assert code(segment.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
            assert code(segment.SegmentedPropertyTypeCodeSequence) == ("50960005", "SCT")
            assert code(segment.AnatomicRegionSequence) == ("1101003", "SCT")
            assert segment.SegmentAlgorithmType == "AUTOMATIC"
            made_by = segment.SegmentationAlgorithmIdentificationSequence[0]
            assert (made_by.AlgorithmName, made_by.AlgorithmVersion) == ("cascade3d", "0.1.0")
            assert made_by.AlgorithmParameters == "weights_sha256=" + "ab" * 32
            assert code(made_by.AlgorithmFamilyCodeSequence) == ("123110", "DCM")

    def test_a_bundle_without_weights_is_no_artificial_intelligence(self, tilted):
        slices, mask = tilted
        bare = Algorithm("hu_threshold", "0.1.0", "")
        seg = segmentation(slices, label_lesions(mask), measure("case", mask), bare)
        made_by = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
        assert code(made_by.AlgorithmFamilyCodeSequence) == ("FIXED-RULE", "99ICHPIPELINE")
        assert made_by.AlgorithmParameters == "weights_sha256=none"

    def test_spacing_is_that_of_the_planes_and_not_the_header_s(self, tilted):
        measures = both(*tilted)[0].SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert pydicom.dcmread(tilted[0].images[0].path).SliceThickness == 99
        assert (float(measures.SliceThickness), float(measures.SpacingBetweenSlices)) == (11, 11)

    def test_uneven_slices_have_their_own_extents(self, tmp_path):
        slices = saved(head_series(0, UNEVEN), tmp_path / "case")
        mask = lopsided_mask(slices)
        written(both(slices, mask)[0], tmp_path / "x.seg.dcm")
        seg = hd.seg.segread(tmp_path / "x.seg.dcm")
        assert "PixelMeasuresSequence" not in seg.SharedFunctionalGroupsSequence[0]
        extent_of = dict(
            zip(
                [str(each.header.SOPInstanceUID) for each in slices.images],
                [4, 4, 4, 4, 2.55, 4.05, 7, 7, 7, 7, 7],  # half the step on either side; the end slices' is doubled
                strict=True,
            )
        )
        ml = 0.0
        for group, (_, uid, _, pixels) in zip(seg.PerFrameFunctionalGroupsSequence, frames(seg), strict=True):
            measures = group.PixelMeasuresSequence[0]
            assert float(measures.SliceThickness) == pytest.approx(extent_of[uid], abs=1e-5)
            ml += pixels.sum() * 4.0 * 4.5 * float(measures.SliceThickness) / 1000
        areas = mask.values.sum(axis=(0, 1))
        assert ml == pytest.approx((areas * list(extent_of.values())).sum() * 4.0 * 4.5 / 1000, rel=1e-5)

    def test_lossy_sources_are_named(self, tilted):
        slices, mask = tilted
        first = pydicom.dcmread(slices.images[0].path)
        first.LossyImageCompression, first.LossyImageCompressionRatio = "01", 12.5
        first.save_as(slices.images[0].path)
        seg, _ = both(slices, mask)
        assert (seg.LossyImageCompression, float(seg.LossyImageCompressionRatio)) == ("01", 12.5)

    def test_many_lesions_share_the_last_segment(self, tilted, monkeypatch):
        monkeypatch.setattr(dicom_out, "MAX_SEGMENTS", 2)
        slices, mask = tilted
        seg, document = both(slices, mask)
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["Hemorrhage 1", "Hemorrhage 2 to 3"]
        voxels = {1: 0, 2: 0}
        for number, _, _, pixels in frames(seg):
            voxels[number] += pixels.sum()
        lesions = measure("case", mask).lesions
        assert voxels == {1: (label_lesions(mask) == 1).sum(), 2: (label_lesions(mask) > 1).sum()}
        rest = groups(document)["Hemorrhage 2 to 3"]
        assert rest["volume_ml"] == round(lesions[1].volume_ml + lesions[2].volume_ml, 6)
        assert rest["n_lesions"] == 2
        assert groups(document)["Hemorrhage, whole"]["n_lesions"] == 3

    def test_a_mask_of_another_shape_is_refused(self, tilted):
        slices, mask = tilted
        with pytest.raises(GeometryError, match=r"case: mask \(50, 44, 14\), series \(44, 50, 14\)"):
            segmentation(slices, label_lesions(mask).transpose(1, 0, 2), measure("case", mask), ALGORITHM)


class TestMultiFrame:
    """Frames of a file are told apart by their number."""

    @pytest.fixture
    def slices(self, tmp_path) -> Slices:
        datasets = head_series(12)
        order = np.random.default_rng(0).permutation(8)
        first, second = multi_frame(datasets[:8], order=order), multi_frame(datasets[8:], LEGACY_CONVERTED)
        second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        second.filename = "second.dcm"
        return saved([first, second], tmp_path / "case")

    def test_every_voxel_is_on_its_frame(self, slices, tmp_path):
        mask = lopsided_mask(slices)
        seg = written(both(slices, mask)[0], tmp_path / "case.seg.dcm")
        slice_of = {(str(each.header.SOPInstanceUID), each.frame + 1): k for k, each in enumerate(slices.images)}
        found = np.zeros(mask.grid.shape, int)
        for group, (number, uid, position, pixels) in zip(
            seg.PerFrameFunctionalGroupsSequence, frames(seg), strict=True
        ):
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            k = slice_of[uid, int(source.ReferencedFrameNumber)]
            np.testing.assert_array_equal(position, slices.positions_lps_mm[k])
            found[:, :, k] += number * pixels.T
        np.testing.assert_array_equal(found, label_lesions(mask))
        listed = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert sorted(item.ReferencedSOPInstanceUID for item in listed) == sorted({uid for uid, _ in slice_of})

    def test_report_names_files_once_with_their_frames(self, slices, tmp_path):
        document = written(both(slices, lopsided_mask(slices))[1], tmp_path / "case.sr.dcm")
        whole, *_ = items(items(document, "126010")[0], "125007")
        references = [item.ReferencedSOPSequence[0] for item in whole.ContentSequence if item.ValueType == "IMAGE"]
        expected = {(str(each.header.SOPInstanceUID), each.frame + 1) for each in slices.images}
        named = [(str(r.ReferencedSOPInstanceUID), int(n)) for r in references for n in r.ReferencedFrameNumber]
        assert (len(references), len(named), set(named)) == (2, 14, expected)


def test_a_zip_file_is_read_again(tmp_path):
    folder = save_series(head_series(), tmp_path / "case")
    shutil.make_archive(str(tmp_path / "case"), "zip", folder)
    scan = read_scan(tmp_path / "case.zip")
    mask = NativeMask((scan.image_hu == 65).astype(np.uint8), scan.grid)
    write_results(tmp_path, scan, mask, measure("case", mask), ALGORITHM)
    assert sum(pixels.sum() for *_, pixels in frames(pydicom.dcmread(tmp_path / "case.seg.dcm"))) == mask.values.sum()


def code(sequence) -> tuple[str, str]:
    return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator


def items(node: Dataset, concept: str) -> list[Dataset]:
    return [item for item in node.get("ContentSequence", ()) if code(item.ConceptNameCodeSequence)[0] == concept]


def source_images(group: Dataset) -> list[str]:
    """UIDs of the images that a group refers to; versions of highdicom name the relation differently."""
    images = [item for item in group.ContentSequence if item.ValueType == "IMAGE"]
    return [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in images]


def groups(document: Dataset) -> dict[str, dict[str, float]]:
    """Numbers of every measurement group by its tracking identifier, under the names that the tables use."""
    column_of = {(method.value, method.scheme_designator): column for column, method in METHODS.items()}
    found = {}
    (measurements,) = items(document, "126010")
    for group in items(measurements, "125007"):
        numbers = {}
        for item in items(group, "118565006"):
            (method,) = items(item, "370129005")
            value = item.MeasuredValueSequence[0]
            assert code(value.MeasurementUnitsCodeSequence) == ("mL", "UCUM")
            numbers[column_of[code(method.ConceptCodeSequence)]] = float(value.NumericValue)
        (count,) = items(group, "246206008")
        numbers["n_lesions"] = int(float(count.MeasuredValueSequence[0].NumericValue))
        found[items(group, "112039")[0].TextValue] = numbers
    return found


class TestReport:
    def test_is_a_measurement_report_that_nobody_verified(self, tilted, tmp_path):
        slices, mask = tilted
        seg, document = both(slices, mask)
        document = written(document, tmp_path / "x.sr.dcm")
        assert document.SOPClassUID.name == "Comprehensive 3D SR Storage"
        assert document.ContentTemplateSequence[0].TemplateIdentifier == "1500"
        assert (document.CompletionFlag, document.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
        assert document.PreliminaryFlag == "PRELIMINARY"
        assert "research use only" in document.SeriesDescription
        assert document.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99ICHPIPELINE"
        (measurements,) = items(document, "126010")
        whole, *lesions = items(measurements, "125007")
        assert source_images(whole) == [each.header.SOPInstanceUID for each in slices.images]
        for number, lesion in enumerate(lesions, start=1):
            (reference,) = items(lesion, "121191")
            assert reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID
            assert reference.ReferencedSOPSequence[0].ReferencedSegmentNumber == number
            assert seg.SegmentSequence[number - 1].TrackingUID == items(lesion, "112040")[0].UID
            assert code(items(lesion, "121071")[0].ConceptCodeSequence) == ("50960005", "SCT")
            assert items(lesion, "111001")[0].TextValue == "cascade3d"
            assert items(lesion, "111002")[0].TextValue == "weights_sha256=" + "ab" * 32
        evidence = {
            reference.ReferencedSOPInstanceUID
            for series in document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
            for reference in series.ReferencedSOPSequence
        }
        assert evidence == {seg.SOPInstanceUID, *(each.header.SOPInstanceUID for each in slices.images)}

    def test_highdicom_reads_it_back(self, tilted, tmp_path):
        written(both(*tilted)[1], tmp_path / "x.sr.dcm")
        content = hd.sr.srread(tmp_path / "x.sr.dcm").content
        lesions = content.get_volumetric_roi_measurement_groups()
        assert [group.tracking_identifier for group in lesions] == [f"Hemorrhage {n}" for n in (1, 2, 3)]
        (whole,) = content.get_image_measurement_groups()
        assert whole.get_measurements()[0].value == round(measure("case", tilted[1]).volume_ml, 6)

    def test_no_bleed_is_0_ml_without_a_segmentation(self, tilted, tmp_path):
        slices, mask = tilted
        seg, document = both(slices, replace(mask, values=np.zeros_like(mask.values)))
        assert seg is None
        document = written(document, tmp_path / "x.sr.dcm")
        assert groups(document) == {"Hemorrhage, whole": {**dict.fromkeys(METHODS, 0.0), "n_lesions": 0}}
        (whole,) = items(items(document, "126010")[0], "125007")
        assert source_images(whole) == [each.header.SOPInstanceUID for each in slices.images]


class TestIdentity:
    def test_the_same_again_differs_in_times_only(self, tilted):
        for one, other in zip(both(*tilted), both(*tilted), strict=True):
            for dataset in (one, other):
                for holder in (dataset, *dataset.get("ContributingEquipmentSequence", ())):
                    for element in [e.keyword for e in holder if e.VR in ("DA", "TM", "DT")]:
                        if element.startswith(TIMES):
                            delattr(holder, element)
            assert one == other
            assert "ContentTime" not in one

    def test_anything_else_is_another_object(self, tilted):
        slices, mask = tilted
        seg, document = both(slices, mask)
        less = mask.values.copy()
        less[-1, -1, 1] = 0
        others = [both(slices, replace(mask, values=less))]
        report = measure("case", mask)
        for algorithm in (replace(ALGORITHM, version="0.1.1"), replace(ALGORITHM, weights_sha256="cd" * 32)):
            other = segmentation(slices, label_lesions(mask), report, algorithm)
            others.append((other, measurement_report(slices, report, algorithm, other)))
        uids = [(s.SOPInstanceUID, s.SeriesInstanceUID, d.SOPInstanceUID, d.SeriesInstanceUID) for s, d in others]
        flat = [
            uid
            for pair in [(seg, document), *others]
            for file in pair
            for uid in (file.SOPInstanceUID, file.SeriesInstanceUID)
        ]
        assert len(set(flat)) == len(flat) == 4 * (len(uids) + 1)


class TestPatient:
    NAMES = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyID")

    def test_patient_and_study_are_the_source_s(self, tmp_path):
        datasets = head_series()
        for d in datasets:
            d.SpecificCharacterSet = "ISO_IR 144"
            d.PatientName, d.PatientID, d.PatientSex = "Иванова^Анна", "MRN-4711", "F"
            d.PatientBirthDate, d.StudyDate, d.StudyID, d.AccessionNumber = "19560213", "20240105", "S1", "A-99"
            d.StudyDescription, d.PatientAge, d.ReferringPhysicianName = "Голова", "067Y", "Петров^И"
            other = Dataset()
            other.PatientID, other.TypeOfPatientID = "Карта 5", "TEXT"
            d.OtherPatientIDsSequence = [other]
        slices = find_slices(save_series(datasets, tmp_path / "x"), "x")
        for number, dataset in enumerate(both(slices, lopsided_mask(slices))):
            dataset = written(dataset, tmp_path / f"{number}.dcm")
            assert dataset.SpecificCharacterSet == "ISO_IR 192"
            assert str(dataset.PatientName) == "Иванова^Анна"
            assert str(dataset.ReferringPhysicianName) == "Петров^И"
            assert dataset.StudyDescription == "Голова"
            assert dataset.OtherPatientIDsSequence[0].PatientID == "Карта 5"
            assert [dataset[name].value for name in self.NAMES] == [datasets[0][name].value for name in self.NAMES]

    def test_what_is_missing_stays_empty(self, tmp_path):
        datasets = head_series()
        for d in datasets:
            for name in ("PatientID", "SliceThickness", "AcquisitionNumber", "ConvolutionKernel", "SeriesNumber"):
                delattr(d, name)
        slices = find_slices(save_series(datasets, tmp_path / "x"), "x")
        for number, dataset in enumerate(both(slices, lopsided_mask(slices))):
            dataset = written(dataset, tmp_path / f"{number}.dcm")
            assert [dataset[name].value or "" for name in self.NAMES] == [""] * len(self.NAMES)

    def test_broken_values_are_copied_without_a_word(self, tmp_path, recwarn, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        datasets = head_series()
        with pydicom.config.disable_value_validation():
            for d in datasets:
                d.PatientBirthDate, d.PatientSex, d.PatientName = "born 1956", "lady", "Secret=" * 40
                d.PatientID, d.StudyTime = "S3cret" * 30, "about noon"
                study = Dataset()
                study.ReferencedSOPInstanceUID = "1.2.S3cret"  # pydicom quotes a wrong UID in a warning
                d.ReferencedStudySequence = [study]
            folder = save_series(datasets, tmp_path / "x")
        slices = find_slices(folder, "x")
        recwarn.clear()
        seg, document = both(slices, lopsided_mask(slices))
        for dataset in (seg, document):
            dicom_out._write(tmp_path / "x.dcm", dataset)
        assert (seg.PatientBirthDate, document.PatientSex) == ("born 1956", "lady")
        said = " ".join([caplog.text, *capfd.readouterr(), *(str(w.message) for w in recwarn)])
        assert not [word for word in ("1956", "lady", "ecret", "3cret", "noon") if word in said]

    def test_an_error_of_a_library_is_not_quoted(self, tilted, monkeypatch, caplog):
        def copy_patient(dataset, slices):
            raise ValueError(f"bad id {slices.images[0].header.PatientID}")

        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(dicom_out, "_copy_patient", copy_patient)
        with pytest.raises(ReadError, match=r"^case: DICOM SEG and SR .*ValueError at test_dicom_out.py:\d+") as caught:
            both(*tilted)
        failed_row(CaseRecord("case", Path("case")), caught.value)
        assert "case failed" in caplog.text
        assert "phantom" not in str(caught.value) + caplog.text


class TestIdentifiers:
    @pytest.mark.parametrize("name", dicom_out.IDENTIFIERS)
    @pytest.mark.parametrize("n_without", [1, 14])
    def test_missing(self, tilted, name, n_without):
        slices, mask = tilted
        for image in slices.images[:n_without]:
            delattr(image.header, name)
        with pytest.raises(ReadError, match=rf"{name} and {n_without} have none, .* dicom=false"):
            both(slices, mask)

    def test_two_frames_of_reference(self, tilted):
        tilted[0].images[3].header.FrameOfReferenceUID = "1.2.3"
        with pytest.raises(ReadError, match="2 different FrameOfReferenceUID and 0 have none, expected 1"):
            both(*tilted)

    def test_a_uid_that_two_slices_share(self, tilted):
        one, other = (image.header for image in tilted[0].images[3:5])
        one.SOPInstanceUID = other.SOPInstanceUID
        with pytest.raises(ReadError, match="13 different SOPInstanceUID and 0 have none, expected 14"):
            both(*tilted)

    def test_another_series_in_the_folder_by_now(self, tmp_path):
        folder = save_series(head_series(), tmp_path / "x")
        scan = read_scan(folder)
        save_series(head_series(), folder)
        mask = NativeMask(np.zeros(scan.grid.shape, np.uint8), scan.grid)
        with pytest.raises(ReadError, match=scan.series.uid):
            write_results(tmp_path, scan, mask, measure("x", mask), ALGORITHM)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy of the Debian package dicom3tools")
@pytest.mark.parametrize("name", ["tilt", "uneven", "coronal"])
def test_the_standard_s_rules_are_kept(tmp_path, name):
    slices = saved(SERIES[name](), tmp_path / "case")
    for number, dataset in enumerate(both(slices, lopsided_mask(slices))):
        path = tmp_path / f"{number}.dcm"
        written(dataset, path)
        said = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False).stderr
        assert ("Segmentation", "Comprehensive3DSR")[number] in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return oracle_bundle(tmp_path_factory.mktemp("bundle") / "oracle")


def patients(folder: Path) -> list:
    """Datasets of a bleeding head, `bleed`, and of one without, `clean`, saved in a folder each."""
    bleeding, clean = head_series(18.5), head_series(-18.5)
    for d in clean:
        stored = np.frombuffer(d.PixelData, np.int16).copy()
        stored[stored - 1024 == 65] = 30 + 1024
        d.PixelData = stored.tobytes()
    for d in (*bleeding, *clean):
        d.PatientName, d.PatientID, d.PatientBirthDate = "Quintessa^Secretia", "MRN-4711", "19560213"
        d.AccessionNumber, d.StudyID, d.StudyDate = "ACC-0815", "STUDY-77", "20240105"
    save_series(bleeding, folder / "bleed")
    save_series(clean, folder / "clean")
    return bleeding


def segment(scans: Path, out: Path, bundle: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(["volume", str(scans), "--out", str(out / "volumes.csv"), f"bundle={bundle}", *words])
    return int(exited.value.code or 0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bundle) -> tuple[Path, Path]:
    """Folder of scans and folder of results of a run over them."""
    folder = tmp_path_factory.mktemp("finished")
    patients(folder / "scans")
    assert segment(folder / "scans", folder / "out", bundle) == 0
    return folder / "scans", folder / "out"


@pytest.fixture
def again(finished, tmp_path) -> tuple[Path, Path]:
    """A copy of `finished` to spoil."""
    for source in finished:
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / "scans", tmp_path / "out"


class TestRun:
    def test_files_beside_the_masks(self, finished):
        names = {path.name for path in (finished[1] / "masks").iterdir()}
        assert names == {"bleed.nii.gz", "bleed.seg.dcm", "bleed.sr.dcm", "clean.nii.gz", "clean.sr.dcm"}

    def test_the_segmentation_is_the_nifti_mask(self, finished):
        scans, out = finished
        mask, _ = read_mask(out / "masks" / "bleed.nii.gz")
        assert mask.values.sum() * mask.grid.voxel_volume_mm3 / 1000 > 5
        slice_of = {
            str(each.header.SOPInstanceUID): k for k, each in enumerate(find_slices(scans / "bleed", "bleed").images)
        }
        found = np.zeros_like(mask.values)
        for _, uid, _, pixels in frames(pydicom.dcmread(out / "masks" / "bleed.seg.dcm")):
            found[:, :, slice_of[uid]] |= pixels.T
        np.testing.assert_array_equal(found, mask.values)
        centre = grid_points(mask.grid)[found > 0].mean(axis=0)
        assert np.linalg.norm(centre - LESION_CENTRE_MM) < 4

    @pytest.mark.parametrize("case_id", ["bleed", "clean"])
    def test_the_report_has_the_numbers_of_the_tables(self, finished, case_id):
        found = groups(pydicom.dcmread(finished[1] / "masks" / f"{case_id}.sr.dcm"))
        (row,) = [row for row in rows(finished[1] / "volumes.csv") if row["case_id"] == case_id]
        assert (float(row["volume_ml"]) > 0) == (case_id == "bleed")
        assert found.pop("Hemorrhage, whole") == {
            **{column: float(row[column]) for column in METHODS},
            "n_lesions": int(row["n_lesions"]),
        }
        lesions = [lesion for lesion in rows(finished[1] / "lesions.csv") if lesion["case_id"] == case_id]
        assert found == {
            f"Hemorrhage {lesion['lesion']}": {**{column: float(lesion[column]) for column in METHODS}, "n_lesions": 1}
            for lesion in lesions
        }

    def test_patient_is_in_the_dicom_files_and_nowhere_else(self, tmp_path, bundle, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        patients(tmp_path / "scans")
        assert segment(tmp_path / "scans", tmp_path / "out", bundle) == 0
        secrets = (b"Quintessa", b"Secretia", b"MRN-4711", b"19560213", b"ACC-0815", b"STUDY-77", b"20240105")
        for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
            content = path.name.encode() + (b"" if path.suffix == ".gz" else path.read_bytes())
            assert [secret in content for secret in secrets] == [path.suffix == ".dcm"] * len(secrets), path.name
        said = (caplog.text + "".join(capfd.readouterr())).encode()
        assert b"scans" in said  # the bar, so stderr was seen
        assert not [secret for secret in secrets if secret in said]

    def test_identifiers_are_kept_where_asked_and_leave_no_machine(self, tmp_path, bundle):
        patients(tmp_path / "scans")
        assert segment(tmp_path / "scans", tmp_path / "out", bundle, "--keep-identifiers") == 0
        bleed, _ = rows(tmp_path / "out" / "volumes.csv")
        found = {name: bleed[name] for name in COLUMNS.values()}
        header = pydicom.dcmread(next((tmp_path / "scans" / "bleed").iterdir()))
        assert found["patient_id"] == header.PatientID == "MRN-4711"
        assert found["study_date"] == "20240105"
        assert "Secretia" in found["patient_name"]
        assert found["accession_number"] == "ACC-0815"
        left_out = Privacy().table(tmp_path / "out" / "volumes.csv", tmp_path / "sent.csv")
        assert set(COLUMNS.values()) <= set(left_out)
        # The same command goes on; without the option it is another run.
        assert segment(tmp_path / "scans", tmp_path / "out", bundle, "--keep-identifiers") == 0
        assert rows(tmp_path / "out" / "volumes.csv")[0]["patient_id"] == "MRN-4711"
        assert segment(tmp_path / "scans", tmp_path / "out", bundle) == 2

    def test_identifiers_that_cannot_be_read_are_said_without_their_value(self, tmp_path, monkeypatch):
        patients(tmp_path / "scans")

        def broken(*given, **named):
            raise ValueError("DOE^JANE cannot be decoded")

        monkeypatch.setattr("ich_pipeline.dicom.identifiers.pydicom.dcmread", broken)
        slices = SimpleNamespace(images=[SimpleNamespace(path=tmp_path / "1.dcm")])
        monkeypatch.setattr("ich_pipeline.dicom.identifiers.find_slices", lambda *given: slices)
        with pytest.raises(
            ReadError, match=r"bleed: the patient's elements in 1\.dcm cannot be read \(ValueError\)"
        ) as told:
            read_identifiers(tmp_path / "scans" / "bleed", "bleed", "")
        assert "JANE" not in str(told.value)

    @pytest.mark.parametrize("gone", ["bleed.seg.dcm", "bleed.sr.dcm", "clean.sr.dcm"])
    def test_a_file_that_is_gone_is_made_again(self, again, bundle, gone):
        scans, out = again
        before = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
        uid = pydicom.dcmread(out / "masks" / gone).SOPInstanceUID
        (out / "masks" / gone).unlink()
        assert segment(scans, out, bundle) == 0
        after = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
        case_id = gone.partition(".")[0]
        assert {name for name in after if after[name] != before[name]} == {n for n in after if n.startswith(case_id)}
        assert pydicom.dcmread(out / "masks" / gone).SOPInstanceUID == uid

    def test_false_writes_none_and_overwrite_removes_them(self, again, bundle, capsys):
        scans, out = again
        assert segment(scans, out, bundle, "dicom=false") == 2
        assert "other settings" in capsys.readouterr().err
        assert segment(scans, out, bundle, "dicom=false", "overwrite=true") == 0
        assert {path.name for path in (out / "masks").iterdir()} == {"bleed.nii.gz", "clean.nii.gz"}

    def test_a_stale_segmentation_does_not_outlive_a_clean_mask(self, again):
        scans, out = again
        scan = read_scan(scans / "bleed")
        mask = NativeMask(np.zeros(scan.grid.shape, np.uint8), scan.grid)
        write_results(out / "masks", scan, mask, measure("bleed", mask), ALGORITHM)
        assert not (out / "masks" / "bleed.seg.dcm").exists()

    def test_masks_are_measured_as_before(self, again, capsys):
        with pytest.raises(SystemExit) as exited:
            cli.main(["volume", str(again[1] / "masks"), "--masks", "--out", str(again[1] / "m" / "volumes.csv")])
        assert exited.value.code == 0
        assert [row["case_id"] for row in rows(again[1] / "m" / "volumes.csv")] == ["bleed", "clean"]

    def test_a_scan_that_cannot_be_referred_to_has_a_flag_or_fails(self, tmp_path, bundle):
        datasets = patients(tmp_path / "scans")
        for d in datasets:
            del d.FrameOfReferenceUID
        save_series(datasets, tmp_path / "scans" / "bleed")
        assert segment(tmp_path / "scans", tmp_path / "auto", bundle) == 0
        bleed, clean = rows(tmp_path / "auto" / "volumes.csv")
        assert float(bleed["volume_ml"]) > 0
        assert ("no_dicom_results" in bleed["flags"], "no_dicom_results" in clean["flags"]) == (True, False)
        names = {path.name for path in (tmp_path / "auto" / "masks").iterdir()}
        assert names == {"bleed.nii.gz", "clean.nii.gz", "clean.sr.dcm"}
        before = (tmp_path / "auto" / "masks" / "bleed.nii.gz").stat().st_mtime_ns
        assert segment(tmp_path / "scans", tmp_path / "auto", bundle) == 0  # nothing is done again
        assert (tmp_path / "auto" / "masks" / "bleed.nii.gz").stat().st_mtime_ns == before
        assert segment(tmp_path / "scans", tmp_path / "out", bundle, "dicom=true") == 1
        bleed, clean = rows(tmp_path / "out" / "volumes.csv")
        assert (bleed["status"], clean["status"]) == ("failed", "ok")
        assert "0 different FrameOfReferenceUID and 14 have none" in bleed["error"]
        assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {"clean.nii.gz", "clean.sr.dcm"}
        assert segment(tmp_path / "scans", tmp_path / "out", bundle, "dicom=false", "overwrite=true") == 0

    @pytest.mark.parametrize("value", ["yes please", "1.5"])
    def test_other_values_of_the_setting_are_refused(self, value):
        with pytest.raises(ConfigError, match="expected auto, true or false"):
            Settings.of([f"dicom={value}"])


def test_highdicom_is_imported_where_a_file_is_made() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import ich_pipeline.dicom_out, sys; print('highdicom' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "False"


@pytest.mark.realdata
class TestRealSeries:
    """A GE head at 18.5 degrees, the half of it with even steps, and all of it with two slice distances."""

    def folder(self, real_data, tmp_path, numbers) -> Path:
        (tmp_path / "ge").mkdir()
        for number in numbers:
            shutil.copyfile(real_data / "ge_head_dicom" / f"{number:02}.dcm", tmp_path / "ge" / f"{number:02}.dcm")
        return tmp_path / "ge"

    def test_mask_of_the_even_half(self, real_data, tmp_path):
        slices = find_slices(self.folder(real_data, tmp_path, range(1, 15)), "ge")
        grid = single_grid(slices)
        middle = grid.affine @ [230, 260, 6, 1]
        inside = np.linalg.norm(grid_points(grid) - middle[:3], axis=-1) < 19.3
        mask = NativeMask(inside.astype(np.uint8), grid)
        start = time.perf_counter()
        seg, document = both(slices, mask)
        assert time.perf_counter() - start < 20  # 0.3 s on one core, the import of highdicom included
        seg = written(seg, tmp_path / "ge.seg.dcm")
        slice_of = {str(each.header.SOPInstanceUID): k for k, each in enumerate(slices.images)}
        found = np.zeros_like(mask.values)
        for _, uid, position, pixels in frames(seg):
            found[:, :, slice_of[uid]] |= pixels.T
            np.testing.assert_array_equal(position, slices.positions_lps_mm[slice_of[uid]])
        np.testing.assert_array_equal(found, mask.values)
        assert groups(document)["Hemorrhage, whole"]["volume_ml"] == pytest.approx(30.1, rel=0.02)
        assert seg.PatientID == slices.images[0].header.PatientID

    def test_uneven_series(self, real_data, tmp_path):
        paths = sorted((real_data / "ge_head_dicom").glob("*.dcm"))
        slices = find_slices(real_data / "ge_head_dicom", "ge")
        values = np.zeros((512, 512, len(paths)), np.uint8)
        values[200:260, 220:250, 10:18] = 1
        mask = NativeMask(values, Grid(values.shape, np.diag([0.5, 0.5, 5.0, 1.0])))
        seg = written(both(slices, mask)[0], tmp_path / "x.seg.dcm")
        thickness = [float(g.PixelMeasuresSequence[0].SliceThickness) for g in seg.PerFrameFunctionalGroupsSequence]
        assert sorted(round(t, 2) for t in thickness) == [2.54, 4.0, 4.0, 4.0, 4.04, 7.0, 7.0, 7.0]
