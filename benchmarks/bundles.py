"""Every bundle on one set of synthetic scans: trained, evaluated on the same held-out phantoms, in one table.

    python benchmarks/bundles.py --out DIR [--preset cpu|gpu|tiny] [--bundles a,b] [--cases 60] [--more N]
                                 [KEY=VALUE ...]

40 of 60 phantoms train, 8 validate, 12 and N more test (seed 0). The same command goes on where it stopped: a bundle
that is trained is not trained again. Writes DIR/bundles.md beside what `evaluate` writes. Scores on phantoms say how
the networks learn under the same means, nothing about patients.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from monai.bundle import ConfigParser

from ich_pipeline import bundles, commands
from ich_pipeline.bootstrap import REPLICATES, Resampler, ratio
from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import ConfigError
from ich_pipeline.evaluation import Evaluation, compare, labelled_cases
from ich_pipeline.manifest import read_manifest, split_by_patient, write_manifest
from ich_pipeline.overlap import compare_masks
from ich_pipeline.phantom import make_case, write_dataset
from ich_pipeline.phantom.settings import PhantomCase
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import interval, write_text
from ich_pipeline.run_report import machine, versions
from ich_pipeline.settings import Settings

SHARES = {"train": 40 / 60, "val": 8 / 60, "test": 12 / 60}
SCORES = ("dice", "nsd", "rvd", "abs_error_ml", "false_alarm_ml")


def arguments(description: str | None, per: str) -> argparse.ArgumentParser:
    """What every one of these benchmarks takes; `per` is what gets the settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help=f"settings of training, for every {per}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--more", type=int, default=0, help="further phantoms to test on")
    return parser


def phantoms(
    folder: Path, cases: int, more: int = 0, make: Callable[..., PhantomCase] = make_case, learn: int = 0
) -> Path:
    """The manifest of the set; made once.

    Args:
        cases: parted into training, validation and test.
        more: so many further phantoms of the same kind, all in the split `test`: the intervals become narrower, and
            nothing else changes.
        make: what makes a phantom.
        learn: and so many after those, all in the split `train`.

    Raises:
        ConfigError: the set is there, and made with other numbers.
    """
    manifest = folder / "manifest.csv"
    made = not manifest.is_file()
    if made:
        write_dataset(folder, cases + more + learn, 0, make=make)
    records = read_manifest(manifest)
    further = [replace(r, split="test" if n < more else "train") for n, r in enumerate(records[cases:])]
    parted = [*split_by_patient(records[:cases], SHARES, seed=0), *further]
    if made:
        write_manifest(manifest, parted)
    elif parted != records or len(records) != cases + more + learn:
        raise ConfigError(
            f"{folder} holds {len(records)} phantoms, expected {cases} to part, {more} more to test on and {learn} to "
            "train on. Give another --out, or the numbers that they were made with."
        )
    return manifest


def conditions(given: argparse.Namespace, manifest: Path) -> str:
    """What stands above every table: data, preset, settings, machine, versions and date."""
    splits = [record.split for record in read_manifest(manifest)]
    counts = ", ".join(f"{splits.count(split)} {split}" for split in SHARES)
    libraries = [f"{name} {version}" for name, version in versions().items() if name in ("torch", "monai")]
    settings = " ".join([f"preset={given.preset}", *given.words])
    return (
        f"{len(splits)} synthetic scans ({counts}), `{settings}`, {machine()['cores']} cores, {', '.join(libraries)}, "
        f"{datetime.now(UTC):%Y-%m-%d}."
    )


def trained(name: str, manifest: Path, preset: str, words: list[str], out: Path) -> Bundle:
    """The trained bundle of one architecture, or the one that needs no training."""
    bundle = bundles.find_bundle(name)
    if not bundle.needs_weights:
        return bundle
    if not (out / "finished").is_file():
        resume = ["resume=true"] if (out / "bundle").is_dir() else []
        given = [f"bundle={name}", f"data={manifest}", f"preset={preset}", f"out={out}", "tracking=false"]
        commands.train(Settings.of([*given, *resume, *words]))
        (out / "finished").touch()
    return bundles.find_bundle(str(out / "bundle"))


def parameters(bundle: Bundle) -> int:
    """Learned numbers of a bundle's network."""
    if not bundle.needs_weights:
        return 0
    parser = ConfigParser({**bundle.config("inference"), "bundle_root": str(bundle.path)})
    return sum(each.numel() for each in parser.get_parsed_content("network_def").parameters())


def line(bundle: Bundle, evaluation: Evaluation) -> str:
    """A row of the table."""
    summary = evaluation.summary
    seconds = [each.seconds for each in evaluation.scored if each.seconds is not None]
    cells = [interval(summary[name].mean) for name in SCORES]
    missed = f"{summary['dice'].missed} of {summary['dice'].n}"
    return (
        f"| {bundle.name} | {' | '.join(cells)} | {missed} | {np.mean(seconds) if seconds else float('nan'):.2f} | "
        f"{parameters(bundle) / 1e6:.2f} |"
    )


def coarse_dice(cases: list[CaseRecord], regions: Path) -> dict[str, float]:
    """Dice of the masks that a coarse stage gave, which `evaluate` keeps, by case id."""
    found = {}
    for case in cases:
        region, _ = read_mask(regions / f"{case.case_id}.nii.gz")
        label, _ = read_mask(case.label)
        found[case.case_id] = compare_masks(case.case_id, region, label).dice
    return found


def difference(one: dict[str, float], other: dict[str, float]) -> str:
    """Mean paired difference of Dice, with a 95 % interval over cases, each a patient of its own."""
    changes = np.array([one[case_id] - other[case_id] for case_id in one])
    return interval(Resampler(list(one), REPLICATES, seed=0).estimate(ratio(changes, np.ones(len(changes)))))


def statements(dice: dict[str, dict[str, float]], cases: list[CaseRecord], out: Path) -> list[str]:
    """What issue and papers expect of two stages, as differences of Dice."""
    if "densenet_nnunet" not in dice:
        return []
    fine = dice["densenet_nnunet"]
    coarse = coarse_dice(cases, out / "densenet_nnunet" / "regions")
    lines = [
        "",
        f"densenet_nnunet: Dice of its coarse stage alone {np.mean(list(coarse.values())):.3f}; fine stage less coarse "
        f"stage {difference(fine, coarse)}.",
    ]
    if "nnunet3d" in dice:
        lines.append(f"densenet_nnunet less nnunet3d: {difference(fine, dice['nnunet3d'])}.")
    return lines


def main() -> None:
    parser = arguments(__doc__, "bundle")
    parser.add_argument("--bundles", default=",".join(bundles.all_bundles()))
    given = parser.parse_args()
    manifest = phantoms(given.out / "phantoms", given.cases, given.more)
    cases = labelled_cases(manifest, "test")
    found = [trained(name, manifest, given.preset, given.words, given.out / name) for name in given.bundles.split(",")]
    lines = []
    dice: dict[str, dict[str, float]] = {}
    for bundle in found:
        out = given.out / "evaluation" / bundle.name
        words = [f"bundle={bundle.path}", f"data={manifest}", f"out={out}", "pictures=false", "html=false"]
        commands.evaluate(Settings.of([*words, "tracking=false"]))
        evaluation = compare(cases, out / "volumes.csv")
        dice[bundle.name] = {row.case_id: row.dice for row in evaluation.rows}
        lines.append(line(bundle, evaluation))
    heading = [
        "bundle",
        "Dice",
        "NSD",
        "RVD",
        "volume MAE (mL)",
        "clean scans (mL)",
        "missed",
        "s a case",
        "M parameters",
    ]
    text = [
        f"{conditions(given, manifest)} Brackets: 95 % bootstrap interval.",
        "",
        f"| {' | '.join(heading)} |",
        f"|---|{'--:|' * (len(heading) - 1)}",
        *lines,
        *statements(dice, cases, given.out / "evaluation"),
    ]
    write_text(given.out / "bundles.md", "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
