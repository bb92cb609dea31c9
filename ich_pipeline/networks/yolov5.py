"""YOLOv5: CSP backbone with SPPF, PANet neck, heads at three scales.

Built from the published architecture of release 6 (Jocher et al., doi 10.5281/zenodo.4679653), its figure and its table
of depths and widths: CSP stages (Wang et al., arXiv 1911.11929), spatial pyramid pooling by repeated 5 x 5 pooling (He
et al., arXiv 1406.4729), path aggregation (Liu et al., arXiv 1803.01534). None of its code was copied.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ich_pipeline.errors import ConfigError
from ich_pipeline.labels import Subtype
from ich_pipeline.networks.slice_detector import WINDOWS_HU, SliceDetector
from ich_pipeline.yolo import LossWeights, detections, yolo_loss

# Depth and width multiples of the published sizes.
SIZES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0)}
)
STRIDES = (8, 16, 32)
N_ANCHORS = 3  # at each scale
PRIOR = 0.01  # what an untrained head holds for the chance of hemorrhage in a cell


def convolution(n_in: int, n_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    """Convolution, batch norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2 if padding is None else padding, bias=False),
        nn.BatchNorm2d(n_out, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
    )


class Bottleneck(nn.Module):
    """1 x 1, then 3 x 3, added to the input where `residual`."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(channels, channels), convolution(channels, channels, 3))
        self.residual = residual

    def forward(self, features: Tensor) -> Tensor:
        """Same shape out."""
        return features + self.layers(features) if self.residual else self.layers(features)


class CSPStage(nn.Module):
    """Half of the channels through bottlenecks, half past them, joined."""

    def __init__(self, n_in: int, n_out: int, depth: int, residual: bool = True) -> None:
        super().__init__()
        half = n_out // 2
        self.through = nn.Sequential(convolution(n_in, half), *(Bottleneck(half, residual) for _ in range(depth)))
        self.past = convolution(n_in, half)
        self.joined = convolution(2 * half, n_out)

    def forward(self, features: Tensor) -> Tensor:
        """(B, n_in, H, W) to (B, n_out, H, W)."""
        return self.joined(torch.cat([self.through(features), self.past(features)], dim=1))


class PyramidPooling(nn.Module):
    """Three 5 x 5 maximum poolings, one after the other, joined (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduced = convolution(channels, channels // 2)
        self.joined = convolution(2 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Same shape out."""
        pooled = [self.reduced(features)]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, stride=1, padding=2))
        return self.joined(torch.cat(pooled, dim=1))


class YoloV5(SliceDetector):
    """YOLOv5 on slices in HU; see `SliceDetector` for input and output.

    Objectness says whether there is hemorrhage (`any`), the classes which subtype.

    Args:
        size: n, s, m or l.
        n_classes: 5 subtypes; 0 for boxes without subtype.
        image_size: see `SliceDetector`.
        windows_hu: see `SliceDetector`.
        score_threshold: boxes with a lower score are not given.
        nms_iou: of two boxes that overlap more, the surer stays; 0.6 in Rajapakse et al., IEEE Access 2024.
        nms_by_class: boxes of different subtypes do not suppress each other.
        max_detections: in one image.
        box_weight: share of the box loss; `objectness_weight` and `subtype_weight` likewise.

    Raises:
        ConfigError: no such size, or an image size that cannot be halved five times.
    """

    anchors_px: Tensor
    heads: nn.ModuleList

    def __init__(
        self,
        size: str = "l",
        n_classes: int = len(Subtype),
        image_size: int = 512,
        windows_hu: Sequence[Sequence[float]] = WINDOWS_HU,
        score_threshold: float = 0.25,
        nms_iou: float = 0.6,
        nms_by_class: bool = False,
        max_detections: int = 100,
        box_weight: float = LossWeights.box,
        objectness_weight: float = LossWeights.objectness,
        subtype_weight: float = LossWeights.subtype,
    ) -> None:
        super().__init__(image_size, windows_hu, score_threshold)
        if size not in SIZES:
            raise ConfigError(f"YoloV5 size={size!r}: expected one of {', '.join(SIZES)}")
        if image_size % STRIDES[-1]:
            raise ConfigError(f"YoloV5 image_size={image_size}: expected a multiple of {STRIDES[-1]}")
        depth, width = SIZES[size]
        self.n_classes = n_classes
        self.nms_iou, self.nms_by_class, self.max_detections = nms_iou, nms_by_class, max_detections
        self.weights = LossWeights(box_weight, objectness_weight, subtype_weight)
        c1, c2, c3, c4, c5 = (int(width * c) for c in (64, 128, 256, 512, 1024))
        d3, d6, d9 = (max(1, round(depth * d)) for d in (3, 6, 9))
        self.to_8 = nn.Sequential(
            convolution(len(self.windows_hu), c1, 6, 2, padding=2),
            convolution(c1, c2, 3, 2),
            CSPStage(c2, c2, d3),
            convolution(c2, c3, 3, 2),
            CSPStage(c3, c3, d6),
        )
        self.to_16 = nn.Sequential(convolution(c3, c4, 3, 2), CSPStage(c4, c4, d9))
        self.to_32 = nn.Sequential(convolution(c4, c5, 3, 2), CSPStage(c5, c5, d3), PyramidPooling(c5))
        self.lateral_32, self.lateral_16 = convolution(c5, c4), convolution(c4, c3)
        self.down_16 = CSPStage(2 * c4, c4, d3, residual=False)
        self.out_8 = CSPStage(2 * c3, c3, d3, residual=False)
        self.step_8, self.step_16 = convolution(c3, c3, 3, 2), convolution(c4, c4, 3, 2)
        self.out_16 = CSPStage(2 * c3, c4, d3, residual=False)
        self.out_32 = CSPStage(2 * c4, c5, d3, residual=False)
        self.heads = nn.ModuleList(nn.Conv2d(c, N_ANCHORS * (5 + n_classes), 1) for c in (c3, c4, c5))
        with torch.no_grad():  # an untrained network finds nothing, and its first steps need not unlearn that
            for head in self.heads:
                head.get_parameter("bias").view(N_ANCHORS, -1)[:, 4] = torch.logit(torch.tensor(PRIOR))
        # Of no use before `set_anchors`: squares of 2, 4 and 8 strides. They are part of the weights.
        squares = [[[stride * times] * 2 for times in (2, 4, 8)] for stride in STRIDES]
        self.register_buffer("anchors_px", torch.tensor(squares, dtype=torch.float32))
        self.to(memory_format=torch.channels_last)  # a training step on CPU takes three quarters of the time

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Take nine anchors, (9, 2) heights and widths by area: three for each scale."""
        self.anchors_px.copy_(anchors_px.reshape(len(STRIDES), N_ANCHORS, 2))

    def levels(self, images: Tensor) -> list[Tensor]:
        """Raw numbers of the three heads, (B, 3, H, W, 5 + K) each, from windowed images."""
        f8 = self.to_8(images)
        f16 = self.to_16(f8)
        f32 = self.lateral_32(self.to_32(f16))
        up_16 = self.lateral_16(self.down_16(torch.cat([F.interpolate(f32, scale_factor=2.0), f16], dim=1)))
        out_8 = self.out_8(torch.cat([F.interpolate(up_16, scale_factor=2.0), f8], dim=1))
        out_16 = self.out_16(torch.cat([self.step_8(out_8), up_16], dim=1))
        out_32 = self.out_32(torch.cat([self.step_16(out_16), f32], dim=1))
        found = []
        for head, features in zip(self.heads, (out_8, out_16, out_32), strict=True):
            numbers = head(features)
            batch, _, rows, columns = numbers.shape
            found.append(numbers.reshape(batch, N_ANCHORS, -1, rows, columns).permute(0, 1, 3, 4, 2))
        return found

    def forward(self, images_hu: Tensor, targets: Tensor | None = None) -> list[Tensor] | dict[str, Tensor]:
        """Boxes of every image, or with targets the losses."""
        heads = self.levels(self.windowed(images_hu))
        if targets is not None:
            return yolo_loss(heads, targets, self.anchors_px, STRIDES, self.weights)
        return detections(
            heads,
            self.anchors_px,
            STRIDES,
            score_threshold=self.score_threshold,
            nms_iou=self.nms_iou,
            by_class=self.nms_by_class,
            max_detections=self.max_detections,
        )
