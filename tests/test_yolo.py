"""The arithmetic of YOLOv5 against torchvision and against loops; the network against published figures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou_loss, nms

from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.networks.faster_rcnn import FasterRCNN
from ich_pipeline.networks.slice_detector import SliceDetector
from ich_pipeline.networks.yolov5 import N_ANCHORS, STRIDES, YoloV5
from ich_pipeline.yolo import (
    ANY_CLASS,
    ASSIGN_RATIO,
    LossWeights,
    anchor_fitness,
    assign,
    decode,
    detections,
    fit_anchors,
    yolo_loss,
)

ANCHORS = torch.tensor([[10.0, 14.0], [30.0, 20.0], [60.0, 70.0]])
TARGETS = torch.tensor(
    [
        [0, 0, 3.0, 5.0, 17.0, 21.0],
        [0, 2, 40.0, 8.0, 60.5, 44.0],  # centre at row 50.25, column 26
        [1, ANY_CLASS, 0.0, 0.0, 6.0, 9.0],  # the neighbours above and to the left are outside
        [1, 1, 20.0, 20.0, 21.0, 63.0],  # no anchor is so flat
        [2, 4, 44.0, 44.0, 64.0, 64.0],
    ]
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# --- assignment -----------------------------------------------------------------------------------------------------


def assigned_by_loops(anchors: torch.Tensor, shape: tuple[int, int], stride: int) -> set[tuple[int, ...]]:
    """(target, image, anchor, row, column) by the words of the description."""
    found = set()
    for t, (image, _, r0, c0, r1, c1) in enumerate(TARGETS.tolist()):
        for a, (height, width) in enumerate(anchors.tolist()):
            shares = ((r1 - r0) / height, (c1 - c0) / width)
            if max(max(s, 1 / s) for s in shares) >= ASSIGN_RATIO:
                continue
            at = ((r0 + r1) / 2 / stride, (c0 + c1) / 2 / stride)
            row, column = (min(int(x), n - 1) for x, n in zip(at, shape, strict=True))
            cells = [(row, column)]
            cells.append((row - 1 if at[0] - row < 0.5 else row + 1, column))
            cells.append((row, column - 1 if at[1] - column < 0.5 else column + 1))
            found |= {(t, int(image), a, *c) for c in cells if 0 <= c[0] < shape[0] and 0 <= c[1] < shape[1]}
    return found


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_assignment_is_that_of_a_loop(stride: int) -> None:
    shape = (64 // stride, 64 // stride)
    found = assign(TARGETS, ANCHORS, shape, stride)
    target = [(TARGETS[:, 2:] == box).all(dim=1).nonzero().item() for box in found.boxes]
    rows = zip(target, found.image, found.anchor, found.row, found.column, strict=True)
    listed = [tuple(int(x) for x in row) for row in rows]
    expected = assigned_by_loops(ANCHORS, shape, stride)
    assert len(listed) == len(set(listed))
    assert set(listed) == expected
    assert {t for t, *_ in expected} == {0, 1, 2, 4}
    assert torch.equal(found.classes, TARGETS[target, 1].long())


def test_an_assigned_cell_can_reach_its_box() -> None:
    """Every centre lies where the cell's logistic can put it: -1/2 to 3/2 cells from its corner."""
    found = assign(TARGETS, ANCHORS, (8, 8), 8)
    centre = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2 / 8
    away = centre - torch.stack([found.row, found.column], dim=1)
    assert (away.abs() <= 1.5).all()
    assert ((away >= -0.5) & (away <= 1.5)).all()


def test_no_targets_assign_nothing() -> None:
    assert len(assign(torch.zeros(0, 6), ANCHORS, (8, 8), 8).image) == 0


# --- decoding -------------------------------------------------------------------------------------------------------


def test_decoding_by_hand() -> None:
    raw = torch.zeros(1, 3, 4, 4, 5)
    # s(0) = 1/2: the middle of the cell, one anchor large.
    assert decode(raw, ANCHORS, 8)[0, 1, 2, 3].tolist() == [20 - 15, 28 - 10, 20 + 15, 28 + 10]
    raw[0, 0, 1, 1, :4] = torch.tensor([logit(0.75), logit(0.25), logit(0.25), logit(0.75)])
    # Centre (2 x .75 - .5 + 1) 8 = 16, (2 x .25 - .5 + 1) 8 = 8; sides (2 x .25)^2 10 = 2.5, (2 x .75)^2 14 = 31.5.
    wanted = torch.tensor([16 - 1.25, 8 - 15.75, 16 + 1.25, 8 + 15.75])
    torch.testing.assert_close(decode(raw, ANCHORS, 8)[0, 0, 1, 1], wanted)


def heads_that_say(boxes: torch.Tensor, stride: int = 8, n_classes: int = 5) -> torch.Tensor:
    """(B, 3, 8, 8, 5 + K) heads of one level in which every assigned cell gives its box for certain."""
    head = torch.full((3, 3, 8, 8, 5 + n_classes), -12.0)
    found = assign(boxes, ANCHORS, (8, 8), stride)
    at = (found.image, found.anchor, found.row, found.column)
    centre = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    cells = torch.stack([found.row, found.column], dim=1)
    place = (centre / stride - cells + 0.5) / 2
    size = ((found.boxes[:, 2:] - found.boxes[:, :2]) / ANCHORS[found.anchor]).sqrt() / 2
    head[(*at, slice(0, 4))] = torch.logit(torch.cat([place, size], dim=1).clamp(1e-4, 1 - 1e-4))
    head[(*at, torch.full_like(at[0], 4))] = 12.0
    if n_classes:
        known = found.classes != ANY_CLASS
        head[(*(part[known] for part in at), 5 + found.classes[known])] = 12.0
    return head


# --- loss -----------------------------------------------------------------------------------------------------------


def loss(head: torch.Tensor, targets: torch.Tensor = TARGETS) -> dict[str, torch.Tensor]:
    return yolo_loss([head], targets, ANCHORS[None], [8], LossWeights(1.0, 1.0, 1.0, (1.0,)))


def test_heads_that_say_the_truth_cost_nothing() -> None:
    found = loss(heads_that_say(TARGETS))
    assert all(value < 2e-3 for value in found.values()), found


def ciou(one: list[float], other: list[float]) -> float:
    """Complete IoU (Zheng et al., arXiv 1911.08287, equations 7 to 11)."""
    overlap = [max(0.0, min(one[k + 2], other[k + 2]) - max(one[k], other[k])) for k in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    iou = overlap[0] * overlap[1] / (sum(areas) - overlap[0] * overlap[1])
    apart = sum(((one[k] + one[k + 2]) - (other[k] + other[k + 2])) ** 2 / 4 for k in (0, 1))
    around = sum((max(one[k + 2], other[k + 2]) - min(one[k], other[k])) ** 2 for k in (0, 1))
    angles = [math.atan((b[2] - b[0]) / (b[3] - b[1])) for b in (one, other)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return iou - apart / around - v * v / (1 - iou + v)


def test_box_loss_is_one_less_complete_iou() -> None:
    one, other = [3.0, 4.0, 20.0, 31.0], [6.0, 2.0, 17.0, 20.0]
    boxes = torch.tensor([one]), torch.tensor([other])
    assert complete_box_iou_loss(*boxes)[0].item() == pytest.approx(1 - ciou(one, other), abs=1e-5)
    # Rows and columns exchanged, nothing changes: torchvision has columns first.
    exchanged = (b[:, [1, 0, 3, 2]] for b in boxes)
    assert complete_box_iou_loss(*exchanged)[0].item() == pytest.approx(1 - ciou(one, other), abs=1e-5)


def test_losses_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    head = torch.randn(3, 3, 8, 8, 10)
    found = assign(TARGETS, ANCHORS, (8, 8), 8)
    boxes = decode(head, ANCHORS, 8)
    wanted = np.zeros((3, 3, 8, 8))
    away, wrong = [], []
    for n in range(len(found.image)):
        at = tuple(int(part[n]) for part in (found.image, found.anchor, found.row, found.column))
        overlap = ciou(boxes[at].tolist(), found.boxes[n].tolist())
        away.append(1 - overlap)
        wanted[at] = max(wanted[at], overlap, 0)
        if found.classes[n] != ANY_CLASS:
            for k in range(5):
                p = torch.sigmoid(head[at][5 + k]).item()
                wrong.append(-math.log(p if k == found.classes[n] else 1 - p))
    p = torch.sigmoid(head[..., 4]).numpy().astype(np.float64)
    told = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))
    losses = {name: value.item() for name, value in loss(head).items()}
    expected = {"box": np.mean(away), "objectness": told.mean(), "subtype": np.mean(wrong)}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_slices_without_boxes_teach_objectness_alone() -> None:
    head = torch.zeros(3, 3, 8, 8, 10, requires_grad=True)
    found = loss(head, torch.zeros(0, 6))
    assert (found["box"].item(), found["subtype"].item()) == (0, 0)
    assert found["objectness"].item() == pytest.approx(math.log(2))
    found["objectness"].backward()
    assert head.grad is not None
    assert (head.grad[..., 4] > 0).all()
    assert (head.grad[..., [0, 1, 2, 3, 5]] == 0).all()


def test_a_box_without_subtype_teaches_no_subtype() -> None:
    head = torch.randn(3, 3, 8, 8, 10, requires_grad=True)
    targets = TARGETS.clone()
    targets[:, 1] = ANY_CLASS
    sum(loss(head, targets).values()).backward()
    assert head.grad is not None
    assert (head.grad[..., 5:] == 0).all()
    assert (head.grad[..., :4] != 0).any()


# --- detections -----------------------------------------------------------------------------------------------------


def found_in(head: torch.Tensor, **changes: Any) -> list[torch.Tensor]:
    given = {"score_threshold": 0.25, "nms_iou": 0.6, "max_detections": 100, **changes}
    return detections([head], ANCHORS[None], [8], **given)


def test_detections_give_back_the_boxes() -> None:
    found = found_in(heads_that_say(TARGETS))
    # The flat box has no anchor; that of no subtype has no likely class.
    assert [len(rows) for rows in found] == [2, 0, 1]
    for image in (0, 2):
        held = TARGETS[TARGETS[:, 0] == image]
        overlap, which = box_iou(found[image][:, :4], held[:, 2:]).max(dim=1)
        assert (overlap > 0.95).all()
        assert torch.equal(found[image][:, 5], held[which, 1])
        assert (found[image][:, 4] > 0.99).all()


def test_without_classes_the_score_is_objectness() -> None:
    found = found_in(heads_that_say(TARGETS, n_classes=0))
    assert [len(rows) for rows in found] == [2, 1, 1]
    assert all((rows[:, 5] == ANY_CLASS).all() and (rows[:, 4] > 0.99).all() for rows in found)


def suppressed_by_loops(rows: torch.Tensor, iou: float) -> list[int]:
    kept: list[int] = []
    for n in rows[:, 4].argsort(descending=True).tolist():
        if all(box_iou(rows[None, n, :4], rows[None, m, :4])[0, 0] <= iou for m in kept):
            kept.append(n)
    return kept


def test_suppression_is_that_of_a_loop() -> None:
    torch.manual_seed(1)
    head = torch.randn(1, 3, 8, 8, 10)
    [before] = found_in(head, nms_iou=1.0, score_threshold=0.4)
    [after] = found_in(head, nms_iou=0.6, score_threshold=0.4)
    assert 5 < len(after) < len(before)
    kept = suppressed_by_loops(before, 0.6)
    assert torch.equal(after, before[kept])
    assert kept == nms(before[:, :4], before[:, 4], 0.6).tolist()
    assert torch.equal(found_in(head, nms_iou=0.6, score_threshold=0.4, max_detections=3)[0], after[:3])


def test_subtypes_suppress_each_other_unless_kept_apart() -> None:
    head = heads_that_say(TARGETS[:1])
    found = assign(TARGETS[:1], ANCHORS, (8, 8), 8)
    head[found.image[0], found.anchor[0], found.row[0], found.column[0], 5:7] = torch.tensor([-12.0, 9.0])
    assert len(found_in(head)[0]) == 1
    assert found_in(head, by_class=True)[0][:, 5].tolist() == [0, 1]


# --- anchors --------------------------------------------------------------------------------------------------------


def test_anchors_fit_clusters() -> None:
    rng = np.random.default_rng(0)
    middles = np.array([[8.0, 10.0], [30.0, 16.0], [60.0, 64.0]])
    sizes = np.concatenate([m * rng.uniform(0.95, 1.05, (60, 2)) for m in middles])
    anchors = fit_anchors(sizes, 3)
    assert anchors == pytest.approx(middles, rel=0.06)
    assert (np.diff(anchors.prod(axis=1)) > 0).all()
    assert np.array_equal(fit_anchors(sizes, 3), anchors)


def test_random_changes_never_fit_worse() -> None:
    sizes = np.random.default_rng(3).lognormal(3, 0.8, (200, 2))
    before = anchor_fitness(np.maximum(sizes, 2), fit_anchors(sizes, 9, generations=0))
    after = anchor_fitness(np.maximum(sizes, 2), fit_anchors(sizes, 9, generations=300))
    assert after > before


def test_fitness_by_hand() -> None:
    sizes, anchors = np.array([[10.0, 10.0], [40.0, 10.0]]), np.array([[10.0, 20.0], [10.0, 12.5]])
    # 10 / 12.5 of the first; the second is four times as high as either: no anchor is assigned to it.
    assert anchor_fitness(sizes, anchors) == pytest.approx((0.8 + 0) / 2)


def test_fewer_boxes_than_anchors_still_give_anchors() -> None:
    anchors = fit_anchors(np.array([[20.0, 30.0]]), 9)
    assert anchors.shape == (9, 2)
    assert anchor_fitness(np.array([[20.0, 30.0]]), anchors) > 0.8


def test_no_boxes_are_refused() -> None:
    with pytest.raises(ManifestError, match="no boxes to fit anchors"):
        fit_anchors(np.zeros((0, 2)), 9)


# --- networks -------------------------------------------------------------------------------------------------------


# Millions, with 80 classes: the table of sizes that the authors published.
@pytest.mark.parametrize(("size", "millions"), [("n", 1.9), ("s", 7.2), ("m", 21.2), ("l", 46.5)])
def test_parameters_are_those_published(size: str, millions: float) -> None:
    network = YoloV5(size, n_classes=80)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.07)


def test_levels_have_the_published_strides() -> None:
    levels = YoloV5("n", image_size=64).eval().levels(torch.zeros(2, 3, 64, 64))
    assert [tuple(level.shape) for level in levels] == [(2, N_ANCHORS, 64 // s, 64 // s, 10) for s in STRIDES]


def test_an_untrained_network_finds_nothing() -> None:
    found = YoloV5("n", image_size=64).eval()(torch.full((2, 1, 64, 64), 40.0))
    assert [tuple(rows.shape) for rows in found] == [(0, 6), (0, 6)]


@pytest.fixture(params=["yolov5", "fasterrcnn"])
def network(request: pytest.FixtureRequest) -> SliceDetector:
    torch.manual_seed(0)
    if request.param == "yolov5":
        return YoloV5("n", image_size=64, score_threshold=0.001)
    return FasterRCNN("mobilenet", image_size=64, score_threshold=0.001)


def test_every_detector_learns_from_one_call(network: SliceDetector) -> None:
    images = torch.full((2, 1, 64, 64), 30.0)
    images[0, 0, 10:34, 20:52] = 70
    targets = torch.tensor([[0, 1, 10.0, 20.0, 34.0, 52.0]])
    before, after = [], []
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for step in range(6):
        losses = network(images, targets)
        total = torch.stack(list(losses.values())).sum()
        (before if step == 0 else after).append(total.item())
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        optimizer.step()
    assert min(after) < before[0]


def test_every_detector_gives_rows_in_the_image(network: SliceDetector) -> None:
    torch.manual_seed(0)
    found = network.eval()(torch.randn(2, 1, 64, 64) * 60)
    assert len(found) == 2
    rows = torch.cat(found)
    assert rows.shape[1] == 6
    assert len(rows)
    assert ((rows[:, :4] >= 0) & (rows[:, :4] <= 64)).all()
    assert (rows[:, 4] >= 0.001).all()
    assert ((rows[:, 5] >= 0) & (rows[:, 5] <= ANY_CLASS)).all()
    network.score_threshold = 0.99
    assert all(len(each) == 0 for each in network(torch.randn(2, 1, 64, 64)))


def test_faster_rcnn_keeps_rows_and_columns_apart() -> None:
    """What torchvision is given has columns first, and what it gives is turned back."""
    network = FasterRCNN("mobilenet", image_size=64).train()
    seen: list[Any] = []
    network.network.forward = lambda images, targets=None: (
        seen.append(targets)
        or (
            {}
            if targets
            else [{"boxes": torch.tensor([[1.0, 2, 3, 4]]), "scores": torch.ones(1), "labels": torch.tensor([6])}]
        )
    )
    network(torch.zeros(1, 1, 64, 64), torch.tensor([[0, ANY_CLASS, 10.0, 20.0, 30.0, 50.0]]))
    assert seen[0][0]["boxes"].tolist() == [[20, 10, 50, 30]]
    assert seen[0][0]["labels"].tolist() == [ANY_CLASS + 1]
    assert network.eval()(torch.zeros(1, 1, 64, 64))[0].tolist() == [[2, 1, 4, 3, 1, ANY_CLASS]]


def test_windows_become_channels() -> None:
    network = YoloV5("n", image_size=64, windows_hu=[[0, 80], [-20, 180]])
    found = network.windowed(torch.tensor([-100.0, 20.0, 80.0, 200.0]).view(1, 1, 2, 2))
    torch.testing.assert_close(found[0].flatten(1), torch.tensor([[0, 0.25, 1, 1], [0, 0.2, 0.5, 1]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: YoloV5("x"), "size='x': expected one of n, s, m, l"),
        (lambda: YoloV5("n", image_size=100), "image_size=100: expected a multiple of 32"),
        (lambda: FasterRCNN("vgg"), "expected one of resnet50, mobilenet"),
        (lambda: FasterRCNN("mobilenet", windows_hu=[[0, 80]]), "expected three"),
    ],
)
def test_what_cannot_be_built_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
