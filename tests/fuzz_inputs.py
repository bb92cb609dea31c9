"""Damaged files by the thousand: each one is read right or refused by one of our own errors.

    python tests/fuzz_inputs.py --seconds 60 --seed 0 [--kind nifti|dicom]

What is right is said by a second reader below, written from the standard. Anything else (another exception, a number
that the file does not hold, more than SLOWEST_S) is a failure: it is printed with its seed and mutations, and the exit
status is 1. `--seed S --first N --cases 1` makes case N again.
"""

import argparse
import gzip
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from scan_files import GANTRY_TILT, SPACING, head_series, nifti_image, rotation, save_series

from ich_pipeline.errors import IchError
from ich_pipeline.reading import read_scan
from ich_pipeline.records import Scan

SLOWEST_S = 5.0
SHAPE = (24, 26, 12)
MATRIX_SCALE = np.diag([44 / 24, 50 / 26, 16 / 12])  # the same head on fewer voxels
# Offset and format of the fields that decide what an image is. https://nifti.nimh.nih.gov
FIELDS = {
    348: {
        "sizeof_hdr": (0, "i"),
        "dim": (40, "8h"),
        "datatype": (70, "h"),
        "bitpix": (72, "h"),
        "pixdim": (76, "8f"),
        "vox_offset": (108, "f"),
        "scl_slope": (112, "f"),
        "scl_inter": (116, "f"),
        "xyzt_units": (123, "B"),
        "descrip": (148, "80B"),
        "qform_code": (252, "h"),
        "sform_code": (254, "h"),
        "quatern": (256, "6f"),
        "srow": (280, "12f"),
        "magic": (344, "4B"),
        "extension": (348, "4B"),
    },
    540: {
        "sizeof_hdr": (0, "i"),
        "magic": (4, "8B"),
        "datatype": (12, "h"),
        "bitpix": (14, "h"),
        "dim": (16, "8q"),
        "pixdim": (104, "8d"),
        "vox_offset": (168, "q"),
        "scl_slope": (176, "d"),
        "scl_inter": (184, "d"),
        "descrip": (240, "80B"),
        "qform_code": (344, "i"),
        "sform_code": (348, "i"),
        "quatern": (352, "6d"),
        "srow": (400, "12d"),
        "xyzt_units": (500, "i"),
        "extension": (540, "4B"),
    },
}
DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-3, 1e3, 1e-30, 1e30, 3.4e38, -1e9, np.nan, np.inf, -np.inf)
WHOLES = (
    0,
    1,
    -1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    64,
    127,
    128,
    255,
    256,
    512,
    1024,
    1536,
    2304,
    32767,
    -32768,
    65536,
    2**31 - 1,
)


@dataclass
class Summary:
    """What came of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [f"{n:7d}  {outcome}" for outcome, n in self.outcomes.most_common()]
        return "\n".join([*lines, *self.failures, f"{self.outcomes.total()} cases, {len(self.failures)} failures"])


# ---------------------------------------------------------------- NIfTI


@cache
def nifti_bases() -> dict[str, bytes]:
    """Right files of every kind, as they are on disk."""
    files = {}
    with TemporaryDirectory() as name:
        for label, matrix, dtype, kind, byte_order, forms in (
            ("plain", SPACING, np.int16, nib.Nifti1Image, "<", "sform"),
            ("tilted, both forms", GANTRY_TILT, np.float32, nib.Nifti1Image, "<", "both"),
            ("qform, big-endian", rotation(17, 9) @ SPACING, np.int16, nib.Nifti1Image, ">", "qform"),
            ("NIfTI-2", np.diag([-4.0, 4.5, 11.0]), np.float64, nib.Nifti2Image, "<", "both"),
        ):
            image = nifti_image(np.asarray(matrix) @ MATRIX_SCALE, SHAPE, dtype, kind)
            image = kind(image.dataobj, image.affine, image.header.as_byteswapped(byte_order))
            image.set_qform(image.affine, int(forms != "sform"))
            image.set_sform(image.affine, int(forms != "qform"))
            path = Path(name) / "x.nii"
            nib.save(image, path)
            files[label] = path.read_bytes()
    return files


def _byte_order(data: bytes) -> tuple[int, str]:
    """Header size and byte order by the first four bytes."""
    for order in "<>":
        size = struct.unpack_from(order + "i", data)[0] if len(data) >= 4 else 0
        if size in FIELDS:
            return size, order
    raise ValueError("no NIfTI header")


def set_field(data: bytearray, rng: np.random.Generator) -> str:
    """One number of one header field becomes another."""
    size, order = _byte_order(data)
    name = str(rng.choice(list(FIELDS[size])))
    offset, code = FIELDS[size][name]
    count, kind = int(code[:-1] or 1), code[-1]
    index = int(rng.integers(count))
    at = offset + index * struct.calcsize(kind)
    if kind in "fd":
        old = struct.unpack_from(order + kind, data, at)[0]
        value = float(rng.choice([*REALS, old * 1.001, old * 1.5, -old, rng.normal(0, 100)]))
        with np.errstate(over="ignore"):
            data[at : at + struct.calcsize(kind)] = np.array(value, np.dtype(order + kind)).tobytes()
    else:
        bits = 8 * struct.calcsize(kind)
        value = int(rng.choice([*WHOLES, int(rng.integers(2**15))])) % 2**bits
        data[at : at + bits // 8] = value.to_bytes(bits // 8, "little" if order == "<" else "big")
    return f"{name}[{index}]={value}"


def flip_header(data: bytearray, rng: np.random.Generator) -> str:
    at = int(rng.integers(min(360, len(data))))
    data[at] = int(rng.integers(256))
    return f"byte {at}={data[at]}"


def flip_body(data: bytearray, rng: np.random.Generator) -> str:
    start, count = int(rng.integers(352, len(data))), int(rng.choice([1, 8, 300]))
    data[start : start + count] = rng.bytes(len(data[start : start + count]))
    return f"{count} bytes from {start}"


def cut(data: bytearray, rng: np.random.Generator) -> str:
    keep = int(rng.choice([rng.integers(len(data)), rng.integers(600), len(data) - 1 - rng.integers(8)]))
    del data[keep:]
    return f"cut to {keep}"


def extend(data: bytearray, rng: np.random.Generator) -> str:
    more = rng.bytes(int(rng.choice([1, 4, 1000])))
    data += more
    return f"{len(more)} bytes more"


def drop(data: bytearray, rng: np.random.Generator) -> str:
    start, count = int(rng.integers(len(data))), int(rng.choice([1, 4, 100]))
    del data[start : start + count]
    return f"{count} bytes left out at {start}"


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], str], ...] = (
    *(set_field,) * 8,
    *(flip_header,) * 3,
    *(flip_body, cut, extend, drop),
)


def nifti_case(folder: Path, rng: np.random.Generator) -> tuple[Path, list[str]]:
    """A file with one to three mutations, before or after it was compressed."""
    label = str(rng.choice(list(nifti_bases())))
    data, said = bytearray(nifti_bases()[label]), [label]
    zipped = bool(rng.random() < 0.3)
    damage_zipped = zipped and rng.random() < 0.5
    for _ in range(0 if damage_zipped else int(rng.integers(1, 4))):
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        try:
            said.append(mutation(data, rng))
        except (ValueError, struct.error):  # the one before left no header or body
            break
    if zipped:
        data = bytearray(gzip.compress(bytes(data), 1, mtime=0))
        said.append("gzip")
        if damage_zipped:
            said.append((flip_header, cut, extend, drop)[int(rng.integers(4))](data, rng))
    path = folder / ("x.nii.gz" if zipped else "x.nii")
    path.write_bytes(data)
    return path, said


def _unzipped(data: bytes) -> bytes:
    """By zlib, to the end of every member; it minds the reserved flags of the first, which change no byte."""
    if data[:2] != b"\x1f\x8b":
        return data
    data = data[:3] + bytes([data[3] & 0x1F]) + data[4:]
    out = b""
    while data.strip(b"\0"):
        member = zlib.decompressobj(31)
        out += member.decompress(data)
        if not member.eof:
            raise ValueError("gzip stream ends early")
        data = member.unused_data
    return out


def _quaternion_affine(quatern: NDArray[Any], pixdim: NDArray[Any]) -> NDArray[np.float64]:
    """Method 2 of the standard."""
    b, c, d = quatern[:3]
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turned = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = turned * pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
    affine[:3, 3] = quatern[3:]
    return affine


def nifti_truth(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """HU and affine in mm of a NIfTI file, as the standard has it; of what it cannot read it raises anything."""
    data = _unzipped(path.read_bytes())
    size, order = _byte_order(data)
    raw = {
        name: np.array(struct.unpack_from(order + code, data, offset), float)
        for name, (offset, code) in FIELDS[size].items()
        if name not in ("descrip", "extension")
    }
    shape = [int(n) for n in raw["dim"][1 : 1 + int(raw["dim"][0])]]
    dtype = np.dtype(order + DATATYPES[int(raw["datatype"][0])])
    offset, count = int(raw["vox_offset"][0]), int(np.prod(shape))
    if len(data) != offset + count * dtype.itemsize:
        raise ValueError("size")
    values = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F").astype(float)
    slope, inter = raw["scl_slope"][0], raw["scl_inter"][0]
    if slope != 0 and np.isfinite(slope):
        values = values * slope + inter
    if raw["sform_code"][0] > 0:
        affine = np.vstack([raw["srow"].reshape(3, 4), [0, 0, 0, 1]])
    else:
        affine = _quaternion_affine(raw["quatern"], raw["pixdim"])
    to_mm = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}[int(raw["xyzt_units"][0]) & 7]
    return values, np.diag([to_mm, to_mm, to_mm, 1.0]) @ affine


def check_nifti(scan: Scan, path: Path) -> None:
    """The scan is what the second reader says."""
    image_hu, affine = nifti_truth(path)
    image_hu = np.where(np.isnan(image_hu), -1000, np.maximum(image_hu, -1024)).squeeze()
    np.testing.assert_allclose(scan.grid.affine, affine, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scan.image_hu, image_hu.reshape(scan.image_hu.shape), rtol=1e-5, atol=1e-2)


# ---------------------------------------------------------------- DICOM

TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "AcquisitionNumber"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelData", "NumberOfFrames"),
)


@cache
def dicom_base() -> dict[str, bytes]:
    """A right series, as it is on disk."""
    with TemporaryDirectory() as name:
        datasets = head_series(12, [11.0] * 13)
        for number, dataset in enumerate(datasets):  # the same bytes in every process
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "2.25.1", "2.25.2"
            dataset.FrameOfReferenceUID = "2.25.3"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.{100 + number}"
        folder = save_series(datasets, Path(name))
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def set_tag(file: Path, rng: np.random.Generator) -> str:
    """One tag of one file is gone, empty, or has another value."""
    dataset = pydicom.dcmread(file)
    name = str(rng.choice(TAGS))
    how = int(rng.integers(4))
    if how == 0 and name in dataset:
        delattr(dataset, name)
        value: Any = "gone"
    elif how == 1 and name in dataset:
        dataset[name].value = value = None
    else:
        is_text = name.endswith("UID") or name in ("Modality", "ImageType", "RescaleType", "PhotometricInterpretation")
        texts = ["1.2.3", "MR", "LOCALIZER", "US", "MONOCHROME1", "RGB", "x" * 70]
        many = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}.get(name)
        numbers = [float(rng.choice([0, 1, -1, 0.5, 7.5, 1e9, 1e-9])) for _ in range(many or 1)]
        value = str(rng.choice(texts)) if is_text else numbers if many else int(abs(numbers[0])) % 2**15
        if name == "PixelData":
            value = rng.bytes(int(rng.choice([0, 10, 4400, 5000])))
        setattr(dataset, name, value)
    dataset.save_as(file)
    return f"{name}: {str(value)[:40]}"


def dicom_case(folder: Path, rng: np.random.Generator) -> tuple[Path, list[str]]:
    """A series in which one to three files are damaged."""
    said = []
    for name, content in dicom_base().items():
        (folder / name).write_bytes(content)
    for name in rng.choice(list(dicom_base()), int(rng.integers(1, 4)), replace=False):
        file = folder / str(name)
        if rng.random() < 0.5:
            try:
                said.append(f"{name} {set_tag(file, rng)}")
            except Exception as error:  # pydicom does not write every nonsense
                said.append(f"{name} not written: {type(error).__name__}")
            continue
        data = bytearray(file.read_bytes())
        mutation = (flip_tags, flip_tags, cut, extend, drop)[int(rng.integers(5))]
        said.append(f"{name} {mutation(data, rng)}")
        file.write_bytes(data)
    return folder, said


def flip_tags(data: bytearray, rng: np.random.Generator) -> str:
    """Bytes before the pixels."""
    at = int(rng.integers(128, len(data) - 4400))
    data[at] = int(rng.integers(256))
    return f"byte {at}={data[at]}"


def check_dicom(scan: Scan, folder: Path) -> None:
    """Every slice is the one of a file, at its position, and no voxel has another volume than the files say."""
    slices = []
    for file in folder.iterdir():
        try:
            d = pydicom.dcmread(file, force=True)
            if "TransferSyntaxUID" not in d.file_meta:  # that element is what was damaged: pixels are plain
                d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            image_hu = d.pixel_array.astype(float) * float(d.RescaleSlope) + float(d.RescaleIntercept)
            slices.append((np.array(d.ImagePositionPatient, float) * [-1, -1, 1], np.maximum(image_hu.T, -1024)))
        except Exception:  # a file that is no slice, which the reader may pass over
            continue
    for k in range(scan.grid.shape[2]):
        corner_mm = scan.grid.to_mm(np.array([0, 0, k]))
        off_mm = [float(np.linalg.norm(position - corner_mm)) for position, _ in slices]
        nearest = int(np.argmin(off_mm))
        assert off_mm[nearest] < 0.06, f"slice {k} lies {off_mm[nearest]:.3g} mm from any file"
        np.testing.assert_allclose(scan.image_hu[..., k], slices[nearest][1], atol=0.01, err_msg=f"slice {k}")


# ---------------------------------------------------------------- running


KINDS = {"nifti": (nifti_case, check_nifti), "dicom": (dicom_case, check_dicom)}


def run(kind: str, *, seed: int, seconds: float = np.inf, first: int = 0, cases: int | None = None) -> Summary:
    """Make, read and judge cases until the time is over or `cases` are done."""
    make, check = KINDS[kind]
    summary, end, n = Summary(), time.monotonic() + seconds, first
    while time.monotonic() < end and (cases is None or n < first + cases):
        with TemporaryDirectory() as name:
            path, said = make(Path(name), np.random.default_rng([seed, n]))
            start = time.monotonic()
            try:
                scan = read_scan(path, "case")
            except IchError as error:
                summary.outcomes[f"{kind}: {type(error).__name__}"] += 1
                problem = "" if str(error).startswith("case: ") else f"does not name its case: {error}"
            except Exception:
                summary.outcomes[f"{kind}: crash"] += 1
                problem = traceback.format_exc(limit=-3)
            else:
                summary.outcomes[f"{kind}: read"] += 1
                try:
                    check(scan, path)
                    problem = ""
                except Exception as error:
                    problem = f"wrong: {type(error).__name__}: {error}"
            if time.monotonic() - start > SLOWEST_S:
                problem += f" took {time.monotonic() - start:.1f} s"
            if problem:
                summary.failures.append(f"FAILED --kind {kind} --seed {seed} --first {n} --cases 1: {said}\n{problem}")
        n += 1
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kind", choices=KINDS, default="nifti")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="how many, within the time")
    given = parser.parse_args()
    summary = run(given.kind, seed=given.seed, seconds=given.seconds, first=given.first, cases=given.cases)
    print(summary.text())
    return int(bool(summary.failures))


if __name__ == "__main__":
    sys.exit(main())
