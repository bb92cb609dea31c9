"""Training for real, with a tiny network on tiny cases: reproducible, resumable to the bit, on several processes."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stopped_training
import torch
import yaml
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from training_cases import TINY, write_cases

from ich_pipeline import bundles, commands, training
from ich_pipeline.bundles import Bundle
from ich_pipeline.commands import Settings
from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.files import sha256_of
from ich_pipeline.training import CaseSampler, Draw, TrainingCases

EPOCHS = ("epochs=4", "validate_every=3", "seed=7", "tracking=false")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases"))


def words(cases: Path, out: Path, *more: str) -> list[str]:
    """Words of a training; a later word replaces an earlier one with the same key."""
    given = ["bundle=cascade3d", f"data={cases}", f"out={out}", *TINY, *EPOCHS, *more]
    return list({word.partition("=")[0]: word for word in given}.values())


def train(cases: Path, out: Path, *more: str) -> Path:
    """Train in this process; returns the folder of the run."""
    assert commands.train(Settings.of(words(cases, out, *more))) == 0
    return out


def start(cases: Path, out: Path, *more: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen[str]:
    """Train in a process, or in those that a launcher starts, of their own."""
    command = [*launcher, "-m", "ich_pipeline", "train", *words(cases, out, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def state_of(out: Path) -> dict[str, Any]:
    return torch.load(out / "training_state.pt", weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def undisturbed(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cases, tmp_path_factory.mktemp("undisturbed") / "run")


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_bundle_with_its_settings_and_best_weights(undisturbed: Path, cases: Path) -> None:
    bundle = Bundle(undisturbed / "bundle")
    assert sorted(p.name for p in undisturbed.iterdir()) == ["bundle", "run.json", "training_state.pt"]
    assert bundle.weights is not None
    assert bundle.metadata["weights_sha256"] == sha256_of(bundle.weights)
    assert bundle.metadata["trained_on_phantoms"] is False  # tests/test_demo.py has the other case
    assert bundle.metadata["trained_slice_mm"] == [11.0, 11.0]
    config = bundle.config("train")
    assert (config["seed"], config["data"], config["filters"]) == (7, str(cases), [4, 4, 4, 4])
    assert bundle.config("inference")["filters"] == [4, 4, 4, 4]
    state = state_of(undisturbed)
    assert (state["epoch"], state["best_epoch"] in (3, 4)) == (4, True)
    assert state["scheduler"]["last_epoch"] == 4
    report = json.loads((undisturbed / "run.json").read_text())
    assert (report["exit_status"], report["seeds"]) == (0, {"seed": 7})
    assert report["bundle"]["sha256"] == bundle.metadata["weights_sha256"]
    assert report["inputs"] == [{"path": str(cases), "sha256": sha256_of(cases)}]
    assert set(report["stages"]) == {"start", "train"}


def test_the_last_epoch_is_validated_whatever_the_interval(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[int] = []
    monkeypatch.setattr(training.ResumableRun, "_share_buffers", lambda run: validated.append(run.epoch))
    monkeypatch.setattr(
        training.ResumableRun,
        "epoch_started",
        lambda run, engine, real=training.ResumableRun.epoch_started: (
            setattr(run, "epoch", engine.state.epoch),
            real(run, engine),
        ),
    )
    train(cases, tmp_path / "run", "epochs=5", "validate_every=2", "iterations=1")
    assert validated == [2, 4, 5]


def test_equal_seeds_give_equal_files_with_and_without_workers(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    other = train(cases, tmp_path / "run", "workers=2")
    assert set(multiprocessing.active_children()) <= before  # none of its workers outlives it
    assert same(state_of(other), state_of(undisturbed))
    assert sha256_of(other / "bundle/models") == sha256_of(undisturbed / "bundle/models")


def test_another_seed_gives_other_weights(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    other = train(cases, tmp_path / "run", "seed=8", "epochs=1")
    assert sha256_of(other / "bundle/models") != sha256_of(undisturbed / "bundle/models")


def test_monai_runs_the_same_training(undisturbed: Path, tmp_path: Path) -> None:
    """`python -m monai.bundle run` on what a run left, in the bundle's folder, with no command of ours."""
    copy = tmp_path / "copy"
    prepared = Bundle(undisturbed / "bundle")
    bundles.write_configs(copy, {name: prepared.config(name) for name in prepared.config_names})
    (copy / "models").mkdir()
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
    result = subprocess.run(
        command, cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert same(state_of(tmp_path), state_of(undisturbed))
    assert sha256_of(copy / "models/model.pt") == prepared.metadata["weights_sha256"]
    assert Bundle(copy).metadata["weights_sha256"] == prepared.metadata["weights_sha256"]


def test_training_needs_no_mlflow(cases: Path, tmp_path: Path) -> None:
    """With tracking off, MLflow may be missing; MONAI's handlers import it where it is there."""
    code = f"""
import sys
sys.modules["mlflow"] = None
from ich_pipeline.cli import main
main(["train", *{words(cases, tmp_path / "run", "epochs=1")!r}])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # Results on stdout and nothing else; in a log the bar is a line at its start and end, however many steps there are.
    assert re.fullmatch(r"best validation Dice 0\.\d{3} in epoch 1: .*/run/bundle\n", result.stdout)
    shown = [line for line in re.split(r"[\r\n]", result.stderr) if line.startswith("train:")]
    assert 1 <= len(shown) <= 3
    last = shown[-1]
    assert re.search(r"4/4 \[.*step.*epoch=1, loss=\d+\.\d{3}, val_\w*dice=0\.\d{3}\]", last), last


# --- begun with weights that exist -----------------------------------------------------------------------------------


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models" / "model.pt", weights_only=True)


def learnt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an optimizer changes: all but running means, which move with every batch."""
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


def test_training_begins_with_the_weights_of_another_run(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    begun = undisturbed / "bundle"
    own = [f"start_from={begun}", "epochs=1", "iterations=1"]
    still = train(cases, tmp_path / "still", *own, "learning_rate=0") / "bundle"
    assert same(learnt(weights_of(still)), learnt(weights_of(begun)))
    assert Bundle(still).metadata["started_from"] == Bundle(begun).metadata["weights_sha256"]
    moved = train(cases, tmp_path / "moved", *own) / "bundle"
    assert not same(learnt(weights_of(moved)), learnt(weights_of(begun)))
    # What begins from nothing, even of a bundle that did not, says so.
    words_ = [f"bundle={still}", "epochs=1", "iterations=1"]
    assert "started_from" not in Bundle(train(cases, tmp_path / "anew", *words_) / "bundle").metadata


def test_a_run_stopped_before_its_first_state_starts_over_with_the_same_weights(
    undisturbed: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "run", f"start_from={undisturbed / 'bundle'}"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_bundle", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cases, out, begun, "learning_rate=0")
    with pytest.raises(ConfigError, match=r"was to begin with weights of SHA-256 [0-9a-f]{64}.*start_from= again"):
        train(cases, out, "learning_rate=0", "resume=true")
    train(cases, out, begun, "learning_rate=0", "resume=true")
    assert same(learnt(weights_of(out / "bundle")), learnt(weights_of(undisturbed / "bundle")))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start_from=unet3d"], "start_from=unet3d: this bundle has no weights"),
        (["start_from=nowhere"], "nowhere"),
        (["start_from={begun}", "filters=[8,4,4,4]"], "does not fit the network"),
    ],
    ids=["untrained", "missing", "another network"],
)
def test_weights_that_cannot_be_begun_with_are_refused(
    undisturbed: Path, cases: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    given = [word.format(begun=undisturbed / "bundle") for word in more]
    with pytest.raises(ConfigError, match=said):
        train(cases, tmp_path / "run", *given)


def test_what_begins_with_weights_has_the_sizes_of_its_bundle(undisturbed: Path) -> None:
    bundle = bundles.find_bundle("cascade3d")
    settings = Settings.of(["bundle=cascade3d", "start_from=cascade3d"])
    assert settings.config(bundle, "train")["train"]["filters"] == bundle.config("inference")["filters"]


# --- stopped and resumed ---------------------------------------------------------------------------------------------


def test_a_run_killed_in_an_epoch_goes_on_as_if_undisturbed(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(cases, out, launcher=(sys.executable, *stopped_training.launcher(signal.SIGKILL, epoch=2)))
    process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL
    assert state_of(out)["epoch"] == 1
    assert json.loads((out / "run.json").read_text())["exit_status"] is None
    train(cases, out, "resume=true")
    assert same(state_of(out), state_of(undisturbed))
    assert sha256_of(out / "bundle/models") == sha256_of(undisturbed / "bundle/models")
    # Nothing tells the bundle of a resumed run from that of an undisturbed one.
    assert Bundle(out / "bundle").config("train") == Bundle(undisturbed / "bundle").config("train")


def test_a_run_stopped_before_its_first_state_starts_over(
    undisturbed: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_bundle", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cases, out)
    assert json.loads((out / "run.json").read_text())["exit_status"] == 130
    train(cases, out, "resume=true")
    assert same(state_of(out), state_of(undisturbed))


def _interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_goes_on_with_more_epochs(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    """Three epochs and then one more: the rate, the optimizer and the data are those of four epochs in one go."""
    out = train(cases, tmp_path / "run", "epochs=3")
    train(cases, out, "epochs=4", "resume=true")
    ours, theirs = state_of(out), state_of(undisturbed)
    assert same(ours, theirs)


def test_early_stopping_counts_on_after_a_resume(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience 3, and nothing is better than the first validation: epochs 2, 3 and 4 are the last."""
    _evaluations_that_give(monkeypatch, [0.5, 0.4, 0.5, 0.3, 0.9])
    out = train(cases, tmp_path / "run", "epochs=2", "validate_every=1", "patience=3", "iterations=1")
    assert (state_of(out)["epoch"], state_of(out)["waited"]) == (2, 1)
    train(cases, out, "epochs=9", "validate_every=1", "patience=3", "iterations=1", "resume=true")
    state = state_of(out)
    assert (state["epoch"], state["best_epoch"], state["best_metric"], state["waited"]) == (4, 1, 0.5, 3)
    with pytest.raises(ConfigError, match=r"ended after 4 epochs.*patience= \(now 3\)"):
        train(cases, out, "epochs=9", "validate_every=1", "patience=3", "iterations=1", "resume=true")
    train(cases, out, "epochs=9", "validate_every=1", "patience=4", "iterations=1", "resume=true")
    assert state_of(out)["best_metric"] == 0.9


def test_the_last_weights_are_kept_where_that_is_asked_for(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream's last epoch is kept though an earlier one scored more; a resumed run takes its new last one."""
    words = ("validate_every=1", "patience=0", "iterations=1", "keep=last")
    _evaluations_that_give(monkeypatch, [0.5, 0.4, 0.3])
    out = tmp_path / "run"
    for epochs, metric, resume in ((2, 0.4, "resume=false"), (3, 0.3, "resume=true")):
        train(cases, out, f"epochs={epochs}", *words, resume)
        state = state_of(out)
        assert (state["best_epoch"], state["best_metric"]) == (epochs, metric)
        kept = torch.load(out / "bundle" / "models" / "model.pt", weights_only=True)
        assert same(kept, state["network"])


def test_patience_and_the_last_weights_exclude_each_other(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep=last with patience=2.*Give patience=0"):
        train(cases, tmp_path / "run", "epochs=2", "patience=2", "keep=last")


def _evaluations_that_give(monkeypatch: pytest.MonkeyPatch, metrics: list[float]) -> None:
    """Each validation gives the next of `metrics`; when they are used up the last."""
    from monai.engines import SupervisedEvaluator

    def run(evaluator: Any, epoch: int) -> None:
        evaluator.state.metrics = {evaluator.state.key_metric_name: metrics[0]}
        if len(metrics) > 1:
            metrics.pop(0)

    monkeypatch.setattr(SupervisedEvaluator, "run", run)


def test_only_a_better_metric_replaces_the_weights(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _evaluations_that_give(monkeypatch, [0.5, 0.5, 0.4])
    out = train(cases, tmp_path / "run", "epochs=3", "validate_every=1", "iterations=1")
    kept = torch.load(out / "bundle/models/model.pt", weights_only=True)
    assert state_of(out)["best_epoch"] == 1
    assert not same(kept, dict(state_of(out)["network"]))
    once = train(cases, tmp_path / "once", "epochs=1", "validate_every=1", "iterations=1")
    assert same(kept, torch.load(once / "bundle/models/model.pt", weights_only=True))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["epochs=4"], r"bundle exists\. Go on with resume=true, give another out="),
        (["resume=true"], r"ended after 4 epochs\. To train on raise epochs= \(now 4\)"),
        (["resume=true", "epochs=6", "learning_rate=0.5"], r"learning_rate=0\.5: .* begun with 0\.01"),
        (["resume=true", "epochs=6", "seed=8"], r"seed=8: .* begun with 7"),
        (["resume=true", "epochs=6", "preset=cpu", "filters=[8]"], r"=.*: the run in .* was begun with"),
        (["resume=true", "epochz=6"], r"no key 'epochz'; did you mean 'epochs'"),
        (["overwrite=true", "data=null"], r"training needs data=MANIFEST"),
        (["overwrite=true", "preset=gpuu"], r"no preset 'gpuu'; did you mean 'gpu'"),
    ],
)
def test_a_run_that_exists_is_not_changed_by_a_wrong_call(
    undisturbed: Path, cases: Path, more: list[str], message: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    with pytest.raises(ConfigError, match=message):
        train(cases, undisturbed, *more)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_overwrite_begins_anew(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    out = train(cases, tmp_path / "run", "epochs=1", "seed=3")
    (out / "mlflow_run_id").write_text("of an earlier run")
    train(cases, out, "overwrite=true")
    assert same(state_of(out), state_of(undisturbed))
    assert not (out / "mlflow_run_id").exists()


def test_nothing_to_resume_is_refused(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=true, but there is no run in .*nowhere"):
        train(cases, tmp_path / "nowhere", "resume=true")


@pytest.mark.parametrize(
    ("splits", "found"),
    [("train train test", "2 cases to train and 0 to validate"), ("val test", "0 cases to train and 1 to validate")],
)
def test_a_manifest_without_training_or_validation_cases_is_refused(tmp_path: Path, splits: str, found: str) -> None:
    with pytest.raises(ManifestError, match=found):
        train(write_cases(tmp_path / "cases", splits), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fold_validates_and_the_others_train(tmp_path: Path) -> None:
    manifest = write_cases(tmp_path, "train train train val test")
    rows = list(csv.DictReader(manifest.open()))
    for n, row in enumerate(rows):
        row["fold"] = str(n % 2)
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    by_fold = training.load_cases(manifest, fold=1)
    assert [[Path(case["image"]).name for case in by_fold[name]] for name in ("train", "val")] == [
        ["image-0.nii.gz", "image-2.nii.gz"],
        ["image-1.nii.gz", "image-3.nii.gz"],
    ]
    with pytest.raises(ManifestError, match="4 cases to train and 0 to validate"):
        training.load_cases(manifest, fold=5)
    with pytest.raises(ConfigError, match="training needs data=MANIFEST"):
        training.load_cases(None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.sampler", None, "the loader has a SequentialSampler, expected a CaseSampler"),
        ("weights", "model.pt", "expected models/model.pt of a bundle"),
    ],
)
def test_a_config_that_cannot_be_resumed_is_refused(
    undisturbed: Path, key: str, value: str | None, message: str
) -> None:
    config = bundles.resolve(Bundle(undisturbed / "bundle"), ["train"], {key: value}, None)["train"]
    parser = ConfigParser({**config, "bundle_root": str(undisturbed / "bundle")})
    with pytest.raises(ConfigError, match=message):
        parser.get_parsed_content("train#trainer").run()
    assert state_of(undisturbed)["epoch"] == 4


# --- what is drawn ---------------------------------------------------------------------------------------------------


class _Cases(list):
    """Only a length."""


def draws(n_cases: int, n: int, seed: int, epoch: int) -> list[Draw]:
    sampler = CaseSampler(_Cases(range(n_cases)), n, seed)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    assert len(sampler) == n
    return list(sampler)


def test_every_case_comes_once_before_any_comes_again() -> None:
    drawn = [draw.case for draw in draws(5, 12, seed=0, epoch=1)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(drawn[10:])) == 2


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    one = draws(5, 10, seed=0, epoch=1)
    assert draws(5, 10, seed=0, epoch=1) == one
    for other in (draws(5, 10, seed=0, epoch=2), draws(5, 10, seed=1, epoch=1)):
        assert [d.case for d in other] != [d.case for d in one]
        assert not {d.seed for d in other} & {d.seed for d in one}


def test_processes_share_the_draws_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = draws(7, 8, seed=0, epoch=1)
    monkeypatch.setattr(training, "n_processes", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(training, "rank", lambda rank=rank: rank)
        shares.append(draws(7, 4, seed=0, epoch=1))
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    assert not {d.seed for d in shares[0]} & {d.seed for d in shares[1]}


def test_validation_cases_are_shared_out(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "n_processes", lambda: 2)
    monkeypatch.setattr(training, "rank", lambda: 1)
    given = training.load_cases(cases)
    assert len(given["train"]) == 4
    assert [Path(case["image"]).name for case in given["val"]] == ["image-5.nii.gz"]
    monkeypatch.setattr(training, "n_processes", lambda: 3)
    with pytest.raises(ManifestError, match="2 cases to validate on for 3 processes"):
        training.load_cases(cases)


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    item = {"image": torch.linspace(0, 1, 64).reshape(1, 8, 8)}
    random_steps = Compose([RandFlipd("image", prob=0.5), RandGaussianNoised("image", prob=0.5)])
    dataset = TrainingCases([item, item], Compose([]), random_steps)
    first = dataset[Draw(0, seed=5)]["image"]
    others = [dataset[Draw(1, seed=n)]["image"] for n in range(8)]
    assert torch.equal(dataset[Draw(1, seed=5)]["image"], first)
    assert len({tuple(other.flatten().tolist()) for other in others}) > 2


def test_augmentation_of_the_bundle_moves_image_and_label_together_and_spares_the_cache(undisturbed: Path) -> None:
    bundle = Bundle(undisturbed / "bundle")
    parser = ConfigParser({**bundle.config("train"), "bundle_root": str(bundle.path)})
    dataset = parser.get_parsed_content("train#dataset")
    cached = dataset[Draw(0, 0)]  # fills nothing in: the cache is there before the first draw
    before = [{key: torch.as_tensor(case[key]).clone() for key in ("image", "label")} for case in dataset._cache]
    bleeds, patches = [], []
    for seed in range(60):
        [patch] = dataset[Draw(0, seed)]
        assert patch.keys() == {"image", "label"}
        assert {key: tuple(value.shape) for key, value in patch.items()} == dict.fromkeys(patch, (1, 8, 32, 32))
        assert all(type(value) is torch.Tensor for value in patch.values())
        assert set(patch["label"].unique().tolist()) <= {0.0, 1.0}
        patches.append(patch)
        bleeds.append(bool(patch["label"].any()))
        if patch["label"].sum() > 100:  # the bleed is brighter than the brain around it, wherever both went
            inside = patch["image"][patch["label"] > 0].median()
            assert inside > patch["image"][patch["label"] == 0].median()
    # Two patches in three are centred on the bleed; some others hold it by chance.
    assert sum(bleeds) >= 35
    assert len({float(patch["image"].sum()) for patch in patches}) == 60
    assert torch.equal(dataset[Draw(0, 0)][0]["image"], cached[0]["image"])
    for case, was in zip(dataset._cache, before, strict=True):
        assert all(torch.equal(torch.as_tensor(case[key]), value) for key, value in was.items())


# --- several processes -----------------------------------------------------------------------------------------------

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Leaves what each process drew and ended with in OUT/rank-N.pt; the state file is only rank 0's.
WITNESS = """
import sys, torch
from pathlib import Path
from ich_pipeline import training
from ich_pipeline.cli import main

drawn, real = [], training.TrainingCases.__getitem__
def getitem(cases, draw):
    drawn.append(tuple(draw))
    return real(cases, draw)
training.TrainingCases.__getitem__ = getitem

def ended(run, engine, real=training.ResumableRun.epoch_completed):
    real(run, engine)
    found = {"drawn": drawn, "network": run.parts["network"].state_dict(), "best": run.best_metric}
    torch.save(found, Path(run.state_file).resolve().parent / f"rank-{training.rank()}.pt")
training.ResumableRun.epoch_completed = ended
main(["train", *sys.argv[1:]])
"""


def test_two_processes_train_one_network(cases: Path, tmp_path: Path) -> None:
    out, script = tmp_path / "run", tmp_path / "witness.py"
    script.write_text(WITNESS)
    # Validated in the last epoch only, where the processes' own running means would differ most.
    command = [*TORCHRUN, str(script), *words(cases, out, "epochs=2", "validate_every=2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best validation Dice") == 1
    assert len(re.findall(r"train:\s+0%", result.stderr)) == 1
    ranks = [torch.load(out / f"rank-{n}.pt", weights_only=True) for n in (0, 1)]
    assert same(ranks[0]["network"], ranks[1]["network"])
    assert same(ranks[0]["network"], dict(state_of(out)["network"]))
    assert ranks[0]["best"] == ranks[1]["best"] == state_of(out)["best_metric"]
    # Two epochs of four steps of two patches in each process.
    assert [len(rank["drawn"]) for rank in ranks] == [16, 16]
    assert not {seed for _, seed in ranks[0]["drawn"]} & {seed for _, seed in ranks[1]["drawn"]}
    first_pass = [case for rank in ranks for case, _ in rank["drawn"][:2]]
    assert sorted(first_pass) == [0, 1, 2, 3]
    assert json.loads((out / "run.json").read_text())["exit_status"] == 0


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_end_and_the_run_resumes(cases: Path, tmp_path: Path) -> None:
    import psutil

    whole, out = tmp_path / "whole", tmp_path / "run"
    process = start(cases, whole, launcher=TORCHRUN)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors

    stopped = stopped_training.launcher(signal.SIGKILL, epoch=2, stopped_rank=1)
    process = start(cases, out, launcher=(*TORCHRUN, *stopped))
    while len(workers := psutil.Process(process.pid).children()) < 2:
        time.sleep(0.05)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    assert state_of(out)["epoch"] == 1

    process = start(cases, out, "resume=true", launcher=TORCHRUN)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert same(state_of(out), state_of(whole))


@pytest.mark.slow
def test_a_wrong_call_ends_all_processes(cases: Path, tmp_path: Path) -> None:
    process = start(cases, tmp_path / "nowhere", "resume=true", launcher=TORCHRUN)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "resume=true, but there is no run in" in errors


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slope", "learns"), [(0.1, True), (1e4, True), (1e7, False), (float("nan"), False), (float("inf"), False)]
)
def test_large_gradients_are_clipped_and_absurd_ones_end_the_run(slope: float, learns: bool) -> None:
    weight = torch.nn.Linear(1, 1, bias=False)
    before = weight.weight.item()
    optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.ones(1, 1), "label": torch.zeros(1, 1)}],
        network=weight,
        optimizer=optimizer,
        loss_function=lambda pred, label: pred * slope,
        train_handlers=[training.GradientGuard(weight, max_norm=12.0)],
        decollate=False,
    )
    if learns:
        trainer.run()
        assert weight.weight.item() == pytest.approx(before - min(slope, 12.0), rel=1e-4)
    else:
        with pytest.raises(IchError, match=r"epoch 1, step 1: loss .*The training has diverged: lower learning_rate="):
            trainer.run()
        assert weight.weight.item() == before


def test_amp_is_settled_when_a_run_begins(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU `auto` is a measurement: a resumed run might find otherwise and would not be the same."""
    from ich_pipeline import engines

    for faster, expected in ((True, "on"), (False, "off")):
        monkeypatch.setattr(engines, "bf16_is_faster", lambda faster=faster: faster)
        out = tmp_path / expected
        source = bundles.find_bundle("cascade3d")
        training.prepare_run(source, Settings.of(words(cases, out, "amp=auto")), out, resume=False)
        assert yaml.safe_load((out / "bundle/configs/train.yaml").read_text())["amp"] == expected
        assert Bundle(out / "bundle").config("inference")["amp"] == "auto"
        monkeypatch.setattr(engines, "bf16_is_faster", lambda faster=faster: not faster)
        training.prepare_run(source, Settings.of(words(cases, out, "amp=auto", "resume=true")), out, resume=True)
        assert Bundle(out / "bundle").config("train")["amp"] == expected


def test_what_leaves_the_machine_names_no_path(undisturbed: Path, cases: Path) -> None:
    bundle = Bundle(undisturbed / "bundle")
    with training.without_paths(bundle) as copy:
        assert copy.name == "cascade3d"
        texts = [path.read_text() for path in (copy / "configs").iterdir()]
        assert not any(str(cases.parent) in text for text in texts)
        assert Bundle(copy).config("inference") == bundle.config("inference")
        assert sha256_of(copy / "models") == sha256_of(bundle.path / "models")
        assert not list(copy.rglob("training_state.pt"))
    assert str(cases) in (bundle.path / "configs/train.yaml").read_text()
