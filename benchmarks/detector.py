"""Detectors of yolov5_transdeeplab on synthetic scans: mAP@0.5 and seconds a slice, in one table.

    python benchmarks/detector.py --out DIR [--preset cpu|gpu|tiny] [--cases 60] [--more N] [--learn N]
                                  [--detectors yolov5,fasterrcnn] [KEY=VALUE ...]

40 of 60 phantoms train, 8 validate, 12 and N more test (seed 0), as in benchmarks/bundles.py; --learn makes further
ones that train only the detector, which has data of its own. Boxes are those of boxes.csv, one for each subtype of a
slice. The same command goes on where it stopped. Writes DIR/detector.md. Scores on phantoms say nothing about patients.
"""

from pathlib import Path

from bundles import arguments, conditions, phantoms
from ich_pipeline import commands
from ich_pipeline.bundles import find_bundle
from ich_pipeline.detection import read_boxes
from ich_pipeline.detector import load_detector
from ich_pipeline.manifest import read_manifest
from ich_pipeline.report import write_text
from ich_pipeline.settings import Settings

SYSTEM = "yolov5_transdeeplab"


def trained(variant: str, manifest: Path, preset: str, words: list[str], out: Path) -> Path:
    """Folder of the trained detector."""
    if not (out / "finished").is_file():
        given = [f"bundle={SYSTEM}", "stage=detector", f"data={manifest}", f"preset={preset}", f"out={out}"]
        given += [f"variant={variant}"] if variant != "yolov5" else []
        given += ["resume=true"] if (out / "bundle").is_dir() else []
        commands.train(Settings.of([*given, "tracking=false", *words]))
        (out / "finished").touch()
    return out / "bundle"


def scores(bundle: Path, manifest: Path, out: Path) -> dict[tuple[str, str], str]:
    """AP@0.5 with its interval, by boxes (all, visible) and class; and the seconds a slice."""
    given = [f"bundle={bundle}", f"data={manifest}", f"out={out}", "tracking=false"]
    commands.evaluate(Settings.of(given))
    found, boxes = {}, ""
    for line in (out / "box_scores.md").read_text().splitlines():
        if line.endswith(" boxes:"):
            boxes = line.split()[0].lower()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in ("any", "mean"):
            found[boxes, cells[0]] = cells[4]
        if "s a slice" in line:
            found["", "seconds"] = line.rsplit("Detector: ", 1)[1].split()[0]
    return found


def main() -> None:
    parser = arguments(__doc__, "detector")
    parser.add_argument("--detectors", default="yolov5,fasterrcnn")
    parser.add_argument("--learn", type=int, default=0, help="further phantoms to train on")
    given = parser.parse_args()
    manifest = phantoms(given.out / "phantoms", given.cases, given.more, learn=given.learn)
    held = {record.case_id: record.split for record in read_manifest(manifest)}
    n_boxes = [held[box.case_id] for box in read_boxes(manifest.with_name("boxes.csv"))]
    lines = []
    for name in given.detectors.split(","):
        bundle = trained(name, manifest, given.preset, given.words, given.out / name)
        found = scores(bundle, manifest, given.out / "evaluation" / name)
        size = sum(each.numel() for each in load_detector(bundle, "cpu").parameters()) / 1e6
        cells = [found[boxes, kind] for boxes in ("visible", "all") for kind in ("mean", "any")]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['', 'seconds']} | {size:.2f} |")
    visible_mm = find_bundle(str(bundle)).config("evaluate")["visible_mm"]
    text = [
        f"{conditions(given, manifest)} Boxes: {n_boxes.count('train')} to train on, {n_boxes.count('test')} held "
        "out. AP@0.5 with its 95 % bootstrap interval over patients; visible: both sides of the label's box at least "
        f"{visible_mm:g} mm.",
        "",
        "| detector | visible, mean of subtypes | visible, any | all, mean of subtypes | all, any | s a slice | "
        "M parameters |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *lines,
    ]
    write_text(given.out / "detector.md", "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
