"""A mask as DICOM SEG and its volumes as DICOM SR, beside the NIfTI mask and for the study that the scan came from.

DICOM PS3.3 A.51 (Segmentation) and A.35.13 (Comprehensive 3D SR), PS3.16 TID 1500 (Measurement Report). Each frame of
the SEG names the slice that it lies on and has that slice's own position, so tilt and uneven steps need no resampling.
Patient and study of the source are copied into both, which is what files them under the patient; an error here never
quotes a header. highdicom is imported where a file is made: it takes half a second.
"""

import hashlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage, generate_uid

from ich_pipeline import __version__
from ich_pipeline.dicom.archive import as_folder
from ich_pipeline.dicom.headers import CT_CLASS, Image
from ich_pipeline.dicom.stack import Slices, find_slices
from ich_pipeline.errors import GeometryError, IchError, ReadError
from ich_pipeline.files import SEG_SUFFIX, SR_SUFFIX, atomic_path
from ich_pipeline.records import NativeMask, Scan
from ich_pipeline.volumetry import LesionReport, VolumeReport, label_lesions

# A lesion is a segment, whose frames take Rows x Columns / 8 bytes for each slice that it is on. Of more lesions than
# this, the smallest share the last segment: thousands of specks would make gigabytes that no viewer opens.
MAX_SEGMENTS = 50
SEG_SERIES_NUMBER, SR_SERIES_NUMBER = 9001, 9002
PRODUCT = "ich-pipeline"
# What the scan must say of itself to be referred to, and how many different values its slices may have: one, or each.
IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
EMPTY = (  # elements that must be there and may be empty; the source's own are copied over them
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
REFERRED_TO = (
    *IDENTIFIERS,
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
)
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")

# Written out: pydicom's names of codes change between its versions.
CATEGORY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
FINDING = Code("50960005", "SCT", "Hemorrhage")
SITE = Code("1101003", "SCT", "Intracranial")
PROCEDURE = Code("303653007", "SCT", "Computed tomography of head")
VOLUME, MILLILITRE = Code("118565006", "SCT", "Volume"), Code("mL", "UCUM", "milliliter")
N_LESIONS, NO_UNITS = Code("246206008", "SCT", "Number of lesions"), Code("1", "UCUM", "no units")
DEVICE = Code("121007", "DCM", "Device")
OWN_SCHEME = "99ICHPIPELINE"  # PS3.16 8.2: 99 marks a private scheme
TRAINED = Code("123110", "DCM", "Artificial Intelligence")
FIXED_RULE = Code("FIXED-RULE", OWN_SCHEME, "Fixed rule without trained weights")
METHODS = {  # column of volumes.csv and lesions.csv: how that volume was made
    "volume_ml": Code("126030", "DCM", "Sum of segmented voxel method for volume"),
    "abc2_ml": Code("ABC2", OWN_SCHEME, "ABC/2"),
    "abc2_kothari_ml": Code("ABC2-KOTHARI", OWN_SCHEME, "ABC/2, slices weighted by area (Kothari 1996)"),
    "tada_ml": Code("TADA", OWN_SCHEME, "Tada, pi/6 ABC"),
}


@dataclass(frozen=True)
class Algorithm:
    """What made a mask: a bundle, its version and the hash of its weights; "" where it has none."""

    bundle: str
    version: str
    weights_sha256: str


@dataclass(frozen=True)
class _Part:
    """A segment: one lesion, or the smallest ones together."""

    name: str
    lesions: Sequence[LesionReport]

    def ml(self, column: str) -> float:
        return sum((getattr(lesion, column) for lesion in self.lesions), 0.0)


def segmentation(
    slices: Slices, lesions: NDArray[np.unsignedinteger], report: VolumeReport, algorithm: Algorithm
) -> Dataset | None:
    """DICOM SEG of a mask: BINARY, a segment a lesion, the frames that hold blood and no others.

    The same slices, mask and algorithm give the same UIDs, and but for dates and times the same bytes.

    Args:
        slices: of the source series, in the order of their positions.
        lesions: (I, J, K) = (column, row, slice) lesion numbers from `label_lesions`.
        report: of this mask.
        algorithm: that made it.

    Returns:
        None for an empty mask.

    Raises:
        GeometryError: the mask has another shape than the series.
        ReadError: slices without the UIDs that a reference needs, or headers that cannot be copied.
    """
    with _quiet_headers(slices.case_id):
        _check_identifiers(slices)
        first = slices.images[0].header
        shape = (int(first.Columns), int(first.Rows), len(slices.images))
        if lesions.shape != shape:
            raise GeometryError(
                f"{slices.case_id}: mask {lesions.shape}, series {shape} (column, row, slice). Segment it again."
            )
        bleeding = np.flatnonzero(lesions.any(axis=(0, 1)))
        if not bleeding.size:
            return None
        segments = np.minimum(lesions[:, :, bleeding], MAX_SEGMENTS).astype(np.uint8).transpose(2, 1, 0)
        return _segmentation(slices, bleeding, np.ascontiguousarray(segments), _parts(report), algorithm)


def measurement_report(slices: Slices, report: VolumeReport, algorithm: Algorithm, seg: Dataset | None) -> Dataset:
    """DICOM SR of a mask's volumes: the whole mask over all slices of the series, then each segment of its SEG.

    Numbers are those of volumes.csv and lesions.csv, to six decimals.

    Args:
        slices: of the source series.
        report: of the mask.
        algorithm: that made it.
        seg: of `segmentation`; None for an empty mask, whose report says 0 mL.

    Raises:
        ReadError: as `segmentation`.
    """
    with _quiet_headers(slices.case_id):
        _check_identifiers(slices)
        return _measurement_report(slices, report, algorithm, seg)


def write_results(folder: Path, scan: Scan, mask: NativeMask, report: VolumeReport, algorithm: Algorithm) -> None:
    """Write `<case_id>.seg.dcm` (none for an empty mask) and `<case_id>.sr.dcm` of a scan that came from DICOM.

    Args:
        folder: of the files.
        scan: whose source still holds its series; the headers are read again.
        mask: on the scan's grid.
        report: of the mask.
        algorithm: that made it.

    Raises:
        ReadError: as `segmentation`, or the source holds another series by now.
    """
    with as_folder(scan.source, scan.case_id) as source:
        slices = find_slices(source, scan.case_id, scan.series.uid if scan.series else None)
        seg = segmentation(slices, label_lesions(mask), report, algorithm)
        document = measurement_report(slices, report, algorithm, seg)
    seg_file = folder / f"{scan.case_id}{SEG_SUFFIX}"
    if seg is None:
        seg_file.unlink(missing_ok=True)
    else:
        _write(seg_file, seg)
    _write(folder / f"{scan.case_id}{SR_SUFFIX}", document)


def are_complete(mask_file: Path, n_lesions: int) -> bool:
    """Whether what `write_results` leaves is there, beside a mask of that many lesions."""
    stem = mask_file.name.removesuffix(".nii.gz")
    return all(mask_file.with_name(stem + suffix).is_file() for suffix in [SR_SUFFIX] + [SEG_SUFFIX] * bool(n_lesions))


def _write(path: Path, dataset: Dataset) -> None:
    with atomic_path(path) as temporary:
        dataset.save_as(temporary)


def _segmentation(
    slices: Slices,
    bleeding: NDArray[np.integer],
    segments: NDArray[np.uint8],
    parts: Sequence[_Part],
    algorithm: Algorithm,
) -> Dataset:
    """As `segmentation`: `segments` (slices with blood, row, column) holds segment numbers, `bleeding` those slices."""
    import highdicom as hd

    extents_mm = _slice_extents_mm(slices)
    identity = _identity(slices, algorithm, bleeding.tolist(), hashlib.sha256(segments.tobytes()).hexdigest())
    made_by = hd.AlgorithmIdentificationSequence(
        name=algorithm.bundle,
        family=_family(algorithm),
        version=algorithm.version,
        source=PRODUCT,
        parameters={"weights_sha256": algorithm.weights_sha256 or "none"},
    )
    seg = hd.seg.Segmentation(
        source_images=[
            _reference(slices.images[k], float(np.mean(extents_mm)), even=slices.are_even) for k in bleeding
        ],
        pixel_array=segments,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=part.name,
                segmented_property_category=CATEGORY,
                segmented_property_type=FINDING,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=made_by,
                tracking_uid=_uid(identity, "tracking", number),
                tracking_id=part.name,
                anatomic_regions=[SITE],
            )
            for number, part in enumerate(parts, start=1)
        ],
        series_number=SEG_SERIES_NUMBER,
        series_instance_uid=_uid(identity, "SEG series"),
        sop_instance_uid=_uid(identity, "SEG"),
        instance_number=1,
        content_label="HEMORRHAGE",
        content_description="Intracranial hemorrhage",
        **_equipment(algorithm, "segmentation"),
    )
    organization = _uid(identity, "dimensions")  # highdicom's own is drawn by chance
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    if not slices.are_even:
        del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    slice_of = {_stand_in(slices.images[k]): k for k in bleeding}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        k = slice_of[str(source.ReferencedSOPInstanceUID)]
        _refer(source, slices.images[k])
        if not slices.are_even:
            extent_mm = round(float(extents_mm[k]), 6)
            frame.PixelMeasuresSequence = hd.PixelMeasuresSequence(slices.images[k].header.PixelSpacing, extent_mm)
    files = {str(image.header.SOPInstanceUID): image for image in (slices.images[k] for k in bleeding)}
    seg.SourceImageSequence = [_whole_file(image) for image in files.values()]
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [_whole_file(image) for image in files.values()]
    source_file = _first_file(slices)
    for name in LOSSY:
        if name in source_file:
            seg[name] = source_file[name]
    _copy_patient(seg, slices)
    return seg


def _measurement_report(slices: Slices, report: VolumeReport, algorithm: Algorithm, seg: Dataset | None) -> Dataset:
    from highdicom import sr
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    seg_uid, segments = (seg.SOPInstanceUID, seg.SegmentSequence) if seg else ("", ())
    files: dict[str, list[Image]] = {}
    for image in slices.images:
        files.setdefault(str(image.header.SOPInstanceUID), []).append(image)
    evidence = [_reference(images[0], 0, even=False) for images in files.values()]
    for reference, images in zip(evidence, files.values(), strict=True):
        reference.SOPClassUID, reference.SOPInstanceUID = (
            images[0].header.SOPClassUID,
            images[0].header.SOPInstanceUID,
        )
    identity = _identity(slices, algorithm, seg_uid, *astuple(report))
    made_by = sr.AlgorithmIdentification(
        name=algorithm.bundle,
        version=algorithm.version,
        parameters=[f"weights_sha256={algorithm.weights_sha256 or 'none'}"],
    )
    about = {
        "algorithm_id": made_by,
        "finding_category": CATEGORY,
        "finding_type": FINDING,
        "finding_sites": [sr.FindingSite(SITE)],
    }

    def measurements(ml: dict[str, float], n_lesions: int) -> list[Any]:
        volumes = [
            sr.Measurement(VOLUME, round(value, 6), MILLILITRE, method=METHODS[column]) for column, value in ml.items()
        ]
        return [*volumes, sr.Measurement(N_LESIONS, n_lesions, NO_UNITS)]

    whole = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(_uid(identity, "whole"), "Hemorrhage, whole"),
        measurements=measurements({column: getattr(report, column) for column in METHODS}, report.n_lesions),
        source_images=[
            sr.SourceImageForMeasurementGroup(images[0].header.SOPClassUID, uid, _frame_numbers(images))
            for uid, images in files.items()
        ],
        **about,
    )
    groups = [
        sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(segment.TrackingUID, segment.TrackingID),
            referenced_segment=sr.ReferencedSegment(
                SegmentationStorage,
                seg_uid,
                segment.SegmentNumber,
                source_series=sr.SourceSeriesForSegmentation(evidence[0].SeriesInstanceUID),
            ),
            measurements=measurements({column: part.ml(column) for column in METHODS}, len(part.lesions)),
            **about,
        )
        for part, segment in zip(_parts(report), segments, strict=True)
    ]
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[PRODUCT, *astuple(algorithm)]),
        name=PRODUCT,
        manufacturer_name=PRODUCT,
        model_name=algorithm.bundle,
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=sr.ObserverContext(DEVICE, device)),
        procedure_reported=PROCEDURE,
        imaging_measurements=[whole, *groups],
    )
    document = sr.Comprehensive3DSR(
        evidence=[*evidence, seg] if seg else evidence,
        content=content,
        series_number=SR_SERIES_NUMBER,
        series_instance_uid=_uid(identity, "SR series"),
        sop_instance_uid=_uid(identity, "SR"),
        instance_number=1,
        is_complete=True,  # nobody has verified it, and it is preliminary
        coding_schemes=[CodingSchemeIdentificationItem(OWN_SCHEME, name=PRODUCT, responsible_organization=PRODUCT)],
        **_equipment(algorithm, "volumes"),
    )
    _copy_patient(document, slices)
    return document


def _parts(report: VolumeReport) -> list[_Part]:
    """Segments in order: every lesion, or the largest and then all others together."""
    lesions = report.lesions
    alone = lesions if len(lesions) <= MAX_SEGMENTS else lesions[: MAX_SEGMENTS - 1]
    parts = [_Part(f"Hemorrhage {lesion.lesion}", [lesion]) for lesion in alone]
    rest = lesions[len(alone) :]
    return [*parts, _Part(f"Hemorrhage {rest[0].lesion} to {rest[-1].lesion}", rest)] if rest else parts


def _reference(image: Image, thickness_mm: float, *, even: bool) -> Dataset:
    """What highdicom needs to know of a slice, and nothing of the patient: it would quote that in errors and logs."""
    reference = Dataset()
    for name in REFERRED_TO:
        setattr(reference, name, image.header.get(name))
    reference.SOPClassUID, reference.SOPInstanceUID = CT_CLASS, _stand_in(image)
    for name in EMPTY:
        setattr(reference, name, None)
    # Readers take spacing from here: the distance of the planes, not the header's thickness, which may be anything.
    reference.SliceThickness = round(thickness_mm, 6)
    if even:
        reference.SpacingBetweenSlices = round(thickness_mm, 6)
    return reference


def _stand_in(image: Image) -> str:
    """A UID for one slice while highdicom works, which takes every slice for a CT image; `_refer` replaces it."""
    return f"{image.header.SOPInstanceUID}.{image.frame}" if image.n_frames > 1 else str(image.header.SOPInstanceUID)


def _refer(item: Dataset, image: Image) -> None:
    item.ReferencedSOPClassUID = image.header.SOPClassUID
    item.ReferencedSOPInstanceUID = image.header.SOPInstanceUID
    if image.n_frames > 1:
        item.ReferencedFrameNumber = image.frame + 1


def _whole_file(image: Image) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = image.header.SOPClassUID
    item.ReferencedSOPInstanceUID = image.header.SOPInstanceUID
    return item


def _frame_numbers(images: Sequence[Image]) -> list[int] | None:
    return [image.frame + 1 for image in images] if images[0].n_frames > 1 else None


def _slice_extents_mm(slices: Slices) -> NDArray[np.float64]:
    """(K,) half the distance to both neighbours along the normal; an end slice reaches out as far as in."""
    steps = np.diff(slices.distances_mm)
    return (np.append(steps[:1], steps) + np.append(steps, steps[-1:])) / 2


def _copy_patient(dataset: Dataset, slices: Slices) -> None:
    """Patient and study modules of the first slice's file, in UTF-8 whatever the source is encoded in."""
    dataset.copy_patient_and_study_information(_first_file(slices))
    for _ in dataset.iterall():
        pass  # decodes text by the source's character set while that is still known
    dataset.SpecificCharacterSet = "ISO_IR 192"


def _first_file(slices: Slices) -> Dataset:
    return pydicom.dcmread(slices.images[0].path, force=True, stop_before_pixels=True)


def _check_identifiers(slices: Slices) -> None:
    """Refuse slices that a SEG could not refer to one by one, in one frame of reference.

    Raises:
        ReadError: a UID is missing, or differs where it may not, or is shared where it may not be.
    """
    n_slices = len(slices.images)
    for name in IDENTIFIERS:
        found = [str(image.header.get(name) or "") for image in slices.images]
        each = [
            (uid, image.frame if name == "SOPInstanceUID" else 0)
            for uid, image in zip(found, slices.images, strict=True)
        ]
        expected = n_slices if name == "SOPInstanceUID" else 1
        if "" in found or len(set(each)) != expected:
            raise ReadError(
                f"{slices.case_id}: {n_slices} slices have {len({e for e in each if e[0]})} different {name} and "
                f"{found.count('')} have none, expected {expected} and 0: no DICOM SEG or SR can refer to them. Export "
                "the series again, or give dicom=false to do without."
            )


@contextmanager
def _quiet_headers(case_id: str) -> Iterator[None]:
    """Keep what headers say out of warnings and errors.

    Raises:
        ReadError: in place of any error that is not ours, with its place and without its message.
    """
    try:
        with config.disable_value_validation():  # its warnings quote the value
            yield
    except IchError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ReadError(
            f"{case_id}: DICOM SEG and SR cannot be made from the series' headers ({type(error).__name__} at "
            f"{Path(at.filename).name}:{at.lineno}; its message may name the patient and is withheld), expected valid "
            "patient and study elements. Correct them, or give dicom=false to do without."
        ) from None


def _equipment(algorithm: Algorithm, what: str) -> dict[str, Any]:
    return {
        "manufacturer": PRODUCT,
        "manufacturer_model_name": algorithm.bundle,
        "software_versions": __version__,
        "device_serial_number": algorithm.weights_sha256 or "none",
        "series_description": f"Hemorrhage {what}, research use only",
    }


def _family(algorithm: Algorithm) -> Code:
    return TRAINED if algorithm.weights_sha256 else FIXED_RULE


def _identity(slices: Slices, algorithm: Algorithm, *rest: Any) -> str:
    """What decides the content of a file, as one hash."""
    sources = [(str(image.header.SOPInstanceUID), image.frame) for image in slices.images]
    return hashlib.sha256(repr((__version__, astuple(algorithm), sources, rest)).encode()).hexdigest()


def _uid(identity: str, *what: Any) -> str:
    return str(generate_uid(entropy_srcs=[identity, *map(str, what)]))
