"""A bundle on real heads: what it calls blood where there is none, and how it finds real bleeds put into them.

    python benchmarks/real_heads.py --out DIR --data FOLDER [--bundle NAME] [--masks 85]

FOLDER holds vhm_head/vhm_head_crop.nii.gz (Visible Human, NLM), ge_head_dicom/ (dcm_qa_ct) and
hemorrhage_masks/masks.zip (HemSeg-500, its validation masks are used). Semi-real cases: a mask of one patient is
registered to one of the two heads (phantom/transplant.py) and painted with blood, edema, partial volume and the head's
own noise; of the GE head, whose slices are of two spacings, the upper part of 7 mm. Writes DIR/real_heads.md, and
pictures of the worst cases beside the tables of each head. Without --bundle: the weights that ship.
"""

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ich_pipeline import commands
from ich_pipeline.errors import IchError
from ich_pipeline.evaluation import MODEL, TADA, Evaluation, compare, draw_with_labels, labelled_cases
from ich_pipeline.files import write_csv_rows
from ich_pipeline.geometry import Grid
from ich_pipeline.phantom.cases import scanner_forms
from ich_pipeline.phantom.dataset import write_image
from ich_pipeline.phantom.transplant import transplant
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord, NativeMask, Scan
from ich_pipeline.report import aggregates_markdown, interval, read_rows, write_text
from ich_pipeline.restoring import write_mask
from ich_pipeline.run_report import machine, versions
from ich_pipeline.settings import DEFAULT_BUNDLE, Settings

COLUMNS = ("case_id", "patient_id", "image", "label", "split", "volume_ml", "shift_mm", "turn_deg", "cut_share")
LARGE_ML = 1.0
WORST = 6


def even_part(scan: Scan) -> Scan:
    """The longest run of slices at one distance."""
    if scan.grid.slice_positions is None:
        return scan
    grid, axis = scan.grid, scan.grid.slice_axis
    steps = np.diff(grid.slice_positions)
    starts = [0, *(np.flatnonzero(np.abs(np.diff(steps)) > 0.01) + 1), len(steps)]
    runs = list(pairwise(starts))
    first, last = runs[int(np.argmax([grid.slice_positions[b] - grid.slice_positions[a] for a, b in runs]))]
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, axis] * grid.slice_positions[first]
    affine[:3, axis] *= steps[first]
    image_hu = np.take(scan.image_hu, range(first, last + 1), axis=axis)
    even = Grid((int(image_hu.shape[0]), int(image_hu.shape[1]), int(image_hu.shape[2])), affine)
    return replace(scan, image_hu=image_hu, grid=even, forms=scanner_forms(even), flags=())


def read_masks(archive: Path, count: int) -> dict[str, NativeMask]:
    """Validation masks by name."""
    found = {}
    with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory() as folder:
        names = sorted(name for name in content.namelist() if "val/label" in name and name.endswith(".nii.gz"))
        for name in names[:count]:
            found[Path(name).name.removesuffix(".nii.gz")] = read_mask(Path(content.extract(name, folder)))[0]
    return found


def semi_real(head: Scan, masks: dict[str, NativeMask], out: Path) -> tuple[Path, list[str]]:
    """The manifest of a head with every mask put into it, made once, and why masks were left out."""
    manifest, reasons = out / "manifest.csv", out / "left_out.txt"
    if not manifest.is_file():
        rows, left_out = [], []
        for number, (name, mask) in enumerate(tqdm(masks.items(), desc=out.name, unit="case", file=sys.stderr)):
            try:
                case, placed = transplant(name, mask, head, seed=number)
            except IchError as error:
                left_out.append(str(error))
                continue
            label = (case.label > 0).astype(np.uint8)
            write_image(out / "images" / f"{name}.nii.gz", case.scan)
            write_mask(out / "labels" / f"{name}.nii.gz", label, case.scan.grid, case.scan.forms)
            ml = case.scan.grid.foreground_ml(label)
            paths = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
            rows.append(
                {"case_id": name, "patient_id": name, "split": "test", "volume_ml": f"{ml:.5f}"} | paths | vars(placed)
            )
        write_text(reasons, "".join(f"{line}\n" for line in left_out))
        write_csv_rows(manifest, rows, COLUMNS)
    return manifest, reasons.read_text().splitlines()


def evaluated(bundle: str, manifest: Path, out: Path) -> tuple[Evaluation, list[CaseRecord]]:
    """Scores of the cases of `LARGE_ML` or more, and those cases; the worst are drawn with their label."""
    words = [f"bundle={bundle}", f"data={manifest}", f"out={out}", "html=false", "tracking=false"]
    commands.evaluate(Settings.of(words))
    cases = [c for c in labelled_cases(manifest, "test") if float(c.extra["volume_ml"]) >= LARGE_ML]
    found = compare(cases, out / "volumes.csv")
    by_id = {case.case_id: case for case in cases}
    worst = sorted(found.rows, key=lambda row: row.dice)[:WORST]
    draw_with_labels([by_id[row.case_id] for row in worst], out / "volumes.csv", out / "worst")
    return found, cases


def false_alarms(bundle: str, scans: Sequence[Path], out: Path) -> list[str]:
    """A row a clean head."""
    words = [f"bundle={bundle}", "html=false"]
    commands.segment(scans, out / "masks", out / "volumes.csv", Settings.of(words))
    rows = read_rows(out / "volumes.csv")
    lines = ["| clean head | called hemorrhage (mL) | lesions |", "|---|--:|--:|"]
    for row in rows:
        report = row.report
        lines.append(
            f"| {row.case_id} | {report.volume_ml:.2f} | {report.n_lesions} |"
            if report
            else f"| {row.case_id} | {row.error} | |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--masks", type=int, default=85)
    given = parser.parse_args()
    heads = {"Visible Human": given.data / "vhm_head" / "vhm_head_crop.nii.gz", "GE": given.data / "ge_head_dicom"}
    lines = false_alarms(given.bundle, list(heads.values()), given.out / "clean")
    masks = read_masks(given.data / "hemorrhage_masks" / "masks.zip", given.masks)
    table = [
        "| head | cases | Dice | NSD | volume MAE (mL) | Tada's (mL) | missed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    recalls: list[str] = []
    for name, path in heads.items():
        folder = given.out / name.lower().replace(" ", "_")
        manifest, left_out = semi_real(even_part(read_scan(path)), masks, folder / "cases")
        found, cases = evaluated(given.bundle, manifest, folder / "evaluation")
        errors = {way: interval(found.volumes[way].statistics["mae_ml"]) for way in (MODEL, TADA)}
        scores = [interval(found.summary[score].mean) for score in ("dice", "nsd")]
        missed = f"{found.summary['dice'].missed} of {found.summary['dice'].n}"
        table.append(f"| {name} | {len(cases)} | {' | '.join(scores)} | {errors[MODEL]} | {errors[TADA]} | {missed} |")
        recall = [each for each in found.summary.aggregates if each.name.startswith("lesion_recall")]
        recalls += [
            "",
            f"{name}: lesions found, of the same cases; {len(left_out)} masks were left out.",
            "",
            aggregates_markdown(recall),
        ]
    about = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "monai"))
    heading = (
        f"Bundle {given.bundle}, {machine()['cores']} cores, {about}, {datetime.now(UTC):%Y-%m-%d}. Semi-real: real "
        f"shapes in real heads, painted; bleeds of {LARGE_ML:g} mL or more. Brackets: 95 % bootstrap interval."
    )
    text = "\n".join([heading, "", *lines, "", *table, *recalls]) + "\n"
    write_text(given.out / "real_heads.md", text)
    print(text)


if __name__ == "__main__":
    main()
