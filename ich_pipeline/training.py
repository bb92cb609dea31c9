"""Handlers and steps that `train.yaml` names, and the run of a bundle's training."""

import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import CacheDataset
from monai.engines import IterationEvents
from monai.transforms import Compose
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from tqdm import tqdm

from ich_pipeline.boxes import SOURCES
from ich_pipeline.bundles import Bundle, Config, is_bundle, read_yaml, resolve, write_configs
from ich_pipeline.engines import autocast, check_hash, load_network, pick_device
from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.files import atomic_path, sha256_of, write_json
from ich_pipeline.manifest import PHANTOM_FILE, read_manifest
from ich_pipeline.reading import read_grid
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport
from ich_pipeline.settings import TRAIN_CONFIGS, Settings

# In the folder of a run, beside its bundle.
STATE_FILE, RUN_ID_FILE, COARSE_FOLDER = "training_state.pt", "mlflow_run_id", "coarse"
PATH_KEYS = (
    "data",
    "boxes",
    "background",
)  # of configs: files of the user's; `boxes` may be one of `boxes.SOURCES` as well
# What `calibrate` and the shipping of weights leave in a bundle, and what is there without.
UNCALIBRATED = {"temperature": 1.0, "threshold": 0.5, "min_lesion_peak": 0.0, "min_lesion_ml": 0.0}
OF_WEIGHTS = ("operating_points", "calibration", "trained", "started_from")
KEEP = ("best", "last")
# What a resumed run may change: the saved state does not depend on it.
MAY_CHANGE = ("epochs", "patience", "validate_every", "workers", "device")


def split_records(
    manifest: str | Path | None, fold: int | None = None, *, require_label: bool = True
) -> dict[str, list[CaseRecord]]:
    """Cases to train and to validate on, `train` and `val`; arguments and errors as `load_cases`."""
    if manifest is None:
        raise ConfigError("training needs data=MANIFEST, a CSV with case_id, image, label and split")
    records = [r for r in read_manifest(Path(manifest)) if r.split != "test"]
    unlabelled = [r.case_id for r in records if r.label is None and require_label]
    if unlabelled:
        raise ManifestError(
            f"{manifest}: no label for {unlabelled[0]} ({len(unlabelled)} cases), expected one for every case that is "
            "not held out. Fill the column `label`, or give them split=test."
        )
    if fold is None:
        train, val = ([r for r in records if r.split == name] for name in ("train", "val"))
    else:
        train, val = [r for r in records if r.fold != fold], [r for r in records if r.fold == fold]
    if not train or not val:
        raise ManifestError(
            f"{manifest}: {len(train)} cases to train and {len(val)} to validate on; expected at least one each. Fill "
            "the column `split` with train, val and test (or `fold`, and name one with fold=0)."
        )
    if len(val) < n_processes():
        raise ManifestError(
            f"{manifest}: {len(val)} cases to validate on for {n_processes()} processes; expected at least one for "
            "each. Start fewer processes or give split=val to more cases."
        )
    return {"train": train, "val": val}


def load_cases(manifest: str | Path | None, fold: int | None = None) -> dict[str, list[dict[str, str]]]:
    """Training and validation cases of a manifest as MONAI data lists.

    When several processes train, each validates its share of the cases; all of them draw from all training cases
    (`CaseSampler` deals them out).

    Args:
        manifest: with `split` (train, val, test), or with `fold`.
        fold: this fold validates and the others train, whatever `split` says, except that test cases stay out.

    Raises:
        ConfigError: no manifest was named.
        ManifestError: it cannot be used, or has no labelled cases to train or to validate on.
    """
    records = split_records(manifest, fold)
    shares = {"train": records["train"], "val": records["val"][rank() :: n_processes()]}
    return {name: [record.item() for record in chosen] for name, chosen in shares.items()}


class Draw(NamedTuple):
    """One sample of an epoch."""

    case: int  # index in the list of training cases
    seed: int  # of its augmentation


class CaseSampler(Sampler[Draw]):
    """Which case comes when, and with which augmentation: functions of seed, epoch and rank.

    Every case comes once before any case comes again; several processes take turns. `ResumableRun` sets the epoch.

    Args:
        dataset: the training cases.
        draws: samples each process takes in one epoch.
        seed: of the run.
    """

    def __init__(self, dataset: "TrainingCases", draws: int, seed: int = 0) -> None:
        self.n_cases, self.draws, self.seed, self.epoch = len(dataset), draws, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass over the sampler gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[Draw]:
        random_state = np.random.default_rng((self.seed, self.epoch))
        total = self.draws * n_processes()
        passes = -(-total // self.n_cases)
        cases = np.concatenate([random_state.permutation(self.n_cases) for _ in range(passes)])
        seeds = random_state.integers(2**31, size=total)
        for n in range(rank(), total, n_processes()):
            yield Draw(int(cases[n]), int(seeds[n]))


class TrainingCases(CacheDataset):
    """MONAI's cache of training cases, each draw augmented with a seed of its own.

    So a sample does not depend on which worker makes it, nor on what was drawn before it.

    Args:
        data: MONAI data list.
        preprocessing: deterministic; its result is cached.
        augmentation: cached up to its first random transform. No transform may change its input in place.
    """

    def __init__(self, data: Sequence[Mapping[str, str]], preprocessing: Compose, augmentation: Compose) -> None:
        # Flattened: CacheDataset takes a nested Compose for a random transform and would cache nothing.
        transform = Compose([preprocessing, augmentation]).flatten()
        super().__init__(data, transform, num_workers=2, progress=False, copy_cache=False)

    def __getitem__(self, draw: Draw) -> Any:
        self.transform.set_random_state(seed=draw.seed)
        return super().__getitem__(draw.case)


def rank() -> int:
    """Number of this process among those that train together; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """How many processes train together; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def training_device(name: str = "auto") -> torch.device:
    """Device of this process: under torchrun each process takes the GPU of its local rank."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device_name: str = "auto") -> Iterator[None]:
    """Under torchrun join its process group (NCCL on GPUs, gloo on CPUs) for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start_processes(training_device(device_name))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def start_processes(device: torch.device) -> None:
    """Join the process group that torchrun describes, once."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


class ResumableRun:
    """Handler that makes a MONAI trainer reproducible, resumable to the bit, and stops it early.

    The random state is a function of seed, epoch and rank: it is set when an epoch starts, so a run that was killed
    and goes on from its last whole epoch draws what an undisturbed run would have drawn. The trainer's loader must draw
    through a `CaseSampler`.

    Written by rank 0, each whole or not at all: `weights` (those that `keep` says) with their SHA-256 into the bundle's
    metadata, and `state_file` (last epoch: network, optimizer, scheduler, best value, patience). Attach
    after every handler that changes or records what an epoch did: the state says that the epoch is done.

    Args:
        network: the module whose weights are kept (not its DistributedDataParallel wrapper).
        optimizer: of the trainer.
        scheduler: anything with a state dict.
        evaluator: MONAI evaluator with a key metric, larger is better.
        validate_every: epochs from validation to validation; the last epoch is always validated.
        weights: where the kept weights go, `models/model.pt` of a bundle.
        state_file: what `resume` reads; kept beside the bundle, not in it.
        patience: validations without a better metric before the run stops; 0 never stops early.
        seed: of the run.
        resume: go on from `state_file`; a run that was stopped in its first epoch has none and starts over.
        average: a network with averaged weights; it is what is validated and kept, and saved with the state.
        also: further parts with a state dict that the state holds, such as a discriminator and its optimizer.
        keep: `best`, the weights with the highest key metric of all validations; or `last`, those of the last
            validation, for a run whose cases do not run out or whose few validation cases cannot tell epochs apart.

    Attributes:
        best_metric, best_epoch: key metric and epoch of the weights that are kept.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        evaluator: Engine,
        weights: str | Path,
        state_file: str | Path,
        validate_every: int = 1,
        patience: int = 0,
        seed: int = 0,
        resume: bool = False,
        average: nn.Module | None = None,
        also: Mapping[str, Any] | None = None,
        keep: str = "best",
    ) -> None:
        self.keep = keep
        self.parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler, **(also or {})}
        if average is not None:
            self.parts["average"] = average
        self.kept = network if average is None else average
        self.evaluator = evaluator
        self.weights, self.state_file = Path(weights), Path(state_file)
        self.validate_every, self.patience, self.seed, self.resume = validate_every, patience, seed, resume
        self.best_metric, self.best_epoch, self.waited = -float("inf"), 0, 0
        self.start_metric: float | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """Load the last state when resuming; remove what another run left when not.

        Raises:
            ConfigError: the loader has no `CaseSampler`, `weights` lies in no bundle, `keep` is unknown or excludes
                `patience`.
        """
        if self.keep not in KEEP:
            raise ConfigError(f"keep={self.keep!r}: expected one of {', '.join(KEEP)}")
        if self.keep == "last" and self.patience:
            raise ConfigError(
                f"keep=last with patience={self.patience}: patience waits for a better validation, and keep=last asks "
                "for none. Give patience=0, or keep=best."
            )
        if not isinstance(engine.state.dataloader.sampler, CaseSampler):
            found = type(engine.state.dataloader.sampler).__name__
            raise ConfigError(f"ResumableRun: the loader has a {found}, expected a CaseSampler. Edit train.yaml.")
        if not self.metadata_file.is_file():
            raise ConfigError(
                f"{self.weights}: expected models/model.pt of a bundle, but there is no {self.metadata_file}. Run in "
                "the bundle's folder, or give bundle_root."
            )
        if not (self.resume and self.state_file.is_file()):
            if rank() == 0:
                self.state_file.unlink(missing_ok=True)
            return
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best_metric, self.best_epoch, self.waited = state["best_metric"], state["best_epoch"], state["waited"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        if self._over(engine):
            engine.terminate()

    def _over(self, engine: Engine) -> bool:
        return is_over(engine.state.epoch, engine.state.max_epochs, self.waited, self.patience)

    def epoch_started(self, engine: Engine) -> None:
        """Start the data over and set every random state from seed, epoch and rank."""
        epoch, loader = engine.state.epoch, engine.state.dataloader
        loader.sampler.set_epoch(epoch)
        engine.set_data(loader)
        # After that: a loader draws from torch's state when it starts, with workers that it keeps only once.
        seed = int(np.random.SeedSequence((self.seed, epoch, rank())).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - libraries that still draw from the global state
        torch.manual_seed(seed)

    def epoch_completed(self, engine: Engine) -> None:
        """Validate when it is time, keep weights and the last state, stop when patience is spent."""
        epoch = engine.state.epoch
        if epoch % self.validate_every == 0 or epoch == engine.state.max_epochs:
            self._share_buffers()
            self.evaluator.run(epoch)
            metric = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
            self.waited += 1
            if self.keep == "last" or metric > self.best_metric:
                self.best_metric, self.best_epoch, self.waited = metric, epoch, 0
                self._keep()
        if rank() == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"best_metric": self.best_metric, "best_epoch": self.best_epoch, "waited": self.waited}
            _save({**state, "epoch": epoch}, self.state_file)
        if self._over(engine):
            engine.terminate()

    def _share_buffers(self) -> None:
        """Give all processes rank 0's running means: batch normalisation counts its own batches in each."""
        if dist.is_initialized():
            for buffer in self.kept.buffers():
                dist.broadcast(buffer, 0)

    def start_from(self, weights: Path) -> float:
        """Put weights that exist into the network, and validate them before anything is learnt.

        Returns:
            Their key metric, on the cases that this run validates on.

        Raises:
            ConfigError: the file is not whole, or does not fit the network.
        """
        network = self.parts["network"]
        for each in {id(part): part for part in (network, self.kept)}.values():
            load_network(each, weights, next(each.parameters()).device)
        self.evaluator.run(0)
        return float(self.evaluator.state.metrics[self.metric_name])

    @property
    def metric_name(self) -> str:
        """What `best_metric` is."""
        return str(self.evaluator.state.key_metric_name)

    def _keep(self) -> None:
        if rank() != 0:
            return
        state = {name: value.detach().cpu() for name, value in self.kept.state_dict().items()}
        _save(state, self.weights)
        metadata = json.loads(self.metadata_file.read_text())
        write_json(self.metadata_file, metadata | {"weights_sha256": sha256_of(self.weights)})

    @property
    def metadata_file(self) -> Path:
        """Metadata of the bundle that `weights` belongs to."""
        return self.weights.parent.parent / "configs" / "metadata.json"


def is_over(epoch: int, epochs: int, waited: int, patience: int) -> bool:
    """Whether all epochs are done or patience is spent."""
    return epoch >= epochs or bool(patience and waited >= patience)


def _save(state: Mapping[str, Any], path: Path) -> None:
    # Through a stream: torch.save writes a file's name into the file, and equal weights are to have equal hashes.
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)


# No training that goes well comes near it. oneDNN's bf16 convolution gives such weight gradients (1e30 and more, not
# always inf) where a feature map is two slices deep; docs/training.md says how that was seen.
IMPOSSIBLE_NORM = 1e6


class GradientGuard:
    """Handler that clips the gradient's norm, and stops a training that has diverged.

    Args:
        network: whose gradients are clipped.
        max_norm: larger norms are scaled down to this one; 12 is nnU-Net's choice.
    """

    def __init__(self, network: nn.Module, max_norm: float = 12.0) -> None:
        self.network, self.max_norm = network, max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, between backward pass and optimizer step."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.clip)

    def clip(self, engine: Engine) -> None:
        """Clip once.

        Raises:
            IchError: loss or gradient is not finite or absurdly large; nothing of this step reaches the weights.
        """
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        loss = engine.state.output["loss"]
        if not (norm < IMPOSSIBLE_NORM and torch.isfinite(loss)):
            raise IchError(
                f"epoch {engine.state.epoch}, step {engine.state.iteration}: loss {loss.item():g}, gradient norm "
                f"{norm.item():g}. The training has diverged: lower learning_rate=, use patches of 12 or more slices, "
                "or give amp=off."
            )


class Progress:
    """Handler that shows one bar over all iterations: rate, loss, last validation metric, remaining time.

    In a terminal twice a second; in a log file every half minute.
    """

    def __init__(self, evaluator: Engine | None = None) -> None:
        self.evaluator = evaluator
        self.bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self.started)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.moved)
            engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self.ended)

    def started(self, engine: Engine) -> None:
        """Open the bar on stderr."""
        total = engine.state.max_epochs * engine.state.epoch_length
        seconds = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc="train",
            unit="step",
            file=sys.stderr,
            mininterval=seconds,
            maxinterval=2 * seconds,
            smoothing=0,  # the mean rate: validation comes in bursts
            dynamic_ncols=True,
        )

    def moved(self, engine: Engine) -> None:
        """One more step."""
        self._show(engine)
        self.bar.update()

    def _show(self, engine: Engine) -> None:
        shown = {"epoch": engine.state.epoch, "loss": f"{engine.state.output['loss'].item():.3f}"}
        if self.evaluator is not None:
            shown |= {name: f"{float(value):.3f}" for name, value in self.evaluator.state.metrics.items()}
        self.bar.set_postfix(shown, refresh=False)

    def ended(self, engine: Engine, error: Exception | None = None) -> None:
        """Close the bar, if it ever opened, with the last validation; an error goes on its way."""
        if error is not None:
            if self.bar is not None:
                self.bar.close()
            raise error
        if engine.state.output is not None:  # None when there was nothing left to train
            self._show(engine)
        self.bar.close()


def prepare_run(source: Bundle, settings: Settings, out: Path, *, resume: bool) -> None:
    """Write `out/bundle`: the source bundle without weights, every setting of this run in its configs.

    Args:
        source: the bundle that was named; when resuming only its presets and variants are read.
        settings: what was asked for.
        out: folder of the run.
        resume: keep the bundle that is there and change only what was asked for now.

    Raises:
        ConfigError: `out` holds a run already and is not to be resumed or overwritten; or it holds none to resume, one
            that has ended, or one with other settings.
    """
    target = out / "bundle"
    if resume:
        if not is_bundle(target):
            raise ConfigError(f"resume=true, but there is no run in {out}. Start without resume.")
        configs = _resumed_configs(source, settings, Bundle(target))
        _require_unfinished(out, configs["train"])
        write_configs(target, configs)
        return
    if source.metadata.get("calibration"):
        # Chosen for the weights that the source has, which this run does not take along.
        own = source.config("inference")
        undone = {key: value for key, value in UNCALIBRATED.items() if key in own}
        settings = replace(settings, overrides={**undone, **settings.overrides})
    start_from = settings.start_from()
    configs = settings.config(source, *TRAIN_CONFIGS)
    streams = is_stream(configs["train"])
    if not (configs["train"]["data"] or streams):
        raise ConfigError("training needs data=MANIFEST, a CSV with case_id, image, label and split")
    if target.exists() and not settings.run["overwrite"]:
        raise ConfigError(
            f"{target} exists. Go on with resume=true, give another out=, or replace it with overwrite=true."
        )
    if streams:
        from ich_pipeline.phantom.dataset import STREAMED, write_validation_phantoms

        slices_mm = list(STREAMED.slice_mm)
        configs["train"]["data"] = configs["train"]["data"] or str(write_validation_phantoms(out / "phantoms"))
    else:
        # A detector takes its cases from a table of boxes.
        labelled = not source.finds_boxes
        cases = split_records(configs["train"]["data"], configs["train"]["fold"], require_label=labelled)["train"]
        slices_mm = [read_grid(case.image, case.case_id, case.series).slice_spacing_mm for case in cases]
    # Paths are the user's, but the bundle may be moved: they are kept whole.
    for config in configs.values():
        _make_absolute(config)
    configs["train"] |= {"amp": _settled_amp(configs["train"]), "resume": False}
    for left in (STATE_FILE, RUN_ID_FILE, "run.json"):
        (out / left).unlink(missing_ok=True)
    # `coarse` is that of a bundle with a coarse stage: its folds would be taken for those of this run.
    for folder in (target, out / COARSE_FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    with atomic_path(target) as temporary:
        shutil.copytree(source.path, temporary, ignore=shutil.ignore_patterns("*.pt", "presets", "variants"))
        # Weights made from phantoms say so in every row that they write: on real heads they are far off.
        on_phantoms = streams or Path(configs["train"]["data"]).with_name(PHANTOM_FILE).is_file()
        made_here = {
            "weights_sha256": None,
            "trained_on_phantoms": on_phantoms,
            "trained_slice_mm": [round(min(slices_mm), 4), round(max(slices_mm), 4)],
            **({"started_from": check_hash(start_from)} if start_from else {}),
        }
        metadata = {key: value for key, value in configs["metadata"].items() if key not in OF_WEIGHTS}
        write_configs(temporary, configs | {"metadata": metadata | made_here})
        (temporary / "models").mkdir(exist_ok=True)


def is_stream(config: Mapping[str, Any]) -> bool:
    """Whether a resolved `train.yaml` draws its cases from phantoms that are made meanwhile (streaming.py)."""
    return str(config["train"]["dataset"]["_target_"]).endswith(".PhantomStream")


def _path_keys(config: Config) -> list[str]:
    return [key for key in PATH_KEYS if config.get(key) and config[key] not in SOURCES]


def _make_absolute(config: Config) -> None:
    for key in _path_keys(config):
        config[key] = str(Path(config[key]).resolve())


def _settled_amp(config: Config) -> str:
    """`auto` as what it means here: on a CPU it is a measurement, which a resumed run might find otherwise."""
    device = pick_device(config["device"])
    if config["amp"] != "auto" or device.type != "cpu":
        return config["amp"]
    return "off" if isinstance(autocast(device, "auto"), nullcontext) else "on"


def _resumed_configs(source: Bundle, settings: Settings, run: Bundle) -> dict[str, Config]:
    """Configs of a run with what was asked for now.

    Raises:
        ConfigError: a setting that the saved state depends on differs.
    """
    overrides = dict(settings.overrides)
    settings.config(source, *TRAIN_CONFIGS)  # refuses unknown names
    asked: Config = {}
    for kind, choice in (("presets", settings.run["preset"]), ("variants", overrides.pop("variant", None))):
        if choice in (None, "auto"):
            continue
        asked |= read_yaml(source.overlay(kind, str(choice)))
    asked |= overrides
    _make_absolute(asked)
    # Neither says anything of the run: the first is this call, the second was settled when the run began.
    for key, value in (("resume", True), ("amp", "auto")):
        if asked.get(key) == value:
            del asked[key]
    before, after = (resolve(run, TRAIN_CONFIGS, changes, None) for changes in ({}, asked))
    for config, was in ((after[name], before[name]) for name in TRAIN_CONFIGS):
        changed = [key for key in config if config[key] != was[key] and key not in MAY_CHANGE]
        if changed:
            raise ConfigError(
                f"{changed[0]}={config[changed[0]]}: the run in {run.path.parent} was begun with {was[changed[0]]}; "
                f"resuming may change {', '.join(MAY_CHANGE)}. Leave it out, or start a run of its own with out=."
            )
    return after


def _require_unfinished(out: Path, config: Config) -> None:
    report_file, state_file = out / "run.json", out / STATE_FILE
    complete = report_file.is_file() and json.loads(report_file.read_text())["exit_status"] == 0
    if not (complete and state_file.is_file()):
        return
    state = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)
    if is_over(state["epoch"], config["epochs"], state["waited"], config["patience"]):
        raise ConfigError(
            f"{out}: the run ended after {state['epoch']} epochs. To train on raise epochs= (now {config['epochs']}) "
            f"or patience= (now {config['patience']}); {state['waited']} validations brought nothing better."
        )


def open_workflow(bundle: Path, overlays: Sequence[str] = (), **settings: Any) -> ConfigWorkflow:
    """`train.yaml` of a prepared bundle as a workflow of MONAI.

    Args:
        bundle: its folder.
        overlays: names of further configs laid over it; `multi_gpu_train` follows where several processes train.
        settings: keys with their values.
    """
    configs = bundle / "configs"
    names = ["train", *overlays, *(["multi_gpu_train"] if n_processes() > 1 else [])]
    # MONAI would say on stdout, which is for results, that it reads the file.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.WARNING)
    return ConfigWorkflow(
        config_file=[str(configs / f"{name}.yaml") for name in names],
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        workflow_type="train",
        bundle_root=str(bundle),
        **settings,
    )


def weights_to_start_from(bundle: Bundle, settings: Settings, out: Path, *, resume: bool) -> Path | None:
    """Weights that a prepared run begins with; None for a run that has its own by now, or begins from nothing.

    Raises:
        ConfigError: the run was prepared to begin with others.
    """
    if resume and (out / STATE_FILE).is_file():
        return None
    weights, recorded = settings.start_from(), bundle.metadata.get("started_from")
    if recorded != (check_hash(weights) if weights else None):
        raise ConfigError(
            f"the run in {out} was to begin with weights of SHA-256 {recorded}, and has no state yet. Give the same "
            "start_from= again, or begin anew with overwrite=true."
        )
    return weights


def train_bundle(bundle: Bundle, report: RunReport, *, resume: bool, start_from: Path | None = None) -> ResumableRun:
    """Run `train.yaml` of a prepared bundle, as `python -m monai.bundle run` does.

    Under torchrun `multi_gpu_train.yaml` is laid over it.

    Args:
        bundle: as `prepare_run` left it.
        report: takes seconds and memory of every stage.
        resume: go on from the last whole epoch.
        start_from: weights of a bundle of the same network to learn on from.

    Returns:
        The handler that kept the weights: best metric and epoch, and with `start_from` the metric it began with.
    """
    handler = _train(bundle, report, resume, start_from)
    # The trainer is part of reference cycles: its loader's workers, and what they hold, would stay until Python happens
    # to collect it, in a server for a long time.
    gc.collect()
    return handler


def _train(bundle: Bundle, report: RunReport, resume: bool, start_from: Path | None) -> ResumableRun:
    workflow = open_workflow(bundle.path, resume=resume)
    with report.stage("start"):
        workflow.initialize()
        # Building the trainer loads and caches the cases.
        trainer = workflow.parser.get_parsed_content("train#trainer")
    handler = next(h for h in workflow.parser.get_parsed_content("train#handlers") if isinstance(h, ResumableRun))
    if start_from is not None:
        with report.stage("validate"):
            handler.start_metric = handler.start_from(start_from)
    with report.stage("train"):
        trainer.run()
    workflow.finalize()
    return handler


@contextmanager
def without_paths(bundle: Bundle) -> Iterator[Path]:
    """A copy of a trained bundle that may leave this machine: its configs name neither manifest nor boxes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, bundle.name)
        shutil.copytree(bundle.path, copy)
        configs = {name: bundle.config(name) for name in ("train", "evaluate")}
        for config in configs.values():
            config |= dict.fromkeys(_path_keys(config))
        write_configs(copy, configs)
        yield copy
