"""Downloaded data sets as cases: one function for each folder layout, as its owners publish it.

docs/data.md says what each holds, under which licence, and what of its layout could not be confirmed. Nothing is
fetched.
"""

import ast
import csv
import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.labels import Subtype
from ich_pipeline.records import CaseRecord

if TYPE_CHECKING:
    from ich_pipeline.detection import Box  # imports numpy, which an index does without

NIFTI_SUFFIXES = (".nii.gz", ".nii")
# Columns of CT-ICH's table and names of BHX's boxes.
SUBTYPE_OF = {
    "Epidural": Subtype.EDH,
    "Intraparenchymal": Subtype.IPH,
    "Intraventricular": Subtype.IVH,
    "Subarachnoid": Subtype.SAH,
    "Subdural": Subtype.SDH,
}
# BHX marks chronic subdural hemorrhage apart.
BHX_SUBTYPE_OF = {**SUBTYPE_OF, "Chronic": Subtype.SDH}


def index_folder(root: Path | str, dataset: str) -> list[CaseRecord]:
    """Make records of a downloaded dataset.

    Args:
        root: the folder it was unpacked to.
        dataset: a name in LAYOUTS.

    Raises:
        ConfigError: an unknown layout; the nearest names are given.
        ManifestError: a folder that is not laid out so, a label without an image, or no image at all.
    """
    if dataset not in LAYOUTS:
        near = difflib.get_close_matches(dataset, LAYOUTS, n=2, cutoff=0.3) or list(LAYOUTS)
        raise ConfigError(f"no dataset layout {dataset!r}; did you mean {' or '.join(map(repr, near))}?")
    root = Path(root).resolve()
    records = LAYOUTS[dataset](root)
    if not records:
        raise ManifestError(f"{root}: no scan found in layout {dataset!r}. Check the folder.")
    return records


def boxes_of_bhx(table: Path | str, records: Sequence[CaseRecord]) -> "list[Box]":
    """BHX's boxes of the CQ500 series that are there, in the form of docs/measurement.md.

    Args:
        table: one of BHX's three, such as `1_Initial_Manual_Labeling.csv`.
        records: of `index_folder(root, "cq500")`.

    Raises:
        ManifestError: not such a table, or none of its boxes lies in a slice of these series.
        ReadError: a series with boxes cannot be read.
    """
    from ich_pipeline.detection import Box
    from ich_pipeline.dicom.stack import find_slices

    rows_of: dict[str, list[tuple[str, Subtype, tuple[float, float, float, float]]]] = defaultdict(list)
    for series_uid, slice_uid, subtype, corners in _bhx_rows(Path(table)):
        rows_of[series_uid].append((slice_uid, subtype, corners))
    boxes = []
    for record in records:
        rows = rows_of.get(_series_uid(record.image))
        if not rows:
            continue
        slices = find_slices(record.image, record.case_id).images
        index_of = {str(image.header.SOPInstanceUID): k for k, image in enumerate(slices)}
        held = [row for row in rows if row[0] in index_of]
        boxes += [Box(record.case_id, index_of[uid], subtype.name, *corners) for uid, subtype, corners in held]
    if not boxes:
        raise ManifestError(
            f"{table}: none of its {sum(map(len, rows_of.values()))} boxes lies in a slice of the {len(records)} "
            "series, expected boxes of these. Check that data set and table belong together."
        )
    return boxes


def _bhx_rows(table: Path) -> Iterator[tuple[str, str, Subtype, tuple[float, float, float, float]]]:
    """Series, slice, subtype and corners of every row: i counts columns and j rows, as a series is read."""
    for number, row in _table(table, ("SOPInstanceUID", "SeriesInstanceUID", "data", "labelName")):
        try:
            place = ast.literal_eval(row["data"])  # {'x': 1, 'y': 2, 'width': 3, 'height': 4}
            x, y, width, height = (float(place[key]) for key in ("x", "y", "width", "height"))
            subtype = BHX_SUBTYPE_OF[row["labelName"]]
        except (ValueError, SyntaxError, TypeError, KeyError) as error:
            raise ManifestError(
                f"{table.name} row {number}: {row['labelName']!r}, {row['data']!r}, expected one of "
                f"{', '.join(BHX_SUBTYPE_OF)} and x, y, width and height ({error}). Fetch the table again."
            ) from error
        yield row["SeriesInstanceUID"], row["SOPInstanceUID"], subtype, (x, y, x + width, y + height)


def _series_uid(folder: Path) -> str:
    import pydicom

    first = next(path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".dcm")
    return str(pydicom.dcmread(first, specific_tags=["SeriesInstanceUID"], stop_before_pixels=True).SeriesInstanceUID)


def _table(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their lines, which has these columns among others."""
    if not path.is_file():
        raise ManifestError(f"{path}: no such table. Complete the download.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise ManifestError(f"{path.name}: no column {', '.join(sorted(missing))}. Check that this is the table.")
        return [(reader.line_num, {name: (row[name] or "").strip() for name in columns}) for row in reader]


def _nifti_by_stem(folder: Path) -> dict[str, Path]:
    """NIfTI files directly in a folder by name without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        suffix = next((s for s in NIFTI_SUFFIXES if path.name.endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        stem = path.name.removesuffix(suffix)
        if stem in found:
            raise ManifestError(f"{folder}: both {found[stem].name} and {path.name}, expected one. Remove one.")
        found[stem] = path
    return found


def _paired(images: Mapping[str, Path], labels: Mapping[str, Path], split: str, where: Path) -> list[CaseRecord]:
    lonely = sorted(set(labels) - set(images))
    if lonely:
        raise ManifestError(f"{where}: {len(lonely)} labels have no image, such as {lonely[0]}. Complete the download.")
    return [CaseRecord(case, image, labels.get(case), case, split) for case, image in images.items()]


def _index_folders(root: Path) -> list[CaseRecord]:
    """`images/` and `labels/` or `masks/` with the same file names; an image may have no label."""
    label_folders = [root / name for name in ("labels", "masks") if (root / name).is_dir()]
    if not (root / "images").is_dir() or len(label_folders) > 1:
        raise ManifestError(f"{root}: expected a folder images and one of labels or masks. Check the folder.")
    labels = _nifti_by_stem(label_folders[0]) if label_folders else {}
    return _paired(_nifti_by_stem(root / "images"), labels, "", root)


def _index_nnunet(root: Path) -> list[CaseRecord]:
    """nnU-Net v2 raw data: imagesTr and labelsTr (split train), imagesTs and, where given, labelsTs (split test)."""
    records: list[CaseRecord] = []
    for part, split in (("Tr", "train"), ("Ts", "test")):
        images: dict[str, Path] = {}
        for stem, path in _nifti_by_stem(root / f"images{part}").items():
            case, separator, channel = stem.rpartition("_")
            if not separator or channel != "0000":
                raise ManifestError(f"{path}: expected CASE_0000 and no other channel. Keep the CT channel only.")
            images[case] = path
        records += _paired(images, _nifti_by_stem(root / f"labels{part}"), split, root)
    without = [record.case_id for record in records if record.split == "train" and record.label is None]
    if without:
        raise ManifestError(f"{root}: {len(without)} training images have no label, such as {without[0]}.")
    return records


def _index_instance22(root: Path) -> list[CaseRecord]:
    """INSTANCE 2022: train_2 (or train) with data and label, split train; evaluation without labels, split test."""
    train = next((root / name for name in ("train_2", "train") if (root / name).is_dir()), root)
    if not (train / "data").is_dir() or not (train / "label").is_dir():
        raise ManifestError(f"{root}: expected train_2/data and train_2/label. Check the folder.")
    records = _paired(_nifti_by_stem(train / "data"), _nifti_by_stem(train / "label"), "train", train)
    # The same numbers begin again there.
    held_out = _nifti_by_stem(root / "evaluation")
    return _labelled(records, train) + _paired(
        {f"evaluation_{name}": path for name, path in held_out.items()}, {}, "test", root
    )


def _index_bhsd(root: Path) -> list[CaseRecord]:
    """BHSD: label_192 with images and 'ground truths'; split by the owners' dataset.json where it lies in the root."""
    folder = root / "label_192" if (root / "label_192").is_dir() else root
    if not (folder / "images").is_dir() or not (folder / "ground truths").is_dir():
        raise ManifestError(f"{root}: expected label_192/images and label_192/ground truths. Check the folder.")
    records = _labelled(
        _paired(_nifti_by_stem(folder / "images"), _nifti_by_stem(folder / "ground truths"), "", folder), folder
    )
    listed = root / "dataset.json"
    split_of: dict[str, str] = {}
    if listed.is_file():
        content = json.loads(listed.read_text())
        split_of |= {Path(item["image"]).name: "train" for item in content["training"]}
        split_of |= {Path(name).name: "test" for name in content["test"]}
        without = sorted(record.image.name for record in records if record.image.name not in split_of)
        if without:
            raise ManifestError(
                f"{listed}: {len(without)} images are not listed, such as {without[0]}, expected a split for each. "
                "Remove dataset.json to split at random."
            )
    return [
        # ID_<patient>_ID_<study>: a few patients have two studies.
        CaseRecord(
            record.case_id, record.image, record.label, record.case_id.rpartition("_ID_")[0] or record.case_id, split
        )
        for record in records
        for split in [split_of.get(record.image.name, "")]
    ]


def _index_ct_ich(root: Path) -> list[CaseRecord]:
    """CT-ICH 1.3.1: ct_scans and masks with the same numbers, and a table with the subtypes of every slice."""
    if (root / "Patients_CT").is_dir() and not (root / "ct_scans").is_dir():
        raise ManifestError(
            f"{root}: Patients_CT holds JPEG pictures of two windows (an older version), expected ct_scans in "
            "Hounsfield units. Get version 1.3.1."
        )
    records = _labelled(_paired(_nifti_by_stem(root / "ct_scans"), _nifti_by_stem(root / "masks"), "", root), root)
    if not records:
        return []
    held: dict[int, set[Subtype]] = defaultdict(set)
    for _, row in _table(root / "hemorrhage_diagnosis_raw_ct.csv", ("PatientNumber", *SUBTYPE_OF)):
        if row["PatientNumber"]:
            patient = int(float(row["PatientNumber"]))
            held[patient] |= {subtype for name, subtype in SUBTYPE_OF.items() if row[name] in ("1", "1.0")}
    unknown = sorted(record.case_id for record in records if int(record.case_id) not in held)
    if unknown:
        raise ManifestError(
            f"{root}: hemorrhage_diagnosis_raw_ct.csv has no row for scan {unknown[0]}. Complete the download."
        )
    return [
        CaseRecord(
            record.case_id,
            record.image,
            record.label,
            record.case_id,
            extra={"subtype": "+".join(s.name for s in sorted(held[int(record.case_id)])) or "none"},
        )
        for record in records
    ]


def _index_hemseg(root: Path) -> list[CaseRecord]:
    """HemSeg-500: train, val and, where given, test, each with label, and image, converted from RSNA's files."""
    records: list[CaseRecord] = []
    for split in ("train", "val", "test"):
        folder = root / split
        if folder.is_dir():
            records += _labelled(
                _paired(_nifti_by_stem(folder / "image"), _nifti_by_stem(folder / "label"), split, folder), folder
            )
    return records


def _index_cq500(root: Path) -> list[CaseRecord]:
    """CQ500: every folder with .dcm files below 'CQ500CT0 CQ500CT0/Unknown Study' is a case; no masks."""
    records: list[CaseRecord] = []
    seen: Counter[str] = Counter()
    for folder in sorted({path.parent for path in root.rglob("*.dcm")}):
        numbers = re.findall(r"CQ500-?CT-?(\d+)", str(folder.relative_to(root)))
        if not numbers:
            raise ManifestError(
                f"{folder}: DICOM files outside a folder of one patient, expected 'CQ500CT0 CQ500CT0/...'. Give the "
                "folder that holds those of the patients."
            )
        patient = f"CQ500CT{numbers[-1]}"
        case_id = f"{patient}_{re.sub(r'[^A-Za-z0-9.]+', '-', folder.name).strip('-.')}"
        seen[case_id] += 1
        unique = case_id if seen[case_id] == 1 else f"{case_id}_{seen[case_id]}"
        records.append(CaseRecord(unique, folder, None, patient))
    return records


def _labelled(records: list[CaseRecord], where: Path) -> list[CaseRecord]:
    """The same records, of which each has a label."""
    without = [record.case_id for record in records if record.label is None]
    if without:
        raise ManifestError(
            f"{where}: {len(without)} images have no label, such as {without[0]}. Complete the download."
        )
    return records


LAYOUTS: dict[str, Callable[[Path], list[CaseRecord]]] = {
    "folders": _index_folders,
    "nnunet": _index_nnunet,
    "instance22": _index_instance22,
    "bhsd": _index_bhsd,
    "ct-ich": _index_ct_ich,
    "hemseg": _index_hemseg,
    "cq500": _index_cq500,
}
"""A public dataset with a layout of its own is one more function here."""
