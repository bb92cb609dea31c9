"""The arithmetic of YOLOv5: anchors, target assignment, loss, decoding, and what remains after suppression.

Written from the published description (Jocher et al., YOLOv5, doi 10.5281/zenodo.4679653: figures and formulas of its
documentation, and the papers that it names); none of its code was copied. Boxes are (row0, column0, row1, column1),
in pixels; overlap and suppression are torchvision's, which are the same with rows and columns exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, complete_box_iou_loss, nms

from ich_pipeline.errors import ManifestError
from ich_pipeline.labels import Subtype

ANY_CLASS = len(Subtype)  # of a box without subtype; subtypes are 0 to 4 in the order of labels.Subtype
ASSIGN_RATIO = 4.0  # an anchor answers for a box whose sides are at most so much longer or shorter
MAX_CANDIDATES = 5000  # boxes of one slice that are compared with each other, the surest


def decode(raw: Tensor, anchors_px: Tensor, stride: int) -> Tensor:
    """Boxes that a head's numbers stand for.

    A centre lies up to half a cell outside its cell, a side is 0 to 4 anchors long: (2 s(t) - 1/2 + cell) stride and
    (2 s(t))^2 anchor, with the logistic s.

    Args:
        raw: (..., A, H, W, 4 or more) of one level: row, column, height, width first.
        anchors_px: (A, 2) height and width.
        stride: pixels between cells.

    Returns:
        (..., A, H, W, 4) boxes in pixels.
    """
    rows, columns = raw.shape[-3:-1]
    cells = torch.stack(
        torch.meshgrid(torch.arange(rows, device=raw.device), torch.arange(columns, device=raw.device), indexing="ij"),
        dim=-1,
    )
    place = raw[..., :4].float().sigmoid() * 2
    centre = (place[..., :2] - 0.5 + cells) * stride
    size = place[..., 2:] ** 2 * anchors_px[:, None, None, :]
    return box_convert(torch.cat([centre, size], dim=-1), "cxcywh", "xyxy")


@dataclass(frozen=True, eq=False)
class Assigned:
    """Cells of one level that answer for boxes, (M,) each; `boxes` (M, 4), `classes` (M,)."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    boxes: Tensor
    classes: Tensor


def assign(
    targets: Tensor, anchors_px: Tensor, shape: tuple[int, int], stride: int, ratio: float = ASSIGN_RATIO
) -> Assigned:
    """Which anchors and cells of a level answer for which boxes.

    Every anchor whose sides differ from the box's by less than `ratio` answers, in the cell that holds the centre and
    in the nearer neighbour along either axis, if it is on the grid.

    Args:
        targets: (T, 6) image, class, box in pixels.
        anchors_px: (A, 2).
        shape: cells along rows and columns.
        stride: pixels between cells.
    """
    boxes = box_convert(targets[:, 2:], "xyxy", "cxcywh")
    shares = boxes[:, None, 2:] / anchors_px[None]
    anchor_fits = torch.maximum(shares, 1 / shares).amax(dim=-1) < ratio
    which, anchor = torch.nonzero(anchor_fits, as_tuple=True)
    centre = boxes[which, :2] / stride
    limit = torch.tensor(shape, device=targets.device)
    cell = torch.minimum(centre.long(), limit - 1)
    side = torch.where(centre - cell < 0.5, -1, 1)  # towards the nearer neighbour, along each axis
    steps = torch.zeros(3, len(which), 2, dtype=torch.long, device=targets.device)
    steps[1, :, 0], steps[2, :, 1] = side[:, 0], side[:, 1]
    cells = cell + steps
    held = ((cells >= 0) & (cells < limit)).all(dim=-1)
    chosen = torch.arange(len(which), device=targets.device).expand(3, -1)[held]
    row, column = cells[held].unbind(dim=-1)
    origin = targets[which[chosen]]
    return Assigned(origin[:, 0].long(), anchor[chosen], row, column, origin[:, 2:], origin[:, 1].long())


@dataclass(frozen=True)
class LossWeights:
    """Shares of the three losses, and of objectness by level from the finest."""

    box: float = 0.05
    objectness: float = 1.0
    subtype: float = 0.03
    levels: tuple[float, ...] = (4.0, 1.0, 0.4)


def yolo_loss(
    heads: Sequence[Tensor], targets: Tensor, anchors_px: Tensor, strides: Sequence[int], weights: LossWeights
) -> dict[str, Tensor]:
    """Complete IoU, objectness and subtype losses.

    Objectness is taught the complete IoU of the box that its cell gives; a box without subtype (ANY_CLASS) teaches
    nothing about subtypes.

    Args:
        heads: (B, A, H, W, 5 + K) of each level.
        targets: (T, 6) image, class, box in pixels.
        anchors_px: (levels, A, 2).

    Returns:
        `box`, `objectness`, `subtype`: scalars, weighted; their sum is the loss.
    """
    total = {name: heads[0].new_zeros((), dtype=torch.float32) for name in ("box", "objectness", "subtype")}
    for level, (head, stride) in enumerate(zip(heads, strides, strict=True)):
        raw = head.float()
        found = assign(targets, anchors_px[level], (raw.shape[2], raw.shape[3]), stride)
        at = (found.image, found.anchor, found.row, found.column)
        wanted = raw.new_zeros(raw.shape[:-1])
        if len(found.image):
            held = decode(raw, anchors_px[level], stride)[at]
            away = complete_box_iou_loss(held, found.boxes.float(), reduction="none")
            total["box"] = total["box"] + weights.box * away.mean()
            # Several boxes may want one cell: the best fit counts, whatever their order.
            overlap = (1 - away.detach()).clamp(min=0)
            wanted.view(-1).scatter_reduce_(0, _flat_index(at, wanted.shape), overlap, "amax")
            total["subtype"] = total["subtype"] + weights.subtype * _subtype_loss(raw[at][:, 5:], found.classes)
        told = F.binary_cross_entropy_with_logits(raw[..., 4], wanted)
        total["objectness"] = total["objectness"] + weights.objectness * weights.levels[level] * told
    return total


def _flat_index(at: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    index = torch.zeros_like(at[0])
    for part, size in zip(at, shape, strict=True):
        index = index * size + part
    return index


def _subtype_loss(logits: Tensor, classes: Tensor) -> Tensor:
    known = classes != ANY_CLASS
    if not logits.shape[1] or not bool(known.any()):
        return logits.sum() * 0
    wanted = F.one_hot(classes[known], logits.shape[1]).float()
    return F.binary_cross_entropy_with_logits(logits[known], wanted)


def detections(
    heads: Sequence[Tensor],
    anchors_px: Tensor,
    strides: Sequence[int],
    *,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
    by_class: bool = False,
) -> list[Tensor]:
    """Boxes of every image after non-maximum suppression, the surest first.

    A box has one class, its likeliest; its score is objectness times that class's probability. Without classes it is
    objectness, and the class ANY_CLASS.

    Args:
        heads: as for `yolo_loss`.
        by_class: boxes of different classes do not suppress each other.

    Returns:
        For each image (N, 6): box clipped to the image, score, class.
    """
    limit = [heads[0].shape[2] * strides[0], heads[0].shape[3] * strides[0]]
    boxes = [decode(head, anchors_px[n], strides[n]).flatten(1, 3) for n, head in enumerate(heads)]
    rest = torch.cat([head[..., 4:].float().sigmoid().flatten(1, 3) for head in heads], dim=1)
    found = []
    for box, numbers in zip(torch.cat(boxes, dim=1), rest, strict=True):
        if numbers.shape[1] > 1:
            share, kind = numbers[:, 1:].max(dim=1)
        else:
            share, kind = torch.ones_like(numbers[:, 0]), torch.full_like(numbers[:, 0], ANY_CLASS, dtype=torch.long)
        score = numbers[:, 0] * share
        sure = torch.nonzero(score > score_threshold)[:, 0]
        sure = sure[score[sure].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
        rows = box[sure].clamp(min=0)
        rows = torch.minimum(rows, rows.new_tensor(limit * 2))
        kept = batched_nms(rows, score[sure], kind[sure], nms_iou) if by_class else nms(rows, score[sure], nms_iou)
        kept = kept[:max_detections]
        found.append(torch.cat([rows[kept], score[sure][kept, None], kind[sure][kept, None].float()], dim=1))
    return found


def fit_anchors(
    sizes_px: NDArray[np.floating], n_anchors: int, *, generations: int = 300, seed: int = 0
) -> NDArray[np.float64]:
    """Anchors for boxes: k-means on their sides, then random changes that are kept when they fit better.

    The fitness is the mean over boxes of the best anchor's worst side ratio, where it is above 1 / ASSIGN_RATIO.

    Args:
        sizes_px: (N, 2) heights and widths.

    Returns:
        (n_anchors, 2), by area.

    Raises:
        ManifestError: no boxes.
    """
    if not len(sizes_px):
        raise ManifestError("no boxes to fit anchors to, expected some in the cases with split=train.")
    sizes = np.maximum(np.asarray(sizes_px, dtype=np.float64), 2.0)
    rng = np.random.default_rng(seed)
    spread = sizes.std(axis=0) + 1e-9
    # Fewer different boxes than anchors: as many again, a little larger or smaller.
    drawn = sizes if len(np.unique(sizes, axis=0)) >= n_anchors else np.tile(sizes, (n_anchors, 1))
    if drawn is not sizes:
        drawn = drawn * rng.uniform(0.8, 1.25, drawn.shape)
        spread = drawn.std(axis=0) + 1e-9
    best = kmeans2(drawn / spread, n_anchors, minit="++", seed=rng)[0] * spread
    fitness = anchor_fitness(sizes, best)
    for _ in range(generations):
        factor = np.where(rng.random(best.shape) < 0.5, np.exp(rng.normal(0, 0.1, best.shape)), 1.0)
        changed = np.maximum(best * factor, 2.0)
        value = anchor_fitness(sizes, changed)
        if value > fitness:
            best, fitness = changed, value
    return best[np.argsort(best.prod(axis=1))]


def anchor_fitness(sizes_px: NDArray[np.floating], anchors_px: NDArray[np.floating]) -> float:
    """Mean over boxes of the best anchor's worst side ratio (0 to 1), 0 where no anchor would be assigned."""
    shares = sizes_px[:, None] / anchors_px[None]
    worst = np.minimum(shares, 1 / shares).min(axis=-1).max(axis=-1)
    return float(np.where(worst > 1 / ASSIGN_RATIO, worst, 0).mean())
