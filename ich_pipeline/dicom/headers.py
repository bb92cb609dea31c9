"""DICOM files to headers, one a slice, whether files hold one frame or many.

A header is a flat dataset with the elements named here and no others, so nothing that names a patient goes further.
DICOM PS3.3 C.7.6.2 (image plane), C.7.6.16 (functional groups of multi-frame images), C.8.2.1 (CT image).
"""

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydicom
from pydicom.dataset import Dataset

from ich_pipeline.errors import ReadError
from ich_pipeline.files import files_under

DICOM_SUFFIXES = (".dcm", ".ima")
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
MEDIA_INDEX_CLASS = "1.2.840.10008.1.3.10"
MULTI_FRAME_CLASSES = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # Enhanced, Legacy Converted
# ImageType values of CT images that are no part of a stack.
NO_SLICE_TYPES = {"LOCALIZER", "SCREEN SAVE", "DOSE", "DOSE_INFO", "DOSE REPORT"}
REQUIRED = {  # element: how many numbers it holds
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
    "BitsAllocated": 1,
    "BitsStored": 1,
    "HighBit": 1,
    "PixelRepresentation": 1,
}
OPTIONAL = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",  # compared, never shown
    "ImageType",
    "NumberOfFrames",
    "SamplesPerPixel",
    "RescaleType",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "AcquisitionNumber",
    "InstanceNumber",
    "SeriesNumber",
    "ConvolutionKernel",
    "ContrastBolusAgent",
    "ContrastBolusAgentSequence",
    "BodyPartExamined",
    "LossyImageCompression",
)
WHOLE_NUMBERS = ("NumberOfFrames", "SamplesPerPixel", "PixelPaddingValue", "PixelPaddingRangeLimit")
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# Where multi-frame images keep what a single-frame header says flatly: sequence, then element there: element here.
IN_GROUPS = {
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing"},
    "PixelValueTransformationSequence": {
        "RescaleSlope": "RescaleSlope",
        "RescaleIntercept": "RescaleIntercept",
        "RescaleType": "RescaleType",
    },
    "CTReconstructionSequence": {"ConvolutionKernel": "ConvolutionKernel"},
    "CTImageFrameTypeSequence": {"FrameType": "ImageType"},
    "FrameContentSequence": {
        "FrameAcquisitionNumber": "AcquisitionNumber",
        "InStackPositionNumber": "InstanceNumber",
    },
    "UnassignedSharedConvertedAttributesSequence": {
        "ConvolutionKernel": "ConvolutionKernel",
        "ContrastBolusAgent": "ContrastBolusAgent",
    },
    "UnassignedPerFrameConvertedAttributesSequence": {
        "AcquisitionNumber": "AcquisitionNumber",
        "InstanceNumber": "InstanceNumber",
        "ConvolutionKernel": "ConvolutionKernel",
    },
}
DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_INFLATED_BYTES = 2**30  # of a file in the deflated transfer syntax, which may unpack to 1000 times its size


@dataclass(frozen=True, eq=False)
class Image:
    """One slice: what its header says and where its pixels are.

    Attributes:
        header: flat dataset of REQUIRED and OPTIONAL.
        path: its file.
        frame: which of the file's frames, from 0.
        n_frames: how many the file has.
        syntax: UID of the transfer syntax; empty for a file that does not say.
    """

    header: Any
    path: Path
    syntax: str
    frame: int = 0
    n_frames: int = 1


def is_dicom(path: Path) -> bool:
    """Whether a file carries the DICM mark of DICOM Part 10, or starts as data sets without it do."""
    with path.open("rb") as stream:
        return is_dicom_start(stream.read(132))


def is_dicom_start(start: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file.

    Without the mark: an element of group 0002 or 0008 below (gggg,0020), where every data set starts, with a value of a
    plausible length, in either byte order and with or without VR.
    """
    if start[128:] == b"DICM":
        return True
    if len(start) < 132:
        return False
    order: Literal["little", "big"] = "little" if start[1] == 0 else "big"
    group, element = (int.from_bytes(start[n : n + 2], order) for n in (0, 2))
    if group not in (0x0002, 0x0008) or element >= 0x20:
        return False
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    length = int.from_bytes(start[6:8] if explicit else start[4:8], order)
    return length <= 1024


def read_images(folder: Path, case_id: str) -> tuple[list[Image], Counter[str]]:
    """Headers of all CT slices under a folder, and how many files of what kind were left out.

    Raises:
        ReadError: a file that is damaged, a link out of the folder, or a multi-frame image without its groups.
    """
    images: list[Image] = []
    left_out: Counter[str] = Counter()
    for path in (path for _, paths in files_under(folder, case_id) for path in paths):
        if not is_dicom(path):
            if path.suffix.lower() in DICOM_SUFFIXES:
                raise ReadError(
                    f"{case_id}: {path.name} has no DICM mark at byte 128 and does not start as a data set, expected "
                    "DICOM. Copy it again."
                )
            continue
        found, reason = _read_file(case_id, path)
        images += found
        left_out.update([reason] if reason else [])
    # A frame may be a localizer too.
    slices = [image for image in images if not _no_slice(image.header)]
    left_out.update({"localizer, screen save or dose report": len(images) - len(slices)})
    return slices, +left_out


def _read_file(case_id: str, path: Path) -> tuple[list[Image], str | None]:
    """The slices of a file, or why it is left out."""
    try:
        with pydicom.config.disable_value_validation():  # it would quote values in warnings
            dataset, syntax = _read_dataset(case_id, path)
            reason = _why_left_out(case_id, path, dataset)
            if reason:
                return [], reason
            if str(dataset.SOPClassUID) in MULTI_FRAME_CLASSES:
                return _frames(case_id, path, dataset, syntax), None
            return [Image(_flat(dataset), path, syntax)], None
    except ReadError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files, and quotes what it found there
        raise ReadError(
            f"{case_id}: {path.name} cannot be read as DICOM ({type(error).__name__}). Copy it again."
        ) from error


def _read_dataset(case_id: str, path: Path) -> tuple[Any, str]:
    """Elements that are named here, and the UID of the transfer syntax."""
    _require_bounded(case_id, path)
    names = [*REQUIRED, *OPTIONAL, *FRAME_GROUPS]
    dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=names)
    for name in names:
        dataset.get(name)  # values are parsed when asked for, so damage shows here and nowhere later
    for name in WHOLE_NUMBERS:
        int(dataset.get(name) or 0)
    return dataset, str(dataset.file_meta.get("TransferSyntaxUID", ""))


def _require_bounded(case_id: str, path: Path) -> None:
    """Refuse a deflated file that unpacks to more than MAX_INFLATED_BYTES; pydicom would unpack it whole."""
    with path.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != DEFLATED:
            return
        stream.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
        inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while packed := inflating.unconsumed_tail or stream.read(2**16):
            size += len(inflating.decompress(packed, 2**20))
            if size > MAX_INFLATED_BYTES:
                raise ReadError(
                    f"{case_id}: {path.name} unpacks to more than {MAX_INFLATED_BYTES / 2**30:g} GiB, expected one "
                    "slice. The file is not a CT image."
                )


def _why_left_out(case_id: str, path: Path, dataset: Any) -> str | None:
    sop_class = str(dataset.get("SOPClassUID", ""))
    announced = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if announced == MEDIA_INDEX_CLASS:
        return "DICOMDIR"
    if not sop_class or announced == CT_CLASS != sop_class:
        raise ReadError(  # leaving out a slice that was cut off would shorten the head unseen
            f"{case_id}: {path.name} announces class {announced or 'none'} and holds {sop_class or 'none'}, expected "
            "one class. The file is damaged or cut off: copy it again."
        )
    if sop_class in MULTI_FRAME_CLASSES:
        return None
    if sop_class != CT_CLASS:
        return pydicom.uid.UID(sop_class).name
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ReadError(
            f"{case_id}: {path.name} has {dataset.NumberOfFrames} frames in a CT Image, whose header places one only, "
            "expected one frame or Enhanced CT. Export as classic or enhanced CT."
        )
    return None


def image_types(header: Any) -> set[str]:
    """Values of ImageType in capitals."""
    values = header.get("ImageType") or ()
    return {str(value).upper() for value in ([values] if isinstance(values, str) else values)}


def _no_slice(header: Any) -> bool:
    return bool(NO_SLICE_TYPES & image_types(header))


def _flat(dataset: Any) -> Any:
    header = Dataset()
    for name in (*REQUIRED, *OPTIONAL):
        if name in dataset:
            header[name] = dataset[name]
    return header


def _frames(case_id: str, path: Path, dataset: Any, syntax: str) -> list[Image]:
    """One header a frame, put together from the shared groups and its own; its own count."""
    shared, per_frame = (list(dataset.get(name) or ()) for name in FRAME_GROUPS)
    n_frames = int(dataset.get("NumberOfFrames") or 0)
    if len(per_frame) != n_frames or not n_frames:
        raise ReadError(
            f"{case_id}: {path.name} has {n_frames} frames and {len(per_frame)} per-frame functional groups, expected "
            "one group a frame. Export the series again."
        )
    common = _flat(dataset)
    common.pop("InstanceNumber", None)  # of the file, not of a frame
    images = []
    for frame, own in enumerate(per_frame):
        header = Dataset()
        header.update(common)
        for groups in (*shared[:1], own):
            _take_groups(groups, header)
        images.append(Image(header, path, syntax, frame, n_frames))
    return images


def _take_groups(groups: Any, header: Any) -> None:
    for sequence, names in IN_GROUPS.items():
        for item in (groups.get(sequence) or ())[:1]:
            for there, here in names.items():
                if there in item:
                    setattr(header, here, item[there].value)
