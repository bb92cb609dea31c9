"""torchvision's Faster R-CNN (Ren et al., arXiv 1506.01497) with a feature pyramid, as a detector of boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models import detection

from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.slice_detector import WINDOWS_HU, SliceDetector
from ich_pipeline.yolo import ANY_CLASS

BACKBONES = {
    "resnet50": detection.fasterrcnn_resnet50_fpn,
    "mobilenet": detection.fasterrcnn_mobilenet_v3_large_fpn,
}
XY = [1, 0, 3, 2]  # torchvision has columns first


class FasterRCNN(SliceDetector):
    """Faster R-CNN from scratch; see `SliceDetector` for input and output.

    Classes are the five subtypes and `any`, of which a box has one.

    Args:
        backbone: resnet50 or mobilenet.
        image_size: see `SliceDetector`.
        windows_hu: see `SliceDetector`; three.
        score_threshold: boxes with a lower score are not given.
        nms_iou: of two boxes of a class that overlap more, the surer stays.
        max_detections: in one image.

    Raises:
        ConfigError: no such backbone, or not three windows.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        image_size: int = 512,
        windows_hu: Sequence[Sequence[float]] = WINDOWS_HU,
        score_threshold: float = 0.25,
        nms_iou: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__(image_size, windows_hu, score_threshold)
        if backbone not in BACKBONES:
            raise ConfigError(f"FasterRCNN backbone={backbone!r}: expected one of {', '.join(BACKBONES)}")
        if len(self.windows_hu) != 3:
            raise ConfigError(f"FasterRCNN windows_hu={list(windows_hu)}: expected three, one for each input channel")
        self.network = BACKBONES[backbone](
            weights=None,
            weights_backbone=None,  # pretrained ones would be fetched from the network
            num_classes=ANY_CLASS + 2,  # background first
            min_size=image_size,
            max_size=image_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            box_nms_thresh=nms_iou,
            box_detections_per_img=max_detections,
        )

    def forward(self, images_hu: Tensor, targets: Tensor | None = None) -> list[Tensor] | dict[str, Tensor]:
        """Boxes of every image, or with targets the losses."""
        images = list(self.windowed(images_hu))
        if targets is not None:
            held = [targets[targets[:, 0] == n] for n in range(len(images))]
            return self.network(images, [{"boxes": t[:, 2:][:, XY], "labels": t[:, 1].long() + 1} for t in held])
        self.network.roi_heads.score_thresh = self.score_threshold
        return [
            torch.cat([found["boxes"][:, XY], found["scores"][:, None], found["labels"][:, None] - 1.0], dim=1)
            for found in self.network(images)
        ]
