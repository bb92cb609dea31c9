"""The command line: parse, call one function, set the exit status. Nothing heavy is imported before it is needed."""

import errno
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ich_pipeline import __version__
from ich_pipeline.errors import ConfigError, IchError, own_errors
from ich_pipeline.files import write_csv_rows

OK, SOME_FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130
# A disk that is full, over its quota or failing: the call was right, and can go on when there is room.
FOLDS = 5  # of a data set whose owners hold cases out and name none to validate on
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Tables of cases (manifests).", rich_markup_mode=None)
app.add_typer(data_app, name="data")
label_app = typer.Typer(
    no_args_is_help=True, help="MONAI Label: correct masks in 3D Slicer, and train on them.", rich_markup_mode=None
)
app.add_typer(label_app, name="label")

Words = Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="settings of the run or of the bundle")]
ScansAndWords = Annotated[
    list[str], typer.Argument(metavar="SCANS... [KEY=VALUE]...", help="NIfTI files, folders, DICOM series, manifests")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ich-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr, tracebacks too.")] = False,
) -> None:
    """Segment and measure intracranial hemorrhage on non-contrast head CT. Research use only.

    Settings are given as key=value and reach any key of a bundle's config (nested keys with a dot); values are YAML.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it says each element that it copies


def split_words(words: list[str]) -> tuple[list[Path], list[str]]:
    """Part scans from settings: what exists is a path, whatever it contains; else `key=value` is a setting.

    Raises:
        ConfigError: a word that is neither.
    """
    scans, settings = [], []
    for word in words:
        if Path(word).exists():
            scans.append(Path(word))
        elif "=" in word:
            settings.append(word)
        else:
            raise ConfigError(f"{word}: no such file or folder")
    return scans, settings


IDENTIFIERS = ["keep_identifiers=true"]  # what the option below means
KeepIdentifiers = Annotated[
    bool, typer.Option("--keep-identifiers", help="columns with patient, study and accession number of DICOM scans")
]


@app.command()
def segment(
    words: ScansAndWords,
    out: Annotated[Path, typer.Option("--out", help="folder for masks, table and pictures")],
    keep_identifiers: KeepIdentifiers = False,
) -> int:
    """Segment scans: one mask a scan, on the scan's own grid, and the table volumes.csv beside them.

    Example: ich-pipeline segment scans/ --out masks bundle=runs/cascade3d/bundle engine=openvino
    """
    from ich_pipeline import commands

    scans, settings = split_words([*words, *IDENTIFIERS * keep_identifiers])
    return commands.segment(scans, out, out / "volumes.csv", commands.Settings.of(settings))


@app.command()
def volume(
    words: ScansAndWords,
    out: Annotated[Path, typer.Option("--out", help="the table; masks, pictures and run.json go beside it")],
    masks: Annotated[bool, typer.Option("--masks", help="SCANS are masks: only measure them")] = False,
    keep_identifiers: KeepIdentifiers = False,
) -> int:
    """Measure bleeds: segment scans, then voxel volume beside ABC/2 and Tada; or measure masks that exist.

    Example: ich-pipeline volume scans/ --out volumes.csv bundle=runs/cascade3d/bundle

    Example: ich-pipeline volume masks/ --masks --out volumes.csv
    """
    from ich_pipeline import commands

    scans, words = split_words([*words, *IDENTIFIERS * keep_identifiers])
    settings = commands.Settings.of(words)
    if masks:
        return commands.measure_masks(scans, out, settings)
    return commands.segment(scans, out.parent / "masks", out, settings)


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="BASELINE FOLLOWUP [KEY=VALUE]...", help="two scans, two folders, or one manifest"),
    ],
    out: Annotated[Path, typer.Option("--out", help="the table of growth; volumes.csv and run.json go beside it")],
    masks: Annotated[bool, typer.Option("--masks", help="the scans are masks: only measure them")] = False,
) -> int:
    """Say how much a bleed grew between two scans of a patient, and whether that is expansion; or of many patients.

    Two folders are paired by file name; one manifest by its columns patient_id and timepoint.

    Example: ich-pipeline compare monday.nii.gz tuesday.nii.gz --out growth.csv bundle=runs/cascade3d/bundle

    Example: ich-pipeline compare masks/first masks/second --masks --out growth.csv criterion=strict

    Example: ich-pipeline compare cases.csv --masks --out growth.csv 'criterion=>=12.5mL or new IVH' subtypes=true
    """
    from ich_pipeline import commands

    scans, settings = split_words(words)
    return commands.compare(scans, out, commands.Settings.of(settings), masks=masks)


@app.command()
def train(words: Words) -> int:
    """Train a bundle on a manifest; the trained bundle is in OUT/bundle.

    Example: ich-pipeline train bundle=cascade3d data=phantoms/manifest.csv preset=cpu epochs=10

    Example: ich-pipeline train bundle=cascade3d out=runs/cascade3d resume=true

    Several GPUs: torchrun --nproc-per-node 2 -m ich_pipeline train bundle=cascade3d data=cases.csv
    """
    from ich_pipeline import commands

    return commands.train(commands.Settings.of(words))


@app.command()
def tune(
    words: Words,
    trials: Annotated[int, typer.Option("--trials", min=1, help="trainings, those of earlier calls included")] = 40,
) -> int:
    """Search for training settings by a genetic algorithm over whole trainings; the same command goes on.

    Example: ich-pipeline tune bundle=yolov5_transdeeplab stage=detector data=cases.csv out=tuning epochs=20 --trials 40
    """
    from ich_pipeline import commands

    return commands.tune(commands.Settings.of(words), trials)


@app.command()
def plan(
    words: Words,
    memory_gb: Annotated[float, typer.Option("--memory-gb", help="of the GPU that trains")] = 8.0,
) -> int:
    """Plan an nnU-Net for the labelled cases of a manifest: patch, spacing, topology, intensities, as readable YAML.

    With bundle=pesa_rcnn its group heights, by which each group holds as many bleeds.

    Example: ich-pipeline plan data=cases.csv out=plan.yaml
    """
    from ich_pipeline import commands

    return commands.plan(commands.Settings.of(words), memory_gb)


@app.command()
def evaluate(words: Words) -> int:
    """Segment the labelled cases of a manifest and score the masks against the labels.

    Example: ich-pipeline evaluate bundle=runs/cascade3d/bundle data=phantoms/manifest.csv split=test
    """
    from ich_pipeline import commands

    return commands.evaluate(commands.Settings.of(words))


@app.command()
def calibrate(words: Words) -> int:
    """Choose threshold, smallest lesion and temperature of a bundle on labelled scans that it did not learn from.

    Example: ich-pipeline calibrate bundle=runs/cascade3d/bundle data=cases.csv split=val
    """
    from ich_pipeline import commands

    return commands.calibrate(commands.Settings.of(words))


@app.command()
def agreement(
    table: Annotated[Path, typer.Argument(help="a CSV table, such as volumes.csv or evaluation.csv")],
    estimate: Annotated[list[str], typer.Option(help="column to judge; may be given again")],
    out: Annotated[Path, typer.Option("--out", help="folder for agreement.md, agreement.csv and plots")],
    reference: Annotated[str, typer.Option(help="column to judge it by")] = "volume_ml",
) -> int:
    """Say how well two ways of measuring agree: bias, limits, errors, correlations, crossings of 30 mL, by group.

    Example: ich-pipeline agreement volumes.csv --estimate abc2_ml --estimate tada_ml --out agreement
    """
    from ich_pipeline import commands

    return commands.agree(table, reference, estimate, out)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="folder for scans, labels and manifest")],
    cases: Annotated[int, typer.Option(min=1, help="how many")] = 24,
    seed: Annotated[int, typer.Option(help="the same seed gives the same bytes")] = 0,
    background: Annotated[Path | None, typer.Option(help="put the hemorrhages into this real scan")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    matrix: Annotated[int, typer.Option(help="pixels along each side of a slice")] = 512,
    split: Annotated[str | None, typer.Option(help="of every case; by default train, val and test")] = None,
    varied: Annotated[bool, typer.Option("--varied", help="as those that the shipped weights learnt from")] = False,
) -> int:
    """Make synthetic head CTs with hemorrhages, labels and a manifest.

    Example: ich-pipeline phantom phantoms --cases 24 --seed 0
    """
    from tqdm import tqdm

    from ich_pipeline.phantom import PhantomSettings, write_dataset
    from ich_pipeline.phantom.settings import VARIED

    settings = replace(VARIED if varied else PhantomSettings(), matrix=matrix)
    with tqdm(total=cases, desc="phantoms", unit="case", file=sys.stderr) as bar:
        write = partial(write_dataset, out, cases, seed, settings=settings, background=background, jobs=jobs)
        manifest = write(split=split, on_case=lambda case_id: bar.update())
    print(manifest)
    return OK


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo"),
    cases: Annotated[int, typer.Option(min=6, help="synthetic scans to make")] = 40,
    seed: Annotated[int, typer.Option(help="of phantoms and training")] = 0,
) -> int:
    """Run the whole main job on synthetic scans: make, train, evaluate, measure, draw. Minutes on two CPU cores.

    Example: ich-pipeline demo --out demo
    """
    from ich_pipeline.demo import run_demo

    return run_demo(out, cases, seed)


@app.command("bundles")
def list_bundles(
    json_: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> int:
    """List bundles: name, version, weights or none, description.

    Example: ich-pipeline bundles --json
    """
    from ich_pipeline.commands import list_bundles

    print(list_bundles(json_))
    return OK


@data_app.command("index")
def data_index(
    folder: Annotated[Path, typer.Argument(help="the data set as it was downloaded")],
    dataset: Annotated[str, typer.Option("--dataset", help="its layout; docs/data.md lists them")],
    out: Annotated[Path | None, typer.Option("--out", help="the manifest; by default FOLDER/manifest.csv")] = None,
    boxes: Annotated[Path | None, typer.Option("--boxes", help="a table of BHX, for cq500: boxes.csv")] = None,
    seed: Annotated[int, typer.Option(help="of the split")] = 0,
) -> int:
    """Make a manifest of a downloaded data set.

    Cases without a split are split 70/10/20 by patient; where the data set has a split without `val`, the
    others get five folds.

    Example: ich-pipeline data index Task01 --dataset nnunet --out cases.csv
    """
    from ich_pipeline.layouts import boxes_of_bhx, index_folder
    from ich_pipeline.manifest import assign_folds, split_by_patient, write_manifest

    if boxes and dataset != "cq500":
        raise ConfigError(f"--boxes with --dataset {dataset}: BHX's boxes belong to cq500")
    records = index_folder(folder, dataset)
    splits = {record.split for record in records}
    if splits == {""}:
        records = split_by_patient(records, {"train": 0.7, "val": 0.1, "test": 0.2}, seed)
    elif "val" not in splits and len({r.patient_id for r in records if r.split == "train"}) >= FOLDS:
        records = assign_folds(records, FOLDS, seed)
    target = out or folder / "manifest.csv"
    write_manifest(target, records)
    print(target)
    if boxes:
        from ich_pipeline.detection import BOX_COLUMNS

        found = boxes_of_bhx(boxes, records)
        write_csv_rows(target.parent / "boxes.csv", map(vars, found), BOX_COLUMNS)
        print(target.parent / "boxes.csv")
    return OK


@data_app.command("boxes")
def data_boxes(
    manifest: Annotated[Path, typer.Argument(help="a manifest whose cases have labels")],
    out: Annotated[
        Path | None, typer.Option("--out", help="the table; by default boxes.csv beside the manifest")
    ] = None,
    subtypes: Annotated[bool, typer.Option("--subtypes", help="labels hold the values of labels.py")] = False,
    regions: Annotated[bool, typer.Option(help="a box for every region of a slice, or one for all")] = True,
) -> int:
    """Make a table of boxes from the labels of a manifest, to train a detector on.

    Example: ich-pipeline data boxes cases.csv
    """
    from ich_pipeline.box_data import BOXES_FILE, boxes_of_labels
    from ich_pipeline.detection import write_boxes

    boxes = boxes_of_labels(manifest, subtypes=subtypes, regions=regions)
    print(write_boxes(out or manifest.with_name(BOXES_FILE), boxes))
    return OK


LabelOut = Annotated[Path, typer.Option("--out", help="folder of the server: trained versions, scores")]
LABEL_OUT = Path("runs/label")


@label_app.command("start")
def label_start(
    studies: Annotated[Path, typer.Option("--studies", help="folder of NIfTI scans; labels are kept there too")],
    bundles: Annotated[
        str | None, typer.Option("--bundles", help="names or folders, with commas; by default all that can segment")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="other than loopback only with ICH_LABEL_TOKEN")] = "127.0.0.1",
    out: LabelOut = LABEL_OUT,
    origin: Annotated[
        list[str] | None, typer.Option("--origin", help="web page that may ask, as https://viewer.example")
    ] = None,
    max_upload_mib: Annotated[int, typer.Option("--max-upload-mib", min=1, help="largest upload")] = 1024,
) -> None:
    """Serve bundles to 3D Slicer by MONAI Label, until Ctrl-C or `label stop`. Needs the extra `label`.

    Example: ich-pipeline label start --studies scans --bundles cascade3d,unet3d
    """
    from ich_pipeline import label_commands

    label_commands.start(studies, bundles, host, port, out, origin or [], max_upload_mib)


@label_app.command("stop")
def label_stop(out: LabelOut = LABEL_OUT) -> int:
    """Stop the server that was started with this folder, and everything it runs.

    Example: ich-pipeline label stop
    """
    from ich_pipeline import label_commands

    return label_commands.stop(out)


@label_app.command("versions")
def label_versions(
    name: Annotated[str | None, typer.Argument(help="model; by default every one")] = None,
    serve: Annotated[int | None, typer.Option("--serve", help="take this version of NAME from now on")] = None,
    out: LabelOut = LABEL_OUT,
) -> int:
    """List the versions of the served bundles, or take one back: 0 is the bundle that was named at the start.

    Example: ich-pipeline label versions

    Example: ich-pipeline label versions cascade3d --serve 0
    """
    from ich_pipeline import label_commands

    return label_commands.versions(name, serve, out)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 all done, 1 some cases failed, 2 the call was wrong, 130 interrupted."""
    try:
        with own_errors():
            status = app(args=argv, prog_name="ich-pipeline", standalone_mode=False)
    except IchError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_CALL
    except (PermissionError, NotADirectoryError) as error:
        print(f"error: {error.filename}: {error.strerror}. Give another path, or the right to use it.", file=sys.stderr)
        status = WRONG_CALL
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(
            f"error: {error.filename or 'writing'}: {error.strerror}. What was finished before is whole; make room, "
            "and the same command goes on (train: with resume=true).",
            file=sys.stderr,
        )
        status = SOME_FAILED
    except Exception as error:
        status = _usage(error)
    if status == INTERRUPTED:  # typer makes this status of Ctrl-C
        print("interrupted; the same command goes on where this one stopped (train: with resume=true)", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else OK)


def _usage(error: Exception) -> int:
    """Exit status of a call that typer's parser refused; any other error goes on.

    typer carries its own copy of click, so its exceptions are known by what they can do.
    """
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return WRONG_CALL
