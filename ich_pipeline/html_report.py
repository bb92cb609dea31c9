"""One HTML file for a batch: its table, every case's numbers and picture, plots, and how it ran.

The file holds all it shows and asks for nothing: no script, style, font or picture comes from elsewhere, and its
Content-Security-Policy forbids the browser to fetch any. Whatever comes from files is escaped by the template.
"""

import base64
import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ich_pipeline.agreement import volume_agreement
from ich_pipeline.files import atomic_path
from ich_pipeline.pictures import volume_scatter
from ich_pipeline.privacy import Privacy
from ich_pipeline.report import HTML_NAME, CaseRow, case_values, measures, read_rows

log = logging.getLogger(__name__)

# JPEG with full colour resolution: at the usual half of it a red outline one pixel wide bleeds into the lesion.
QUALITIES = (60, 45, 30)
MAX_PICTURE_BYTES = 120_000

FLAG_WORDS = {
    "contrast_agent": "The series names a contrast agent: enhanced vessels may be taken for blood.",
    "contrast_suspected": "Something long inside the skull is as bright as contrast medium.",
    "duplicate_slices": "The series held slices twice; each was taken once.",
    "gantry_tilt": "The gantry was tilted by more than 0.5 degrees; volumes allow for it.",
    "lossy_compression": "The pixels were compressed with losses before they came.",
    "metal_suspected": "Something is as dense as metal: streaks may hide blood or look like it.",
    "motion_suspected": "The skull jumps from one slice to the next: the head may have moved.",
    "nan_outside_head": "Voxels without a value, away from the head, were read as air.",
    "no_boxes": "There is no box in any slice, so nothing was segmented.",
    "no_detector": "All of a certain density was called blood: a test of the path, no search for hemorrhage.",
    "no_dicom_results": "The series' headers do not allow a DICOM SEG and SR; there is none.",
    "padding": "Values below -1024 HU, outside the scanner's field, were read as -1024.",
    "phantom_weights": "The network was trained on synthetic phantoms: its outlines say nothing about patients.",
    "pixdim_differs": "The header's voxel size is not that of its affine; the affine counts.",
    "qform_differs": "The header's two transforms differ; the sform counts.",
    "secondary_image": "The series was derived from another one.",
    "sharp_kernel": "The only series was reconstructed with a kernel for bone or lung, which adds noise.",
    "small_lesions_removed": "Lesions below min_lesion_ml were found and are in neither mask nor volume.",
    "split_by_acquisition": "The series held several acquisitions; the one without contrast agent was taken.",
    "strong_resampling": "The network saw voxels more than three times as long or as short as those of the scan.",
    "touches_border": "The mask reaches the edge of the scan: the bleed may go on outside.",
    "uneven_slices": "Slices lie unevenly; each counts for half the way to its neighbours.",
    "unsure_lesions_removed": "Lesions less sure than min_lesion_peak were found and are in neither mask nor volume.",
    "untrained_slice_spacing": "The slices are thinner or thicker than those that the network was trained on.",
    "units_scaled": "The header was not in millimetres, and was converted.",
}


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: column of volumes.csv or evaluation.csv.
        words: the tooltip.
        high: for a range, the column of its upper end.
    """

    name: str
    heading: str
    decimals: int
    words: str
    high: str = ""

    def text(self, values: Mapping[str, Any]) -> str:
        """The cell of one case; empty where it has no such number."""
        value = values.get(self.name)
        if value is None:
            return ""
        high = values.get(self.high)
        return f"{value:.{self.decimals}f}" + ("" if high is None else f"–{high:.{self.decimals}f}")


COLUMNS = (
    Column("volume_ml", "volume mL", 2, "voxels of the mask times the volume of a voxel"),
    Column("volume_low_ml", "band mL", 1, "lowest and highest volume of the same bleed", high="volume_high_ml"),
    Column("abc2_ml", "ABC/2", 1, "A B C / 2 of the whole mask, mL"),
    Column("abc2_kothari_ml", "Kothari", 1, "A B C / 2 with area-weighted C, mL"),
    Column("tada_ml", "Tada", 1, "pi/6 A B C, mL"),
    Column("n_lesions", "lesions", 0, "26-connected parts of the mask"),
    Column("largest_lesion_ml", "largest mL", 2, "volume of the largest lesion"),
    Column("dice", "Dice", 3, "overlap with the label: 1 is the same, 0 is none"),
    Column("error_ml", "error mL", 2, "volume less the label's volume"),
    Column("seconds", "s", 2, "seconds of work on this case"),
)


@dataclass(frozen=True)
class _Case:
    """What the page shows of one case: `values` by column of the table, `groups` of label and text for its panel."""

    row: CaseRow
    values: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, str]]
    lesions: Sequence[Mapping[str, str]]


def write_html(table: Path | str, out: Path | None = None) -> Path:
    """Write the report of a batch from what lies beside its table, whole or not at all.

    Pictures are those of `pictures/`, for rows that a bundle segmented; scores and plots of an evaluation are shown
    when it scored the masks of this table. What is missing is left out.

    Args:
        table: `volumes.csv`, with `lesions.csv` beside it.
        out: default is `report.html` beside the table.

    Raises:
        ManifestError: the table cannot be read.
    """
    table = Path(table)
    folder, out = table.parent, out or table.with_name(HTML_NAME)
    rows = read_rows(table)
    scores = _read_scores(folder / "evaluation.csv", rows)
    run = _read_json(folder / "run.json")
    seconds = {case["case_id"]: case.get("seconds", {}) for case in run.get("cases", [])}
    cases = [_case(row, folder, scores.get(row.case_id, {}), seconds.get(row.case_id, {})) for row in rows]
    flags = Counter(flag for row in rows for flag in row.flags)
    template = _environment().from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    with ThreadPoolExecutor() as pool, atomic_path(out) as temporary:
        page = template.stream(
            table_name=table.name,
            counts=_counts(rows),
            columns=[each for each in COLUMNS if any(each.text(case.values) for case in cases)],
            cases=cases,
            panels=zip(cases, pool.map(_picture, (_picture_file(row, folder) for row in rows)), strict=True),
            flags={flag: (n, FLAG_WORDS.get(flag, "")) for flag, n in sorted(flags.items())},
            flag_words=FLAG_WORDS,
            plots=dict(_plots(folder, rows, scores)),
            evaluation=_read_text(folder / "evaluation.md") if scores else "",
            bundle=run.get("bundle") or {},
            run=_run_groups(run),
            # Absolute paths are withheld here; run.json has them.
            command=" ".join(["ich-pipeline", *map(_command_word, run.get("command", [])[1:])]),
            config=json.dumps(Privacy().config(run["config"]), indent=2) if run.get("config") else "",
        )
        page.dump(str(temporary), encoding="utf-8")
    return out


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(_read_text(file) or "{}")


def _read_scores(file: Path, rows: Sequence[CaseRow]) -> dict[str, dict[str, Any]]:
    """Scores by case; none when they are of other masks, as after another run into the folder of an evaluation."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        scores = {cells.pop("case_id"): _score(cells) for cells in csv.DictReader(stream)}
    volumes_ml = {row.case_id: row.report.volume_ml for row in rows if row.report}
    for case_id, score in scores.items():
        if not math.isclose(volumes_ml.get(case_id, math.nan), score["pred_ml"], rel_tol=1e-4, abs_tol=1e-3):
            log.warning("%s: %s scores another mask of this case; scores and plots are left out", case_id, file.name)
            return {}
    return scores


def _score(cells: Mapping[str, str]) -> dict[str, Any]:
    """One line of evaluation.csv, but for the patient's id."""
    return {name: _number(cell) for name, cell in cells.items() if name != "patient_id"}


def _number(cell: str) -> Any:
    try:
        return float(cell) if "." in cell else int(cell)
    except ValueError:
        return cell or None


def _counts(rows: Sequence[CaseRow]) -> dict[str, str]:
    """The line of numbers at the top."""
    by_status = Counter(row.status for row in rows)
    reports = [row.report for row in rows if row.report]
    counts = {"cases": str(len(rows)), "ok": str(by_status["ok"]), "failed": str(by_status["failed"])}
    if by_status["skipped"]:
        counts["skipped"] = str(by_status["skipped"])
    counts["with hemorrhage outlined"] = str(sum(report.volume_ml > 0 for report in reports))
    if held := sum(report.band_holds_30 for report in reports):
        counts["with 30 mL in their band"] = str(held)
    counts["mL in total"] = f"{sum(report.volume_ml for report in reports):.1f}"
    return counts


def _case(row: CaseRow, folder: Path, scores: Mapping[str, Any], seconds: Mapping[str, float]) -> _Case:
    values = case_values(row, folder)
    about = ("image", "mask", "bundle", "weights_sha256", *row.extra)
    shown = {"case_id", "status", "error", "flags", "seconds", *about}
    groups = {
        "Measured": {_label(name): _text(value) for name, value in values.items() if name not in shown},
        "Against the label": {_label(name): _text(value) for name, value in scores.items()},
        "Seconds": {name: f"{value:.2f}" for name, value in seconds.items()},
        "From": {_label(name): values[name] for name in about},
    }
    filled = {title: {label: text for label, text in group.items() if text} for title, group in groups.items()}
    lesions = [
        {_label(name): _text(value, 2) for name, value in measures(lesion).items() if value is not None}
        for lesion in (row.report.lesions if row.report else ())
    ]
    return _Case(row, {**values, **scores}, filled, lesions)


_UNITS = {"ml": "mL", "mm": "mm", "mm3": "mm³", "deg": "degrees", "gib": "GiB", "mib": "MiB"}
_NAMES = {"abc2": "ABC/2", "kothari": "Kothari", "tada": "Tada", "n": "number of", "dice": "Dice", "iou": "IoU"}
_NAMES |= {"hd95": "HD95", "nsd": "NSD", "f1": "F1", "pred": "predicted", "sha256": "SHA-256", "rss": "RSS"}
_NAMES |= {name: name.upper() for name in ("a", "b", "c", "r", "s", "edh", "iph", "ivh", "sah", "sdh")}


def _label(name: str) -> str:
    """A column's name in words: `abc2_kothari_ml` becomes `ABC/2 Kothari, mL`."""
    *words, last = name.split("_")
    unit = f", {_UNITS[last]}" if words and last in _UNITS else ""
    return " ".join(_NAMES.get(word, word) for word in ([*words] if unit else [*words, last])) + unit


def _text(value: Any, decimals: int = 3) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def _run_groups(run: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What run.json says, but for command, config, inputs and cases."""
    if not run:
        return {}
    stages = {name: f"{stage['seconds']:.2f} ({stage['count']})" for name, stage in run.get("stages", {}).items()}
    groups = {
        "Times": {name: run.get(name) for name in ("exit_status", "started", "ended", "seconds")},
        "Bundle": run.get("bundle") or {},
        "Seconds by stage (times)": stages,
        "Machine": {**run.get("machine", {}), "process_peak_rss_mib": run.get("process_peak_rss_mib")},
        "Seeds": run.get("seeds", {}),
        "Versions": run.get("versions", {}),
    }
    return {
        title: {_label(name): ", ".join(value) if isinstance(value, list) else str(value) for name, value in known}
        for title, group in groups.items()
        if (known := [(name, value) for name, value in group.items() if value not in (None, [])])
    }


def _command_word(word: str) -> str:
    """`bundle=/a/path` keeps its key."""
    key = "".join(re.findall(r"^[\w.-]+=", word))
    return key + Privacy().config(word[len(key) :])


def _picture_file(row: CaseRow, folder: Path) -> Path | None:
    """A row without a bundle was measured from a mask: a picture of that name is of something else."""
    file = folder / "pictures" / f"{row.case_id}.png"
    return file if row.report and row.bundle and file.is_file() else None


def _picture(file: Path | None) -> str:
    """A montage as a JPEG of at most MAX_PICTURE_BYTES where QUALITIES allow, in a data URI; empty without one."""
    if file is None:
        return ""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            image = picture.convert("RGB")
    except OSError as error:
        log.warning("%s cannot be shown: %s", file, error)
        return ""
    for quality in QUALITIES:
        jpeg = BytesIO()
        image.save(jpeg, format="JPEG", quality=quality, subsampling=0, optimize=True)
        if jpeg.tell() <= MAX_PICTURE_BYTES:
            break
    return _data_uri("jpeg", jpeg.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _plots(folder: Path, rows: Sequence[CaseRow], scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Caption and data URI of each plot: those of the evaluation, then the rules against the voxels."""
    of_evaluation = {
        "scatter": "Predicted against reference volume",
        "bland_altman": "Their difference",
        "precision_recall": "Precision and recall of the voxels",
    }
    for name, words in of_evaluation.items():
        file = folder / f"{name}.png"
        # An evaluation without a bleeding case draws none; what lies there then is of an earlier one.
        if file.is_file() and any(score["label_ml"] for score in scores.values()):
            yield words, _data_uri("png", file.read_bytes())
    bleeds = [row.report for row in rows if row.report and row.report.volume_ml > 0]
    if len(bleeds) < 2:
        return
    voxels_ml, case_numbers = [each.volume_ml for each in bleeds], [str(n) for n in range(len(bleeds))]
    for rule, estimate_ml in (
        ("ABC/2", [each.abc2_ml for each in bleeds]),
        ("ABC/2 with Kothari's weights", [each.abc2_kothari_ml for each in bleeds]),
    ):
        agreement = volume_agreement(voxels_ml, estimate_ml, case_numbers, replicates=0)  # a plot shows no interval
        figure = volume_scatter(
            voxels_ml, estimate_ml, agreement, reference_name="voxels of the mask", estimate_name=rule
        )
        figure.axes[0].set_title(f"{len(bleeds)} scans with hemorrhage outlined", loc="left")  # patients are unknown
        png = BytesIO()
        figure.savefig(png, format="png", dpi=150)
        yield f"{rule} against voxels of the same mask", _data_uri("png", png.getvalue())
