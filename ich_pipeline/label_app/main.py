"""The app that MONAI Label loads: a model for each bundle, a box model for one that looks at regions, training, scores.

MONAI Label runs this file by path, in the server and again in the process of every training and scoring.
"""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from tqdm import tqdm

from ich_pipeline import __version__
from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import own_errors
from ich_pipeline.geometry import require_same_grid
from ich_pipeline.inference import Loaded, Prediction, Segmenter
from ich_pipeline.label_app import checks, scores
from ich_pipeline.label_app.learning import assign_cases, fine_tune
from ich_pipeline.label_app.prompt import apply_prompt
from ich_pipeline.label_app.versions import Versions, versions_of
from ich_pipeline.pipeline import Pipeline
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.report import CaseRow, measures
from ich_pipeline.run_report import RunReport
from ich_pipeline.volumetry import THRESHOLD_ML

DEFAULT_EPOCHS = 20
KEPT_MASKS = 16  # of 10 MB each, for a scan of 512 x 512 x 40
# What 3D Slicer shows of a result; all other columns of volumes.csv come with it.
LABELS = {"hemorrhage": 1}
PR_SET_PDEATHSIG = 1


class Served:
    """A bundle as it answers now: built at its first request, and built anew when another version is served."""

    def __init__(self, versions: Versions) -> None:
        self.versions = versions
        # One request at a time: a bundle's inferer keeps what its last call found.
        self.lock = threading.RLock()
        self._built: tuple[int, Segmenter] | None = None
        self._last: tuple[tuple[Any, ...], Loaded] | None = None

    @property
    def segmenter(self) -> Segmenter:
        """Of the served version."""
        with self.lock:
            version = self.versions.served
            if self._built is None or self._built[0] != version:
                bundle = self.versions.bundle(version)
                with own_errors():
                    self._built, self._last = (version, Segmenter(bundle, bundle.config("inference"))), None
            return self._built[1]

    def read(self, case: CaseRecord, segmenter: Segmenter) -> Loaded:
        """A scan on the model grid; the last one is kept, for one box follows another."""
        key = (segmenter, case.image, *scores.stamp(case.image))
        if self._last is None or self._last[0] != key:
            self._last = None
            with own_errors():
                self._last = (key, segmenter.read(case))
        return self._last[1]


class Segment(InferTask):
    """Automatic segmentation: the voxels of `ich-pipeline segment`, on the scan's grid."""

    def __init__(self, served: Served, masks: "Masks") -> None:
        bundle = served.versions.source
        super().__init__(InferType.SEGMENTATION, LABELS, 3, bundle.metadata["description"])
        self.served, self.masks = served, masks

    def is_valid(self) -> bool:
        """Whether there is anything to run; bundles without weights are not served at all."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Mask file and measures of `image`, a path that the server has chosen."""
        case = CaseRecord(request["image_id"], Path(request["image"]))
        with self.served.lock:
            segmenter = self.served.segmenter
            loaded = self.served.read(case, segmenter)
            with own_errors():
                prediction = self.predict(request, segmenter, loaded)
                file, row = _finished(segmenter, prediction)
        self.masks.put(request, prediction.mask)
        return file, _params(row, segmenter, self.served.versions)

    def predict(self, request: Mapping[str, Any], segmenter: Segmenter, loaded: Loaded) -> Prediction:
        """What the bundle says of the scan."""
        return segmenter.segment(loaded)


class SegmentInBox(Segment):
    """The stage of a bundle that looks at regions, in a box that the user drew; outside it the mask stays."""

    def __init__(self, served: Served, masks: "Masks") -> None:
        super().__init__(served, masks)
        self.type = InferType.DEEPGROW
        description = served.versions.source.metadata["description"]
        self.description = f"{description}; its second stage in a box, and clicks"

    def predict(self, request: Mapping[str, Any], segmenter: Segmenter, loaded: Loaded) -> Prediction:
        """What the user's box and clicks make of the mask so far."""
        scan = loaded.scan
        prompt = checks.prompt_of(request["params"], scan.grid.shape)
        current = self.masks.current(request, scan.grid)
        automatic = None if current is not None and prompt.box else segmenter.segment(loaded)
        if current is None:
            assert automatic is not None
            current = automatic.mask
        if prompt.box:
            probability = segmenter.look_in(loaded, prompt.box)
        else:
            assert automatic is not None
            probability = automatic.probability
        mask, decided, flags = apply_prompt(probability, segmenter.threshold, current.values != 0, prompt)
        return Prediction(scan, NativeMask(mask, scan.grid), decided, segmenter.flags_of(loaded) + flags)


class Masks:
    """The mask so far of every scan, by client: 3D Slicer sends none with a box, and takes the result for the whole.

    The newest of: the mask that comes with the request, the last result, the label that was sent back.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[Any, ...], NativeMask] = {}
        self._lock = threading.Lock()

    def put(self, request: Mapping[str, Any], mask: NativeMask) -> None:
        """Keep a result, and of older ones the last few."""
        key = self._key(request)
        with self._lock:
            self._last.pop(key, None)
            self._last[key] = mask
            while len(self._last) > KEPT_MASKS:
                del self._last[next(iter(self._last))]

    def forget(self, image_id: str) -> None:
        """A label was sent back: it is the newest."""
        with self._lock:
            self._last = {key: mask for key, mask in self._last.items() if key[1] != image_id}

    def current(self, request: Mapping[str, Any], grid: Any) -> NativeMask | None:
        """The mask so far; None where there is none yet."""
        with self._lock:
            last = self._last.get(self._key(request))
        sent = request.get("label")
        if sent is None and last is not None:
            return last
        sent = sent or request.get("saved_label")
        if sent is None:
            return None
        mask, _ = read_mask(sent, request["image_id"])
        require_same_grid(request["image_id"], "label", mask.grid, grid)
        return mask

    @staticmethod
    def _key(request: Mapping[str, Any]) -> tuple[Any, ...]:
        client = str(request["params"].get("client_id") or "")
        return client, request["image_id"], *scores.stamp(Path(request["image"]))


def _finished(segmenter: Segmenter, prediction: Prediction) -> tuple[str, CaseRow]:
    """Mask file in a folder of its own, and the row that `ich-pipeline segment` would write."""
    folder = Path(tempfile.mkdtemp(prefix="ich-label-"))
    try:
        row = Pipeline(segmenter, folder, None, RunReport({}), dicom=False).finish(prediction)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return str(row.mask), row


def _params(row: CaseRow, segmenter: Segmenter, versions: Versions) -> dict[str, Any]:
    assert row.report is not None
    return {
        "label_names": LABELS,
        "flags": list(row.flags),
        **measures(row.report),
        "bundle": segmenter.name,
        "bundle_version": segmenter.version,
        "label_version": versions.served,
        "weights_sha256": segmenter.weights_sha256,
    }


class FineTune(TrainTask):
    """Training from corrected labels."""

    def __init__(self, versions: Versions, studies: Path) -> None:
        super().__init__(f"{versions.source.metadata['description']}: trained on from the labels tagged final")
        self.versions, self.studies = versions, studies

    def config(self) -> dict[str, Any]:
        """What a client may set."""
        return {"max_epochs": DEFAULT_EPOCHS}

    def stats(self) -> dict[str, Any]:
        """Every version with its Dice before and after, and which one answers."""
        return {"served": self.versions.served, "versions": self.versions.history()}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, in a process of its own; a wrong call has been refused before."""
        die_with_parent()
        manifest = assign_cases(self.studies, labelled(datastore))
        outcome = fine_tune(self.versions, manifest, checks.epochs(request, DEFAULT_EPOCHS))
        words = "now served" if outcome.served else "not served: its Dice is lower"
        return {"message": f"version {outcome.version}: {words}", **vars(outcome)}


def labelled(datastore: Datastore) -> dict[str, tuple[Path, Path]]:
    """Scan and final label by image id, in the order in which they were labelled."""
    names = sorted(
        datastore.get_labeled_images(), key=lambda n: (datastore.get_label_info(n, checks.FINAL).get("ts", 0), n)
    )
    return {n: (Path(datastore.get_image_uri(n)), Path(datastore.get_label_uri(n, checks.FINAL))) for n in names}


class Score(ScoringMethod):
    """Scores of every scan by every model, in a process of its own."""

    def __init__(self, served: Mapping[str, Served], file: Path) -> None:
        super().__init__("entropy, volume and disagreement of every scan, for the choice of the next one")
        self.served, self.file = served, file

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score what has no scores of the served weights yet."""
        die_with_parent()
        segmenters = {name: each.segmenter for name, each in self.served.items()}
        images = images_of(datastore)
        with tqdm(total=len(images), desc="scores", unit="scan", file=sys.stderr, mininterval=30) as bar:
            n = scores.score_images(self.file, images, segmenters, lambda name: bar.update())
        return {"scored": n}


def images_of(datastore: Datastore) -> dict[str, Path]:
    """Scans by id; those whose file a link leads out of the studies folder are left out."""
    paths = {name: Path(datastore.get_image_uri(name)) for name in datastore.list_images()}
    studies = Path(datastore._datastore_path).resolve()
    return {name: path for name, path in sorted(paths.items()) if path.is_relative_to(studies) and path.is_file()}


class Next(Strategy):
    """The next scan to correct, by its scores; without scores the first by name."""

    def __init__(self, name: str, models: list[str], file: Path) -> None:
        super().__init__(scores.STRATEGIES[name])
        self.name, self.models, self.file = name, models, file

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Id of the scan, and its score in mL if it has one; None when every scan has a final label."""
        images = images_of(datastore)
        waiting = [name for name in datastore.get_unlabeled_images() if name in images]
        if not waiting:
            return None
        order = scores.ranked(
            scores.read_scores(self.file),
            waiting,
            self.name,
            model=request.get("of_model") or self.models[0],
            threshold_ml=checks.threshold_ml(request, THRESHOLD_ML),
        )
        name, score_ml = order[0] if order else (min(waiting), None)
        return {"id": name, "score_ml": score_ml}


class LabelApp(MONAILabelApp):
    """Our bundles behind MONAI Label's interface.

    Args:
        app_dir: this folder.
        studies: folder of NIfTI scans.
        conf: `bundles`, folders by name, and `out`, the folder of versions and scores.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, Any]) -> None:
        out = Path(conf["out"])
        self.masks = Masks()
        self.scores_file = out / "scores.json"
        self.served = {
            name: Served(versions)
            for name, versions in versions_of({n: Bundle(Path(p)) for n, p in conf["bundles"].items()}, out).items()
        }
        super().__init__(
            app_dir,
            studies,
            {},
            name="ich-pipeline",
            description="Intracranial hemorrhage on non-contrast head CT. Research use only.",
            version=__version__,
            labels=list(LABELS),
        )

    def init_infers(self) -> dict[str, InferTask]:
        """A model for each bundle, and a box model for each that looks at regions."""
        tasks: dict[str, InferTask] = {name: Segment(each, self.masks) for name, each in self.served.items()}
        boxes = {
            n: SegmentInBox(each, self.masks) for n, each in self.served.items() if takes_boxes(each.versions.source)
        }
        return tasks | {f"{name}{checks.BOX_SUFFIX}": task for name, task in boxes.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """A trainer for each bundle that learns in one stage."""
        return {
            name: FineTune(each.versions, Path(self.studies))
            for name, each in self.served.items()
            if can_learn(each.versions.source)
        }

    def init_strategies(self) -> dict[str, Strategy]:
        """By uncertainty, by volume near a threshold and, with several models, by their disagreement."""
        names = [n for n in scores.STRATEGIES if n != scores.DISAGREEMENT or len(self.served) > 1]
        return {name: Next(name, list(self.served), self.scores_file) for name in names}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """One that fills the file of scores."""
        return {scores.SCORING: Score(self.served, self.scores_file)}

    def on_init_complete(self) -> None:
        """Nothing: MONAI Label would start threads here that clean sessions, which this app has none of."""


def takes_boxes(bundle: Bundle) -> bool:
    """Whether the bundle's inferer has `look_in`, seen without building its network."""
    from monai.bundle import ConfigParser

    parser = ConfigParser({**bundle.config("inference"), "bundle_root": str(bundle.path)})
    return bool(getattr(parser.get_parsed_content("inferer"), "takes_boxes", False))


def can_learn(bundle: Bundle) -> bool:
    """Whether the bundle has a training of one stage: a coarse one is trained by cross-validation, from many cases."""
    return bundle.needs_weights and "coarse_folds" not in bundle.config("train")


def die_with_parent() -> None:
    """Let this process end when the server does, however that ends (on Linux), and give way to it."""
    os.nice(10)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
