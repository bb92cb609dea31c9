"""Steps and handlers that a detector's train.yaml names beside those of `training`."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor, nn

from ich_pipeline.box_data import BoxSlices
from ich_pipeline.detection import Box, ScoredBox, average_precision
from ich_pipeline.detector import CLASS_NAMES
from ich_pipeline.networks.slice_detector import SliceDetector
from ich_pipeline.networks.yolov5 import YoloV5
from ich_pipeline.yolo import fit_anchors


def with_anchors(network: SliceDetector, dataset: BoxSlices, device: torch.device, seed: int = 0) -> SliceDetector:
    """The network on its device; anchors of a YoloV5 are fitted to the training boxes, and are part of its weights."""
    if not isinstance(network, YoloV5):
        return network.to(device)
    anchors = fit_anchors(dataset.sizes_px, network.anchors_px[..., 0].numel(), seed=seed)
    network.set_anchors(torch.as_tensor(anchors, dtype=torch.float32))
    return network.to(device)


def ranking(network: SliceDetector, score_threshold: float) -> SliceDetector:
    """The same network, from here on with a low threshold: average precision ranks unsure boxes too."""
    network.score_threshold = score_threshold
    return network


def weight_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights of convolutions and linear layers decay, biases and norms do not."""
    held = [p for p in network.parameters() if p.requires_grad]
    decaying = [p for p in held if p.ndim > 1]
    others = [p for p in held if p.ndim <= 1]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def training_batch(batch: Mapping[str, Any], device: torch.device, *_: Any, **__: Any) -> tuple[Any, ...]:
    """`prepare_batch` of the trainer: the network takes images and targets, and gives its losses."""
    targets = batch["targets"].to(device)
    return batch["image"].to(device), targets, (targets,), {}


def validation_batch(batch: Mapping[str, Any], device: torch.device, *_: Any, **__: Any) -> tuple[Any, ...]:
    """`prepare_batch` of the evaluator: the network takes images, and gives boxes."""
    return batch["image"].to(device), (batch["targets"], batch["places"])


def total_loss(losses: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """The sum of a detector's losses."""
    return torch.stack([each.float() for each in losses.values()]).sum()


class WeightAverage:
    """Handler that keeps an exponential moving average of a network, which is what is validated and kept.

    The decay grows to its value as 1 - exp(-step / ramp): the first steps are soon forgotten. It follows from the
    step's number, so a resumed run goes on to the bit.

    Args:
        network: the module, not its DistributedDataParallel wrapper.
        decay: share of the average that each step leaves.
        ramp: steps.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, ramp: float = 500.0) -> None:
        self.network, self.decay, self.ramp = network, decay, ramp
        self.average = deepcopy(network).eval().requires_grad_(False)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """One step; what is no floating number (a count of batches) is copied."""
        kept = self.decay * -torch.expm1(torch.tensor(-engine.state.iteration / self.ramp)).item()
        new = self.network.state_dict()
        for name, held in self.average.state_dict().items():
            if held.is_floating_point():
                held.lerp_(new[name], 1 - kept)
            else:
                held.copy_(new[name])


class MeanAveragePrecision(Metric):
    """mAP@0.5 over all validation slices, of all processes; mean over subtypes, see `detection.average_precision`.

    Takes what an evaluator with `validation_batch` gives. Without boxes in the labels it is 0.
    """

    def __init__(self) -> None:
        super().__init__(output_transform=lambda output: (output["pred"], output["label"]))

    def reset(self) -> None:
        """Forget all slices."""
        self.found: list[tuple[list[Box], list[Box], tuple[str, str, int]]] = []

    def update(self, output: tuple[list[Tensor], tuple[Tensor, list[tuple[str, str, int]]]]) -> None:
        """Take the slices of one batch."""
        predictions, (targets, places) = output
        for n, (rows, place) in enumerate(zip(predictions, places, strict=True)):
            pred: list[Box] = [
                ScoredBox(place[0], place[2], CLASS_NAMES[int(kind)], i0, j0, i1, j1, score)
                for i0, j0, i1, j1, score, kind in rows.double().cpu().tolist()
                if i0 < i1 and j0 < j1
            ]
            held = targets[targets[:, 0] == n, 1:].double().tolist()
            label = [Box(place[0], place[2], CLASS_NAMES[int(kind)], *corners) for kind, *corners in held]
            self.found.append((pred, label, place))

    def compute(self) -> float:
        """mAP@0.5 of what was taken since `reset`."""
        found = self.found
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, found)
            found = [each for part in parts for each in part]
        pred = [box for boxes, _, _ in found for box in boxes]
        label = [box for _, boxes, _ in found for box in boxes]
        n_slices: dict[str, int] = {}
        for _, _, (case_id, _, k) in found:
            n_slices[case_id] = max(n_slices.get(case_id, 0), k + 1)
        return average_precision(pred, label, n_slices, replicates=0).map50.value or 0.0
