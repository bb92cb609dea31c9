"""The CSD U-Net's own training, which `train.yaml` of `pesa_rcnn` names, and its weak targets."""

import shutil
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import set_determinism

from ich_pipeline.coarse_training import train_stage
from ich_pipeline.engines import load_network
from ich_pipeline.files import sha256_of, write_json
from ich_pipeline.networks.csd_unet import dilated
from ich_pipeline.networks.pesa_rcnn import PesaRCNN
from ich_pipeline.training import rank, wait_for_all

DONE_FILE = "done.json"  # written last, so a folder that has it is whole


class DilateSlicesd(MapTransform):
    """Masks dilated slice by slice with a 3x3 kernel: hemorrhage and, roughly, the edema around it.

    Args:
        keys: (1, ..., R, C) masks.
        times: see `dilated`.
    """

    def __init__(self, keys: KeysCollection, times: int = 3, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.times = times

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Dilate every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = dilated(d[key], self.times)
        return d


def train_csd(
    bundle_root: str, manifest: str, fold: int | None, seed: int, device: str, folder: str, resume: bool, wanted: bool
) -> Path | None:
    """Train the CSD U-Net on the cases that the two-stage network will be trained on.

    Args:
        bundle_root: a prepared bundle, with `coarse.yaml`.
        manifest: of the run.
        fold: see `load_cases`.
        seed: of the training.
        device: see `pick_device`.
        folder: gets the weights, the last state and `done.json`.
        resume: go on; what is whole is kept.
        wanted: False trains none.

    Returns:
        The weights, None where none are wanted. The random state is that of `seed`, whatever had to be done.
    """
    home = Path(folder)
    weights = home / "models" / "model.pt"
    if not wanted:
        return None
    if rank() == 0 and not resume:
        shutil.rmtree(home, ignore_errors=True)
    wait_for_all()
    if not (home / DONE_FILE).is_file():
        train_stage(Path(bundle_root), home, resume, data=manifest, fold=fold, seed=seed, device=device)
        if rank() == 0:
            write_json(home / DONE_FILE, {"weights_sha256": sha256_of(weights)})
        wait_for_all()
    set_determinism(seed=seed)
    return weights


def with_csd(network: PesaRCNN, weights: Path | None, device: torch.device) -> PesaRCNN:
    """The network on its device, its CSD U-Net trained and frozen."""
    if network.csd is not None:
        assert weights is not None
        load_network(network.csd, weights, device).requires_grad_(False)
    return network.to(device)
