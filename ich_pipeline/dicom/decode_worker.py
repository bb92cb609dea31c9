"""The pixels of one DICOM file as an array; run as a module, a process that does so on request.

Codecs for compressed pixels are C and C++ libraries that may end the process on a broken stream (python-gdcm aborts on
broken JPEG 2000), so they run here and nowhere else.
"""

import json
import resource
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import encaps
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

MAX_MEMORY_BYTES = 6 * 2**30
JPEG_FAMILY = "1.2.840.10008.1.2.4."
END_OF_IMAGE = b"\xff\xd9"  # in every codec of the family: JPEG, JPEG-LS, JPEG 2000


def stored_pixels(path: str) -> NDArray[np.integer]:
    """(frames, rows, columns) stored values of one file.

    Raises:
        ValueError: pixels are missing, or not as many bytes as the header says, or a stream is cut off.
        Exception: what pydicom and its codecs raise.
    """
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise ValueError("there is no PixelData; the file may be cut off")
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = _implied_syntax(dataset)
    frames = int(dataset.get("NumberOfFrames") or 1)
    syntax = dataset.file_meta.TransferSyntaxUID
    if is_native(syntax):
        expected = frames * dataset.Rows * dataset.Columns * (dataset.BitsAllocated // 8)
        found = len(dataset.PixelData)
        if dataset["PixelData"].is_undefined_length or found not in (expected, expected + expected % 2):
            raise ValueError(f"PixelData has {found} bytes, expected {expected}")
    elif syntax.startswith(JPEG_FAMILY):
        _require_whole_streams(dataset.PixelData, frames)
    return np.asarray(dataset.pixel_array).reshape(frames, dataset.Rows, dataset.Columns)


def is_native(syntax: str) -> bool:
    """Whether pixels in this transfer syntax are plain numbers, which need no codec; so are those of no syntax."""
    return syntax in ("", *NATIVE)


NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, "1.2.840.10008.1.2.1.99")


def _implied_syntax(dataset: Any) -> str:
    """Of a file without file meta information, as pydicom found it; pydicom 2 and 3 say it by other names."""
    if hasattr(dataset, "original_encoding"):
        implicit, little = dataset.original_encoding
    else:
        implicit, little = dataset.is_implicit_VR, dataset.is_little_endian
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _require_whole_streams(pixel_data: bytes, n_frames: int) -> None:
    """Refuse streams that do not end: codecs fill what is missing without a word."""
    if hasattr(encaps, "generate_frames"):  # pydicom 3
        streams = list(encaps.generate_frames(pixel_data, number_of_frames=n_frames))
    else:
        streams = list(encaps.generate_pixel_data_frame(pixel_data, n_frames))
    cut = sum(not stream.rstrip(b"\0").endswith(END_OF_IMAGE) for stream in streams)
    if cut or len(streams) != n_frames:
        raise ValueError(f"{len(streams)} streams of {n_frames} frames, {cut} without their end")


def serve(connection: Connection) -> None:
    """Answer paths with arrays, or with why not, until the other end is closed."""
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            path = connection.recv_bytes().decode()
        except EOFError:
            return
        try:
            pixels = np.ascontiguousarray(stored_pixels(path))
        except Exception as error:  # whatever a codec raises is a property of the file
            connection.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            continue
        connection.send_bytes(json.dumps({"dtype": pixels.dtype.str, "shape": pixels.shape}).encode())
        connection.send_bytes(pixels.data.cast("B"))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
