"""PESA R-CNN: boxes around blood and edema, aligned and segmented by their size (Chang et al., JBHI 2023).

Anchors, proposal network, RoI align, box coder, matcher and sampler are torchvision's. A box is x0, y0, x1, y1 in
pixels, columns before rows; pixel (r, c) covers [c, c + 1) x [r, r + 1).
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from monai.networks.nets.resnet import ResNet
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.csd_unet import CSDUNet

Boxes = list[torch.Tensor]  # (N, 4) of each slice
Features = dict[str, torch.Tensor]
Targets = list[dict[str, torch.Tensor]]
Sizes = list[tuple[int, int]]

LEVELS = ("0", "1", "2", "3")  # of the pyramid: strides 4, 8, 16, 32
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
ROIS, POSITIVE_SHARE = 100, 1 / 3  # RoIs of a slice that are trained on; positive to negative as 1 to 2
LEAST_ROIS = 24  # where too few are positive: what is missing is negative
BOX_SIZE = 7  # RoI grid of class and box heads
CONNECTIONS = ("none", "residual", "dense")
LOSSES = ("objectness", "proposal_box", "class", "box", "mask")


def region_targets(label: torch.Tensor, regions: torch.Tensor | None = None) -> Targets:
    """What the boxes of each slice should be: one around every 8-connected region of label OR `regions`.

    A region with blood is of class 1; one without, where only the CSD U-Net saw something, is of class 0: a target of
    the proposal network that the class head should refuse.

    Args:
        label: (B, 1, R, C), non-zero is hemorrhage.
        regions: (B, 1, R, C) bool, the CSD U-Net's prediction; None for plain Mask R-CNN.

    Returns:
        For each slice `boxes` (N, 4), `labels` (N,) and `masks` (N, R, C): the label's own pixels in each region.
    """
    blood = (label[:, 0] > 0).cpu().numpy()
    joined = blood if regions is None else blood | regions[:, 0].cpu().numpy()
    targets = []
    for inside, around in zip(blood, joined, strict=True):
        # Not cc3d: its boxes of a 2D array that is not square are wrong (4.1.1).
        numbered, _ = ndimage.label(around, np.ones((3, 3)))
        boxes = [(c.start, r.start, c.stop, r.stop) for r, c in ndimage.find_objects(numbered)]
        masks = np.stack([(numbered == n + 1) & inside for n in range(len(boxes))] or [np.zeros_like(inside)])
        masks = masks[: len(boxes)]
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32, device=label.device).reshape(-1, 4),
                "labels": torch.as_tensor(masks.any(axis=(1, 2)).astype(np.int64), device=label.device),
                "masks": torch.as_tensor(masks, device=label.device),
            }
        )
    return targets


def expanded(boxes: torch.Tensor, factor: float, size: tuple[int, int]) -> torch.Tensor:
    """(N, 4) boxes with both sides `factor` times as long about their centre, cut at the slice's border."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    return clip_boxes_to_image(torch.cat([centre - half, centre + half], dim=1), size)


class ScaleAdaptiveAlign(nn.Module):
    """Section III-C: RoIs in nested groups by height, each aligned to a grid of its own.

    Args:
        align_sizes: edge of each group's grid; the first group holds every RoI. Published 7, 14, 14.
        group_heights: the second group and those after it hold the RoIs lower than these many pixels, falling.

    Raises:
        ConfigError: not one height less than sizes, or heights that do not fall.
    """

    def __init__(self, align_sizes: Sequence[int] = (7, 14, 14), group_heights: Sequence[float] = (128, 64)) -> None:
        super().__init__()
        if len(group_heights) != len(align_sizes) - 1 or list(group_heights) != sorted(set(group_heights))[::-1]:
            raise ConfigError(
                f"group_heights={list(group_heights)}, align_sizes={list(align_sizes)}: expected one height less than "
                "sizes, in falling order."
            )
        self.heights = (float("inf"), *group_heights)
        self.mask_size: int = 2 * max(align_sizes)  # of the merged masks: each network doubles its grid
        self.aligns = nn.ModuleList(MultiScaleRoIAlign(LEVELS, size, sampling_ratio=2) for size in align_sizes)

    def forward(self, features: Features, boxes: Boxes, sizes: Sizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each group its (n, C, S, S) maps, and which of all boxes, slice after slice, they belong to."""
        groups = []
        for align, below in zip(self.aligns, self.heights, strict=True):
            held = [each[:, 3] - each[:, 1] < below for each in boxes]
            chosen = [each[kept] for each, kept in zip(boxes, held, strict=True)]
            groups.append((align(features, chosen, sizes), torch.nonzero(torch.cat(held))[:, 0]))
        return groups


class MaskBranch(nn.Module):
    """One segmentation network of section III-D: convolutions, then twice the size, then one logit a pixel.

    Args:
        channels: of its input and of each layer.
        depth: 3x3 convolutions.
        connections: `dense`: each layer, and the last step, gets the input and all layers before it; `residual`: each
            layer's input is added to its output; `none`.

    Raises:
        ConfigError: no such connections.
    """

    def __init__(self, channels: int, depth: int, connections: str = "dense") -> None:
        super().__init__()
        if connections not in CONNECTIONS:
            raise ConfigError(f"connections={connections!r}: expected one of {', '.join(CONNECTIONS)}")
        self.connections = connections
        widths = [channels * (n + 1 if connections == "dense" else 1) for n in range(depth + 1)]
        self.layers = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1) for width in widths[:-1])
        self.up = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, S, S) maps in, (N, 1, 2S, 2S) logits out."""
        for layer in self.layers:
            out = F.relu(layer(x))
            if self.connections == "dense":
                x = torch.cat([x, out], dim=1)
            else:
                x = x + out if self.connections == "residual" else out
        return self.head(F.relu(self.up(x)))


class MultiScaleMasks(nn.Module):
    """Section III-D: a segmentation network for each group, added up pixel by pixel.

    Args:
        channels: see `MaskBranch`.
        depths: of the networks, deepest first; published three depths, of which two and three layers are named.
        connections: see `MaskBranch`.
        size: edge of the masks.
    """

    def __init__(self, channels: int, depths: Sequence[int], connections: str, size: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(MaskBranch(channels, depth, connections) for depth in depths)
        self.size = size

    def forward(self, groups: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Logits (N, size, size) of all N RoIs: the sum over the groups that each is in."""
        n = len(groups[0][1])
        total = groups[0][0].new_zeros((n, self.size, self.size), dtype=torch.float32)
        for branch, (maps, index) in zip(self.branches, groups, strict=True):
            logits = branch(maps).float()
            # A group may be empty: interpolation refuses nothing, and its network still needs a gradient of zero.
            if len(index):
                logits = F.interpolate(logits, size=(self.size, self.size), mode="bilinear", align_corners=False)
                total = total.index_add(0, index, logits[:, 0])
            else:
                total = total + logits.sum()
        return total


def pasted(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The largest of all instances' values at every pixel of a slice; 0 outside their boxes.

    torchvision's own function takes boxes as the indices of whole pixels, which shifts a mask by up to a pixel.

    Args:
        masks: (N, M, M) in [0, 1].
        boxes: (N, 4).
        size: rows and columns of the slice.
    """
    canvas = masks.new_zeros(size)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        # Pixels whose centre lies in the box.
        rows, columns = (
            torch.arange(max(0, ceil(low - 0.5)), max(0, min(n, ceil(high - 0.5))), device=masks.device)
            for low, high, n in ((y0, y1, size[0]), (x0, x1, size[1]))
        )
        if not len(rows) or not len(columns):
            continue
        v, u = ((rows + 0.5 - y0) / (y1 - y0) * 2 - 1, (columns + 0.5 - x0) / (x1 - x0) * 2 - 1)
        grid = torch.stack([u.expand(len(rows), -1), v[:, None].expand(-1, len(columns))], dim=-1)
        values = F.grid_sample(mask[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
        part = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        canvas[part] = torch.maximum(canvas[part], values)
    return canvas


class RatioSampler:
    """RoIs to train on: of each slice at most 100, one positive to two negative, as published; at least `LEAST_ROIS`.

    torchvision's own sampler always draws 100. While proposals are poor a slice has a few positives, the class head
    sees one hemorrhage in fifty RoIs and calls nothing hemorrhage. Two negatives for each positive and no more is too
    few where there are few: it calls too much hemorrhage.

    Args:
        sampler: torchvision's, which draws a share of positives among so many RoIs of each slice.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __call__(self, classes: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Masks of the positive and the negative RoIs that are drawn; (N,) classes of each slice, 0 is background."""
        positive, negative = [], []
        for each in classes:
            n = max(LEAST_ROIS, min(ROIS, round(int((each > 0).sum()) / POSITIVE_SHARE)))
            self.sampler.batch_size_per_image = n
            drawn = self.sampler([each])
            positive += drawn[0]
            negative += drawn[1]
        return positive, negative


class ScaleAdaptiveHeads(RoIHeads):
    """torchvision's box heads, and masks by `ScaleAdaptiveAlign` and `MultiScaleMasks`.

    Args:
        channels: of the pyramid.
        box_features: of the two fully connected layers before class and box.
        align: groups and their grids.
        depths: see `MultiScaleMasks`.
        connections: see `MaskBranch`.
        roi_expansion: both sides of a RoI that is segmented grow by this factor (RS R-CNN); 1 leaves it.
        detections: most instances of a slice.
        score_threshold: of the class; what scores less is no instance.

    Raises:
        ConfigError: a factor that would make RoIs smaller.
    """

    fg_bg_sampler: Any

    def __init__(
        self,
        channels: int,
        box_features: int,
        align: ScaleAdaptiveAlign,
        depths: Sequence[int],
        connections: str,
        roi_expansion: float,
        detections: int,
        score_threshold: float,
    ) -> None:
        if roi_expansion < 1:
            raise ConfigError(f"roi_expansion={roi_expansion}: expected 1 or more.")
        super().__init__(
            box_roi_pool=MultiScaleRoIAlign(LEVELS, BOX_SIZE, sampling_ratio=2),
            box_head=TwoMLPHead(channels * BOX_SIZE**2, box_features),
            box_predictor=FastRCNNPredictor(box_features, 2),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=ROIS,
            positive_fraction=POSITIVE_SHARE,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections,
            mask_roi_pool=align,
            mask_head=MultiScaleMasks(channels, depths, connections, align.mask_size),
            mask_predictor=nn.Identity(),
        )
        self.fg_bg_sampler = RatioSampler(self.fg_bg_sampler)
        self.mask_size: int = align.mask_size
        self.roi_expansion = roi_expansion

    def _boxes(self, features: Features, proposals: Boxes, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, sizes)))
        return logits.float(), deltas.float()

    def _masks(self, features: Features, boxes: Boxes, sizes: Sizes) -> torch.Tensor:
        return self.mask_head(self.mask_roi_pool(features, boxes, sizes))

    def _expanded(self, boxes: Boxes, sizes: Sizes) -> Boxes:
        return [expanded(each, self.roi_expansion, size) for each, size in zip(boxes, sizes, strict=True)]

    def losses(self, features: Features, proposals: Boxes, sizes: Sizes, targets: Targets) -> list[torch.Tensor]:
        """Equations 1 to 3 and the cross entropy of masks, for RoIs that are sampled among the proposals."""
        proposals, matched, classes, wanted = self.select_training_samples(list(proposals), targets)
        logits, deltas = self._boxes(features, proposals, sizes)
        truth = torch.cat(classes)
        positive = torch.nonzero(truth > 0)[:, 0]
        box = F.smooth_l1_loss(
            deltas.reshape(len(truth), -1, 4)[positive, 1], torch.cat(wanted)[positive], beta=1.0, reduction="sum"
        )
        held = [each > 0 for each in classes]
        boxes = self._expanded([each[kept] for each, kept in zip(proposals, held, strict=True)], sizes)
        aims = [each["masks"][which[kept]] for each, which, kept in zip(targets, matched, held, strict=True)]
        masks = self._masks(features, boxes, sizes)
        aim = torch.cat([self._cut(one, at) for one, at in zip(aims, boxes, strict=True)])
        mask = F.binary_cross_entropy_with_logits(masks, aim) if len(aim) else masks.sum()
        return [F.cross_entropy(logits, truth), box / len(truth), mask]

    def _cut(self, masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(N, M, M) part of each (N, R, C) mask inside its box."""
        index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
        size = (self.mask_size, self.mask_size)
        return roi_align(masks[:, None].float(), torch.cat([index, boxes], dim=1), size, aligned=True)[:, 0]

    def instances(self, features: Features, proposals: Boxes, sizes: Sizes) -> list[tuple[torch.Tensor, ...]]:
        """For each slice the boxes, scores and (N, M, M) mask probabilities of its instances."""
        found, scores, _ = self.postprocess_detections(*self._boxes(features, proposals, sizes), proposals, sizes)
        boxes = self._expanded(found, sizes)
        counts = [len(each) for each in boxes]
        if not sum(counts):
            return [
                (at, score, at.new_zeros((0, self.mask_size, self.mask_size)))
                for at, score in zip(boxes, scores, strict=True)
            ]
        masks = torch.sigmoid(self._masks(features, boxes, sizes)).split(counts)
        return list(zip(boxes, scores, masks, strict=True))


class _FloatRPNHead(RPNHead):
    """Boxes are decoded in float32: in bf16 a coordinate of 500 pixels is known to 2."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


def _with_group_norm(module: nn.Module) -> nn.Module:
    """Every batch norm as a group norm: a step has few slices, most of them of one head."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(max(1, min(32, child.num_features // 8)), child.num_features))
        else:
            _with_group_norm(child)
    return module


class TwoStage(nn.Module):
    """Backbone with feature pyramid, proposal network and heads: everything but the CSD U-Net.

    Args:
        block: `bottleneck` or `basic`; bottleneck with 3, 4, 23, 3 layers is ResNet-101.
        layers: residual blocks of each stage.
        widths: channels of each stage before a bottleneck's factor of four.
        channels: of the pyramid, and of the mask networks.
        anchor_sizes: edge of the square anchor of each of the pyramid's five levels, pixels.
        proposals: most that the proposal network gives for a slice, in training and in inference.
        group_heights: see `ScaleAdaptiveAlign`.
        align_sizes: likewise.
        depths: see `MultiScaleMasks`.
        connections: see `MaskBranch`.
        roi_expansion: see `ScaleAdaptiveHeads`, as `box_features`, `detections` and `score_threshold`.
        box_features: likewise.
        detections: likewise.
        score_threshold: likewise.
    """

    def __init__(
        self,
        block: str = "bottleneck",
        layers: Sequence[int] = (3, 4, 23, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        channels: int = 256,
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        proposals: Sequence[int] = (2000, 1000),
        group_heights: Sequence[float] = (128, 64),
        align_sizes: Sequence[int] = (7, 14, 14),
        depths: Sequence[int] = (4, 3, 2),
        connections: str = "dense",
        roi_expansion: float = 1.0,
        box_features: int = 1024,
        detections: int = 20,
        score_threshold: float = 0.05,
    ) -> None:
        super().__init__()
        body = ResNet(
            block=block,
            layers=list(layers),
            block_inplanes=list(widths),
            spatial_dims=2,
            n_input_channels=1,
            conv1_t_stride=2,
            feed_forward=False,
            bias_downsample=False,
        )
        ends = [width * (4 if block == "bottleneck" else 1) for width in widths]
        names = {f"layer{n + 1}": level for n, level in enumerate(LEVELS)}
        self.backbone = BackboneWithFPN(_with_group_norm(body), names, ends, channels, LastLevelMaxPool())
        top = dict(zip(("training", "testing"), proposals, strict=True))
        self.rpn = RegionProposalNetwork(
            AnchorGenerator([(size,) for size in anchor_sizes], [ANCHOR_RATIOS] * len(anchor_sizes)),
            _FloatRPNHead(channels, len(ANCHOR_RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=top,
            post_nms_top_n=top,
            nms_thresh=0.7,
        )
        align = ScaleAdaptiveAlign(align_sizes, group_heights)
        self.heads = ScaleAdaptiveHeads(
            channels, box_features, align, depths, connections, roi_expansion, detections, score_threshold
        )

    def _features(self, image: torch.Tensor) -> tuple[ImageList, Features]:
        rows, columns = image.shape[2:]
        padded = F.pad(image, (0, -columns % 32, 0, -rows % 32), mode="replicate")
        return ImageList(padded, [(rows, columns)] * len(image)), {
            level: each.float() for level, each in self.backbone(padded).items()
        }

    def propose(self, image: torch.Tensor) -> Boxes:
        """The proposal network's boxes for (B, 1, R, C) slices, best first; in evaluation mode."""
        return self.rpn(*self._features(image))[0]

    def forward(
        self, image: torch.Tensor, label: torch.Tensor | None = None, regions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """In training the five losses, named in `LOSSES`; else scores of both classes.

        Args:
            image: (B, 1, R, C) slices of any size.
            label: (B, 1, R, C), in training.
            regions: see `region_targets`.

        Returns:
            (5,), or (B, 2, R, C) in [0, 1]: hemorrhage is the largest score x mask probability of the instances.
        """
        images, features = self._features(image)
        sizes = images.image_sizes
        if self.training:
            assert label is not None
            targets = region_targets(label, regions)
            proposals, first = self.rpn(images, features, targets)
            second = self.heads.losses(features, proposals, sizes, targets)
            return torch.stack([first["loss_objectness"], first["loss_rpn_box_reg"], *second])
        found = self.heads.instances(features, self.rpn(images, features)[0], sizes)
        score = torch.stack(
            [pasted(m * s[:, None, None], b, size) for (b, s, m), size in zip(found, sizes, strict=True)]
        )
        return torch.stack([1 - score, score], dim=1)


class PesaRCNN(nn.Module):
    """Both networks: the two-stage detector, and the CSD U-Net that says where its boxes should be in training.

    Args:
        use_csd: False leaves the CSD U-Net out: proposals are trained on the label alone.
        csd_filters: see `CSDUNet`.
        csd_dropout: likewise.
        **detector: see `TwoStage`.
    """

    torch_only = True  # what lies between its convolutions depends on what they find: tracing would freeze one course

    def __init__(
        self,
        use_csd: bool = True,
        csd_filters: Sequence[int] = (32, 64, 128, 256),
        csd_dropout: float = 0.75,
        **detector: object,
    ) -> None:
        super().__init__()
        self.csd = CSDUNet(csd_filters, csd_dropout) if use_csd else None
        self.detector = TwoStage(**detector)  # type: ignore[arg-type]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores of both classes for (B, 1, R, C) slices of any size, (B, 2, R, C) in [0, 1]."""
        return self.detector(image)


class SumOfLosses(nn.Module):
    """Equation 4 and the proposal network's own two losses, which the detector has worked out."""

    def forward(self, losses: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Sum of the (5,) losses; the label is already in them."""
        return losses.sum()
