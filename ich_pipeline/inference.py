"""A bundle made ready, and one scan through it: scan in, native mask and native probability out."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import AsDiscreted, Compose, SaveImaged
from monai.utils import convert_to_dst_type
from numpy.typing import NDArray

from ich_pipeline.bundles import Bundle, learns
from ich_pipeline.engines import check_hash, pick_device
from ich_pipeline.errors import ConfigError, own_errors
from ich_pipeline.finding import find_scans
from ich_pipeline.quality import fit_flags
from ich_pipeline.records import CaseRecord, NativeMask, Scan
from ich_pipeline.transforms import Box, RemoveSmalld, RemoveUnsured, scan_of

CORNER_TOLERANCE = 1e-6  # voxels: what arithmetic adds to a corner that lies on a voxel's edge


def items(scans: str | Sequence[str]) -> list[dict[str, str]]:
    """Files, folders or manifests as the data list of a MONAI dataset: `[{"image": path}, ...]` (`CaseRecord.item`)."""
    given = [scans] if isinstance(scans, str) else scans
    return [case.item() for case in find_scans([Path(s) for s in given])]


# Gives a context in which the seconds of one named stage are counted (`RunReport.stage`).
Stage = Callable[[str], AbstractContextManager[None]]


def no_stage(name: str) -> AbstractContextManager[None]:
    """A stage that nobody counts."""
    return nullcontext()


# Steps after the threshold that take lesions out, and the flag of a scan that lost any.
REMOVALS = {RemoveUnsured: "unsure_lesions_removed", RemoveSmalld: "small_lesions_removed"}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A scan, and its MONAI dictionary on the model grid; `others` are those of an ensemble's further members."""

    scan: Scan
    data: dict[Hashable, Any]
    others: tuple["Loaded", ...] = ()


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a bundle says of one scan.

    Attributes:
        scan: as it was read.
        mask: uint8 0 or 1 on the scan's grid.
        probability: (I, J, K) float32 on the scan's grid, before the threshold.
        flags: of the weights, and where the scan does not fit the bundle (quality.py).
        regions: where a cascade's first stage found something, on the scan's grid; None where none was asked for, or
            the bundle has no such stage.
        spread: (I, J, K) float32, standard deviation of the probability over an ensemble's members; None for one.
        member_ml: volumes of the members' own masks.
        edema_estimate: what the network took for edema, on the scan's grid, and no label has taught it; None where it
            was not asked for.
        instance_scores: the probability holds the scores of instances (`volumetry.with_lesion_scores`).
    """

    scan: Scan
    mask: NativeMask
    probability: NDArray[np.float32]
    flags: tuple[str, ...] = ()
    regions: NativeMask | None = None
    spread: NDArray[np.float32] | None = None
    member_ml: tuple[float, ...] = ()
    edema_estimate: NativeMask | None = None
    instance_scores: bool = False


class Segmenter:
    """A bundle's preprocessing, network, inferer and postprocessing, built once from its `inference.yaml`.

    The config's own `SaveImaged` is left out, as MONAI Label does: the caller decides where masks go.

    Args:
        bundle: with weights, or one that needs none.
        config: `inference.yaml` with overrides applied (`bundles.resolve`).

    Attributes:
        name, version: of the bundle, as rows and reports have them.
        weights_sha256: None of a bundle that needs no weights.
        threshold: of the probability, above which a voxel belongs to the mask.
        trained_slice_mm: least and largest slice spacing of the training scans; None where the metadata do not say.
        flags: what a reader of a result should know of the bundle: `phantom_weights` were trained on phantoms, and
            what its metadata say under `flags`.
        instance_scores: its probability is the score of an instance times that of its mask.

    Raises:
        ConfigError: no weights, a wrong hash, or a config that does not build.
    """

    def __init__(self, bundle: Bundle, config: Mapping[str, Any]) -> None:
        if bundle.weights is None and learns(bundle, config):
            raise ConfigError(
                f"{bundle.name} has no weights. Train it (ich-pipeline train bundle={bundle.name} data=MANIFEST) or "
                "name the folder of a trained bundle."
            )
        self.bundle, self.name, self.version = bundle, bundle.name, str(bundle.metadata["version"])
        self.weights_sha256 = check_hash(bundle.weights) if bundle.weights else None
        self.trained_slice_mm = bundle.metadata.get("trained_slice_mm")
        on_phantoms = ("phantom_weights",) if bundle.metadata.get("trained_on_phantoms") else ()
        self.flags = (*on_phantoms, *bundle.metadata.get("flags", ()))
        self.instance_scores = bool(bundle.metadata.get("instance_scores", False))
        parser = ConfigParser({**config, "bundle_root": str(bundle.path)})
        with own_errors():
            if bundle.weights and Path(parser.get_parsed_content("weights")).resolve() != bundle.weights.resolve():
                raise ConfigError(
                    f"weights={config['weights']}: results name the weights of their bundle. Give the folder of the "
                    "bundle that holds them: bundle=FOLDER."
                )
            self.device = pick_device(parser.get_parsed_content("device"))
            self.network = parser.get_parsed_content("network")
            self.inferer = parser.get_parsed_content("inferer")
            self.reading, *rest = parser.get_parsed_content("preprocessing").transforms
            steps = parser.get_parsed_content("postprocessing").transforms
        self.preprocessing = Compose(rest)
        cut = next((n for n, step in enumerate(steps) if isinstance(step, AsDiscreted)), None)
        if cut is None:
            raise ConfigError(
                f"{bundle.name}: postprocessing has no AsDiscreted, which makes a mask of scores. Add it."
            )
        self.threshold = float(steps[cut].threshold[0])
        self.restoring = Compose(steps[:cut])
        self.thresholding = [step for step in steps[cut:] if not isinstance(step, SaveImaged)]

    @property
    def engine(self) -> dict[str, Any]:
        """Device, engine and precision in use, for the run report."""
        return {"device": str(self.device), **getattr(self.inferer, "in_use", {})}

    def read(self, case: CaseRecord, stage: Stage = no_stage) -> Loaded:
        """Read a scan and take it to the model grid.

        Raises:
            ReadError: not a head CT that can be read whole.
            GeometryError: its grid is broken or implausible.
        """
        with stage("read"):
            data = self.reading(case.item())
            scan = scan_of(data["image"], case)
        with stage("preprocess"):
            return Loaded(scan, self.preprocessing(data))

    def segment(self, loaded: Loaded, stage: Stage = no_stage, *, with_regions: bool = False) -> Prediction:
        """Run the network over a scan that was read, and bring its scores (and what a first stage found) back."""
        data = dict(loaded.data)
        with stage("network"):
            data["pred"] = self.inferer(data["image"][None].to(self.device), self.network)[0].cpu()
        with stage("restore"):
            data = self.restoring(data)
            probability = np.asarray(data["pred"][0])
            removed: tuple[str, ...] = ()
            for step in self.thresholding:
                before = np.count_nonzero(data["pred"])
                data = step(data)
                if type(step) in REMOVALS and np.count_nonzero(data["pred"]) < before:
                    removed += (REMOVALS[type(step)],)
            mask = np.asarray(data["pred"][0]).astype(np.uint8)
            regions = self._native(loaded, getattr(self.inferer, "regions", None)) if with_regions else None
            edema = self._native(loaded, getattr(self.inferer, "surroundings", None))
            if edema is not None:  # hemorrhage is what the mask says, not what the estimate says
                edema = NativeMask(edema.values * (mask == 0), edema.grid)
            flags = self.flags_of(loaded) + removed
            if loaded.data["image"].meta.get("boxes") == "[]":  # as `boxes.FindBoxesd` writes them
                flags += ("no_boxes",)
            return Prediction(
                loaded.scan,
                NativeMask(mask, loaded.scan.grid),
                probability,
                flags,
                regions,
                edema_estimate=edema,
                instance_scores=self.instance_scores,
            )

    def flags_of(self, loaded: Loaded) -> tuple[str, ...]:
        """What a reader of any result for a scan should know of the weights, and of how the scan fits them."""
        model_affine = np.asarray(loaded.data["image"].affine)
        return self.flags + fit_flags(loaded.scan.grid, model_affine, self.trained_slice_mm)

    @property
    def takes_boxes(self) -> bool:
        """Whether the bundle can look at a box that a user drew."""
        return bool(getattr(self.inferer, "takes_boxes", False))

    def look_in(self, loaded: Loaded, box: Box) -> NDArray[np.float32]:
        """Probability inside a box that a user drew, from the stage of the bundle that looks at regions.

        Args:
            loaded: a scan that was read.
            box: (start, stop) for each array axis of the scan, in voxels.

        Returns:
            (I, J, K) float32 on the scan's grid; what it says outside the box is of no account.

        Raises:
            ConfigError: the bundle looks at whole scans only, or the box lies beside the head.
        """
        if not self.takes_boxes:
            raise ConfigError(f"{self.name} looks at whole scans only, expected a bundle with a stage for regions.")
        image = loaded.data["image"]
        to_model = np.linalg.inv(np.asarray(image.affine, dtype=np.float64)) @ loaded.scan.grid.affine
        # A voxel reaches half a step to both sides of its index.
        corners = np.stack(np.meshgrid(*[(a - 0.5, b - 0.5) for a, b in box], indexing="ij"), axis=-1).reshape(-1, 3)
        at = corners @ to_model[:3, :3].T + to_model[:3, 3] + 0.5
        low = np.clip(np.floor(at.min(axis=0) + CORNER_TOLERANCE), 0, image.shape[1:]).astype(int)
        high = np.clip(np.ceil(at.max(axis=0) - CORNER_TOLERANCE), 0, image.shape[1:]).astype(int)
        if (high <= low).any():
            raise ConfigError(f"{loaded.scan.case_id}: box {box} lies beside the head. Draw it over brain.")
        window = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        score = self.inferer.look_in(image[None].to(self.device), self.network, window)[0].cpu()
        return np.asarray(self.restoring({**loaded.data, "pred": score})["pred"][0])

    def _native(self, loaded: Loaded, found: torch.Tensor | None) -> NativeMask | None:
        """What else the inferer found in the last call, (1, 1, ...) on the model grid, as a mask of the scan."""
        if found is None:
            return None
        score = convert_to_dst_type(found[0].float().cpu(), loaded.data["image"])[0]
        native = np.asarray(self.restoring({**loaded.data, "pred": score})["pred"][0])
        return NativeMask((native >= 0.5).astype(np.uint8), loaded.scan.grid)
