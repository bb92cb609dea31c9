"""A folder of phantoms: scans, labels, edema, brain masks, boxes and a manifest.

A case is drawn from (seed, index) alone, so that case 7 is the same in a set of 10 and of 100, on one process or many.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from tqdm import tqdm

from ich_pipeline import __version__
from ich_pipeline.detection import BOX_COLUMNS
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import atomic_path, sha256_of, write_csv_rows, write_json
from ich_pipeline.labels import Subtype
from ich_pipeline.manifest import PHANTOM_FILE
from ich_pipeline.phantom.cases import make_case
from ich_pipeline.phantom.settings import STREAMED, PhantomCase, PhantomSettings
from ich_pipeline.records import Scan
from ich_pipeline.restoring import write_mask

DEFAULT = PhantomSettings()
# 6:1:3 in every ten of the clean and of the bleeding, and one of each split among the first three.
SPLITS = ("train", "test", "val", "train", "train", "test", "train", "train", "test", "train")
FOLDS = 5
VALIDATION_CASES, VALIDATION_SEED = 24, 90_001
MANIFEST_COLUMNS = (
    *("case_id", "patient_id", "image", "label", "split", "fold", "subtype", "edema", "brain", "volume_ml"),
    *(f"{s.name.lower()}_ml" for s in Subtype),
    *("edema_ml", "slice_mm", "tilt_deg", "age"),
)


def write_dataset(
    out: Path,
    cases: int,
    seed: int = 0,
    *,
    settings: PhantomSettings = DEFAULT,
    background: Path | None = None,
    jobs: int = 2,
    split: str | None = None,
    on_case: Callable[[str], object] | None = None,
    make: Callable[..., PhantomCase] = make_case,
) -> Path:
    """Write phantoms with everything known about them. Cases that are there already are kept.

    Args:
        out: folder; gets images/, labels/, edema/, brain/, truth/, boxes.csv, manifest.csv and phantom.json.
        cases: how many. A larger number than last time adds cases, a smaller one shortens the tables only.
        seed: of the set.
        background: a real scan (NIfTI file or DICOM folder) to put the hemorrhages into. All cases are then one
            patient's, and all are in the split `test`.
        jobs: processes.
        split: of every case; None parts them 6 : 3 : 1.
        on_case: called with the id of each case that is ready, in the order of readiness.
        make: what makes a case, a function of a module that takes what `make_case` takes.

    Returns:
        The manifest. Its volumes are continuous (shares of voxels); `subtype` names what the label holds, or `none`.

    Raises:
        ConfigError: the folder holds another set, or numbers that cannot be.
        ReadError: the background is no head CT, or no brain is found in it.
    """
    out = Path(out)
    if cases < 1 or jobs < 1 or seed < 0:
        raise ConfigError(f"phantom: cases={cases}, jobs={jobs}, seed={seed}; expected at least 1, 1 and 0.")
    _claim(out, seed, settings, background, None if make is make_case else make.__name__)
    ids = [f"phantom_{index:04d}" for index in range(cases)]
    missing = [index for index in range(cases) if not _truth_file(out, ids[index]).is_file()]
    for index in sorted(set(range(cases)) - set(missing)):
        if on_case:
            on_case(ids[index])
    write = partial(_write_case, out=out, seed=seed, settings=settings, background=background, make=make)
    for index in _each(write, missing, jobs):
        if on_case:
            on_case(ids[index])
    truths = [json.loads(_truth_file(out, case_id).read_text()) for case_id in ids]
    write_csv_rows(out / "boxes.csv", (box for truth in truths for box in truth["boxes"]), BOX_COLUMNS)
    manifest = out / "manifest.csv"
    write_csv_rows(manifest, [_row(i, truth, settings, split) for i, truth in enumerate(truths)], MANIFEST_COLUMNS)
    return manifest


def is_clean(index: int, fraction: float) -> bool:
    """Whether a case has no hemorrhage: spread evenly, so that a small set has its share too."""
    return _clean_before(index + 1, fraction) > _clean_before(index, fraction)


def _clean_before(index: int, fraction: float) -> int:
    return int(np.floor(index * fraction + 1e-9))


def _split_and_fold(index: int, fraction: float) -> tuple[str, int]:
    """By rank among the clean, or the bleeding, cases: every split gets both, and more cases move none."""
    clean_before = _clean_before(index, fraction)
    rank = clean_before if is_clean(index, fraction) else index - clean_before
    return SPLITS[rank % len(SPLITS)], rank % FOLDS


def _claim(out: Path, seed: int, settings: PhantomSettings, background: Path | None, kind: str | None) -> None:
    """Write phantom.json, or compare it with the one there.

    Raises:
        ConfigError: another set, or files that no phantom.json explains.
    """
    wanted = {
        "version": __version__,
        "seed": seed,
        "kind": kind,
        "settings": settings.as_json(),
        "background": {"name": background.name, "sha256": sha256_of(background)} if background else None,
    }
    file = out / PHANTOM_FILE
    if file.is_file():
        found = json.loads(file.read_text())
        different = [key for key in wanted if found.get(key) != json.loads(json.dumps(wanted[key]))]
        if different:
            raise ConfigError(
                f"{out} holds phantoms of another {', '.join(different)}; expected the same to go on. Give another "
                "folder, or remove this one."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no phantom.json. Give a new or an empty folder.")
    write_json(file, wanted)


def _each(make: Callable[[int], int], indices: list[int], jobs: int) -> Iterator[int]:
    """Run `make` for every index; results as they come. New processes are spawned: a fork would copy threads' locks."""
    if jobs == 1 or len(indices) < 2:
        yield from map(make, indices)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(indices)), mp_context=context) as pool:
        futures = [pool.submit(make, index) for index in indices]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_validation_phantoms(folder: Path, cases: int = VALIDATION_CASES) -> Path:
    """The manifest of varied phantoms to validate a stream on (streaming.py), all in the split `val`; made once.

    Raises:
        ConfigError: the folder holds another set.
    """
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        with tqdm(total=cases, desc="phantoms", unit="case", file=sys.stderr) as bar:
            make = partial(write_dataset, folder, cases, VALIDATION_SEED, settings=STREAMED, split="val")
            make(on_case=lambda case_id: bar.update())
    return manifest


def _write_case(
    index: int,
    *,
    out: Path,
    seed: int,
    settings: PhantomSettings,
    background: Path | None,
    make: Callable[..., PhantomCase],
) -> int:
    """Make and write one case; its truth comes last and says that the rest is whole."""
    case_id = f"phantom_{index:04d}"
    own_seed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    own = replace(settings, clean_fraction=float(is_clean(index, settings.clean_fraction)))
    case = make(case_id, own_seed, own, _background(background) if background else None)
    write_image(out / "images" / f"{case_id}.nii.gz", case.scan)
    masks = {"labels": case.label, "edema": case.edema.view(np.uint8), "brain": case.brain.view(np.uint8)}
    for folder, mask in masks.items():
        write_mask(out / folder / f"{case_id}.nii.gz", mask, case.scan.grid, case.scan.forms)
    patient = f"background_{background.name.split('.')[0]}" if background else case_id
    write_json(_truth_file(out, case_id), _truth(case_id, patient, case))
    return index


@lru_cache(maxsize=1)
def _background(path: Path) -> Scan:
    from ich_pipeline.reading import read_scan

    return read_scan(path)


def _truth(case_id: str, patient_id: str, case: PhantomCase) -> dict[str, Any]:
    held = [s.name for s in Subtype if (case.label == s).any()]
    described = {"case_id": case_id, "patient_id": patient_id, "subtype": "+".join(held) or "none"}
    return described | case.truth | {"boxes": [asdict(box) for box in case.boxes]}


def _truth_file(out: Path, case_id: str) -> Path:
    return out / "truth" / f"{case_id}.json"


def _row(index: int, truth: dict[str, Any], settings: PhantomSettings, split: str | None) -> dict[str, Any]:
    case_id = truth["case_id"]
    own, fold = _split_and_fold(index, settings.clean_fraction)
    volumes = {f"{name.lower()}_ml": f"{ml:.5f}" for name, ml in truth["volume_ml"].items()}
    return {
        "case_id": case_id,
        "patient_id": truth["patient_id"],
        "image": f"images/{case_id}.nii.gz",
        "label": f"labels/{case_id}.nii.gz",
        "split": split or ("test" if truth["background"] else own),
        "fold": None if truth["background"] else fold,
        "subtype": truth["subtype"],
        "edema": f"edema/{case_id}.nii.gz",
        "brain": f"brain/{case_id}.nii.gz",
        "volume_ml": f"{sum(truth['volume_ml'].values()):.5f}",
        "edema_ml": f"{truth['edema_ml']:.5f}",
        "slice_mm": truth["slice_mm"],
        "tilt_deg": truth["tilt_deg"],
        "age": truth["age"],
    } | volumes


def write_image(path: Path, scan: Scan) -> None:
    """An int16 NIfTI file in HU with the scan's forms; the same scan gives the same bytes."""
    image = nib.Nifti1Image(np.rint(scan.image_hu).astype(np.int16), scan.grid.affine)
    image.set_sform(scan.forms.sform, scan.forms.sform_code)
    image.set_qform(scan.forms.qform, scan.forms.qform_code)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        temporary.write_bytes(igzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
