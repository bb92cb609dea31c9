"""Tables of the shape of Rajapakse et al. (IEEE Access 2024), 1 and 2, on synthetic scans, by one command.

    python benchmarks/two_stage.py --out DIR [--detector NAME=FOLDER ...] [--segmenters a,b] [--preset cpu|gpu|tiny]
        [--cases 60] [--more N] [--single-epochs N] [--sizes] [KEY=VALUE ...]

40 of 60 phantoms train, 8 validate, 12 and N more test (seed 0). Each segmenter is trained on crops of the label's
boxes and, for the single stage, on whole slices (in the paper for twice the epochs: --single-epochs); `em` is not
trained. All are scored with boxes of the label, of every detector that is named (folders of trained ones, such as
yolov5=runs/yolo/bundle), and on whole slices. The same command goes on where it stopped. Writes DIR/two_stage.md and,
beside what `evaluate` writes, says whether boxes of the label are above predicted ones above a single stage.

--sizes trains nothing: it times the bundle's own TransDeepLab against untrained YOLOv5 of every size.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import nn

from bundles import arguments, conditions, phantoms, trained
from ich_pipeline import commands
from ich_pipeline.bundles import find_bundle, find_stage
from ich_pipeline.comparison import paired_differences, write_comparison
from ich_pipeline.detector import SliceView, detect_in_slices, load_detector
from ich_pipeline.engines import autocast
from ich_pipeline.evaluation import compare, labelled_cases
from ich_pipeline.inference import Segmenter
from ich_pipeline.networks.slice_detector import SliceDetector
from ich_pipeline.networks.transdeeplab import foreground
from ich_pipeline.networks.yolov5 import SIZES
from ich_pipeline.paper_tables import Method
from ich_pipeline.reading import read_scan
from ich_pipeline.report import interval, write_text
from ich_pipeline.settings import Settings

NAME = "yolov5_transdeeplab"
SLICES, REPEATS = 24, 5  # of the timing
LABEL, SINGLE = "label boxes", "single stage"
# Dice, IoU. Tables 1 and 2; EM's single stage has no IoU there.
PUBLISHED = {
    (LABEL, "transdeeplab"): "0.769, 0.657",
    ("yolov5", "transdeeplab"): "0.605, 0.478",
    ("yolov5", "swinunet"): "0.597, 0.473",
    ("yolov5", "em"): "0.557, 0.436",
    ("fasterrcnn", "em"): "0.480, 0.356",
    (SINGLE, "transdeeplab"): "0.566, 0.446",
    (SINGLE, "swinunet"): "0.513, 0.472",
    (SINGLE, "em"): "0.197, -",
}


def method(stage: str, segmenter: str, bundle: Path | str, words: list[str], manifest: Path, out: Path) -> Method:
    """Scores of one row."""
    given = [f"bundle={bundle}", f"data={manifest}", f"out={out}", "pictures=false", "html=false", "tracking=false"]
    commands.evaluate(Settings.of([*given, *words]))
    cases = labelled_cases(manifest, "test")
    found = compare(cases, out / "volumes.csv", regions=out / "regions")
    return Method(f"{stage} + {segmenter}", f"phantoms, {len(cases)} cases", found)


def rows(given: argparse.Namespace, manifest: Path) -> Iterator[tuple[str, str, Method]]:
    """Every first stage with every segmenter."""
    detectors = dict(pair.split("=", 1) for pair in given.detector)
    firsts = [(LABEL, "boxes=label"), *((name, "boxes=network") for name in detectors), (SINGLE, "boxes=whole")]
    for segmenter in given.segmenters.split(","):
        for stage, boxes in firsts:
            words = [f"segmenter={segmenter}", boxes, f"preset={given.preset}"]
            bundle: Path | str = NAME
            if segmenter != "em":
                single = stage == SINGLE
                own = [f"epochs={given.single_epochs}"] if single and given.single_epochs else []
                settings = [f"segmenter={segmenter}", f"boxes={'whole' if single else 'label'}", *given.words, *own]
                folder = given.out / f"{segmenter}_{'whole' if single else 'crops'}"
                bundle, words = trained(NAME, manifest, given.preset, settings, folder).path, [boxes]
            if stage in detectors:
                words.append(f"detector={Path(detectors[stage]).resolve()}")
            out = given.out / "evaluation" / f"{stage.replace(' ', '_')}_{segmenter}"
            yield stage, segmenter, method(stage, segmenter, bundle, words, manifest, out)


def speeds(given: argparse.Namespace, manifest: Path) -> list[str]:
    """Seconds of a slice in either stage, in turn, so that whatever else the machine does slows both."""
    case = next(case for case in labelled_cases(manifest, "test") if case.extra["subtype"] != "none")
    scan = read_scan(case.image)
    slices_hu = SliceView.of(scan.grid).tensor(scan.image_hu)[:SLICES]
    lines = []
    for segmenter in (name for name in given.segmenters.split(",") if name != "em"):
        bundle = find_bundle(str(given.out / f"{segmenter}_crops" / "bundle"))
        config = bundle.config("inference")
        network = Segmenter(bundle, config | {"boxes": "whole"}).network
        crops = torch.rand(len(slices_hu), 1, *config["crop_size"])
        for name, folder in (pair.split("=", 1) for pair in given.detector):
            detector = load_detector(folder, "cpu")
            lines.append(f"- {name}, {segmenter}: {in_turn(detector, network, slices_hu, crops)}")
    return lines


def in_turn(detector: SliceDetector, network: nn.Module, slices_hu: torch.Tensor, crops: torch.Tensor) -> str:
    """Both stages over as many slices and crops, by turns."""
    spent: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        detect_in_slices(detector, slices_hu, batch_size=8, amp="auto")
        middle = time.perf_counter()
        with torch.inference_mode(), autocast(torch.device("cpu"), "auto"):
            for part in crops.split(8):
                foreground(network, part)
        spent.append((middle - start, time.perf_counter() - middle))
    first, second = (median(each[n] for each in spent[1:]) / len(slices_hu) for n in (0, 1))
    ratios = sorted(b / a for a, b in spent[1:])
    return (
        f"{1000 * first:.1f} and {1000 * second:.1f} ms a slice (medians of {REPEATS}); "
        f"the detector is {median(ratios):.1f} times as fast ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def sizes() -> list[str]:
    """The bundle's own segmenter against each size of detector: weights change nothing of a network's speed."""
    torch.manual_seed(0)
    config = find_bundle(NAME).config("inference")
    own = find_stage(NAME, "detector").config("inference")
    network = ConfigParser(config).get_parsed_content("network_def").eval()
    slices_hu, crops = 30 + 30 * torch.randn(8, 512, 512), torch.rand(8, 1, *config["crop_size"])
    lines = []
    for size, image_size in product(SIZES, (256, 512)):
        detector = ConfigParser(own | {"size": size, "image_size": image_size}).get_parsed_content("network_def").eval()
        lines.append(f"- YOLOv5{size}, {image_size} pixels: {in_turn(detector, network, slices_hu, crops)}")
    return lines


def verdicts(found: list[tuple[str, str, Method]]) -> list[str]:
    """For each segmenter, each step down from label boxes to the single stage: the paired difference of Dice."""
    lines = []
    for segmenter in dict.fromkeys(name for _, name, _ in found):
        held = [(stage, each) for stage, name, each in found if name == segmenter]
        for n, (above, first) in enumerate(held):
            for below, second in held[n + 1 :]:
                if above != LABEL and below != SINGLE:
                    continue  # one detector against another
                gain = paired_differences(second, first)["dice"]
                value, low = gain.mean.value, gain.mean.low
                holds = "holds" if low is not None and low > 0 else "is not shown"
                if value is not None and value < 0:
                    holds = "does not hold"
                lines.append(f"- {segmenter}: {above} above {below} {holds}: Dice {interval(gain.mean)}, n {gain.n}")
    return lines


def main() -> None:
    parser = arguments(__doc__, "segmenter")
    parser.add_argument("--detector", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--segmenters", default="transdeeplab,swinunet,em")
    parser.add_argument("--single-epochs", type=int, default=0)
    parser.add_argument("--sizes", action="store_true")
    given = parser.parse_args()
    if given.sizes:
        text = sizes()
        write_text(given.out / "sizes.md", "\n".join(text) + "\n")
        print("\n".join(text))
        return
    manifest = phantoms(given.out / "phantoms", given.cases, given.more)
    found = list(rows(given, manifest))
    write_comparison([each for _, _, each in found], given.out)
    text = [
        f"{conditions(given, manifest)} Bleeding scans; brackets: 95 % bootstrap interval. Published: means over "
        "slices of patients.",
        "" if given.detector else "\nNo detector was named: no row with predicted boxes.",
        "",
        "| first stage | segmenter | Dice | IoU | missed | s a case | published Dice, IoU |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for stage, segmenter, each in found:
        scores = each.evaluation.summary
        seconds = [case.seconds for case in each.evaluation.scored if case.seconds is not None]
        cells = [interval(scores[name].mean) for name in ("dice", "iou")]
        text.append(
            f"| {stage} | {segmenter} | {' | '.join(cells)} | {scores['dice'].missed} of {scores['dice'].n} | "
            f"{np.mean(seconds) if seconds else float('nan'):.2f} | {PUBLISHED.get((stage, segmenter), '-')} |"
        )
    text += ["", *verdicts(found), "", *speeds(given, manifest)]
    write_text(given.out / "two_stage.md", "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
