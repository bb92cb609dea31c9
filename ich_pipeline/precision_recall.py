"""Precision-recall curves of voxels, from histograms of their probability: exact for eight-bit probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.bootstrap import REPLICATES, Estimate, Floats, Resampler

LEVELS = 256  # of a probability that was written as uint8


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """All voxels of a cohort, weighted by their volume, positives and negatives together.

    Attributes:
        precision, recall: (257,) at falling thresholds from above 255 to 0; the first precision is 1.
        average_precision: sum of precision over the steps of recall, with its interval over patients.
        n: cases.
    """

    precision: Floats
    recall: Floats
    average_precision: Estimate
    n: int


def score_histogram(probability: NDArray[np.uint8], label: NDArray[np.generic]) -> NDArray[np.int64]:
    """(2, 256) counts of voxels by probability: background, blood."""
    blood = np.bincount(probability[label != 0], minlength=LEVELS)
    # All voxels in the order of memory: picking the background out would copy nearly all of them.
    return np.stack([np.bincount(probability.ravel(order="K"), minlength=LEVELS) - blood, blood])


def average_precision(histogram: NDArray[np.int64]) -> float:
    """Sum of precision over the steps of recall; NaN without blood. The same number as scikit-learn's."""
    return float(_average_precision(histogram.astype(np.float64)[None], np.ones((1, 1)))[0])


def precision_recall(
    histograms: Sequence[NDArray[np.int64]],
    voxel_volumes_ml: Sequence[float],
    patient_ids: Sequence[str],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> PrecisionRecall:
    """Curve of a cohort: voxels of all cases pooled, a millilitre counting the same in every scan.

    Args:
        histograms: (2, 256) each.
        voxel_volumes_ml: of each case.
        patient_ids: what the bootstrap resamples.
    """
    weighted = np.array([h * ml for h, ml in zip(histograms, voxel_volumes_ml, strict=True)]).reshape(-1, 2, LEVELS)
    precision, recall = _curve(weighted, np.ones((1, len(weighted))))
    resampler = Resampler(patient_ids, replicates, seed)
    estimate = resampler.estimate(partial(_average_precision, weighted))
    return PrecisionRecall(
        np.concatenate([[1.0], precision[0]]), np.concatenate([[0.0], recall[0]]), estimate, len(weighted)
    )


def _curve(histograms: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Precision and recall (replicates, 256) at thresholds 255 to 0, for cases drawn `counts` (replicates, n) times."""
    pooled = np.tensordot(counts, histograms, axes=1)[..., ::-1].cumsum(axis=-1)
    false, true = pooled[:, 0], pooled[:, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(true + false > 0, true / (true + false), 1.0)
        return precision, true / true[:, -1:]


def _average_precision(histograms: Floats, counts: Floats) -> Floats:
    precision, recall = _curve(histograms, counts)
    return np.asarray((np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1))
