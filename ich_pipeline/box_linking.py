"""Boxes of neighbouring slices joined to lesions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ich_pipeline.detection import ScoredBox


@dataclass(frozen=True)
class BoxLesion:
    """Boxes that hang together through a case's slices.

    Attributes:
        subtype: the one with the largest sum of scores.
        score: of the surest box.
        boxes: by slice, then by score.
    """

    case_id: str
    subtype: str
    score: float
    boxes: tuple[ScoredBox, ...]

    @property
    def n_slices(self) -> int:
        """Slices that hold a box of it."""
        return len({box.slice for box in self.boxes})


def link_boxes(boxes: Sequence[ScoredBox], *, min_overlap: float = 0.25, min_slices: int = 1) -> list[BoxLesion]:
    """Lesions of boxes: two in neighbouring slices belong together when they overlap, whatever their subtypes.

    Args:
        boxes: of any cases.
        min_overlap: share of the smaller box that must lie in the other. Not IoU: a bleed tapers off.
        min_slices: lesions in fewer slices are dropped as ghosts. On slices of 5 mm and more, 2 drops small bleeds too.

    Returns:
        By case, first slice, and score.
    """
    held = sorted(boxes, key=lambda box: (box.case_id, box.slice, -box.score, box.i0, box.j0, box.i1, box.j1))
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for n, box in enumerate(held):
        places[box.case_id, box.slice].append(n)
    pairs = [
        (n, m)
        for (case_id, k), here in places.items()
        for n in here
        for m in places.get((case_id, k + 1), ())
        if overlap_of_smaller(held[n], held[m]) >= min_overlap
    ]
    one, other = np.array(pairs, dtype=int).reshape(-1, 2).T
    joined = coo_array((np.ones(len(one)), (one, other)), shape=(len(held), len(held)))
    numbers = connected_components(joined, directed=False)[1] if held else []
    lesions: dict[int, list[ScoredBox]] = defaultdict(list)
    for box, number in zip(held, numbers, strict=True):
        lesions[int(number)].append(box)
    found = [_lesion(each) for each in lesions.values()]
    kept = [lesion for lesion in found if lesion.n_slices >= min_slices]
    return sorted(kept, key=lambda lesion: (lesion.case_id, lesion.boxes[0].slice, -lesion.score))


def overlap_of_smaller(one: ScoredBox, other: ScoredBox) -> float:
    """Share of the smaller box that lies in the other, 0 to 1, whatever slices they are in."""
    rows = min(one.i1, other.i1) - max(one.i0, other.i0)
    columns = min(one.j1, other.j1) - max(one.j0, other.j0)
    smaller = min((box.i1 - box.i0) * (box.j1 - box.j0) for box in (one, other))
    return max(rows, 0) * max(columns, 0) / smaller


def _lesion(boxes: Sequence[ScoredBox]) -> BoxLesion:
    score_of: dict[str, float] = defaultdict(float)
    for box in boxes:
        score_of[box.subtype] += box.score
    subtype = max(sorted(score_of), key=score_of.__getitem__)
    return BoxLesion(boxes[0].case_id, subtype, max(box.score for box in boxes), tuple(boxes))
