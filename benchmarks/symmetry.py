"""The nine networks of Li et al. (JBHI 2021) on one set of synthetic scans: big and small hemorrhages apart.

    python benchmarks/symmetry.py --out DIR [--preset cpu|gpu|tiny] [--cases 60] [--more N] [--seeds 0,1,2]
                                  [--variants a,b] [KEY=VALUE ...]
    python benchmarks/symmetry.py --out DIR --look-alikes [--seeds 0,1,2,3,4] ...

The first trains every variant once a seed, on 40 of 60 phantoms with 8 to validate on, and writes DIR/symmetry.md:
location accuracy, Dice, IoU and average precision on the 12 others and N more, which of the paper's findings hold
there, and precision-recall curves. Scans with --small-ml or more are big ones (the paper parts them by eye). The second
takes heads with bleeds that only the other side tells from bright structures, and the same network with and without the
mirror image. The same command goes on where it stopped. Scores on phantoms say nothing about patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundles import arguments, conditions, phantoms, trained
from ich_pipeline import commands
from ich_pipeline.bootstrap import REPLICATES, Estimate, Resampler, ratio
from ich_pipeline.evaluation import Evaluation, compare, labelled_cases
from ich_pipeline.overlap import CaseAgreement
from ich_pipeline.phantom import make_case
from ich_pipeline.phantom.look_alikes import look_alike_case
from ich_pipeline.pictures import precision_recall_plot, write_png
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import interval, write_text
from ich_pipeline.settings import Settings

BUNDLE = "symmetry_gan_unet"
ROWS = {
    "unet10": "UNet10",
    "unet10_gan": "UNet10Gan",
    "unet6": "UNet6",
    "unet6_gan": "UNet6Gan",
    "unet6_dilated": "UNet6Dil",
    "unet6_flip": "UNet6Flip",
    "unet6_flip_dilated": "UNet6FlipD",
    "unet6_inception": "UNet6Incep",
    "unet6_vgg": "UNet6Vgg",
}
# Dice of the first less that of the second in a group, and what the paper says of it (section III-C).
FINDINGS = (
    ("dilation helps on big hemorrhages", "big", "unet6_dilated", "unet6"),
    ("dilation does not help on small ones", "small", "unet6_dilated", "unet6"),
    ("the discriminator helps on small ones", "small", "unet6_gan", "unet6"),
    ("the discriminator helps on small ones", "small", "unet10_gan", "unet10"),
    ("the mirror image does not help Dice on big ones", "big", "unet6_flip", "unet6"),
    ("the mirror image does not help Dice on small ones", "small", "unet6_flip", "unet6"),
    ("a short network is as good on big ones", "big", "unet6", "unet10"),
)


@dataclass(frozen=True)
class Scores:
    """One variant in one group: an evaluation a seed."""

    seeds: tuple[Evaluation, ...]

    def per_case(self, score: str) -> dict[str, float]:
        """Mean over the seeds that scored a case, by case id."""
        rows: dict[str, list[float]] = {}
        for evaluation in self.seeds:
            for row in evaluation.rows:
                value = _location_accuracy(row) if score == "location_accuracy" else getattr(row, score)
                if value is not None:
                    rows.setdefault(row.case_id, []).append(float(value))
        return {case_id: float(np.mean(values)) for case_id, values in rows.items()}

    @property
    def missed(self) -> str:
        """Bleeds without a common voxel, over all seeds."""
        rows = [row for evaluation in self.seeds for row in evaluation.rows]
        return f"{sum(bool(row.missed) for row in rows)} of {len(rows)}"

    @property
    def pooled_precision(self) -> str:
        """Average precision of the voxels of all cases together: mean over the seeds, and their range."""
        found = [e.curve.average_precision.value for e in self.seeds if e.curve]
        values = [value for value in found if value is not None]
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


def _location_accuracy(row: CaseAgreement) -> float | None:
    return float(np.mean([each.hit for each in row.slices])) if row.slices else None


def estimate(values: dict[str, float], patient_of: dict[str, str]) -> Estimate:
    """Mean over cases with a 95 % interval over patients."""
    numbers = np.array(list(values.values()))
    patients = Resampler([patient_of[case_id] for case_id in values], REPLICATES, seed=0)
    return patients.estimate(ratio(numbers, np.ones(len(numbers))))


def difference(one: Scores, other: Scores, patient_of: dict[str, str]) -> Estimate:
    """Paired, over the cases that both scored."""
    a, b = one.per_case("dice"), other.per_case("dice")
    return estimate({case_id: a[case_id] - b[case_id] for case_id in a if case_id in b}, patient_of)


def evaluated(
    variant: str,
    seed: int,
    manifest: Path,
    preset: str,
    words: list[str],
    out: Path,
    groups: dict[str, list[CaseRecord]],
) -> dict[str, Evaluation]:
    """Train, segment and score one variant with one seed."""
    name = f"{variant}_{seed}"
    bundle = trained(BUNDLE, manifest, preset, [f"variant={variant}", f"seed={seed}", *words], out / name)
    folder = out / "evaluation" / name
    given = [f"bundle={bundle.path}", f"data={manifest}", f"out={folder}", "pictures=false", "html=false"]
    commands.evaluate(Settings.of([*given, "tracking=false"]))
    found = {}
    for group, cases in groups.items():
        found[group] = compare(cases, folder / "volumes.csv", probabilities=folder / "probabilities")
        curve = found[group].curve
        if curve:
            write_png(out / "curves" / f"{name}_{group}.png", precision_recall_plot(curve))
    return found


def by_size(cases: Sequence[CaseRecord], small_ml: float) -> dict[str, list[CaseRecord]]:
    """Bleeding cases by the volume in the manifest; clean ones are in neither group."""
    bleeding = [(case, float(case.extra["volume_ml"])) for case in cases if case.extra["subtype"] != "none"]
    return {
        "big": [case for case, ml in bleeding if ml >= small_ml],
        "small": [case for case, ml in bleeding if ml < small_ml],
    }


def table(found: dict[str, dict[str, Scores]], groups: Sequence[str], patient_of: dict[str, str]) -> list[str]:
    """A row a variant and group."""
    lines = [
        "| network | group | location accuracy | Dice | IoU | average precision | missed |",
        f"|---|---|{'--:|' * 5}",
    ]
    for group in groups:
        for variant, scores in found.items():
            each = scores[group]
            means = [
                interval(estimate(each.per_case(score), patient_of)) for score in ("location_accuracy", "dice", "iou")
            ]
            lines.append(
                f"| {ROWS[variant]} | {group} | {' | '.join(means)} | {each.pooled_precision} | {each.missed} |"
            )
    return lines


def findings(found: dict[str, dict[str, Scores]], patient_of: dict[str, str]) -> list[str]:
    """What the paper found, and the difference of Dice here."""
    lines = ["| the paper says | Dice of | less that of | on | difference |", "|---|---|---|---|--:|"]
    for text, group, one, other in FINDINGS:
        if group in found.get(one, {}) and group in found.get(other, {}):
            here = interval(difference(found[one][group], found[other][group], patient_of))
            lines.append(f"| {text} | {ROWS[one]} | {ROWS[other]} | {group} | {here} |")
    return lines


def main() -> None:
    parser = arguments(__doc__, "variant")
    parser.add_argument("--seeds", help="default 0,1,2; of look-alikes 0,1,2,3,4")
    parser.add_argument("--variants", help="default all nine; of look-alikes unet6,unet6_flip")
    parser.add_argument("--small-ml", type=float, default=10.0)
    parser.add_argument("--look-alikes", action="store_true")
    given = parser.parse_args()
    alike = given.look_alikes
    variants = (given.variants or ("unet6,unet6_flip" if alike else ",".join(ROWS))).split(",")
    seeds = [int(seed) for seed in (given.seeds or ("0,1,2,3,4" if alike else "0,1,2")).split(",")]
    out = given.out / "look_alikes" if alike else given.out
    manifest = phantoms(out / "phantoms", given.cases, given.more, look_alike_case if alike else make_case)
    cases = labelled_cases(manifest, "test")
    patient_of = {case.case_id: case.patient_id for case in cases}
    groups = by_size(cases, given.small_ml)
    if alike:
        groups = {"all": groups["big"] + groups["small"]}
    groups = {group: each for group, each in groups.items() if each}
    found: dict[str, dict[str, Scores]] = {}
    for variant in variants:
        runs = [evaluated(variant, seed, manifest, given.preset, given.words, out, groups) for seed in seeds]
        found[variant] = {group: Scores(tuple(run[group] for run in runs)) for group in groups}
    held = ", ".join(f"{len(each)} {group}" for group, each in groups.items())
    text = [
        f"{conditions(given, manifest)} Held out with blood: {held}; seeds {', '.join(map(str, seeds))}. Big: from "
        f"{given.small_ml:g} mL. Means over seeds and bleeding scans; brackets: 95 % bootstrap interval over patients. "
        "Average precision: voxels of a group pooled, range over seeds in brackets.",
        "",
        *table(found, list(groups), patient_of),
        "",
    ]
    if alike and len(variants) == 2:
        without, mirrored = variants
        gain = interval(difference(found[mirrored]["all"], found[without]["all"], patient_of))
        text += [f"Dice of {ROWS[mirrored]} less that of {ROWS[without]}: {gain}."]
    elif not alike:
        text += findings(found, patient_of)
    write_text(out / "symmetry.md", "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
