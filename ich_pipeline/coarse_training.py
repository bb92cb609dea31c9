"""Cross-validation of a coarse stage, and masks that no network made of a case it was trained on.

`train.yaml` of a bundle names `train_coarse_folds`; it runs the same file with `coarse.yaml` over it, once a fold.
"""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from monai.transforms import Compose, SaveImaged
from monai.utils import set_determinism
from torch import nn

from ich_pipeline.bundles import Bundle
from ich_pipeline.engines import load_network
from ich_pipeline.errors import ManifestError
from ich_pipeline.files import sha256_of, write_csv_rows, write_json
from ich_pipeline.manifest import assign_folds, read_manifest
from ich_pipeline.networks.coarse_mask_unet import CoarseMaskUNet
from ich_pipeline.records import CaseRecord
from ich_pipeline.training import load_cases, n_processes, open_workflow, rank, training_device, wait_for_all
from ich_pipeline.transforms import NativeMaskWriter

DONE_FILE = "cases.csv"  # of a fold; written last, so a fold that has it is whole
DONE_COLUMNS = ("case_id", "fold", "mask", "weights_sha256")


def records_with_folds(manifest: Path | str, n_folds: int, seed: int) -> list[CaseRecord]:
    """Cases outside the split `test`, each with its fold: that of the manifest, or one drawn by patient.

    Raises:
        ManifestError: the manifest's folds are not 0 to n_folds - 1 for every case, or part a patient.
        ConfigError: fewer patients than folds.
    """
    records = [r for r in read_manifest(manifest, require_label=True) if r.split != "test"]
    if all(r.fold is None for r in records):
        return [r for r in assign_folds(records, n_folds, seed) if r.fold is not None]
    found = sorted({-1 if r.fold is None else r.fold for r in records})
    if found != list(range(n_folds)):
        named = ["none" if fold < 0 else str(fold) for fold in found]
        raise ManifestError(
            f"{manifest}: folds {', '.join(named)}, expected 0 to {n_folds - 1} for every case that is no test case. "
            "Give coarse_folds=, complete the column `fold`, or leave it empty to have folds drawn by patient."
        )
    fold_of: dict[str, CaseRecord] = {}
    for record in records:
        first = fold_of.setdefault(record.patient_id, record)
        if first.fold != record.fold:
            raise ManifestError(
                f"{manifest}: patient {record.patient_id!r} is in fold {first.fold} ({first.case_id}) and "
                f"{record.fold} ({record.case_id}), expected one fold for all scans of a patient."
            )
    return records


def load_fold(manifest: Path | str, fold: int, n_folds: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Cases of one fold of the coarse stage: it validates, and all others train. See `load_cases`.

    Raises:
        ManifestError: as `records_with_folds`, or fewer cases in the fold than processes.
    """
    records = records_with_folds(manifest, n_folds, seed)
    train, val = ([r for r in records if (r.fold == fold) == wanted] for wanted in (False, True))
    if len(val) < n_processes():
        raise ManifestError(
            f"{manifest}: {len(val)} cases in fold {fold} for {n_processes()} processes; expected at least one for "
            "each. Start fewer processes or give fewer coarse_folds=."
        )
    return {
        name: [r.item() for r in chosen] for name, chosen in (("train", train), ("val", val[rank() :: n_processes()]))
    }


def train_coarse_folds(
    bundle_root: str, manifest: str, n_folds: int, seed: int, threshold: float, device: str, folder: str, resume: bool
) -> Path:
    """Train the coarse stage once a fold, and write each case's mask by the network that has not seen it.

    Args:
        bundle_root: a prepared bundle, with `coarse.yaml`.
        manifest: of the run.
        n_folds: how many.
        seed: of folds and training.
        threshold: probability above which a voxel of the scan belongs to its coarse mask.
        device: see `pick_device`.
        folder: gets `fold_N/` with the weights, the last state and cases.csv, and `masks/`.
        resume: go on: what is whole is kept.

    Returns:
        The folder. The random state is that of `seed`, whatever had to be done.
    """
    target = Path(folder)
    if rank() == 0 and not resume:
        shutil.rmtree(target, ignore_errors=True)
    wait_for_all()
    records = records_with_folds(manifest, n_folds, seed)
    for fold in range(n_folds):
        home = target / f"fold_{fold}"
        if (home / DONE_FILE).is_file():
            continue
        network, inferer = _train_fold(Path(bundle_root), home, fold, resume, data=manifest, seed=seed, device=device)
        if rank() == 0:
            held_out = [r for r in records if r.fold == fold]
            _write_masks(Bundle(Path(bundle_root)), network, inferer, held_out, target / "masks", threshold, device)
            weights_sha256 = sha256_of(home / "models" / "model.pt")
            rows = [
                {
                    "case_id": r.case_id,
                    "fold": fold,
                    "mask": f"../masks/{r.case_id}.nii.gz",
                    "weights_sha256": weights_sha256,
                }
                for r in held_out
            ]
            write_csv_rows(home / DONE_FILE, rows, DONE_COLUMNS)
        wait_for_all()
    set_determinism(seed=seed)
    return target


def _train_fold(bundle: Path, home: Path, fold: int, resume: bool, **settings: Any) -> tuple[nn.Module, Inferer]:
    """`train_stage` for one fold."""
    return train_stage(bundle, home, resume, coarse_fold=fold, **settings)


def train_stage(bundle: Path, home: Path, resume: bool, **settings: Any) -> tuple[nn.Module, Inferer]:
    """Train a stage: `train.yaml` of a prepared bundle with `coarse.yaml` over it.

    Args:
        bundle: its folder.
        home: gets `models/model.pt`, with its hash in `configs/metadata.json`, and `training_state.pt`.
        resume: go on from that state.
        **settings: keys with their values; `device` among them.

    Returns:
        The network with the best weights, and the inferer that validated it.
    """
    weights = home / "models" / "model.pt"
    metadata_file = home / "configs" / "metadata.json"
    if rank() == 0 and not metadata_file.is_file():
        write_json(metadata_file, Bundle(bundle).metadata | {"weights_sha256": None})
    wait_for_all()
    workflow = open_workflow(
        bundle,
        ["coarse"],
        **settings,
        resume=resume,
        weights=str(weights),
        state_file=str(home / "training_state.pt"),
    )
    workflow.initialize()
    workflow.parser.get_parsed_content("train#trainer").run()
    wait_for_all()  # rank 0 writes the weights
    network = workflow.parser.get_parsed_content("network_def")
    inferer = workflow.parser.get_parsed_content("validate#inferer")
    workflow.finalize()
    return load_network(network, weights, training_device(settings["device"])), inferer


def _write_masks(
    bundle: Bundle,
    network: nn.Module,
    inferer: Inferer,
    records: Sequence[CaseRecord],
    masks: Path,
    threshold: float,
    device: str,
) -> None:
    """Masks on the scans' own grids, made as `inference.yaml` makes them."""
    parser = ConfigParser({**bundle.config("inference"), "bundle_root": str(bundle.path), "threshold": threshold})
    preprocessing = parser.get_parsed_content("preprocessing")
    steps = parser.get_parsed_content("postprocessing").transforms
    restoring = Compose([step for step in steps if not isinstance(step, SaveImaged)])
    writer = NativeMaskWriter()
    for record in records:
        data = preprocessing(record.item())
        data["pred"] = inferer(data["image"][None].to(training_device(device)), network)[0].cpu()
        mask = restoring(data)["pred"]
        writer.set_data_array(mask)
        writer.set_metadata(mask.meta)
        writer.write(masks / f"{record.case_id}.nii.gz")


def load_cases_with_masks(
    manifest: str | Path | None, folder: str | Path, fold: int | None = None
) -> dict[str, list[dict[str, str]]]:
    """`load_cases`, each case with `coarse`: its mask by the network of the fold that held it out.

    Args:
        manifest: see `load_cases`.
        folder: that of `train_coarse_folds`.
        fold: see `load_cases`.
    """
    cases = load_cases(manifest, fold)
    mask_of: dict[str, Path] = {}
    done = list(Path(folder).glob(f"fold_*/{DONE_FILE}"))
    for file in done:
        with file.open(newline="") as stream:
            mask_of |= {row["case_id"]: (file.parent / row["mask"]).resolve() for row in csv.DictReader(stream)}
    assert manifest is not None  # load_cases refuses it
    held = [r for r in read_manifest(manifest) if r.case_id in mask_of]
    # One folder of DICOM may be two cases that name their series.
    path_of = {(str(r.image), r.series): str(mask_of[r.case_id]) for r in held}
    return {
        name: [case | {"coarse": path_of[case["image"], case.get("series")]} for case in chosen]
        for name, chosen in cases.items()
    }


def with_coarse_stage(network: CoarseMaskUNet, folder: str | Path, device: torch.device) -> CoarseMaskUNet:
    """The network with the weights of every fold in its coarse stage."""
    for fold, coarse in enumerate(network.coarse_stage.networks):
        load_network(coarse, Path(folder) / f"fold_{fold}" / "models" / "model.pt", device)
    return network.to(device)
