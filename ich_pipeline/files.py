"""Writing files whole or not at all, and hashing what was read."""

import csv
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ich_pipeline.errors import ReadError

# Results of a DICOM scan, beside its mask: `<case_id>.seg.dcm`, `<case_id>.sr.dcm`.
SEG_SUFFIX, SR_SUFFIX = ".seg.dcm", ".sr.dcm"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a hidden temporary name beside `path` and rename it to `path` when the block succeeds.

    The suffix is kept, so that libraries which choose a format by suffix may write to it. Parent folders are made.
    On any failure, an interrupt too, the temporary file is removed and `path` is as it was.

    Raises:
        FileNotFoundError: the block wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `atomic_path` in a folder whose process was killed before it could remove them."""
    import psutil  # a light command never comes here

    for path in folder.glob(".*-*-*"):
        owner = re.fullmatch(r"\.(\d+)-[0-9a-f]{12}-.+", path.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            path.unlink(missing_ok=True)


def files_under(root: Path, what: str) -> Iterator[tuple[Path, list[Path]]]:
    """Folders from `root` down and the files in each, sorted; hidden names are passed over, folders that are links too.

    A link to a folder inside `root` is not followed: what it leads to comes up under its own name.

    Args:
        root: a folder.
        what: whose folder it is, for the error.

    Raises:
        ReadError: a link leads out of `root`.
        OSError: a folder cannot be listed.
    """
    inside = os.path.realpath(root)
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        for path in (Path(folder, name) for name in (*subfolders, *names)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ReadError(
                    f"{what}: {path.relative_to(root)} is a link that leads out of {root.name}, expected files inside "
                    "it. Copy them there, or give the folder that they are in."
                )
        yield Path(folder), [path for path in (Path(folder, name) for name in names) if path.is_file()]


def _raise(error: OSError) -> None:
    raise error


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file, or for a folder of the sorted hashes of all files in it, whatever they are called."""
    path = Path(path)
    if path.is_dir():
        hashes = sorted(sha256_of(file) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Paths become strings and numpy numbers become numbers.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot say: use null for a number that does not exist.
        TypeError: `value` holds something that has no JSON form.
    """
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=_jsonable)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv_rows(path: Path | str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows under `columns` as CSV, whole or not at all. None and a missing key give an empty cell.

    Raises:
        ValueError: a row has a key that is not a column.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _jsonable(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
