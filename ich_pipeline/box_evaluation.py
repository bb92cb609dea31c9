"""A detector's boxes over a manifest's split against a table of boxes: found, scored, written.

A label's box is *visible* when both its sides are at least so many millimetres. As COCO does with small objects, a box
that is not visible is neither missed nor false when found: it, every prediction that small, and every prediction that
takes it (IoU 0.5) and no visible one, are left out of the scores called visible.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ich_pipeline.bootstrap import Estimate
from ich_pipeline.box_data import boxes_table, with_boxes
from ich_pipeline.box_training import ranking
from ich_pipeline.bundles import Bundle, Config
from ich_pipeline.detection import Box, ClassScores, DetectionScores, ScoredBox, average_precision, write_boxes
from ich_pipeline.detector import Finder, load_detector
from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.geometry import Grid
from ich_pipeline.manifest import PHANTOM_FILE, read_manifest
from ich_pipeline.reading import read_scan
from ich_pipeline.report import interval, write_text
from ich_pipeline.run_report import RunReport

TAKES_IOU = 0.5
SCORE_COLUMNS = (
    *("boxes", "class", "n_label", "n_pred", "missed", "dropped"),
    *("ap50", "ap50_low", "ap50_high", "ap", "ap_low", "ap_high"),
)


def plane_mm(grid: Grid) -> tuple[float, float]:
    """Size of a pixel along i and j of a `Box`."""
    one, other = sorted({0, 1, 2} - {grid.slice_axis})
    return grid.edge_mm[one], grid.edge_mm[other]


def is_visible(box: Box, pixel_mm: tuple[float, float], min_mm: float) -> bool:
    """Whether both sides of a box are at least `min_mm`."""
    return (box.i1 - box.i0) * pixel_mm[0] >= min_mm and (box.j1 - box.j0) * pixel_mm[1] >= min_mm


def visible_boxes(
    pred: Sequence[ScoredBox], label: Sequence[Box], pixel_mm: Mapping[str, tuple[float, float]], min_mm: float
) -> tuple[list[ScoredBox], list[Box]]:
    """Predictions and label boxes of which the visible scores are made; see the module.

    Args:
        pixel_mm: of every case, see `plane_mm`.
    """
    seen = [box for box in label if is_visible(box, pixel_mm[box.case_id], min_mm)]
    unseen = [box for box in label if not is_visible(box, pixel_mm[box.case_id], min_mm)]
    kept = [
        box
        for box in pred
        if is_visible(box, pixel_mm[box.case_id], min_mm) and not (_takes(box, unseen) and not _takes(box, seen))
    ]
    return kept, seen


def _takes(box: Box, others: Sequence[Box]) -> bool:
    here = (each for each in others if (each.case_id, each.slice) == (box.case_id, box.slice))
    return any(_iou(box, each) >= TAKES_IOU for each in here)


def _iou(one: Box, other: Box) -> float:
    rows = min(one.i1, other.i1) - max(one.i0, other.i0)
    columns = min(one.j1, other.j1) - max(one.j0, other.j0)
    both = max(rows, 0) * max(columns, 0)
    return both / (sum((b.i1 - b.i0) * (b.j1 - b.j0) for b in (one, other)) - both)


@dataclass(frozen=True)
class BoxEvaluation:
    """Scores of a detector.

    Attributes:
        all, visible: over all boxes; over visible ones.
        visible_mm: what visible means.
        seconds_a_slice: of the detector, without reading.
        failed: cases that could not be looked at; they are in no score.
    """

    all: DetectionScores
    visible: DetectionScores
    visible_mm: float
    seconds_a_slice: float
    failed: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """What a tracked run records."""
        named = {"all": self.all, "visible": self.visible}
        found = {f"{name}/map50": scores.map50.value for name, scores in named.items()}
        found |= {f"{name}/map": scores.map.value for name, scores in named.items()}
        found |= {
            f"{name}/{each.name}_ap50": each.ap50.value for name, scores in named.items() for each in scores.classes
        }
        return {name: value for name, value in found.items() if value is not None} | {
            "seconds_a_slice": self.seconds_a_slice
        }


def evaluate_boxes(
    bundle: Bundle, configs: Mapping[str, Config], split: str, out: Path, report: RunReport
) -> BoxEvaluation:
    """Look at every case of a split, write `boxes.csv`, `box_scores.csv` and `box_scores.md` to `out`.

    Args:
        bundle: a trained detector.
        configs: its resolved `inference` and `evaluate`.
        split: of the manifest.
        out: folder.
        report: every case and the seconds of reading and detecting go there.

    Raises:
        ConfigError: no manifest was named, or the detector is not trained.
        ManifestError: manifest or table cannot be used, or the split has no case.
    """
    settings, inference = configs["evaluate"], configs["inference"]
    if not settings["data"]:
        raise ConfigError("evaluate needs data=MANIFEST, a CSV with case_id, image and split, and boxes.csv beside it")
    records = [record for record in read_manifest(settings["data"]) if record.split == split]
    table = boxes_table(settings["data"], settings["boxes"])
    if not records:
        raise ManifestError(f"{settings['data']}: no case with split={split}, expected some. Give another split=.")
    cases = with_boxes(records, table)
    for path in (Path(settings["data"]), table):
        report.add_input(path)
    with report.stage("start"):
        network = load_detector(bundle.path, inference["device"], inference)
        names = {
            "batch_size": "slices_at_once",
            "amp": "amp",
            "link_overlap": "link_overlap",
            "min_slices": "min_slices",
        }
        finder = Finder(
            ranking(network, settings["validation_score"]), **{name: inference[key] for name, key in names.items()}
        )
    pred: list[ScoredBox] = []
    n_slices, pixel_mm, failed = {}, {}, []
    for case in tqdm(cases, desc="scans", unit="scan", file=sys.stderr):
        case_id = case.record.case_id
        try:
            with report.stage("read", case_id):
                scan = read_scan(case.record.image, case_id, case.record.series)
            with report.stage("detect"):
                pred += finder(scan)
        except IchError as error:
            failed.append(case_id)
            report.add_case(case_id, "failed", error=str(error))
            print(f"{case_id}: {error}", file=sys.stderr)
            continue
        n_slices[case_id] = scan.grid.shape[scan.grid.slice_axis]
        pixel_mm[case_id] = plane_mm(scan.grid)
        report.add_case(case_id, "ok")
    if not n_slices:
        raise ManifestError(
            f"{settings['data']}: none of {len(cases)} cases could be looked at; {failed[0]} is the first."
        )
    label = [box for case in cases if case.record.case_id in n_slices for box in case.boxes]
    write_boxes(out / "boxes.csv", pred)
    patients = {record.case_id: record.patient_id for record in records}
    visible = visible_boxes(pred, label, pixel_mm, settings["visible_mm"])
    evaluation = BoxEvaluation(
        average_precision(pred, label, n_slices, patients),
        average_precision(*visible, n_slices, patients),
        settings["visible_mm"],
        report.seconds("detect") / sum(n_slices.values()),
        tuple(failed),
    )
    write_csv_rows(out / "box_scores.csv", _rows(evaluation), SCORE_COLUMNS)
    synthetic = "synthetic phantoms, " if Path(settings["data"]).with_name(PHANTOM_FILE).is_file() else ""
    write_text(out / "box_scores.md", markdown(evaluation, f"{synthetic}{Path(settings['data']).name}, split {split}"))
    return evaluation


def _rows(evaluation: BoxEvaluation) -> list[dict[str, Any]]:
    rows = []
    for boxes, scores in (("all", evaluation.all), ("visible", evaluation.visible)):
        for each in scores.classes:
            counts = {name: getattr(each, name) for name in ("n_label", "n_pred", "missed", "dropped")}
            rows.append({"boxes": boxes, "class": each.name} | counts | _cells(each.ap50, each.ap))
        rows.append({"boxes": boxes, "class": "mean"} | _cells(scores.map50, scores.map))
    return rows


def _cells(ap50: Estimate, ap: Estimate) -> dict[str, Any]:
    found = {"ap50": ap50, "ap": ap}
    cells = {name: each.value for name, each in found.items()}
    cells |= {f"{name}_{end}": getattr(each, end) for name, each in found.items() for end in ("low", "high")}
    return {name: "" if value is None else f"{value:.4f}" for name, value in cells.items()}


def markdown(evaluation: BoxEvaluation, data: str) -> str:
    """The scores as tables."""
    scores = evaluation.all
    lines = [
        f"{data}: {scores.n_cases} scans of {scores.n_patients} patients, {scores.n_images} slices. Average precision "
        "as COCO defines it; brackets: 95 % bootstrap interval over patients. Means: over subtypes with label boxes. "
        f"Visible: both sides of the label's box at least {evaluation.visible_mm:g} mm. Detector: "
        f"{evaluation.seconds_a_slice:.4f} s a slice.",
    ]
    if evaluation.failed:
        lines += ["", f"Not looked at, and in no score: {', '.join(evaluation.failed)}."]
    for title, each in (("All boxes", evaluation.all), ("Visible boxes", evaluation.visible)):
        lines += ["", f"{title}:", "", "| class | label boxes | predicted | missed | AP@0.5 | AP@0.5:0.95 |"]
        lines += ["|---|--:|--:|--:|--:|--:|", *map(_line, each.classes)]
        lines.append(f"| mean | | | | {interval(each.map50)} | {interval(each.map)} |")
    return "\n".join(lines) + "\n"


def _line(each: ClassScores) -> str:
    return (
        f"| {each.name} | {each.n_label} | {each.n_pred} | {each.missed} | "
        f"{interval(each.ap50)} | {interval(each.ap)} |"
    )
