"""Handlers and steps that `train.yaml` names, and the run of a bundle's training."""

import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data.utils import set_rnd
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ich_pipeline.bundles import Bundle, is_bundle, resolve, write_configs
from ich_pipeline.commands import TRAIN_CONFIGS, Settings
from ich_pipeline.engines import pick_device
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.files import atomic_path, sha256_of, write_json
from ich_pipeline.manifest import read_manifest
from ich_pipeline.run_report import RunReport


def load_cases(manifest: str | Path | None, fold: int | None = None) -> dict[str, list[dict[str, str]]]:
    """Training and validation cases of a manifest as MONAI data lists.

    Args:
        manifest: with `split` (train, val, test), or with `fold`.
        fold: this fold validates and the others train, whatever `split` says, except that test cases stay out.

    Raises:
        ConfigError: no manifest was named.
        ManifestError: it cannot be used, or has no labelled cases to train or to validate on.
    """
    if manifest is None:
        raise ConfigError("training needs data=MANIFEST, a CSV with case_id, image, label and split")
    records = [r for r in read_manifest(Path(manifest), require_label=True) if r.split != "test"]
    if fold is None:
        train, val = ([r for r in records if r.split == name] for name in ("train", "val"))
    else:
        train, val = [r for r in records if r.fold != fold], [r for r in records if r.fold == fold]
    if not train or not val:
        raise ManifestError(
            f"{manifest}: {len(train)} cases to train and {len(val)} to validate on; expected at least one each. Fill "
            "the column `split` with train, val and test (or `fold`, and name one with fold=0)."
        )
    return {
        name: [{"image": str(r.image), "label": str(r.label)} for r in chosen]
        for name, chosen in (("train", train), ("val", val))
    }


def rank() -> int:
    """Number of this process among those that train together; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def training_device(name: str = "auto") -> torch.device:
    """Device of this process: under torchrun each process takes the GPU of its local rank."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def several_processes(device_name: str = "auto") -> Iterator[None]:
    """Under torchrun join its process group (NCCL on GPUs, gloo on CPUs) and wait for all at the end of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start_processes(training_device(device_name))
    yield
    if dist.is_initialized():
        dist.barrier()


def start_processes(device: torch.device) -> None:
    """Join the process group that torchrun describes, once."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


class ResumableRun:
    """Handler that makes a MONAI trainer reproducible, resumable to the bit, and stops it early.

    The random state is a function of seed, epoch and rank: it is set when an epoch starts, so a run that was killed
    and goes on from its last whole epoch draws what an undisturbed run would have drawn.

    Written by rank 0, each whole or not at all: `weights` (best by the evaluator's key metric) with its SHA-256 into
    the bundle's metadata, and `state_file` (last epoch: network, optimizer, scheduler, best value, patience).

    Args:
        network: the module whose weights are kept (not its DistributedDataParallel wrapper).
        optimizer: of the trainer.
        scheduler: anything with a state dict.
        evaluator: MONAI evaluator with a key metric, larger is better.
        validate_every: epochs from validation to validation; the last epoch is always validated.
        weights: where the best weights go, `models/model.pt` of a bundle.
        state_file: what `resume` reads.
        patience: validations without a better metric before the run stops; 0 never stops early.
        seed: of the run.
        resume: go on from `state_file`, which must exist then.
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
    ) -> None:
        self.parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
        self.evaluator = evaluator
        self.weights, self.state_file = Path(weights), Path(state_file)
        self.validate_every, self.patience, self.seed, self.resume = validate_every, patience, seed, resume
        self.best_metric, self.best_epoch, self.waited = -float("inf"), 0, 0

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """Load the last state when resuming.

        Raises:
            ConfigError: no whole batch to train on, nothing to resume, or the run had already ended.
        """
        loader = engine.state.dataloader
        if len(loader) == 0:
            raise ConfigError(
                f"{len(loader.dataset)} training cases make no batch of {loader.batch_size}. Lower batch_size=."
            )
        if not self.resume:
            return
        if not self.state_file.is_file():
            raise ConfigError(f"resume=true, but there is no {self.state_file}. Start without resume.")
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best_metric, self.best_epoch, self.waited = state["best_metric"], state["best_epoch"], state["waited"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        if self.ended(engine):
            raise ConfigError(
                f"{self.state_file}: the run ended after {state['epoch']} epochs. Raise epochs= (now "
                f"{engine.state.max_epochs}) or patience= (now {self.patience}) to train on."
            )

    def ended(self, engine: Engine) -> bool:
        """Whether all epochs are done or patience is spent."""
        return engine.state.epoch >= engine.state.max_epochs or bool(self.patience and self.waited >= self.patience)

    def epoch_started(self, engine: Engine) -> None:
        """Set every random state from seed, epoch and rank, and start the data over."""
        epoch = engine.state.epoch
        seed = int(np.random.SeedSequence((self.seed, epoch, rank())).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - libraries that still draw from the global state
        torch.manual_seed(seed)
        loader = engine.state.dataloader
        set_rnd(loader.dataset, seed)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        engine.set_data(loader)

    def epoch_completed(self, engine: Engine) -> None:
        """Validate when it is time, keep the best and the last state, stop when patience is spent."""
        epoch = engine.state.epoch
        if epoch % self.validate_every == 0 or epoch == engine.state.max_epochs:
            self.evaluator.run(epoch)
            metric = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
            self.waited += 1
            if metric > self.best_metric:
                self.best_metric, self.best_epoch, self.waited = metric, epoch, 0
                self._keep_best()
        if rank() == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"best_metric": self.best_metric, "best_epoch": self.best_epoch, "waited": self.waited}
            with atomic_path(self.state_file) as temporary:
                torch.save({**state, "epoch": epoch}, temporary)
        if self.ended(engine):
            engine.terminate()

    def _keep_best(self) -> None:
        if rank() != 0:
            return
        state = {name: value.detach().cpu() for name, value in self.parts["network"].state_dict().items()}
        with atomic_path(self.weights) as temporary:
            torch.save(state, temporary)
        metadata_file = self.weights.parent.parent / "configs" / "metadata.json"
        metadata = json.loads(metadata_file.read_text())
        metadata["weights_sha256"] = sha256_of(self.weights)
        write_json(metadata_file, metadata)


class Progress:
    """Handler that shows one bar over all iterations: loss, last validation metric, remaining time."""

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
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc="train", unit="step", file=sys.stderr)

    def moved(self, engine: Engine) -> None:
        """One more step."""
        shown = {"epoch": engine.state.epoch, "loss": f"{engine.state.output['loss'].item():.3f}"}
        if self.evaluator is not None and self.evaluator.state.metrics:
            shown |= {name: f"{float(value):.3f}" for name, value in self.evaluator.state.metrics.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def ended(self, engine: Engine, error: Exception | None = None) -> None:
        """Close the bar; an error goes on its way."""
        self.bar.close()
        if error is not None:
            raise error


def prepare_run(source: Bundle, settings: Settings, out: Path, *, resume: bool) -> None:
    """Write `out/bundle`: the source bundle without weights, every setting of this run in its configs.

    Args:
        source: the bundle that was named; not read when resuming.
        settings: what was asked for.
        out: folder of the run.
        resume: keep the bundle that is there and change only what was asked for now.

    Raises:
        ConfigError: `out` holds a run already and is not to be resumed or overwritten, or holds none to resume.
    """
    target = out / "bundle"
    if resume:
        if not is_bundle(target):
            raise ConfigError(f"resume=true, but there is no run in {out}. Start without resume.")
        write_configs(target, resolve(Bundle(target), TRAIN_CONFIGS, settings.overrides, None))
        return
    configs = settings.config(source, *TRAIN_CONFIGS)
    if not configs["train"]["data"]:
        raise ConfigError("training needs data=MANIFEST, a CSV with case_id, image, label and split")
    # Paths are the user's, but the bundle may be moved: they are kept whole.
    for config in configs.values():
        if config.get("data"):
            config["data"] = str(Path(config["data"]).resolve())
    if target.exists() and not settings.run["overwrite"]:
        raise ConfigError(
            f"{target} exists. Go on with resume=true, give another out=, or replace it with overwrite=true."
        )
    shutil.rmtree(target, ignore_errors=True)
    with atomic_path(target) as temporary:
        shutil.copytree(source.path, temporary, ignore=shutil.ignore_patterns("*.pt", "presets", "variants"))
        write_configs(temporary, configs | {"metadata": configs["metadata"] | {"weights_sha256": None}})
        (temporary / "models").mkdir(exist_ok=True)


def train_bundle(bundle: Bundle, report: RunReport) -> ResumableRun:
    """Run `train.yaml` of a prepared bundle, as `python -m monai.bundle run` does.

    Under torchrun `multi_gpu_train.yaml` is laid over it.

    Returns:
        The handler that kept the weights: best metric and epoch.
    """
    configs = bundle.path / "configs"
    files = [configs / "train.yaml"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        files.append(configs / "multi_gpu_train.yaml")
    workflow = ConfigWorkflow(
        config_file=[str(f) for f in files],
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        workflow_type="train",
        bundle_root=str(bundle.path),
    )
    with report.stage("start"):
        workflow.initialize()
        # Building the trainer loads and caches the cases.
        trainer = workflow.parser.get_parsed_content("train#trainer")
    with report.stage("train"), warnings.catch_warnings():
        # A clean scan has no foreground to crop around; MONAI says so at every draw.
        warnings.filterwarnings("ignore", message="Num foregrounds 0")
        trainer.run()
    workflow.finalize()
    return next(h for h in workflow.parser.get_parsed_content("train#handlers") if isinstance(h, ResumableRun))
