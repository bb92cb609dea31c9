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
import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor

from bundles import arguments, conditions, phantoms, trained
from ich_pipeline import commands
from ich_pipeline.bootstrap import REPLICATES, Estimate, Resampler, ratio
from ich_pipeline.detector import SliceView
from ich_pipeline.evaluation import Evaluation, compare, labelled_cases
from ich_pipeline.overlap import CaseAgreement
from ich_pipeline.phantom import make_case
from ich_pipeline.phantom.look_alikes import look_alike_case
from ich_pipeline.pictures import precision_recall_plot, write_png
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import interval, write_text
from ich_pipeline.settings import Settings
from ich_pipeline.symmetry import MirrorChanneld

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
# Dice of the first less that of the second in a group, and what the paper says of it (section III-C): that it helps,
# or that it does not.
FINDINGS = (
    ("dilation helps on big hemorrhages", "big", "unet6_dilated", "unet6", True),
    ("dilation does not help on small ones", "small", "unet6_dilated", "unet6", False),
    ("the discriminator helps on small ones", "small", "unet6_gan", "unet6", True),
    ("the discriminator helps on small ones", "small", "unet10_gan", "unet10", True),
    ("the mirror image does not help Dice on big ones", "big", "unet6_flip", "unet6", False),
    ("the mirror image does not help Dice on small ones", "small", "unet6_flip", "unet6", False),
    ("a deeper network does not help on big ones", "big", "unet10", "unet6", False),
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


def gain(one: Scores, other: Scores, patient_of: dict[str, str]) -> tuple[Estimate, str]:
    """Dice of one less that of the other, paired over cases; and of each seed, of which the interval knows nothing."""

    def of(a: dict[str, float], b: dict[str, float]) -> Estimate:
        return estimate({case_id: a[case_id] - b[case_id] for case_id in a if case_id in b}, patient_of)

    pairs = [(Scores((a,)), Scores((b,))) for a, b in zip(one.seeds, other.seeds, strict=True)]
    by_seed = [of(a.per_case("dice"), b.per_case("dice")).value for a, b in pairs]
    return of(one.per_case("dice"), other.per_case("dice")), ", ".join(f"{value:+.3f}" for value in by_seed)


def verdict(found: Estimate, helps: bool) -> str:
    """What an interval says of a claim that something helps, or does not."""
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "neither shown nor refuted"
    return "holds" if (found.low > 0) == helps else "does not hold"


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
    lines = [
        "| the paper says | Dice of | less that of | on | difference | by seed | here |",
        "|---|---|---|---|--:|--:|---|",
    ]
    for text, group, one, other, helps in FINDINGS:
        if group in found.get(one, {}) and group in found.get(other, {}):
            here, by_seed = gain(found[one][group], found[other][group], patient_of)
            cells = [text, ROWS[one], ROWS[other], group, interval(here), by_seed, verdict(here, helps)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def curves(found: dict[str, dict[str, Scores]], groups: Sequence[str]) -> Figure:
    """Precision-recall curves of every variant's first seed, a panel for each group (figures 10 and 11)."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for variant, scores in found.items():
            curve = scores[group].seeds[0].curve
            if curve:
                axes.plot(curve.recall, curve.precision, linewidth=1.2, label=ROWS[variant])
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall of voxels", ylabel="precision", title=group)
        axes.set_aspect("equal")
    figure.axes[-1].legend(frameon=False, loc="lower left", fontsize="small")
    return figure


def side_by_side(case: CaseRecord, variants: Sequence[str], seed: int, out: Path) -> Figure:
    """The slice of a case with most blood, its mirror image, and what two variants make of it; the label is dashed."""
    scan, (label, _) = read_scan(case.image), read_mask(case.label)
    view = SliceView.of(scan.grid)
    image = MetaTensor(torch.as_tensor(np.array(scan.image_hu), dtype=torch.float32)[None], affine=scan.grid.affine)
    mirrored = MirrorChanneld("image")({"image": image})["image"][1].numpy()
    truth = view.slices(label.values > 0)
    k = int(truth.sum(axis=(1, 2)).argmax())
    masks = [
        read_mask(out / "evaluation" / f"{name}_{seed}" / "masks" / f"{case.case_id}.nii.gz")[0] for name in variants
    ]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    titles = ["scan", "its mirror image", *(ROWS[name] for name in variants)]
    for n, (axes, title) in enumerate(zip(figure.subplots(1, len(titles)), titles, strict=True)):
        axes.imshow(view.slices(mirrored if n == 1 else scan.image_hu)[k], cmap="gray", vmin=0, vmax=80)
        if n != 1:
            axes.contour(truth[k], [0.5], colors="#ffd24a", linewidths=1, linestyles="dashed")
        if n > 1 and masks[n - 2].values.any():
            axes.contour(view.slices(masks[n - 2].values > 0)[k], [0.5], colors="#ff4040", linewidths=1)
        axes.set_title(title)
        axes.set_axis_off()
    return figure


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
        here, by_seed = gain(found[mirrored]["all"], found[without]["all"], patient_of)
        text += [f"Dice of {ROWS[mirrored]} less that of {ROWS[without]}: {interval(here)}; by seed {by_seed}."]
        # The case in the middle of the gains, so that none was picked.
        one, other = (found[name]["all"].per_case("dice") for name in (mirrored, without))
        middle = sorted(one, key=lambda case_id: one[case_id] - other[case_id])[len(one) // 2]
        [case] = [case for case in cases if case.case_id == middle]
        write_png(out / "side_by_side.png", side_by_side(case, variants, seeds[0], out))
    elif not alike:
        text += findings(found, patient_of)
    write_png(out / "curves.png", curves(found, list(groups)))
    write_text(out / "symmetry.md", "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
