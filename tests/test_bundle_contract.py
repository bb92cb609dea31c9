"""What every bundle keeps to. Folders under bundles/ are met unasked, and so is each of their variants."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.transforms import Compose, SaveImaged
from numpy.typing import NDArray
from scan_files import LESION_CENTRE_MM, LESION_RADIUS_MM, MATRICES, SHAPE, grid_points, nifti_image, save

from ich_pipeline import __version__, bundles, cli
from ich_pipeline.bundles import Bundle, Config
from ich_pipeline.commands import Settings
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import sha256_of, write_json
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport
from ich_pipeline.training import prepare_run, train_bundle

BUNDLES = bundles.all_bundles()
TRAINABLE = {name: bundle for name, bundle in BUNDLES.items() if bundle.needs_weights}
WITH_VARIANTS = [(name, variant) for name, b in TRAINABLE.items() for variant in (None, *b.overlays("variants"))]


WITHOUT_WEIGHTS: list[tuple[str, str | None]] = [(name, None) for name in BUNDLES if name not in TRAINABLE]


def name_of(param: tuple[str, str | None]) -> str:
    return "-".join(filter(None, param))


def skipped(bundle: Bundle) -> list[pytest.MarkDecorator]:
    """Marks of a bundle whose network cannot be built here."""
    missing = bundle.missing_packages
    return [pytest.mark.skip(f"{bundle.name} needs {', '.join(missing)}, not installed")] if missing else []


def of(found: dict[str, Bundle]) -> list[Any]:
    return [pytest.param(bundle, id=name, marks=skipped(bundle)) for name, bundle in found.items()]


def ready_of(names: list[tuple[str, str | None]]) -> list[Any]:
    return [pytest.param(param, id=name_of(param), marks=skipped(BUNDLES[param[0]])) for param in names]


each_bundle = pytest.mark.parametrize("bundle", of(BUNDLES))
each_trainable_bundle = pytest.mark.parametrize("bundle", of(TRAINABLE))
each_trained_bundle = pytest.mark.parametrize("ready", ready_of(WITH_VARIANTS), indirect=True)
each_ready_bundle = pytest.mark.parametrize("ready", ready_of([(name, None) for name in BUNDLES]), indirect=True)

# Baselines that differ in their network alone, so that a difference of scores is one of networks.
SIBLINGS = [("unet3d", "segresnet3d", "swinunetr"), ("segresnet2d", "unetplusplus2d", "fpn2d")]

# What MONAI's bundle specification asks of metadata, and what we ask besides.
TEXT = {"type": "string", "minLength": 1}
SHAPE_OF_NETWORK = {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 2}
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"],
    "properties": {
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": SHAPE_OF_NETWORK,
        "dtype": {"const": "float32"},
        "value_range": {"type": "array"},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": TEXT},
    },
}
VERSION = {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}
METADATA = {
    "type": "object",
    "required": [
        *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version"),
        *("required_packages_version", "task", "description", "authors", "copyright", "network_data_format"),
        *("name", "intended_use", "references", "weights_sha256"),
    ],
    "properties": {
        "version": VERSION,
        "changelog": {"type": "object", "additionalProperties": TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": VERSION},
        **dict.fromkeys(("monai_version", "pytorch_version", "numpy_version"), VERSION),
        **dict.fromkeys(("schema", "task", "description", "authors", "copyright", "name", "intended_use"), TEXT),
        "weights_sha256": {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"},
        "needs_weights": {"const": False},  # left out by all others
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {"type": "object", "required": ["image"], "properties": {"image": TENSOR}},
                "outputs": {"type": "object", "required": ["pred"], "properties": {"pred": TENSOR}},
            },
        },
    },
}
# Keys that MONAI Label or our own commands open.
INFERENCE_KEYS = {
    *("bundle_root", "device", "network_def", "preprocessing", "inferer", "postprocessing"),
    *("network", "scans", "output_dir", "threshold", "evaluator", "run"),
}
WEIGHT_KEYS = {"weights", "engine", "amp"}


# ---------------------------------------------------------------- phantoms and tiny trained bundles


def head_matrix(name: str) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    right, front, up = SHAPE
    return MATRICES[name], (front, up, right) if name == "permuted" else SHAPE


def distance_mm(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """From the centre of the phantom's lesion, for every voxel of a grid."""
    return np.linalg.norm(grid_points(Grid(shape, affine)) - LESION_CENTRE_MM, axis=-1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small a network mostly wait for each other, on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one head on three grids, their labels, and a manifest."""
    folder = tmp_path_factory.mktemp("heads")
    rows = ["case_id,patient_id,image,label,split"]
    for name, split in (("plain", "train"), ("sheared", "val"), ("permuted", "test")):
        matrix, shape = head_matrix(name)
        image = nifti_image(matrix, shape)
        save(image, folder / f"{name}.nii.gz")
        lesion = distance_mm(image.affine, shape) < LESION_RADIUS_MM
        save(nib.Nifti1Image(lesion.astype(np.uint8), image.affine, image.header), folder / f"{name}_label.nii.gz")
        rows.append(f"{name},{name},{name}.nii.gz,{name}_label.nii.gz,{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def prepared(source: Bundle, variant: str | None, out: Path, heads: Path) -> Bundle:
    """The bundle that `train` writes before it starts, at the size of the preset `tiny`."""
    # As overrides, not as a preset: a variant wins over a preset.
    tiny = bundles.read_yaml(source.overlays("presets")["tiny"])
    settings = Settings.of([f"bundle={source.path}", "preset=null"])
    settings.overrides.update(tiny | {"data": str(heads / "manifest.csv"), "device": "cpu"})
    if variant:
        settings.overrides["variant"] = variant
    prepare_run(source, settings, out, resume=False)
    return Bundle(out / "bundle")


def on_a_coarse_grid(source: Bundle, folder: Path) -> Bundle:
    """A bundle without presets on a model grid that is about as coarse as the phantom."""
    shutil.copytree(source.path, folder)
    names = source.config_names
    bundles.write_configs(folder, bundles.resolve(source, names, {"spacing_mm": [10.0, 2.0, 2.0]}, None))
    return Bundle(folder)


@pytest.fixture(scope="module", params=ready_of([*WITH_VARIANTS, *WITHOUT_WEIGHTS]))
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, heads: Path) -> Bundle:
    """A tiny bundle with the weights of two training steps, or with none where none are needed."""
    name, variant = request.param
    if name not in TRAINABLE:
        return on_a_coarse_grid(BUNDLES[name], tmp_path_factory.mktemp("bundle") / name)
    bundle = prepared(BUNDLES[name], variant, tmp_path_factory.mktemp("run"), heads)
    result = train_bundle(bundle, RunReport({}), resume=False)
    assert result.best_epoch == 1
    assert bundle.metadata["weights_sha256"] == sha256_of(bundle.path / "models" / "model.pt")
    return bundle


@pytest.fixture
def segmenter(ready: Bundle) -> Segmenter:
    return Segmenter(ready, ready.config("inference"))


def case(heads: Path, name: str) -> CaseRecord:
    return CaseRecord(name, heads / f"{name}.nii.gz")


# ---------------------------------------------------------------- what the folder holds


@each_bundle
def test_metadata_is_complete(bundle: Bundle) -> None:
    metadata = bundle.metadata
    jsonschema.validate(metadata, METADATA)
    assert metadata["name"] == bundle.path.name
    assert metadata["version"] in metadata["changelog"]
    assert metadata["required_packages_version"]["ich_pipeline"] == __version__
    data_format = metadata["network_data_format"]
    for tensor in (data_format["inputs"]["image"], data_format["outputs"]["pred"]):
        assert list(tensor["channel_def"]) == [str(n) for n in range(tensor["num_channels"])]


@pytest.mark.parametrize("missing", ["version", "network_data_format", "weights_sha256"])
@each_bundle
def test_incomplete_metadata_is_seen(bundle: Bundle, missing: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=missing):
        jsonschema.validate({k: v for k, v in bundle.metadata.items() if k != missing}, METADATA)


@each_bundle
def test_folder_is_complete(bundle: Bundle) -> None:
    wanted = {"inference", "evaluate"} | ({"train", "multi_gpu_train"} if bundle.needs_weights else set())
    # A stage that is trained first has its own config, laid over train.yaml.
    assert set(bundle.config_names) - {"coarse"} == wanted | {"metadata"}
    assert (bundle.path / "configs" / "logging.conf").is_file()
    assert "Apache License" in (bundle.path / "LICENSE").read_text()
    assert set(bundle.overlays("presets")) >= ({"cpu", "gpu", "tiny"} if bundle.needs_weights else set())


def top_level_keys(bundle: Bundle) -> set[str]:
    names = (name for name in bundle.config_names if name != "metadata")
    return {re.split("#|::", key)[0] for name in names for key in bundle.config(name)}


def documented_keys(card: str) -> set[str]:
    """Names in the first column of the tables in a model card's section "Keys"."""
    section = card.split("\n## Keys\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*)\|", section, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([a-z_0-9]+)`", cell)}


@each_bundle
def test_every_key_is_documented_and_every_documented_key_exists(bundle: Bundle) -> None:
    assert documented_keys((bundle.path / "docs" / "README.md").read_text()) == top_level_keys(bundle)


def test_documented_keys_are_those_of_the_first_column() -> None:
    card = "| `x` |\n\n## Keys\n| `a`, `b_2` | uses `c` |\n|---|---|\n| key | `d` |\n`e`\n\n## Variants\n| `y` |\n"
    assert documented_keys(card) == {"a", "b_2"}


def test_inference_stands_alone_and_saves_last(ready: Bundle) -> None:
    config = ready.config("inference")
    assert set(config) >= INFERENCE_KEYS
    assert set(config) & WEIGHT_KEYS == (WEIGHT_KEYS if ready.needs_weights else set())
    referenced = set(re.findall(r"@([a-z_0-9]+)", json.dumps(config)))
    assert referenced <= set(config)
    assert {step["keys"] for step in config["preprocessing"]["transforms"]} == {"image"}
    steps = config["postprocessing"]["transforms"]
    assert {step["keys"] for step in steps} == {"pred"}
    order = [step["_target_"] for step in steps if step["_target_"] in ("Invertd", "AsDiscreted", "SaveImaged")]
    assert order == ["Invertd", "AsDiscreted", "SaveImaged"]
    assert steps[-1]["writer"] == "ich_pipeline.transforms.NativeMaskWriter"


# ---------------------------------------------------------------- what training and inference share


def image_chain(config: Config) -> list[Config]:
    """What the preprocessing does to the image, key names and the label's own steps left out."""
    chain = []
    for step in config["preprocessing"]["transforms"]:
        keys = [step["keys"]] if isinstance(step["keys"], str) else step["keys"]
        # EnsureTyped drops the metadata, which training does not need; it changes no value.
        if "image" in keys and step["_target_"] != "EnsureTyped":
            chain.append({name: value for name, value in step.items() if name != "keys"})
    return chain


def drift(train: Config, inference: Config) -> list[str]:
    """Names of what the two configs should share and do not."""
    # `network` is loaded here and optimised there; preprocessing is compared by what it does to the image.
    # A second stage is trained on boxes of the label and used on those of a detector.
    own = {"network", "preprocessing", "run", "boxes"}
    names = [key for key in train.keys() & inference.keys() if key not in own and train[key] != inference[key]]
    if image_chain(train) != image_chain(inference):
        names.append("preprocessing")
    windows, validation = inference["inferer"]["inferer"], train["validate"]["inferer"]["inferer"]
    names += [f"inferer.{key}" for key in windows.keys() & validation.keys() if windows[key] != validation[key]]
    return sorted(names)


@each_trainable_bundle
def test_training_and_inference_share_network_and_preprocessing(bundle: Bundle) -> None:
    for variant in (None, *bundle.overlays("variants")):
        for preset in (None, *bundle.overlays("presets")):
            overrides = {"variant": variant} if variant else {}
            # Refuses a preset or variant with a key that no config has.
            configs = bundles.resolve(bundle, ("train", "inference"), overrides, preset)
            assert configs["train"].keys() >= {"network_def", "spacing_mm", "window_hu", "threshold"}
            assert drift(configs["train"], configs["inference"]) == [], (variant, preset)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("spacing_mm", [1, 1, 1], "spacing_mm"),
        ("network_def", {}, "network_def"),
        ("preprocessing", {"transforms": []}, "preprocessing"),
        ("validate", {"inferer": {"inferer": {"_target_": "SimpleInferer"}}}, "inferer._target_"),
    ],
)
@each_trainable_bundle
def test_drift_is_seen(bundle: Bundle, key: str, value: Any, seen: str) -> None:
    assert drift(bundle.config("train") | {key: value}, bundle.config("inference")) == [seen]


def shared_by_siblings(bundle: Bundle) -> dict[str, Config]:
    """Its configs but for the network, the keys that the network alone reads, and what the metadata say of it."""
    configs = {name: bundle.config(name) for name in bundle.config_names}
    network = configs["train"]["network_def"]
    own = {"network_def", *re.findall(r"@([a-z_0-9]+)", json.dumps(network))}
    shared = {name: {key: value for key, value in config.items() if key not in own} for name, config in configs.items()}
    about_it = {"name", "description", "references", "required_packages_version"}
    shared["metadata"] = {key: value for key, value in configs["metadata"].items() if key not in about_it}
    for side in shared["metadata"]["network_data_format"].values():
        for tensor in side.values():
            del tensor["spatial_shape"]
    return shared


def shared_preset(bundle: Bundle, name: str) -> Config:
    shared = shared_by_siblings(bundle)["train"]
    preset = bundles.read_yaml(bundle.overlays("presets")[name])
    # Whether a network bears bf16 is its own.
    return {key: value for key, value in preset.items() if key in shared and key != "amp"}


@pytest.mark.parametrize("names", SIBLINGS, ids="-".join)
def test_siblings_differ_in_their_network_alone(names: tuple[str, ...]) -> None:
    first, *others = (BUNDLES[name] for name in names)
    for other in others:
        assert shared_by_siblings(other) == shared_by_siblings(first)
        # On a machine they are trained alike too; `tiny` is what each network can be tested with.
        for preset in ("cpu", "gpu"):
            assert shared_preset(other, preset) == shared_preset(first, preset)


@each_trainable_bundle
def test_what_all_trainable_bundles_share(bundle: Bundle) -> None:
    shared = BUNDLES["cascade3d"].path
    for name in ("LICENSE", "configs/evaluate.yaml", "configs/multi_gpu_train.yaml", "configs/logging.conf"):
        expected = (shared / name).read_text()
        if "coarse" in bundle.config_names:  # what learns is one stage of the network
            expected = expected.replace('"@network"', '"@learner"')
        assert (bundle.path / name).read_text() == expected


@each_bundle
def test_laid_over_configs_change_keys_that_exist(bundle: Bundle) -> None:
    base = {"evaluate": "inference"} | ({"multi_gpu_train": "train"} if bundle.needs_weights else {})
    own = {"imports", "data", "split"}
    for over, under in base.items():
        roots = {key.split("#")[0] for key in bundle.config(over)}
        assert roots - own <= set(bundle.config(under))


# ---------------------------------------------------------------- the network


@each_bundle
def test_network_takes_and_gives_what_the_metadata_says(bundle: Bundle) -> None:
    configs = bundle.path / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.yaml")}
    verify_net_in_out("network_def", **files, device="cpu", n=1)
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 7}
    with pytest.raises(ValueError, match="channel number"):
        verify_net_in_out("network_def", **files, device="cpu", n=1, **wrong)


def test_network_keeps_the_size_and_is_finite(segmenter: Segmenter) -> None:
    data_format = segmenter.bundle.metadata["network_data_format"]
    given, wanted = data_format["inputs"]["image"], data_format["outputs"]["pred"]
    size = [int(str(n).replace("*n", "")) for n in given["spatial_shape"]]
    with torch.inference_mode():
        logits = segmenter.network(torch.randn(1, given["num_channels"], *size))
    assert given["spatial_shape"] == wanted["spatial_shape"]
    assert logits.shape == (1, wanted["num_channels"], *size)
    assert torch.isfinite(logits).all()


@pytest.fixture
def trainer(ready: Bundle) -> Iterator[Any]:
    workflow = ConfigWorkflow(
        config_file=str(ready.path / "configs" / "train.yaml"),
        workflow_type="train",
        bundle_root=str(ready.path),
    )
    workflow.initialize()
    yield workflow.parser.get_parsed_content("train#trainer")
    workflow.finalize()


def loss_of(trainer: Any, batch: Any) -> torch.Tensor:
    """What one training step minimises; the random state is the same at every call."""
    torch.manual_seed(0)
    image, label, *rest = trainer.prepare_batch(batch, torch.device("cpu"), False)
    args, kwargs = rest or ((), {})
    return trainer.loss_function(trainer.inferer(image, trainer.network, *args, **kwargs), label)


@each_trained_bundle
def test_every_parameter_learns_and_steps_lower_the_loss(trainer: Any) -> None:
    batch = next(iter(trainer.data_loader))
    trainer.network.train()
    losses: list[float] = []
    for _ in range(6):
        trainer.optimizer.zero_grad()
        loss = loss_of(trainer, batch)
        loss.backward()
        if not losses:
            gradients = {name: p.grad for name, p in trainer.network.named_parameters()}
            assert [name for name, g in gradients.items() if g is None or not g.any()] == []
            assert [name for name, g in gradients.items() if not torch.isfinite(g).all()] == []
        trainer.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_trained_bundle
def test_training_reads_a_case_once_and_draws_it_anew(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ich_pipeline.transforms.read_scan", None)  # a second reading would fail
    first, second = trainer.data_loader  # two steps, one case
    assert not torch.equal(first["image"], second["image"])


# ---------------------------------------------------------------- scans and masks


def as_scores(logit: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What an inferer would give for these (1, 1, ...) logits: a probability, or logits of both classes."""
    return like * 0 + (torch.sigmoid(logit) if like.shape[1] == 1 else torch.cat([-logit / 2, logit / 2], dim=1))


@pytest.mark.parametrize("name", ["plain", "sheared", "permuted"])
def test_scores_come_back_to_the_native_grid(segmenter: Segmenter, heads: Path, name: str) -> None:
    loaded = segmenter.read(case(heads, name))
    real = segmenter.inferer(loaded.data["image"][None], segmenter.network)
    assert real.shape[2:] == loaded.data["image"].shape[1:]
    assert torch.isfinite(real).all()

    # The lesion drawn on the model grid where its affine says, one half on the surface.
    affine = np.asarray(loaded.data["image"].affine)
    logit = (
        torch.as_tensor(LESION_RADIUS_MM - distance_mm(affine, tuple(real.shape[2:])), dtype=torch.float32)[None, None]
        / 5
    )
    segmenter.inferer = lambda image, network: as_scores(logit, real)
    prediction = segmenter.segment(loaded)
    truth = np.asarray(nib.load(heads / f"{name}_label.nii.gz").dataobj) > 0
    found = prediction.mask.values > 0
    np.testing.assert_array_equal(prediction.mask.grid.affine, nib.load(heads / f"{name}.nii.gz").affine)
    # The model grid of the preset is about as coarse as the phantom: voxels on the surface may differ.
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95

    segmenter.inferer = lambda image, network: as_scores(logit * 0 - 20, real)
    assert not segmenter.segment(loaded).mask.values.any()


def test_evaluate_scores_on_the_native_grid(ready: Bundle, heads: Path, tmp_path: Path) -> None:
    configs = ready.path / "configs"
    workflow = ConfigWorkflow(
        config_file=[str(configs / "inference.yaml"), str(configs / "evaluate.yaml")],
        workflow_type="infer",
        bundle_root=str(ready.path),
        output_dir=str(tmp_path),
        data=str(heads / "manifest.csv"),
    )
    workflow.initialize()
    workflow.run()
    dice = workflow.parser.get_parsed_content("evaluator").state.metrics["val_mean_dice"]
    workflow.finalize()
    found, truth = (
        np.asarray(nib.load(f).dataobj) for f in (tmp_path / "permuted.nii.gz", heads / "permuted_label.nii.gz")
    )
    assert dice == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()), abs=1e-6)


def as_monai_label(bundle: Bundle, scan: Path, threshold: float) -> NDArray[np.uint8]:
    """The mask as MONAI Label makes it: only inference.yaml is opened, `SaveImaged` is dropped."""
    parser = ConfigParser()
    parser.read_config(str(bundle.path / "configs" / "inference.yaml"))
    parser["bundle_root"] = str(bundle.path)
    parser["threshold"] = threshold
    network = parser.get_parsed_content("network_def")
    if bundle.needs_weights:
        network.load_state_dict(torch.load(bundle.path / "models" / "model.pt", weights_only=True), strict=True)
    data = parser.get_parsed_content("preprocessing")({"image": str(scan), "image_path": str(scan)})
    with torch.no_grad():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
    steps = parser.get_parsed_content("postprocessing").transforms
    return np.asarray(Compose([s for s in steps if not isinstance(s, SaveImaged)])(data)["pred"][0]).astype(np.uint8)


class MonaiRuns:
    """`python -m monai.bundle run` in processes of their own that share the import of MONAI, half of their time.

    Each is a fork of one process that has imported `monai.bundle` and nothing of ours.
    """

    WAITS = """
import json, os, runpy, sys
import monai.bundle
for line in sys.stdin:
    words, log = json.loads(line)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.argv = ["monai.bundle", *words]
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path) -> None:
        # Sums in another order would differ in the last bit, and threads do not survive a fork.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        call, pipe = [sys.executable, "-c", self.WAITS], subprocess.PIPE
        self.process = subprocess.Popen(call, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, words: list[str], log: Path) -> int:
        """Exit status; what it says goes to `log`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([["run", *words], str(log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="session")
def monai_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonaiRuns]:
    runs = MonaiRuns(tmp_path_factory.mktemp("monai"))
    yield runs
    # Not by closing its input alone: workers of a data loader, forked meanwhile and not collected yet, hold it open.
    runs.process.kill()
    runs.process.communicate()


def test_a_run_by_monai_that_fails_is_seen(monai_runs: MonaiRuns, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert monai_runs.run(["--config_file", str(tmp_path / "none.yaml")], log) == 1
    assert "none.yaml" in log.read_text()


@each_ready_bundle
def test_three_routes_give_the_same_mask(ready: Bundle, heads: Path, tmp_path: Path, monai_runs: MonaiRuns) -> None:
    small = ready
    scans = [heads / f"{name}.nii.gz" for name in ("sheared", "permuted")]
    # A threshold in the middle of the scores gives a mask in which every difference would show.
    segmenter = Segmenter(small, small.config("inference"))
    scores = segmenter.segment(segmenter.read(case(heads, "sheared"))).probability
    threshold = float(np.median(scores[scores > 0]))

    ours = tmp_path / "ours"
    words = [f"bundle={small.path}", f"threshold={threshold!r}", "pictures=false"]
    with pytest.raises(SystemExit) as end:
        cli.main(["segment", *map(str, scans), "--out", str(ours), *words])
    assert end.value.code == 0

    config, log = small.path / "configs" / "inference.yaml", tmp_path / "log.txt"
    words = ["--config_file", str(config), "--bundle_root", str(small.path), "--scans", str([str(s) for s in scans])]
    words += ["--output_dir", str(tmp_path / "monai"), "--threshold", repr(threshold)]
    assert monai_runs.run(words, log) == 0, log.read_text()

    for scan in scans:
        mask, theirs = (np.asarray(nib.load(folder / scan.name).dataobj) for folder in (ours, tmp_path / "monai"))
        assert 0.1 < mask.mean() / (scores > 0).mean() < 0.9
        np.testing.assert_array_equal(mask, theirs)
        assert (ours / scan.name).read_bytes() == (tmp_path / "monai" / scan.name).read_bytes()
        np.testing.assert_array_equal(mask, as_monai_label(small, scan, threshold))
        np.testing.assert_array_equal(nib.load(ours / scan.name).affine, nib.load(scan).affine)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("bundle", [b for b in BUNDLES.values() if not b.needs_weights], ids=lambda b: b.name)
def test_what_needs_no_weights_has_none_and_cannot_be_trained(
    bundle: Bundle, heads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (bundle.path / "models").exists()
    segmenter = Segmenter(bundle, bundle.config("inference"))
    assert segmenter.weights_sha256 is None
    assert not segmenter.network.state_dict()
    with pytest.raises(SystemExit) as end:
        cli.main(["train", f"bundle={bundle.path}", f"data={heads / 'manifest.csv'}"])
    assert end.value.code == 2
    assert f"{bundle.name} has nothing to train" in capsys.readouterr().err


@pytest.fixture
def untrained(request: pytest.FixtureRequest, heads: Path, tmp_path: Path) -> Bundle:
    """A tiny bundle whose weights were never trained: `put_weights` gives them."""
    return prepared(request.getfixturevalue("bundle"), None, tmp_path, heads)


def put_weights(bundle: Bundle, content: Any) -> None:
    """Save weights and write their hash into the metadata."""
    path = bundle.path / "models" / "model.pt"
    torch.save(content, path)
    write_json(bundle.path / "configs" / "metadata.json", bundle.metadata | {"weights_sha256": sha256_of(path)})


def state_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    return ConfigParser(bundle.config("inference")).get_parsed_content("network_def").state_dict()


def segmenter_of(bundle: Bundle) -> Segmenter:
    return Segmenter(bundle, bundle.config("inference"))


@each_trainable_bundle
def test_weights_that_were_changed_are_refused(bundle: Bundle, untrained: Bundle) -> None:
    with pytest.raises(ConfigError, match="has no weights"):
        segmenter_of(untrained)
    put_weights(untrained, state_of(untrained))
    segmenter_of(untrained)
    with (untrained.path / "models" / "model.pt").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ConfigError, match="SHA-256"):
        segmenter_of(untrained)


@pytest.mark.parametrize("change", ["extra", "missing"])
@each_trainable_bundle
def test_weights_of_another_network_are_refused(bundle: Bundle, untrained: Bundle, change: str) -> None:
    state = state_of(untrained)
    if change == "extra":
        state["head.weight"] = torch.zeros(1)
    else:
        state.popitem()
    put_weights(untrained, state)
    with pytest.raises(ConfigError, match="does not fit the network"):
        segmenter_of(untrained)


class Payload:
    """Runs code of its own when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in a weights file was run')",)


@each_trainable_bundle
def test_weights_with_code_in_them_are_refused(bundle: Bundle, untrained: Bundle) -> None:
    put_weights(untrained, {"model": Payload()})
    with pytest.raises(ConfigError, match="holds code"):
        segmenter_of(untrained)
    with pytest.raises(SystemExit, match="was run"):
        pickle.loads(pickle.dumps(Payload()))  # the payload does what the test says
