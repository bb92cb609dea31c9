"""CT series as hospitals send them, right and wrong, at least one for every rule of docs/input.md.

Each function writes files into a folder. The head in them is that of `scan_files`; every valid one has its volume.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from scan_files import ct_slices, head_series, save_series, slice_positions

from ich_pipeline.dicom.headers import IN_GROUPS

ENHANCED, LEGACY_CONVERTED = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"
SECONDARY_CAPTURE, DOSE_REPORT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.67"
JPEG_SYNTAXES = {
    "JPEG lossless .57": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "JPEG lossless .70": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG-LS .80": gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000 .90": gdcm.TransferSyntax.JPEG2000Lossless,
    "JPEG 2000 .91": gdcm.TransferSyntax.JPEG2000,
}
IDENTIFIERS = {
    "PatientName": "DOE^JANE^QUX",
    "PatientID": "MRN7788990",
    "PatientBirthDate": "19610203",
    "StudyDate": "20210405",
    "AccessionNumber": "ACC5544332",
    "InstitutionName": "Saint Nowhere",
    "ReferringPhysicianName": "HOUSE^GREGORY",
}


def another(datasets: Sequence[FileDataset], prefix: str = "other", **values: Any) -> list[FileDataset]:
    """Copies under their own SOPInstanceUIDs and file names, with other values."""
    copies = copy.deepcopy(list(datasets))
    for number, dataset in enumerate(copies):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.filename = f"{prefix} {number}.dcm"
        for name, value in values.items():
            setattr(dataset, name, value)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return copies


def another_series(datasets: Sequence[FileDataset], prefix: str = "other", **values: Any) -> list[FileDataset]:
    """A further series of the same study."""
    return another(datasets, prefix, **{"SeriesInstanceUID": generate_uid(), "SeriesNumber": 9, **values})


def of_study(datasets: Sequence[FileDataset], study_of: FileDataset, **values: Any) -> list[FileDataset]:
    """Another series, moved into the study of a dataset."""
    return another_series(datasets, **{"StudyInstanceUID": study_of.StudyInstanceUID, **values})


def brighter(datasets: Iterable[FileDataset], by_hu: int = 40) -> list[FileDataset]:
    """The same datasets with other pixels."""
    datasets = list(datasets)
    for dataset in datasets:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.int16) + np.int16(by_hu)).tobytes()
    return datasets


def multi_frame(
    datasets: Sequence[FileDataset], sop_class: str = ENHANCED, order: Sequence[int] | None = None
) -> FileDataset:
    """One object of all slices: what differs stands with the frame, the rest in the shared groups."""
    datasets = [datasets[n] for n in order] if order is not None else list(datasets)
    whole = copy.deepcopy(datasets[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = sop_class
    whole.filename, whole.NumberOfFrames, whole.InstanceNumber = "frames.dcm", len(datasets), 1
    shared, frames = Dataset(), [Dataset() for _ in datasets]
    for sequence, names in IN_GROUPS.items():
        if sequence.startswith("Unassigned") != (sop_class == LEGACY_CONVERTED) and sequence.startswith("Unassigned"):
            continue
        values = [{there: d.get(here) for there, here in names.items() if here in d} for d in datasets]
        if all(value == values[0] for value in values):
            setattr(shared, sequence, [_item(values[0])])
        else:
            for frame, value in zip(frames, values, strict=True):
                setattr(frame, sequence, [_item(value)])
    for name in {here for names in IN_GROUPS.values() for here in names.values()} - {"ImageType", "InstanceNumber"}:
        if name in whole:
            delattr(whole, name)
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [shared], frames
    whole.PixelData = b"".join(d.PixelData for d in datasets)
    return whole


def _item(values: dict[str, Any]) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def compress(folder: Path, syntax: int) -> None:
    """Compress all files of a folder in place."""
    for path in folder.iterdir():
        reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def strip_preamble(folder: Path, suffix: str = ".dcm") -> None:
    """Leave of every file the data set alone."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        start = 132 + 12 + int(pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength)
        path.unlink()
        path.with_suffix(suffix).write_bytes(content[start:])


def encoded(datasets: Sequence[FileDataset], syntax: str) -> list[FileDataset]:
    """Datasets to be written in another uncompressed transfer syntax."""
    for dataset in datasets:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, np.int16).byteswap().tobytes()
    return list(datasets)


Case = Callable[[Path], object]
VALID: dict[str, Case] = {}
INVALID: dict[str, tuple[Case, str]] = {}


def valid(case: Case) -> Case:
    """Register a case that must be read, with the volume of the head."""
    VALID[case.__name__] = case
    return case


def invalid(message: str) -> Callable[[Case], Case]:
    """Register a case that must be refused with this message."""

    def register(case: Case) -> Case:
        INVALID[case.__name__] = case, message
        return case

    return register


# ---------------------------------------------------------------- geometry


@valid
def tilted(folder):
    save_series(head_series(18.5), folder)


@valid
def tilted_the_other_way(folder):
    save_series(head_series(-18.5), folder)


@valid
def feet_first(folder):
    centres, orientation = slice_positions(12, [11.0] * 13)
    save_series(ct_slices(centres, orientation * np.array([[-1], [1]])), folder)


@valid
def coronal(folder):
    centres = np.zeros((17, 3))
    centres[:, 1] = np.arange(17) * 11.0 - 88
    save_series(ct_slices(centres, np.array([[1.0, 0, 0], [0, 0, -1.0]])), folder)


@valid
def jitter(folder):
    save_series(head_series(15, 11 + np.random.default_rng(0).uniform(-0.01, 0.01, 13)), folder)


@valid
def overlapping_slices(folder):
    datasets = head_series(5, [5.5] * 27)
    for dataset in datasets:
        dataset.SliceThickness, dataset.SpacingBetweenSlices = 11, 11
    save_series(datasets, folder)


@valid
def gapped_slices_without_thickness(folder):
    datasets = head_series(5)
    for dataset in datasets:
        del dataset.SliceThickness
        dataset.SpacingBetweenSlices = 2
    save_series(datasets, folder)


@valid
def slice_location_and_numbers_against_positions(folder):
    datasets = head_series()
    for number, (name, dataset) in enumerate(zip(np.random.default_rng(0).permutation(14), datasets, strict=True)):
        dataset.filename, dataset.InstanceNumber, dataset.SliceLocation = f"{name}.dcm", number, float(name)
        dataset.GantryDetectorTilt = 30
    save_series(datasets, folder)


@valid
def two_zones(folder):
    save_series(head_series(0, [8.0] * 7 + [12.0] * 8), folder)


@valid
def two_zones_under_tilt_and_an_overlap(folder):
    save_series(head_series(-15, [7.0] * 10 + [2.0] + [9.0] * 9), folder)


@invalid(r"slices lie unevenly, 7 x 8\.000, 8 x 12\.000 mm, and are not axial")
def two_zones_coronal(folder):
    centres = np.zeros((16, 3))
    centres[:, 1] = np.concatenate([[0], np.cumsum([8.0] * 7 + [12.0] * 8)]) - 82
    save_series(ct_slices(centres, np.array([[1.0, 0, 0], [0, 0, -1.0]])), folder)


@invalid(r"slices differ in BitsStored and HighBit: 13 x \(16\.0, 15\.0\), 1 x \(7\.0, 15\.0\)")
def one_slice_with_other_bits(folder):
    datasets = head_series()
    datasets[4].BitsStored = 7
    save_series(datasets, folder)


@invalid(r"missing at 1 gap\(s\): 22\.000 mm from -16\.27 to 5\.73 mm along the normal \(image 9 and image 7\)")
def missing_slice(folder):
    datasets = head_series()
    save_series(datasets[:6] + datasets[7:], folder)


@invalid(r"missing at 1 gap\(s\): 22\.000 mm .*an image without number")
def missing_slice_without_numbers(folder):
    datasets = head_series()
    for dataset in datasets:
        del dataset.InstanceNumber
    save_series(datasets[:6] + datasets[7:], folder)


@invalid(r"missing at 2 gap\(s\): 22\.000 mm")
def two_missing_slices_side_by_side_of_one(folder):
    datasets = head_series()
    save_series(datasets[:6] + datasets[7:8] + datasets[9:], folder)


@invalid(r"missing at 1 gap\(s\): 22\.000 mm")
def last_slice_but_one_missing(folder):
    datasets = head_series()
    save_series(datasets[:12] + datasets[13:], folder)


@invalid(r"slices differ in ImageOrientationPatient: 13 x .*, 1 x ")
def mixed_orientation(folder):
    datasets = head_series()
    datasets[3].ImageOrientationPatient = [1, 0, 0, 0, 0.9998, 0.02]
    save_series(datasets, folder)


@invalid(r"slices differ in PixelSpacing: 13 x .*, 1 x ")
def mixed_spacing(folder):
    datasets = head_series()
    datasets[3].PixelSpacing = [4.5, 4.1]
    save_series(datasets, folder)


@invalid(r"slices differ in matrix: 13 x .*, 1 x ")
def mixed_matrix(folder):
    datasets = head_series()
    datasets[3].Rows = 49
    save_series(datasets, folder)


@invalid("14 of 14 slices have no ImagePositionPatient")
def no_position(folder):
    save_series(_without("ImagePositionPatient"), folder)


@invalid("14 of 14 slices have no ImageOrientationPatient")
def no_orientation(folder):
    save_series(_without("ImageOrientationPatient"), folder)


@invalid("14 of 14 slices have no PixelSpacing")
def no_spacing(folder):
    save_series(_without("PixelSpacing"), folder)


def _without(name: str) -> list[FileDataset]:
    datasets = head_series()
    for dataset in datasets:
        delattr(dataset, name)
    return datasets


# ---------------------------------------------------------------- copies and phases


@valid
def copies_of_files(folder):
    datasets = head_series()
    save_series(datasets, folder)
    save_series(datasets[2:5], folder / "again")


@valid
def same_pixels_under_another_uid(folder):
    datasets = head_series()
    save_series([*datasets, *another(datasets[3:9])], folder)


@valid
def phases_with_and_without_contrast(folder):
    datasets = head_series()
    enhanced = brighter(another(datasets, AcquisitionNumber=2, ContrastBolusAgent="agent"))
    save_series([*datasets, *enhanced], folder)


@invalid(r"2 different slices at .*acquisition numbers: 1 \(14 slices\), 2 \(14 slices\)")
def phases_alike(folder):
    datasets = head_series()
    save_series([*datasets, *brighter(another(datasets, AcquisitionNumber=2))], folder)


@invalid(r"2 different slices at .*acquisition numbers: 1 \(14 slices\), 2 \(1 slices\)")
def phase_of_one_slice(folder):
    datasets = head_series()
    phase = brighter(another(datasets[4:5], AcquisitionNumber=2, ContrastBolusAgent="agent"))
    save_series([*datasets, *phase], folder)


@invalid(r"2 different slices at .*acquisition numbers: 1 \(28 slices\)")
def two_reconstructions_in_one_series(folder):
    datasets = head_series()
    save_series([*datasets, *brighter(another(datasets))], folder)


# ---------------------------------------------------------------- several series


@valid
def what_is_no_slice(folder):
    datasets = head_series()
    save_series(
        [
            *datasets,
            *another(datasets[:2], "localizer", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
            *another(datasets[:1], "screen", ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]),
            *another_series(datasets[:1], "dose", ImageType=["DERIVED", "SECONDARY", "DOSE_INFO"]),
            *another_series(datasets[:1], "report", SOPClassUID=DOSE_REPORT),
            *another_series(datasets[:1], "capture", SOPClassUID=SECONDARY_CAPTURE, NumberOfFrames=3),
            *another_series(datasets, "mr", SOPClassUID="1.2.840.10008.5.1.4.1.1.4"),
        ],
        folder,
    )


@valid
def bone_kernel_beside(folder):
    datasets = head_series()
    save_series([*brighter(another_series(datasets, ConvolutionKernel="BONEPLUS")), *datasets], folder)


@valid
def thin_slices_beside(folder):
    datasets = head_series(0, [5.5] * 27)
    thin = of_study(head_series(0, [1.1] * 134), datasets[0])
    save_series([*brighter(thin), *datasets], folder)


@valid
def derived_beside(folder):
    datasets = head_series()
    derived = another_series(datasets, ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    save_series([*brighter(derived), *datasets], folder)


@valid
def reformats_beside(folder):
    datasets = head_series()
    centres = np.zeros((17, 3))
    centres[:, 1] = np.arange(17) * 11.0 - 88
    planes = ct_slices(centres, np.array([[1.0, 0, 0], [0, 0, -1.0]]))
    save_series([*brighter(of_study(planes, datasets[0])), *datasets], folder)


@valid
def contrast_beside(folder):
    datasets = head_series()
    save_series([*brighter(another_series(datasets, ContrastBolusAgent="agent")), *datasets], folder)


@valid
def neck_beside(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.BodyPartExamined = "HEAD"
    save_series([*another_series(_moved(datasets, -250), BodyPartExamined="CSPINE"), *datasets], folder)


@valid
def one_test_slice_beside(folder):
    datasets = head_series()
    save_series([*brighter(another_series(datasets[:1])), *datasets], folder)


@valid
def unlike_thickness_in_one_series(folder):
    datasets = head_series()
    for dataset in datasets[7:]:
        dataset.SliceThickness = 7
    save_series(datasets, folder)


def _moved(datasets: Sequence[FileDataset], by_mm: float) -> list[FileDataset]:
    moved = copy.deepcopy(list(datasets))
    for dataset in moved:
        dataset.ImagePositionPatient[2] += by_mm
    return moved


@invalid(r"2 CT series alike, .*number 2, 14 slices, kernel STD, step 11 mm, UID .*number 9, 14 slices")
def two_series_alike(folder):
    datasets = head_series()
    save_series([*datasets, *brighter(another_series(datasets))], folder)


@invalid("2 CT series of unlike extent")
def head_and_neck_without_body_part(folder):
    datasets = head_series()
    save_series([*datasets, *another_series(_moved(datasets, -250))], folder)


@invalid("2 CT series of unlike extent")
def head_in_two_halves(folder):
    lower = head_series()
    upper = another_series(lower[7:])
    save_series([*lower[:7], *upper], folder)


@invalid(r"CT images of 2 studies \(by StudyInstanceUID\)")
def two_studies(folder):
    datasets = head_series()
    save_series([*datasets, *another_series(datasets, StudyInstanceUID=generate_uid())], folder)


@invalid(r"CT images of 2 patients \(by PatientID\)")
def two_patients(folder):
    datasets = head_series()
    save_series([*datasets, *another_series(datasets, PatientID="MRN0000001")], folder)


@invalid("holds 2 x localizer, screen save or dose report, expected a series of CT images")
def localizers_alone(folder):
    save_series(another(head_series()[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), folder)


@invalid("holds 14 x MR Image Storage, expected a series of CT images")
def magnetic_resonance(folder):
    save_series(another(head_series(), SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), folder)


# ---------------------------------------------------------------- multi-frame


@valid
def enhanced(folder):
    datasets = head_series(12)
    order = np.random.default_rng(0).permutation(len(datasets))
    save_series([multi_frame(datasets, order=order)], folder)


@valid
def legacy_converted(folder):
    save_series([multi_frame(head_series(-12), LEGACY_CONVERTED)], folder)


@valid
def enhanced_with_rescale_of_each_frame(folder):
    datasets = head_series()
    for number, dataset in enumerate(datasets):
        slope = 0.5 + 0.1 * number
        hu = np.frombuffer(dataset.PixelData, np.int16) - 1024.0
        dataset.PixelData = np.round((hu + 1100) / slope).astype(np.int16).tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.3f}", -1100
    save_series([multi_frame(datasets)], folder)


@valid
def enhanced_in_two_files_with_a_copy(folder):
    datasets = head_series()
    first, second = multi_frame(datasets[:8]), multi_frame(datasets[8:])
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    second.filename = "second.dcm"
    save_series([first, second], folder)
    save_series([first], folder / "again")


@valid
def enhanced_compressed(folder):
    save_series([multi_frame(head_series())], folder)
    compress(folder, gdcm.TransferSyntax.JPEGLSLossless)


@invalid("has 14 frames and 13 per-frame functional groups, expected one group a frame")
def enhanced_without_a_group(folder):
    whole = multi_frame(head_series())
    whole.PerFrameFunctionalGroupsSequence = list(whole.PerFrameFunctionalGroupsSequence)[:-1]
    save_series([whole], folder)


@invalid("1 of 14 slices have no ImagePositionPatient")
def enhanced_frame_without_position(folder):
    whole = multi_frame(head_series())
    del whole.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    save_series([whole], folder)


@invalid("missing at 1 gap")
def enhanced_without_a_frame(folder):
    datasets = head_series()
    save_series([multi_frame(datasets[:6] + datasets[7:])], folder)


@invalid(r"cannot be decoded \(transfer syntax Explicit VR Little Endian.*PixelData has .* bytes, expected")
def enhanced_with_pixels_of_fewer_frames(folder):
    whole = multi_frame(head_series())
    whole.PixelData = whole.PixelData[:-8800]
    save_series([whole], folder)


@invalid("has 14 frames in a CT Image")
def many_frames_in_a_single_frame_class(folder):
    whole = multi_frame(head_series(), CTImageStorage)
    save_series([whole], folder)


# ---------------------------------------------------------------- encodings


@valid
def implicit_vr(folder):
    save_series(encoded(head_series(), ImplicitVRLittleEndian), folder)


@valid
def big_endian(folder):
    save_series(encoded(head_series(), ExplicitVRBigEndian), folder)


@valid
def deflated(folder):
    save_series(encoded(head_series(), DeflatedExplicitVRLittleEndian), folder)


@valid
def no_preamble(folder):
    save_series(head_series(), folder)
    strip_preamble(folder)


@valid
def no_preamble_implicit_and_no_suffix(folder):
    save_series(encoded(head_series(), ImplicitVRLittleEndian), folder)
    strip_preamble(folder, "")


@valid
def no_preamble_big_endian(folder):
    save_series(encoded(head_series(), ExplicitVRBigEndian), folder)
    strip_preamble(folder, ".ima")


@valid
def run_length(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
    save_series(datasets, folder)


def _register_jpeg(name: str, syntax: int, *, signed: bool) -> None:
    def case(folder: Path) -> None:
        datasets = head_series()
        for dataset in datasets:
            hu = np.frombuffer(dataset.PixelData, np.int16) - np.int16(1024)
            dataset.PixelData = (hu if signed else (hu + 1024).astype(np.uint16)).tobytes()
            dataset.PixelRepresentation, dataset.RescaleIntercept = int(signed), 0 if signed else -1024
            dataset.BitsStored, dataset.HighBit = (16, 15) if signed else (12, 11)
        save_series(datasets, folder)
        compress(folder, syntax)

    VALID[f"{name} {'signed' if signed else 'unsigned, 12 bits'}"] = case


for _name, _syntax in JPEG_SYNTAXES.items():
    for _signed in (False, True):
        _register_jpeg(_name, _syntax, signed=_signed)


@invalid(r"cannot be decoded \(transfer syntax JPEG-LS Lossless Image Compression .*1 without their end")
def stream_cut_off(folder):
    save_series(head_series(), folder)
    compress(folder, gdcm.TransferSyntax.JPEGLSLossless)
    path = folder / "5.dcm"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData[16 : len(dataset.PixelData) // 2]])
    dataset["PixelData"].is_undefined_length = True
    save_series([dataset], folder)


@invalid(r"cannot be decoded \(transfer syntax MPEG2 Main Profile / Main Level")
def syntax_of_films(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.100")
        dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0\1\xb3\xff\xd9"])
    save_series(datasets, folder)


@invalid("has no DICM mark at byte 128")
def no_dicom_under_its_suffix(folder):
    save_series(head_series(), folder)
    (folder / "13.dcm").write_bytes(bytes(5000))


@invalid(r"13\.dcm cannot be")
def cut_off_pixels(folder):
    save_series(head_series(), folder)
    path = folder / "13.dcm"
    path.write_bytes(path.read_bytes()[:-1000])


@invalid(r"cannot be decoded .*PixelData has 4404 bytes, expected 4400")
def too_many_pixels(folder):
    datasets = head_series()
    datasets[2].PixelData += b"\0\0\0\0"
    save_series(datasets, folder)


# ---------------------------------------------------------------- values


@valid
def slope_and_intercept_of_each_slice(folder):
    datasets = head_series()
    for number, dataset in enumerate(datasets):
        slope = 0.5 + 0.1 * number
        hu = np.frombuffer(dataset.PixelData, np.int16) - 1024.0
        dataset.PixelData = np.round((hu + 1100) / slope).astype(np.int16).tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.3f}", -1100
    save_series(datasets, folder)


@valid
def padding_range(folder):
    datasets = head_series()
    for dataset in datasets:
        pixels = np.frombuffer(dataset.PixelData, np.int16).reshape(50, 44) - np.int16(1024)
        pixels[:2], pixels[2] = -2000, -1990
        dataset.PixelData, dataset.RescaleIntercept = pixels.tobytes(), 0
        dataset.add_new(0x00280120, "SS", -2000)
        dataset.add_new(0x00280121, "SS", -1990)
    save_series(datasets, folder)


@valid
def overlay_in_the_high_bits(folder):
    datasets = head_series()
    for dataset in datasets:
        hu = np.frombuffer(dataset.PixelData, np.int16).astype(int) - 1024
        dataset.PixelData = (hu & 0x0FFF | 0xA000).astype(np.uint16).tobytes()
        dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = 12, 11, 0
    save_series(datasets, folder)


@valid
def monochrome1(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    save_series(datasets, folder)


@invalid("14 of 14 slices have no RescaleSlope")
def no_rescale(folder):
    save_series(_without("RescaleSlope"), folder)


@invalid("RescaleType US, expected HU")
def rescaled_to_something_else(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.RescaleType = "US"
    save_series(datasets, folder)


@invalid("values run from 0 to 255")
def windowed(folder):
    datasets = head_series()
    for dataset in datasets:
        hu = np.frombuffer(dataset.PixelData, np.int16) - 1024.0
        dataset.PixelData = np.clip((hu + 10) * 255 / 100, 0, 255).astype(np.int16).tobytes()
        dataset.RescaleIntercept = 0
    save_series(datasets, folder)


@invalid("3 samples a pixel")
def colour(folder):
    datasets = head_series()
    for dataset in datasets:
        dataset.SamplesPerPixel = 3
    save_series(datasets, folder)
