"""Which scan to look at next: scores of every scan, kept in one file, and the order they give."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import ConfigError, reason
from ich_pipeline.files import write_json
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.records import CaseRecord

UNCERTAINTY, NEAR_THRESHOLD, DISAGREEMENT = "uncertainty", "near_threshold", "disagreement"
STRATEGIES = {
    UNCERTAINTY: "the scan that its model is least sure of: entropy of the probability, summed over the scan",
    NEAR_THRESHOLD: "the scan whose predicted volume is nearest a threshold, by default 30 mL (threshold_ml)",
    DISAGREEMENT: "the scan of which the models' masks differ most, in mL",
}
SCORING = "ich"  # name of the method that fills the file of scores
Scores = dict[str, dict[str, Any]]
# Rows of voxels whose entropy is taken at a time: float64 copies of a whole thin-slice scan are gigabytes.
ROWS = 64


def entropy_ml(probability: NDArray[np.floating], grid: Grid) -> float:
    """Shannon entropy of a foreground probability in bits, summed over voxels, times their volume.

    A voxel at one half counts whole, a sure one not at all: how much volume is undecided. Not a mean over the scan,
    which would fall with every slice of air around the head.
    """
    bits = np.zeros(1)
    for first in range(0, probability.shape[0], ROWS):
        p = probability[first : first + ROWS].astype(np.float64)
        p = p[(p > 0) & (p < 1)]
        bits += -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum()
    return float(bits[0]) * grid.voxel_volume_mm3 / 1000


def disagreement_ml(masks: Sequence[NDArray[np.generic]], grid: Grid) -> float:
    """Volume that some masks hold and others do not."""
    some, every = masks[0] != 0, masks[0] != 0
    for mask in masks[1:]:
        some, every = some | (mask != 0), every & (mask != 0)
    return grid.foreground_ml(some & ~every)


def stamp(image: Path) -> list[int]:
    """Size and time of a file, by which a scan that was replaced is known."""
    found = image.stat()
    return [found.st_size, found.st_mtime_ns]


def read_scores(path: Path) -> Scores:
    """Scores by image id; none where no file is."""
    return json.loads(path.read_text()) if path.is_file() else {}


def stale(scores: Scores, images: Mapping[str, Path], weights: Mapping[str, str | None]) -> list[str]:
    """Ids of the images without scores, or with those of another file or of other weights.

    Args:
        scores: what there is.
        images: by id.
        weights: SHA-256 by model, None of one that needs none.
    """
    return [
        name
        for name, path in images.items()
        if name not in scores or scores[name]["weights"] != dict(weights) or scores[name]["file"] != stamp(path)
    ]


def score_images(
    path: Path, images: Mapping[str, Path], segmenters: Mapping[str, Segmenter], on_image: Callable[[str], object]
) -> int:
    """Score the images that have no scores of these weights; the file is whole after each.

    A scan that cannot be segmented keeps the reason as its `error`.

    Returns:
        How many were scored.
    """
    scores = {name: score for name, score in read_scores(path).items() if name in images}
    weights = {name: segmenter.weights_sha256 for name, segmenter in segmenters.items()}
    todo = stale(scores, images, weights)
    for name in todo:
        scores[name] = {"file": stamp(images[name]), "weights": weights} | _score(name, images[name], segmenters)
        write_json(path, scores)
        on_image(name)
    return len(todo)


def _score(name: str, image: Path, segmenters: Mapping[str, Segmenter]) -> dict[str, Any]:
    models, masks = {}, []
    try:
        for model, segmenter in segmenters.items():
            found = segmenter.segment(segmenter.read(CaseRecord(name, image)))
            grid = found.scan.grid
            models[model] = {
                "entropy_ml": round(entropy_ml(found.probability, grid), 6),
                "volume_ml": round(grid.foreground_ml(found.mask.values), 6),
            }
            masks.append(found.mask.values)
        return {"models": models, "disagreement_ml": round(disagreement_ml(masks, grid), 6)}
    except Exception as error:  # one bad scan does not keep the others from being scored
        return {"error": reason(error)}


def ranked(
    scores: Scores, images: Iterable[str], strategy: str, *, model: str, threshold_ml: float
) -> list[tuple[str, float]]:
    """Image ids with what the strategy looks at in mL, the first to look at first; those without scores are left out.

    Args:
        scores: as `score_images` left them.
        images: ids that come into question.
        strategy: a name of STRATEGIES.
        model: whose uncertainty and volume.
        threshold_ml: of `near_threshold`.

    Raises:
        ConfigError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"no strategy {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    known = [(name, scores[name]) for name in sorted(images) if model in scores.get(name, {}).get("models", {})]
    if strategy == DISAGREEMENT:
        values = [(name, score["disagreement_ml"]) for name, score in known]
    elif strategy == UNCERTAINTY:
        values = [(name, score["models"][model]["entropy_ml"]) for name, score in known]
    else:
        values = [(name, abs(score["models"][model]["volume_ml"] - threshold_ml)) for name, score in known]
        return sorted(values, key=lambda item: item[1])
    return sorted(values, key=lambda item: -item[1])
