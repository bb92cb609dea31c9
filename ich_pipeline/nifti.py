"""NIfTI files: which affine counts, and voxels read whole or not at all.

The standard lets one file carry up to three geometries (sform, qform, pixdim) and readers differ in which one they
believe. Here the sform decides, then the qform; a file that leaves the size or the side of the head open is refused.
NIfTI-1 and -2, single or .hdr/.img, either byte order, compressed or not. https://nifti.nimh.nih.gov/nifti-1
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from isal import igzip_lib
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ich_pipeline.errors import GeometryError, ReadError
from ich_pipeline.geometry import Affine, Grid, grid_difference
from ich_pipeline.records import NiftiForms

GZIP_ERROR: Any = igzip_lib.error
SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img")
# 512 x 512 x 2048 voxels: twice the longest head scan, and what a gzip bomb may make us allocate at most.
MAX_VOXELS = 2**29
# A deflate stream cannot grow more than this (1032:1), so a smaller file is known to be cut off before it is read.
MAX_DEFLATE_RATIO = 1032
# Two headers of one file agree when lengths and volumes do within one percent.
FORM_TOLERANCE = 0.01
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unknown, metre, millimetre, micron
SINGLE_MAGIC = (b"n+1", b"n+2")
PAIR_MAGIC = (b"ni1", b"ni2")
HEADERS: dict[int, Any] = {1: nib.Nifti1Header, 2: nib.Nifti2Header}
HEADER_BYTES = {header.sizeof_hdr: header for header in HEADERS.values()}
# A mask of uneven slices says where they lie in an extension of this code, as JSON under this key, in steps of the
# affine.
COMMENT, POSITIONS_KEY = 6, "ich_pipeline_slice_positions"
MAX_EXTENSION_BYTES = 1 << 24
# dcm2niix fills the description so; its plain file of a tilted series has a slice step that is too short.
DCM2NIIX_DESCRIPTION = re.compile(rb"(TE=[\d.]+;)?Time=\d")


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """What a checked header says.

    Attributes:
        data_path: file that holds the voxels; the .img of a pair.
        data_offset: bytes before the first voxel, after decompression.
        dtype: of the stored voxels, with their byte order.
        slope, inter: image = stored * slope + inter; (1, 0) when the header sets none.
        flags: `qform_differs`, `pixdim_differs`, `units_scaled`, `uneven_slices`.
    """

    case_id: str
    grid: Grid
    forms: NiftiForms
    data_path: Path
    data_offset: int
    dtype: np.dtype[Any]
    slope: float
    inter: float
    flags: tuple[str, ...]


def is_nifti(path: Path) -> bool:
    """Whether the file name is one that a NIfTI file has."""
    return path.name.lower().endswith(SUFFIXES)


def nifti_stem(path: Path) -> str:
    """File name without .nii.gz, .nii, .hdr or .img."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def read_header(path: Path, case_id: str) -> NiftiHeader:
    """Read and check the header of a NIfTI file without its voxels.

    Raises:
        ReadError: not NIfTI, a colour or complex type, not 3D, several time points, a unit that is no length, no form
            code, or two forms that give different voxel sizes.
        GeometryError: an affine that is not finite or is singular, or that no head CT has.
    """
    if path.suffix.lower() == ".img":
        path = path.with_suffix(".hdr")
    raw = _parse(path, case_id)
    magic = bytes(raw["magic"].item())[:3]
    shape = _shape_3d(case_id, raw)
    single = magic in SINGLE_MAGIC
    offset = float(raw["vox_offset"])
    first = raw.sizeof_hdr if single else 0
    if not (first <= offset < np.inf and offset == int(offset)):
        raise ReadError(
            f"{case_id}: voxels start at byte {offset:g}, expected {first} or later. Convert the scan again."
        )
    affine, flags = _affine_mm(case_id, raw, shape)
    grid = _grid(case_id, shape, affine)
    grid.check_plausible(case_id)
    # Of a pair the whole header file after the header is for extensions.
    positions = _slice_positions(path, case_id, raw, int(offset) if single else path.stat().st_size, grid)
    if positions:
        grid = _grid(case_id, shape, affine, positions)
    slope, inter = _scaling(case_id, raw)
    flags += ("uneven_slices",) if positions else ()
    return NiftiHeader(
        case_id=case_id,
        grid=grid,
        forms=_forms(raw),
        data_path=path if single else _image_of_pair(case_id, path),
        data_offset=int(offset),
        dtype=_dtype(case_id, raw),
        slope=slope,
        inter=inter,
        flags=flags,
    )


def read_voxels(header: NiftiHeader) -> NDArray[np.generic]:
    """Stored voxels in native byte order, (I, J, K) in Fortran order, without slope and intercept; maybe read-only.

    Memory is bounded by the header, which is checked: a stream that is longer or shorter, or fails its checksum, is
    refused.

    Raises:
        ReadError: as above; the message gives the bytes found and expected.
    """
    n_voxels = int(np.prod(header.grid.shape))
    expected = header.data_offset + n_voxels * header.dtype.itemsize
    data = _read_bounded(header.data_path, header.case_id, expected)
    if len(data) != expected:
        found = f"more than {expected}" if len(data) > expected else f"only {len(data)}"
        raise ReadError(
            f"{header.case_id}: {header.data_path.name} holds {found} bytes, its header says {expected} "
            f"({header.grid.shape} voxels of {header.dtype}). The file is damaged or cut off: copy or convert it again."
        )
    stored = np.frombuffer(data, header.dtype, n_voxels, header.data_offset).reshape(header.grid.shape, order="F")
    return stored if header.dtype.isnative else stored.astype(header.dtype.newbyteorder("="))


def mask_header_block(grid: Grid, forms: NiftiForms) -> bytes:
    """The bytes before the voxels of a uint8 mask: a header that gives `forms` back as read, in their version.

    No NIfTI header can hold uneven slices: the affine has their mean step, and an extension that other programs pass
    over has their positions.

    Raises:
        GeometryError: the forms do not describe `grid`.
    """
    header = HEADERS[forms.version](endianness="<")
    header.set_data_dtype(np.uint8)
    header.set_data_shape(grid.shape)
    extension = _extension(grid)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1, 0, header.sizeof_hdr + 4 + len(extension)
    header["xyzt_units"] = forms.xyzt_units
    if forms.qform_fields is not None and forms.pixdim is not None:
        header["pixdim"] = forms.pixdim
        for name, value in zip(_QFORM_FIELDS, forms.qform_fields, strict=True):
            header[name] = value
        header["qform_code"] = forms.qform_code
    else:
        header.set_qform(forms.sform if forms.qform is None else forms.qform, forms.qform_code)
    for name, row in zip(_SFORM_ROWS, forms.sform, strict=False):
        header[name] = row
    header["sform_code"] = forms.sform_code
    affine, _ = _affine_mm("mask", header, grid.shape)
    difference = grid_difference(Grid(grid.shape, affine), Grid(grid.shape, grid.affine))
    if difference:
        raise GeometryError(f"header forms describe another grid than the mask's: {difference}. Pass the scan's forms.")
    return header.binaryblock + bytes([bool(extension), 0, 0, 0]) + extension


_SFORM_ROWS = ("srow_x", "srow_y", "srow_z")
_QFORM_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")


def _extension(grid: Grid) -> bytes:
    """A header extension with the positions of uneven slices; nothing for even ones.

    The affine stands beside them: programs that flip, crop or resample an image may carry the extension along.
    """
    if grid.slice_positions is None:
        return b""
    positions = [round(float(n), 9) for n in grid.slice_positions]
    text = json.dumps({POSITIONS_KEY: positions, "affine": grid.affine[:3].tolist()}).encode()
    size = -(-(8 + len(text)) // 16) * 16
    return size.to_bytes(4, "little") + COMMENT.to_bytes(4, "little") + text.ljust(size - 8, b"\0")


def _slice_positions(path: Path, case_id: str, raw: Any, stop: int, grid: Grid) -> list[float] | None:
    """Positions of uneven slices that `mask_header_block` wrote, found before byte `stop` of the header's file.

    Raises:
        ReadError: they are damaged, or of another affine than the file has now.
    """
    first = raw.sizeof_hdr + 4
    if not first + 16 <= stop <= MAX_EXTENSION_BYTES:
        return None
    order: Literal["little", "big"] = "little" if raw.endianness == "<" else "big"
    block = _read_head(path, case_id, stop)[first:]
    while len(block) >= 16:
        size, code = (int.from_bytes(block[n : n + 4], order) for n in (0, 4))
        if not 16 <= size <= len(block):
            return None
        text = block[8:size].rstrip(b"\0")
        if code == COMMENT and text.startswith(f'{{"{POSITIONS_KEY}"'.encode()):
            try:
                said = json.loads(text)
                positions = [float(n) for n in said[POSITIONS_KEY]]
                affine = np.vstack([np.array(said["affine"], dtype=np.float64).reshape(3, 4), [0, 0, 0, 1]])
                difference = grid_difference(grid, Grid(grid.shape, affine))
            except (ValueError, TypeError, KeyError, GeometryError) as error:
                raise ReadError(
                    f"{case_id}: {path.name} has a damaged list of slice positions ({error}). Write the mask again."
                ) from error
            if difference:
                raise ReadError(
                    f"{case_id}: {path.name} has slice positions of another grid than its own ({difference}): a "
                    "program changed the image and kept them. Measure the mask as it was written, or the DICOM SEG."
                )
            return positions
        block = block[size:]
    return None


def _parse(path: Path, case_id: str) -> Any:
    """The header as nibabel's structure, unrepaired: its own checks silently set zero pixdim to 1 mm."""
    block = _read_head(path, case_id, max(HEADER_BYTES))
    for size, header_class in HEADER_BYTES.items():
        if size in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")) and len(block) >= size:
            header = header_class(block[:size], check=False)
            magic = bytes(header["magic"].item())[:3]
            if magic in SINGLE_MAGIC + PAIR_MAGIC:
                return header
            raise ReadError(
                f"{case_id}: {path.name} is ANALYZE 7.5 (no NIfTI magic), which does not say which side is left. "
                "Convert it again from DICOM."
            )
    raise ReadError(f"{case_id}: {path.name} is not a NIfTI file: it starts with {block[:8]!r}. Check the file.")


def _shape_3d(case_id: str, raw: Any) -> tuple[int, int, int]:
    n_dims = int(raw["dim"][0])
    dims = [int(n) for n in raw["dim"][1 : 1 + n_dims]] if 1 <= n_dims <= 7 else []
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) != 3 or min(dims) < 2:
        raise ReadError(
            f"{case_id}: header dimensions {[int(n) for n in raw['dim']]}, expected one 3D image of at least two "
            "slices. Split time points or join slices first."
        )
    if np.prod(dims, dtype=float) > MAX_VOXELS:
        raise ReadError(f"{case_id}: {dims} voxels, expected at most {MAX_VOXELS} in all. Check the file.")
    return dims[0], dims[1], dims[2]


def _dtype(case_id: str, raw: Any) -> np.dtype[Any]:
    try:
        dtype = raw.get_data_dtype()
    except (HeaderDataError, KeyError):  # nibabel means the first and raises the second
        dtype = np.dtype("V")
    if dtype.kind not in "iuf":
        raise ReadError(
            f"{case_id}: NIfTI datatype {int(raw['datatype'])} (colour, complex or unknown), expected one integer or "
            "real number a voxel. Export the CT itself, not a picture of it."
        )
    return dtype


def _scaling(case_id: str, raw: Any) -> tuple[float, float]:
    if np.isinf(raw["scl_slope"]):
        raise ReadError(f"{case_id}: scl_slope is {raw['scl_slope']}, expected a number. Convert the scan again.")
    try:
        slope, inter = raw.get_slope_inter()  # None for slope 0 or NaN, which the standard reads as unset
    except HeaderDataError as error:
        raise ReadError(f"{case_id}: {error} (scl_slope, scl_inter). Convert the scan again.") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _forms(raw: Any) -> NiftiForms:
    return NiftiForms(
        sform=_sform(raw),
        sform_code=int(raw["sform_code"]),
        qform=_qform(raw) if raw["qform_code"] > 0 and _pixdim_mm(raw).min() > 0 else None,
        qform_code=int(raw["qform_code"]),
        xyzt_units=int(raw["xyzt_units"]),
        pixdim=tuple(float(n) for n in raw["pixdim"]),
        qform_fields=tuple(float(raw[name]) for name in _QFORM_FIELDS),
        version=next(version for version, header in HEADERS.items() if header.sizeof_hdr == raw.sizeof_hdr),
    )


def _affine_mm(case_id: str, raw: Any, shape: tuple[int, int, int]) -> tuple[Affine, tuple[str, ...]]:
    """The affine that counts, in millimetres, and flags about those that do not."""
    unit = int(raw["xyzt_units"]) & 7
    if unit not in MM_PER_UNIT:
        raise ReadError(f"{case_id}: spatial unit code {unit} is no length, expected 0 to 3. Convert the scan again.")
    affine, flags = _choose_form(case_id, raw, shape)
    if MM_PER_UNIT[unit] != 1:
        affine = np.diag([MM_PER_UNIT[unit]] * 3 + [1.0]) @ affine
        flags += ("units_scaled",)
    return affine, flags


def _choose_form(case_id: str, raw: Any, shape: tuple[int, int, int]) -> tuple[Affine, tuple[str, ...]]:
    has_sform, has_qform = raw["sform_code"] > 0, raw["qform_code"] > 0
    if not has_sform and not has_qform:
        raise ReadError(
            f"{case_id}: sform and qform codes are both 0, so the file does not say which side is left. Convert it "
            "again from DICOM, or set a form code if you know its orientation."
        )
    pixdim = _pixdim_mm(raw)
    has_pixdim = bool(pixdim.min() > 0)
    if not has_sform:
        if not has_pixdim:
            raise ReadError(f"{case_id}: voxel size {pixdim.tolist()} in pixdim and no sform. Convert the scan again.")
        try:
            return _qform(raw), ()
        except (HeaderDataError, ValueError) as error:
            raise ReadError(f"{case_id}: qform cannot be used: {error}. Convert the scan again.") from error
    sform = _grid(case_id, shape, _sform(raw))
    same_volume = abs(sform.voxel_volume_mm3 / np.prod(pixdim) - 1) <= FORM_TOLERANCE if has_pixdim else False
    same_edges = has_pixdim and np.allclose(sform.edge_mm, pixdim, rtol=FORM_TOLERANCE, atol=0)
    if not has_qform or not has_pixdim:
        return sform.affine, () if same_volume or same_edges else ("pixdim_differs",)
    try:
        qform = _qform(raw)
    except (HeaderDataError, ValueError) as error:
        raise ReadError(f"{case_id}: qform cannot be used: {error}. Set its code to 0 or convert again.") from error
    if not same_volume and not same_edges:
        raise ReadError(
            f"{case_id}: voxel volume {sform.voxel_volume_mm3:.5g} mm3 by sform, {np.prod(pixdim):.5g} by qform, "
            f"expected one within {FORM_TOLERANCE:.0%}. Convert it again from DICOM, or set the code of the wrong "
            "form to 0."
        )
    if not same_volume and DCM2NIIX_DESCRIPTION.match(bytes(raw["descrip"].item())):
        raise ReadError(
            f"{case_id}: a tilted series written by dcm2niix, whose sform gives {sform.voxel_volume_mm3:.5g} mm3 a "
            f"voxel where the series has {np.prod(pixdim):.5g}. Give the DICOM folder instead."
        )
    return sform.affine, ("qform_differs",) if grid_difference(_grid(case_id, shape, qform), sform) else ()


def _sform(raw: Any) -> Affine:
    return np.vstack([raw[name].astype(np.float64) for name in _SFORM_ROWS] + [np.array([0.0, 0, 0, 1])])


def _qform(raw: Any) -> Affine:
    """Method 2 of the standard; pixdim[0] of 0 counts as 1 there."""
    header = raw.copy()
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1
    return header.get_qform()


def _pixdim_mm(raw: Any) -> NDArray[np.float64]:
    """Voxel size in the file's unit, NaN as 0: no size."""
    return np.nan_to_num(raw["pixdim"][1:4].astype(np.float64))


def _grid(
    case_id: str, shape: tuple[int, int, int], affine: Affine, slice_positions: list[float] | None = None
) -> Grid:
    try:
        return Grid(shape, affine, None if slice_positions is None else np.array(slice_positions))
    except GeometryError as error:
        raise GeometryError(f"{case_id}: {error}. Convert the scan again.") from error


def _image_of_pair(case_id: str, header_path: Path) -> Path:
    image_path = header_path.with_suffix(".IMG" if header_path.suffix == ".HDR" else ".img")
    if not image_path.is_file():
        raise ReadError(f"{case_id}: {header_path.name} has no {image_path.name} beside it. Copy both files.")
    return image_path


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _read_head(path: Path, case_id: str, n_bytes: int) -> bytes:
    """The first bytes of a file, decompressed; fewer if it has no more."""
    with path.open("rb") as stream:
        packed = stream.read(n_bytes + (1 << 16))  # a compressed head is little longer than the head at the most
    if packed[:2] != b"\x1f\x8b":
        return packed[:n_bytes]
    try:
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP).decompress(packed, n_bytes)
    except GZIP_ERROR as error:
        raise ReadError(f"{case_id}: {path.name} is a damaged gzip file ({error}). Copy it again.") from error


def _read_bounded(path: Path, case_id: str, expected: int) -> bytes:
    """The file's content, decompressed; at most one byte more than expected, so that excess shows."""
    if not _is_gzip(path):
        with path.open("rb") as stream:
            return stream.read(min(expected, path.stat().st_size) + 1)  # it takes the memory before it reads
    packed = path.read_bytes()
    if expected > MAX_DEFLATE_RATIO * len(packed):
        raise ReadError(
            f"{case_id}: {path.name} has {len(packed)} compressed bytes, too few for the {expected} that its header "
            "says. The file is cut off: copy it again."
        )
    parts: list[bytes] = []
    try:
        while packed.strip(b"\0"):  # a gzip file may have several members, and zeros after the last
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            parts.append(member.decompress(packed, expected + 1 - sum(map(len, parts))))
            if not member.eof:
                break
            packed = member.unused_data
        else:
            return b"".join(parts) if len(parts) != 1 else parts[0]
    except GZIP_ERROR as error:
        raise ReadError(f"{case_id}: {path.name} is a damaged gzip file ({error}). Copy it again.") from error
    unpacked = sum(map(len, parts))
    ended = "goes on" if unpacked > expected else "ends without its checksum"
    raise ReadError(
        f"{case_id}: {path.name} {ended} after {unpacked} bytes, its header says {expected}. The file is damaged or "
        "cut off: copy or convert it again."
    )
