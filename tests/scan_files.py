"""Small head CTs drawn in world coordinates and written as NIfTI files or DICOM series, right or wrong on purpose.

The head has no symmetry, so that a swapped or flipped axis shows.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ich_pipeline.geometry import Grid
from ich_pipeline.records import Scan

LPS_RAS = np.array([-1.0, -1.0, 1.0])
LESION_CENTRE_MM = np.array([-25.0, 20.0, 8.0])
LESION_RADIUS_MM = 15.0
BRAIN_ML = 4 / 3 * np.pi * 0.9**3 * 70 * 88 * 75 / 1000  # what lies inside the skull


def head_hu(points_ras_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """HU of a made-up head centred on the origin, at points (..., 3)."""
    x, y, z = np.moveaxis(points_ras_mm, -1, 0)
    radius = np.sqrt((x / 70) ** 2 + (y / 88) ** 2 + (z / 75) ** 2)
    values = np.select([radius < 0.9, radius < 1.0], [30.0 + 5 * (x > 0) + 10 * (y > 30), 950.0], default=-1000.0)
    values[np.linalg.norm(points_ras_mm - LESION_CENTRE_MM, axis=-1) < LESION_RADIUS_MM] = 65.0
    return values


def grid_points(grid: Grid) -> NDArray[np.float64]:
    """(I, J, K, 3) world position of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return grid.to_mm(index)


def centred(matrix: Any, shape: Sequence[int]) -> NDArray[np.float64]:
    """Affine with this 3x3 part whose grid is centred near the origin, off the lattice of round numbers."""
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2 + (0.31, -0.17, 0.23)
    return affine


def rotation(x_deg: float = 0, z_deg: float = 0) -> NDArray[np.float64]:
    a, c = np.radians([x_deg, z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_x


SHAPE = (44, 50, 16)
SPACING = np.diag([4.0, 4.5, 11.0])
GANTRY_TILT = np.array([[4.0, 0, 0], [0, 4.5 * np.cos(0.3), 0], [0, 4.5 * np.sin(0.3), 11.0]])
MATRICES = {
    "plain": SPACING,
    "negative determinant": np.diag([-4.0, 4.5, 11.0]),
    "oblique": rotation(17, 9) @ SPACING,
    "permuted": np.array([[0, 0, 4.0], [-4.5, 0, 0], [0, 11.0, 0]]),
    "sheared": GANTRY_TILT,
}


def nifti_image(
    matrix: Any = SPACING, shape: tuple[int, int, int] = SHAPE, dtype: Any = np.int16, kind: Any = nib.Nifti1Image
) -> Any:
    """The head on a grid, as an image in memory with sform code 1 and qform code 0, in mm."""
    affine = centred(matrix, shape)
    image = kind(head_hu(grid_points(Grid(shape, affine))).astype(dtype), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 0)
    image.header.set_xyzt_units("mm")
    return image


def save(image: Any, path: Path, **fields: Any) -> Path:
    """Save an image and then set header fields by force, without the checks and repairs of nibabel."""
    nib.save(image, path)
    if fields:
        patch_header(path, **fields)
    return path


def patch_header(path: Path, **fields: Any) -> None:
    """Overwrite header fields of an uncompressed NIfTI-1 file; a value (index, value) sets one item of a field."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        if isinstance(value, tuple):
            header[name][value[0]] = value[1]
        else:
            header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)


def slice_positions(tilt_deg: float, steps_mm: Iterable[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (K, 3) of slices along the couch and their orientation (2, 3), LPS; a step is along the slice normal."""
    tilt = np.radians(tilt_deg)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(tilt), -np.sin(tilt)])
    distances = np.concatenate([[0.0], np.cumsum(list(steps_mm))])
    along_couch = distances / np.cross(row, column)[2]
    centres = np.zeros((len(distances), 3))
    centres[:, 2] = along_couch - along_couch[-1] / 2 + 0.23
    return centres, np.stack([row, column])


def ct_slices(
    centres: NDArray[np.float64],
    orientation: NDArray[np.float64],
    *,
    matrix: tuple[int, int] = (50, 44),
    spacing_mm: tuple[float, float] = (4.5, 4.0),
    intercept: float = -1024,
) -> list[FileDataset]:
    """CT images of the head, each drawn at its own position; `matrix` and `spacing_mm` are (rows, columns)."""
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    rows, columns = matrix
    datasets = []
    for number, centre in enumerate(centres):
        corner = (
            centre
            - orientation[0] * spacing_mm[1] * (columns - 1) / 2
            - orientation[1] * spacing_mm[0] * (rows - 1) / 2
        )
        corner = corner + np.array([0.31, 0.17, 0])
        r, c = np.mgrid[:rows, :columns][..., None]
        points_lps = corner + c * spacing_mm[1] * orientation[0] + r * spacing_mm[0] * orientation[1]
        stored = (head_hu(points_lps * LPS_RAS) - intercept).astype(np.int16)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.FileMetaInformationGroupLength = 0  # counted when it is written
        d = FileDataset(f"{number}.dcm", {}, file_meta=meta, preamble=bytes(128))
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.Modality, d.ImageType, d.PatientID = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "phantom"
        d.SeriesNumber, d.AcquisitionNumber, d.ConvolutionKernel = 2, 1, "STD"
        d.InstanceNumber = len(centres) - number  # against the order of positions, and so is the thickness
        d.SliceThickness = 99
        d.ImagePositionPatient = [f"{v:.7f}" for v in corner]
        d.ImageOrientationPatient = [f"{v:.10f}" for v in orientation.ravel()]
        d.PixelSpacing = list(spacing_mm)
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleSlope, d.RescaleIntercept, d.RescaleType = 1, intercept, "HU"
        d.PixelData = stored.tobytes()
        datasets.append(d)
    return datasets


def save_series(datasets: Iterable[FileDataset], folder: Path) -> Path:
    """Write each dataset to <folder>/<its file name>."""
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        if pydicom.__version__ < "3":  # which does not take the encoding from the transfer syntax
            syntax = dataset.file_meta.TransferSyntaxUID
            dataset.is_little_endian, dataset.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
        pydicom.dcmwrite(folder / Path(str(dataset.filename)).name, dataset)
    return folder


def brain_ml(scan: Scan) -> float:
    """Volume of what is neither air nor bone, to be compared with BRAIN_ML."""
    return scan.grid.foreground_ml((scan.image_hu > 0) & (scan.image_hu < 100))


def head_series(tilt_deg: float = 0, steps_mm: Iterable[float] = (11.0,) * 13) -> list[FileDataset]:
    """A right series of 14 slices; change one thing in it to make it wrong."""
    return ct_slices(*slice_positions(tilt_deg, steps_mm))
