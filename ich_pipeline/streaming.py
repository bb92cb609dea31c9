"""Training on phantoms that are made while it runs: none is stored, and each is drawn from for a while only.

A worker of the data loader makes a new phantom now and then, takes it to the model grid, and keeps the last ones in
memory; patches are drawn from these. What is drawn is a function of seed, epoch and process, so a run that is resumed
draws what it would have drawn: it only has to make the phantoms of its window again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose, RandomizableTrait
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ich_pipeline.geometry import Grid
from ich_pipeline.manifest import read_manifest
from ich_pipeline.phantom import PhantomCase, make_case
from ich_pipeline.phantom.cases import scanner_forms
from ich_pipeline.phantom.settings import STREAMED
from ich_pipeline.phantom.variety import draw_degradation
from ich_pipeline.records import NativeMask, Scan
from ich_pipeline.training import CaseSampler, Draw, n_processes, rank
from ich_pipeline.transforms import ReadMaskd, ReadScand, mask_tensor_of, tensor_of

# A part of every phantom's seed, so that no phantom of a stream is one of a set (`write_dataset` has two parts).
STREAM = 1
# Whole numbers of a background's slices that are averaged, so that a thin scan is not always thin.
SLICES_TOGETHER = (1, 2, 3, 5, 7)


class PhantomStream(Dataset[Any]):
    """Varied phantoms by number, made when they are first drawn from; draws come from a `StreamSampler`.

    Args:
        preprocessing: of files, as for `TrainingCases`; its reading steps are left out.
        augmentation: what comes before its first random transform is done once for each phantom.
        seed: of the phantoms.
        matrix: pixels along each side of a slice.
        background: a real scan that some of the phantoms are put into instead of a synthetic head.
        background_share: how many of them.
        kept: phantoms that each process keeps in memory: at least the `StreamSampler`'s window.
    """

    def __init__(
        self,
        preprocessing: Compose,
        augmentation: Compose,
        seed: int = 0,
        matrix: int = STREAMED.matrix,
        background: str | None = None,
        background_share: float = 0.15,
        kept: int = 40,
    ) -> None:
        steps = [step for step in preprocessing.transforms if not isinstance(step, ReadScand | ReadMaskd)]
        chain = Compose([*steps, augmentation]).flatten().transforms
        first = next((n for n, step in enumerate(chain) if isinstance(step, RandomizableTrait)), len(chain))
        self.once, self.each_time = Compose(chain[:first]), Compose(chain[first:])
        self.seed, self.kept = seed, kept
        self.settings = replace(STREAMED, matrix=matrix)
        self.background, self.background_share = background, background_share
        self._made: OrderedDict[int, Mapping[Any, Any]] = OrderedDict()

    def __getitem__(self, draw: Draw) -> Any:
        if draw.case not in self._made:
            self._made[draw.case] = self.prepared(draw.case)
            while len(self._made) > self.kept:
                self._made.popitem(last=False)
        self.each_time.set_random_state(seed=draw.seed)
        return self.each_time(dict(self._made[draw.case]))

    def prepared(self, number: int) -> Any:
        """The phantom of a number as its draws are cut from it: image and label (1, S, R, C) on the model grid."""
        case = self.phantom(number)
        name, forms = case.scan.case_id, case.scan.forms
        label = NativeMask((case.label > 0).astype(np.uint8), case.scan.grid)
        return self.once({"image": tensor_of(case.scan, name), "label": mask_tensor_of(label, forms, name)})

    def phantom(self, number: int) -> PhantomCase:
        """The phantom of a number, with its whole truth."""
        state = np.random.SeedSequence([self.seed, number, STREAM])
        seed = int(state.generate_state(1, np.uint64)[0])
        rng = np.random.default_rng(state.spawn(1)[0])
        if self.background is None or rng.random() >= self.background_share:
            return make_case(f"stream_{number}", seed, self.settings)
        case = make_case(f"stream_{number}", seed, self.settings, _background(self.background))
        return scanned_otherwise(case, rng)


@lru_cache(maxsize=1)
def _background(path: str) -> Scan:
    from ich_pipeline.reading import read_scan

    return read_scan(Path(path))


def scanned_otherwise(case: PhantomCase, rng: np.random.Generator) -> PhantomCase:
    """One real head as if it were several: turned over, larger or smaller, in thicker slices, by another scanner.

    Only image, label and grid are changed; a stream needs no other truth.
    """
    grid, axis = case.scan.grid, case.scan.grid.slice_axis
    together = int(rng.choice(SLICES_TOGETHER))
    scale = np.diag([rng.uniform(0.9, 1.08) * (-1 if rng.random() < 0.5 else 1), rng.uniform(0.9, 1.08), 1.0, 1.0])
    affine = scale @ grid.affine
    affine[:3, 3] += affine[:3, axis] * (together - 1) / 2
    affine[:3, axis] *= together
    image = _averaged(case.scan.image_hu.astype(np.float32), axis, together)
    share = _averaged((case.label > 0).astype(np.float32), axis, together)
    pixel_mm = float(np.mean([edge for n, edge in enumerate(grid.edge_mm) if n != axis]))
    degradation = draw_degradation(rng)
    # In the order that `apply` takes: both axes of the plane first.
    image = np.moveaxis(degradation.apply(np.moveaxis(image, axis, 2), pixel_mm, rng), 2, axis)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 4))
    changed = Grid((int(image.shape[0]), int(image.shape[1]), int(image.shape[2])), affine)
    image_hu = np.rint(np.clip(image, -1024, 3071)).astype(np.int16)
    scan = Scan(case.scan.case_id, image_hu, changed, scanner_forms(changed), case.scan.source)
    return replace(case, scan=scan, label=(share >= 0.5).astype(np.uint8))


def _averaged(values: NDArray[np.float32], axis: int, together: int) -> NDArray[np.float32]:
    """Means of whole groups of slices; a last, shorter group is left out."""
    moved = np.moveaxis(values, axis, 0)
    groups = len(moved) // together
    means = moved[: groups * together].reshape(groups, together, *moved.shape[1:]).mean(axis=1)
    return np.ascontiguousarray(np.moveaxis(means, 0, axis))


class StreamSampler(CaseSampler):
    """Which phantom is drawn from when, and with which augmentation: functions of seed, epoch and process.

    Each worker has phantoms of its own, every so many draws a new one, and draws evenly from the last ones.

    Args:
        draws: samples each process takes in one epoch; whole batches.
        batch_size: of the loader, which gives its batches to the workers in turn.
        workers: of the loader.
        seed: of the run.
        draws_per_case: after how many draws a worker makes a new phantom.
        window: how many of its last phantoms a worker draws from.
    """

    def __init__(
        self, draws: int, batch_size: int, workers: int, seed: int = 0, draws_per_case: int = 8, window: int = 32
    ) -> None:
        self.draws, self.seed, self.epoch = draws, seed, 0
        self.batch_size, self.workers = batch_size, max(workers, 1)
        self.draws_per_case, self.window = draws_per_case, window

    def __iter__(self) -> Iterator[Draw]:
        random_state = np.random.default_rng((self.seed, self.epoch, rank()))
        streams = self.workers * n_processes()
        before = max(self.epoch - 1, 0) * self.draws
        for n in range(self.draws):
            newest = (before + n) // (self.draws_per_case * self.workers)
            chosen = int(random_state.integers(max(0, newest - self.window + 1), newest + 1))
            own = n // self.batch_size % self.workers + self.workers * rank()
            yield Draw(chosen * streams + own, int(random_state.integers(2**31)))


def validation_cases(manifest: str | Path) -> dict[str, list[dict[str, str]]]:
    """No cases to train on, which a stream has itself, and those of the split `val`, dealt out to the processes."""
    records = [record for record in read_manifest(Path(manifest), require_label=True) if record.split == "val"]
    return {"train": [], "val": [record.item() for record in records[rank() :: n_processes()]]}
