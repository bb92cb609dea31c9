"""The ablations of `pesa_rcnn` on synthetic scans: the shapes of the paper's tables I to IV and figures 9 and 12.

    python benchmarks/pesa.py --out DIR [--preset cpu|gpu|tiny] [--seeds 0,1,2,3,4] [--arms main|all|NAME;NAME]
                              [--cases 60] [--more N] [KEY=VALUE ...]

Data and split are those of benchmarks/bundles.py. Every arm is trained and evaluated with every seed; the same command
goes on where it stopped. Writes DIR/pesa.md. `main` are Mask R-CNN, the same with CSD, and PESA R-CNN; `all` takes RS
R-CNN, the other ablations and other numbers of groups as well. Scores on phantoms say how the parts compare under the
same means, nothing about patients.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_area, box_iou

from bundles import arguments, conditions, phantoms, trained
from ich_pipeline import commands
from ich_pipeline.bootstrap import REPLICATES, Resampler, ratio
from ich_pipeline.bundles import Bundle
from ich_pipeline.evaluation import compare, labelled_cases
from ich_pipeline.files import write_json
from ich_pipeline.inference import Segmenter
from ich_pipeline.instances import RegionBatch
from ich_pipeline.networks.pesa_rcnn import expanded, region_targets
from ich_pipeline.overlap import SLICE_GROUP_NAMES, SLICE_HEIGHTS_PX, CaseAgreement
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import interval, write_text
from ich_pipeline.roi_groups import equal_count_heights, region_heights
from ich_pipeline.settings import Settings
from ich_pipeline.transforms import ModelGridd, ReadMaskd

PLAIN = ("group_heights=[]", "align_sizes=[14]", "mask_depths=[4]", "connections=none")
BASE = ("use_csd=false", *PLAIN)
PESA, MASK_RCNN, WITH_CSD = "PESA R-CNN", "Mask R-CNN", "M + C"
EXPANSIONS = {f"RS R-CNN, k = {n / 10:g}": (*BASE, f"roi_expansion={n / 10}") for n in range(11, 21)}
ARMS: dict[str, tuple[str, ...]] = {
    MASK_RCNN: BASE,
    WITH_CSD: PLAIN,
    PESA: (),
    "M + C + SM1": ("connections=none",),
    "M + C + SM2": ("connections=residual",),
    "M + SM3": ("use_csd=false",),
    **EXPANSIONS,
}
# Number of groups: their grids and mask networks; the heights come from the training data.
GROUPS = {"2 groups": ([7, 14], [4, 2]), "4 groups": ([7, 14, 14, 14], [4, 3, 2, 2])}
MAIN = (MASK_RCNN, WITH_CSD, PESA)
SLICE_MM, SLICE_PX = 250.0, 512  # areas are given in pixels of such a slice

Runs = Mapping[str, Sequence[tuple[Sequence[CaseAgreement], list[dict[str, float]]]]]  # by arm, a seed each


def group_words(name: str, manifest: Path, preset: str, words: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Settings of an arm with another number of groups; its heights are found once."""
    align, depths = GROUPS[name]
    file = folder / f"{name.replace(' ', '_')}.json"
    if not file.is_file():
        settings = Settings.of(["bundle=pesa_rcnn", f"preset={preset}", *words])
        spacing_mm = settings.config(settings.bundle(), "train")["train"]["spacing_mm"]
        write_json(file, {"heights": equal_count_heights(region_heights(manifest, spacing_mm), len(align))})
    heights = json.loads(file.read_text())["heights"]
    return (f"group_heights={heights}", f"align_sizes={align}", f"mask_depths={depths}")


def proposals(bundle: Bundle, cases: Sequence[CaseRecord], out: Path) -> list[dict[str, float]]:
    """What the proposal network gives for each slice with blood; kept in a file.

    `positive`: proposals with IoU 0.5 or more with a region of the label; `on_target`: with a region of what it was
    trained on, CSD prediction OR label; `over`: those whose objectness is 0.5 or more.
    """
    file = out / "proposals.json"
    if file.is_file():
        return json.loads(file.read_text())
    config = bundle.config("inference")
    segmenter = Segmenter(bundle, config)
    network = segmenter.network
    to_512 = SLICE_PX / SLICE_MM * config["spacing_mm"][1]
    to_model = ModelGridd(["image", "label"], config["spacing_mm"])
    batch_of = RegionBatch(network, bundle.config("train")["csd_threshold"])
    found = []
    for case in cases:
        raw = ReadMaskd("label")({**segmenter.reading(case.item()), "label": str(case.label)})
        label = to_model(raw)["label"].as_tensor().movedim(1, 0)
        image = segmenter.read(case).data["image"].as_tensor().movedim(1, 0)
        for k in torch.nonzero(label.flatten(1).any(dim=1))[:, 0].tolist():
            batch = {"image": image[k : k + 1].float(), "label": label[k : k + 1]}
            given, truth, (_, regions), _ = batch_of(batch, segmenter.device)
            size = tuple(given.shape[2:])
            with torch.inference_mode():
                network.detector.rpn.score_thresh = 0.0
                boxes = network.detector.propose(given)[0]
                network.detector.rpn.score_thresh = 0.5
                over = len(network.detector.propose(given)[0])
                network.detector.rpn.score_thresh = 0.0
            bleeds, aims = (region_targets(truth, each)[0]["boxes"] for each in (None, regions))
            heights = (boxes[:, 3] - boxes[:, 1]) * to_512
            tallest = float((bleeds[:, 3] - bleeds[:, 1]).max()) * to_512
            row = {
                "height": tallest,
                "proposals": len(boxes),
                "over": over,
                "positive": int((box_iou(bleeds, boxes) >= 0.5).any(dim=0).sum()),
                "on_target": int((box_iou(aims, boxes) >= 0.5).any(dim=0).sum()),
                "area": float(box_area(expanded(boxes, config["roi_expansion"], size)).mean()) * to_512**2,
            }
            low, high = SLICE_HEIGHTS_PX
            parts = ((heights < low), (heights >= low) & (heights <= high), (heights > high))
            row |= {f"n_{name}": int(part.sum()) for name, part in zip(SLICE_GROUP_NAMES, parts, strict=True)}
            found.append(row)
    write_json(file, found)
    return found


def estimate(values: Sequence[float], patients: Sequence[str]) -> str:
    """A mean with its interval over patients; several seeds of a patient are drawn together."""
    found = np.asarray(values, dtype=np.float64)
    return interval(Resampler(patients, REPLICATES, 0).estimate(ratio(found, np.ones(len(found)))))


def slice_scores(runs: Runs, arm: str, score: str, group: str | None = None) -> tuple[list[float], list[str], int]:
    """A score of every slice with blood (of one group) and every seed, its patient, and how many slices have none."""
    rows = [
        (getattr(each, score), case.patient_id)
        for cases, _ in runs[arm]
        for case in cases
        for each in case.slices
        if group is None or each.group == group
    ]
    held = [(value, patient) for value, patient in rows if value is not None]
    return [value for value, _ in held], [patient for _, patient in held], len(rows) - len(held)


def dice_and_hd(runs: Runs, arm: str, group: str | None = None) -> list[str]:
    """Cells: slices, Dice, Hausdorff distance, and slices without prediction, which have Dice 0 and no distance."""
    dice, patients, _ = slice_scores(runs, arm, "dice", group)
    hd, hd_patients, missed = slice_scores(runs, arm, "hausdorff_px", group)
    return [str(len(dice)), estimate(dice, patients), estimate(hd, hd_patients), str(missed)]


def small_lesions(runs: Runs, arm: str) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Lesions below 1 mL of every case and seed: found ones, all, and whose."""
    cases = [case for each, _ in runs[arm] for case in each]
    found, labelled = (
        np.array([getattr(case.lesions, f"{what}_by_bin")[0] for case in cases], dtype=np.float64)
        for what in ("found", "labelled")
    )
    return found, labelled, [case.patient_id for case in cases]


def small_recall(runs: Runs, arm: str) -> str:
    """Share of the lesions below 1 mL that are found, over patients."""
    found, labelled, patients = small_lesions(runs, arm)
    estimated = Resampler(patients, REPLICATES, 0).estimate(ratio(found, labelled))
    return f"{interval(estimated)} of {int(labelled.sum())}"


def gains(runs: Runs, arm: str) -> list[str]:
    """Cells: what an arm has more than Mask R-CNN with the same seeds, lesion for lesion and slice for slice.

    Intervals are over patients. How far chance in training moves the same figures, their values seed by seed say.
    """
    found, labelled, patients = small_lesions(runs, arm)
    more = found - small_lesions(runs, MASK_RCNN)[0]
    cells = [interval(Resampler(patients, REPLICATES, 0).estimate(ratio(more, labelled)))]
    n_seeds = len(runs[arm])
    by_seed = [
        part.sum() / of.sum() for part, of in zip(*(np.split(x, n_seeds) for x in (more, labelled)), strict=True)
    ]
    for group in (*SLICE_GROUP_NAMES, None):
        here, whose, _ = slice_scores(runs, arm, "dice", group)
        there, _, _ = slice_scores(runs, MASK_RCNN, "dice", group)
        change = np.subtract(here, there)
        cells.append(estimate(change.tolist(), whose))
    dice = [part.mean() for part in np.split(change, n_seeds)]  # of all slices, the last of the groups
    return [*cells, *(", ".join(f"{value:+.3f}" for value in each) for each in (by_seed, dice))]


def mean_of(rows: Sequence[Mapping[str, float]], name: str) -> str:
    return f"{np.mean([row[name] for row in rows]):.1f}" if rows else "-"


def table(title: str, columns: Sequence[str], arms: Sequence[str], cells: Callable[[str], Sequence[str]]) -> list[str]:
    """A Markdown table, a line an arm; nothing where no arm of it was asked for."""
    if not arms:
        return []
    lines = [f"| {arm} | {' | '.join(cells(arm))} |" for arm in arms]
    return [f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}", *lines, ""]


def tables(runs: Runs) -> list[str]:
    """All tables that the arms at hand allow."""
    seen = [[row for _, rows in runs[arm] for row in rows] for arm in runs]
    rows_of = dict(zip(runs, seen, strict=True))
    held = ["slices", "Dice", "Hausdorff (px)", "without prediction"]
    in_one = [arm for arm in (MASK_RCNN, *EXPANSIONS, WITH_CSD) if arm in runs]
    in_three = [arm for arm in ("2 groups", PESA, "4 groups") if arm in runs]
    others = [arm for arm in runs if arm not in GROUPS]
    text = table(
        "I: expansion by a factor, and learned",
        [*held, "mean area of RoI (px)"],
        in_one,
        lambda arm: [*dice_and_hd(runs, arm), mean_of(rows_of[arm], "area")],
    )
    text += table("II: ablation", held, others, lambda arm: dice_and_hd(runs, arm))
    text += table("III: number of groups", held, in_three if len(in_three) > 1 else [], lambda a: dice_and_hd(runs, a))
    text += table("IV: slices of the small group", held, others, lambda arm: dice_and_hd(runs, arm, "small"))
    text += table(
        "Small bleeds",
        ["recall of lesions below 1 mL", *(f"Dice, {name}" for name in SLICE_GROUP_NAMES)],
        list(runs),
        lambda arm: [small_recall(runs, arm), *(dice_and_hd(runs, arm, name)[1] for name in SLICE_GROUP_NAMES)],
    )
    text += table(
        "More than Mask R-CNN, paired",
        [
            "recall of lesions below 1 mL",
            *(f"Dice, {name}" for name in SLICE_GROUP_NAMES),
            "Dice, all slices",
            "recall by seed",
            "Dice by seed",
        ],
        [arm for arm in runs if arm != MASK_RCNN and MASK_RCNN in runs],
        lambda arm: gains(runs, arm),
    )
    text += table(
        "Proposals of a slice with blood (figure 9)",
        ["slices", "proposals", "objectness 0.5 or more", "positive", "on target", "mean area (px)"],
        list(runs),
        lambda arm: [
            str(len(rows_of[arm])),
            *(mean_of(rows_of[arm], name) for name in ("proposals", "over", "positive", "on_target", "area")),
        ],
    )
    low, high = SLICE_HEIGHTS_PX
    groups = dict(zip(SLICE_GROUP_NAMES, ((0.0, low), (low, high + 1e-6), (high + 1e-6, np.inf)), strict=True))
    text += table(
        "Small / medium / large proposals, by size of the bleed (figure 12)",
        [f"{name} bleed" for name in groups],
        list(runs),
        lambda arm: [
            " / ".join(
                mean_of([row for row in rows_of[arm] if start <= row["height"] < stop], f"n_{name}")
                for name in SLICE_GROUP_NAMES
            )
            for start, stop in groups.values()
        ],
    )
    return text


def run_arm(
    arm: str, seed: int, manifest: Path, preset: str, words: Sequence[str], out: Path
) -> tuple[Sequence[CaseAgreement], list[dict[str, float]]]:
    """Train, evaluate and look at the proposals of one arm and seed; what is done is taken as it is."""
    home = out / arm.replace(" ", "_").replace(",", "") / f"seed_{seed}"
    given = group_words(arm, manifest, preset, words, out) if arm in GROUPS else ARMS[arm]
    bundle = trained("pesa_rcnn", manifest, preset, [*words, *given, f"seed={seed}"], home)
    to = home / "evaluation"
    commands.evaluate(
        Settings.of(
            [f"bundle={bundle.path}", f"data={manifest}", f"out={to}", "pictures=false", "html=false", "tracking=false"]
        )
    )
    cases = labelled_cases(manifest, "test")
    return compare(cases, to / "volumes.csv").rows, proposals(bundle, cases, home)


def main() -> None:
    parser = arguments(__doc__, "arm")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--arms", default="main")
    given = parser.parse_args()
    known = {"main": list(MAIN), "all": [*ARMS, *GROUPS]}
    arms = known.get(given.arms) or given.arms.split(";")
    unknown = [arm for arm in arms if arm not in known["all"]]
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; known: {'; '.join(known['all'])}")
    manifest = phantoms(given.out / "phantoms", given.cases, given.more)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    runs: dict[str, list[tuple[Sequence[CaseAgreement], list[dict[str, float]]]]] = {arm: [] for arm in arms}
    for seed, arm in product(seeds, arms):
        runs[arm].append(run_arm(arm, seed, manifest, given.preset, given.words, given.out))
    low, high = SLICE_HEIGHTS_PX
    text = [
        f"{conditions(given, manifest)} Seeds {given.seeds}. Scores are of axial slices with blood, all seeds "
        "together; brackets: 95 % bootstrap interval over patients. Small slices: tallest region below "
        f"{low} px of a 512-pixel slice; large: above {high}.",
        "",
        *tables(runs),
    ]
    write_text(given.out / "pesa.md", "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
