"""A ZIP file of DICOM files as a private folder for as long as it is read.

Members are written under numbers of ours: their names are read for nothing but a suffix, so no name can lead out.
"""

import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ich_pipeline.dicom.headers import DICOM_SUFFIXES, is_dicom_start
from ich_pipeline.errors import ReadError

ZIP_SUFFIX = ".zip"
MAX_MEMBERS = 50_000  # a stroke study with perfusion has some thousands
MAX_UNPACKED_BYTES = 8 * 2**30
CHUNK = 2**20


def is_zip(path: Path) -> bool:
    """Whether a path is that of a ZIP file, by its suffix."""
    return path.suffix.lower() == ZIP_SUFFIX


@contextmanager
def as_folder(path: Path, case_id: str) -> Iterator[Path]:
    """Give a folder as it is, and the DICOM members of a ZIP file in a temporary folder that is removed afterwards.

    Folders, links, hidden names and members that are no DICOM are passed over, nested ZIP files too; where no member
    is DICOM the error counts those.

    Raises:
        ReadError: an encrypted or broken file, too many members, too much to unpack, or no DICOM in it.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ich-zip-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _unpack(archive, Path(folder), f"{case_id}: {path.name}")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError) as error:
            raise ReadError(
                f"{case_id}: {path.name} cannot be read as ZIP ({type(error).__name__}), expected a whole, unencrypted "
                "ZIP file. Copy or pack it again."
            ) from error
        yield Path(folder)


def _unpack(archive: zipfile.ZipFile, folder: Path, what: str) -> None:
    members = [member for member in archive.infolist() if _is_file(member)]
    _require_at_most(what, "members", len(archive.infolist()), MAX_MEMBERS)
    _require_at_most(what, "bytes unpacked", sum(member.file_size for member in members), MAX_UNPACKED_BYTES)
    if any(member.flag_bits & 1 for member in members):
        raise ReadError(f"{what} is encrypted, expected no password. Unpack it and give the folder.")
    left_bytes, n_dicom = MAX_UNPACKED_BYTES, 0
    for number, member in enumerate(members, start=1):
        suffix = Path(member.filename).suffix.lower()
        suffix = suffix if suffix in DICOM_SUFFIXES else ""
        with archive.open(member) as packed:
            start = packed.read(132)
            if not suffix and not is_dicom_start(start):
                continue
            with (folder / f"member_{number}{suffix}").open("xb") as unpacked:
                unpacked.write(start)
                left_bytes -= len(start) + _copy(packed, unpacked, left_bytes, what)
        n_dicom += 1
    if not n_dicom:
        nested = sum(is_zip(Path(member.filename)) for member in members)
        hint = f", {nested} of them ZIP files, which are not opened" if nested else ""
        raise ReadError(f"{what} holds no DICOM file in {len(members)} members{hint}. Give the ZIP of one study.")


def _is_file(member: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the ZIP was not packed on a POSIX system
    parts = re.split(r"[/\\]", member.filename)
    hidden = any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in parts)
    return not member.is_dir() and kind in (0, stat.S_IFREG) and not hidden


def _copy(packed: IO[bytes], unpacked: IO[bytes], left_bytes: int, what: str) -> int:
    """Copy a member and return its bytes; what it announced was checked, what it holds is counted again."""
    copied = 0
    while chunk := packed.read(CHUNK):
        copied += len(chunk)
        _require_at_most(what, "bytes unpacked", copied, left_bytes)
        unpacked.write(chunk)
    return copied


def _require_at_most(what: str, unit: str, found: int, limit: int) -> None:
    if found > limit:
        raise ReadError(f"{what} holds {found} {unit}, expected at most {limit}. Give the ZIP of one study.")
