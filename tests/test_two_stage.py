"""The second stage: crops in, scores pasted back, nothing outside a box; and the bundle's own routes with boxes."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from heads import bleeding_head, save_nifti, save_weights
from monai.bundle import ConfigParser, ConfigWorkflow
from numpy.typing import NDArray
from scan_files import MATRICES, SHAPE
from test_boxes import box, detector_bundle, table
from torch import nn

from ich_pipeline import bundles, cli
from ich_pipeline.boxes import boxes_on_native_grid, merge_slices
from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import GeometryError, ManifestError
from ich_pipeline.inference import Segmenter
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.two_stage import Crop, RandBoxCropd, TwoStageInferer, resegment

BUNDLE = bundles.find_bundle("yolov5_transdeeplab")
MODEL_MM = (11.0, 2.0, 2.0)


class Dense(nn.Module):
    """A segmenter whose answer is known: what is denser than 50 HU in the window 0 to 80; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(40.0))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(crops.shape))
        logit = self.gain * (crops - 50 / 80)
        return torch.cat([-logit, logit], dim=1)


# ---------------------------------------------------------------- crops


def test_margin_is_in_millimetres_and_ends_at_the_slice() -> None:
    crop = Crop((8, 8), 4.0, (5.0, 2.0, 1.0))
    assert crop.around((slice(10, 14), slice(3, 5)), (15, 40)) == (slice(8, 15), slice(0, 9))
    assert Crop((8, 8), 0.0, (5.0, 2.0, 1.0)).around((slice(10, 14), slice(3, 5)), (15, 40)) == (
        slice(10, 14),
        slice(3, 5),
    )


def test_a_crop_comes_back_where_it_was() -> None:
    """A ramp survives the way to the network's size and back, at any size and ratio of the window."""
    crop = Crop((32, 32), 0.0, MODEL_MM)
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    plane = (rows + 2 * columns) / 200
    for window in ((slice(3, 20), slice(5, 49)), (slice(0, 40), slice(0, 60)), (slice(7, 9), slice(9, 10))):
        resized = crop.resize(plane, window)
        assert resized.shape == (1, 1, 32, 32)
        # Bicubic ends overshoot by less than a pixel of the ramp.
        torch.testing.assert_close(crop.back(resized, window), plane[window], atol=0.02, rtol=0)


def model_image(boxes: dict[int, tuple[int, int, int, int]]) -> torch.Tensor:
    """(1, 2, 6, 40, 50): tissue, blood in slices 1 to 4, and boxes."""
    image = torch.full((1, 2, 6, 40, 50), 30 / 80)
    image[0, 1] = 0
    image[0, 0, 1:5, 10:20, 15:35] = 65 / 80
    for k, (r0, c0, r1, c1) in boxes.items():
        image[0, 1, k, r0:r1, c0:c1] = 1
    return image


def test_only_boxes_are_segmented_and_only_slices_with_one_are_seen() -> None:
    network = Dense()
    boxes = {1: (8, 12, 22, 38), 3: (10, 15, 15, 20), 5: (0, 0, 5, 5)}
    inferer = TwoStageInferer((64, 64), 4.0, MODEL_MM, slices_at_once=2)
    image = model_image(boxes)
    with torch.inference_mode():
        score = inferer(image, network)
    assert score.shape == (1, 1, 6, 40, 50)
    assert network.seen == [(2, 1, 64, 64), (1, 1, 64, 64)]
    assert inferer.regions is not None
    assert torch.equal(inferer.regions[:, 0], image[:, 1] > 0)
    mask = score[0, 0] > 0.5
    wanted = torch.zeros_like(mask)
    wanted[1, 10:20, 15:35] = True
    wanted[3, 10:15, 15:20] = True  # the box cuts the blood: what lies in its margin is seen and not segmented
    assert torch.equal(mask, wanted)
    assert not score[0, 0][image[0, 1] == 0].any()


def test_no_box_no_network() -> None:
    network = Dense()
    with torch.inference_mode():
        score = TwoStageInferer((64, 64), 4.0, MODEL_MM)(model_image({}), network)
    assert not score.any()
    assert network.seen == []


def test_slices_at_once_change_nothing() -> None:
    boxes = {k: (5 + k, 10, 25, 40 - k) for k in range(6)}
    scores = []
    for at_once in (1, 4, 8):
        with torch.inference_mode():
            scores.append(TwoStageInferer((32, 32), 2.0, MODEL_MM, at_once)(model_image(boxes), Dense()))
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


# ---------------------------------------------------------------- training crops


def samples(positive_share: float, n: int = 40, boxes: dict[int, tuple[int, int, int, int]] | None = None) -> Any:
    image = model_image(dict.fromkeys(range(1, 5), (10, 15, 20, 35)) if boxes is None else boxes)[0]
    label = torch.zeros(1, 6, 40, 50)
    label[0, 1:5, 10:20, 15:35] = 1
    transform = RandBoxCropd(["image", "label"], (32, 32), 0.0, MODEL_MM, n, positive_share)
    before = image.clone()
    found = transform.set_random_state(seed=1)({"image": image, "label": label, "other": 1})
    assert torch.equal(image, before)
    return found


def test_training_sees_what_inference_sees() -> None:
    for sample in samples(1.0):
        assert sample["image"].shape == sample["label"].shape == (1, 32, 32)
        assert set(sample) == {"image", "label"}
        assert sample["label"].all()  # a tight box around blood that fills it
        torch.testing.assert_close(sample["image"], torch.full((1, 32, 32), 65 / 80))


def test_share_of_slices_with_blood() -> None:
    found = [bool(sample["label"].any()) for sample in samples(0.7, n=400)]
    assert 0.6 < np.mean(found) < 0.8
    assert not any(sample["label"].any() for sample in samples(0.0))


def test_a_clean_case_is_seen_through_boxes_of_any_size() -> None:
    image = model_image({})[0]
    image[0] = 0
    image[0, 2, 20:25, 20:25] = 0.4
    transform = RandBoxCropd(["image", "label"], (32, 32), 0.0, MODEL_MM, 50, 1.0).set_random_state(seed=2)
    found = transform({"image": image, "label": torch.zeros(1, 6, 40, 50)})
    assert not any(sample["label"].any() for sample in found)
    held = {round(float(sample["image"].mean()), 3) for sample in found if sample["image"].any()}
    assert len(held) > 3


# ---------------------------------------------------------------- the bundle


def dense_bundle(folder: Path, **settings: Any) -> Bundle:
    """The bundle with `Dense` for a segmenter: right without training."""
    shutil.copytree(BUNDLE.path, folder, ignore=shutil.ignore_patterns("models", "__pycache__"))
    file = folder / "configs" / "inference.yaml"
    config = yaml.safe_load(file.read_text()) | {"network_def": {"_target_": "test_two_stage.Dense"}}
    config |= {"spacing_mm": list(MODEL_MM), "crop_size": [96, 96], "amp": "off", "device": "cpu"} | settings
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    save_weights(folder, Dense())
    return Bundle(folder)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads with a bleed on three grids, one without, their labels and a manifest."""
    folder = tmp_path_factory.mktemp("scans")
    rows = ["case_id,image,label,split"]
    for name, radius_mm in (("plain", 15.0), ("sheared", 18.0), ("permuted", 15.0), ("clean", 0.0)):
        matrix = MATRICES["plain" if name == "clean" else name]
        image_hu, label, grid = bleeding_head(
            (-22, 15, 5), radius_mm, matrix, (50, 16, 44) if name == "permuted" else SHAPE
        )
        save_nifti(folder / f"{name}.nii.gz", image_hu, grid)
        save_nifti(folder / f"{name}_label.nii.gz", label, grid)
        rows.append(f"{name},{name}.nii.gz,{name}_label.nii.gz,test")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


def values(path: Path) -> NDArray[np.uint8]:
    return np.asarray(nib.load(path).dataobj)


def dice(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum()))


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code


QUIET = ("pictures=false", "html=false")


def test_label_boxes_give_the_lesion_on_every_grid(scans: Path, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    words = (
        f"bundle={bundle.path}",
        f"data={scans / 'cases.csv'}",
        f"out={tmp_path / 'out'}",
        "tracking=false",
        *QUIET,
    )
    assert call("evaluate", *words, "boxes=label") == 0
    for name in ("plain", "sheared", "permuted"):
        assert (
            dice(values(tmp_path / "out" / "masks" / f"{name}.nii.gz"), values(scans / f"{name}_label.nii.gz")) > 0.93
        )
    assert not values(tmp_path / "out" / "masks" / "clean.nii.gz").any()
    rows = (tmp_path / "out" / "volumes.csv").read_text().splitlines()
    assert [("no_boxes" in row) for row in rows[1:]] == [False, False, False, True]
    # What the first stage found is scored as that of a cascade.
    assert "first stage touches" in (tmp_path / "out" / "evaluation.md").read_text()


def test_a_detector_in_the_bundles_folder(scans: Path, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    words = (scans / "plain.nii.gz", scans / "clean.nii.gz", "--out", tmp_path / "out", f"bundle={bundle.path}", *QUIET)
    assert call("segment", *words) == 2  # nothing there yet
    detector_bundle(bundle.path / "detector")
    assert call("segment", *words) == 0
    assert dice(values(tmp_path / "out" / "plain.nii.gz"), values(scans / "plain_label.nii.gz")) > 0.93
    assert not values(tmp_path / "out" / "clean.nii.gz").any()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    weights = json.loads((bundle.path / "detector" / "configs" / "metadata.json").read_text())["weights_sha256"]
    assert run["config"]["inference"]["boxes_sha256"] == weights


def corrected(scans: Path, path: Path) -> Path:
    """One 3D box in half of the bleed of `plain`, two boxes in a slice of `permuted`."""
    planes = values(scans / "plain_label.nii.gz")
    held = np.argwhere(planes)
    low, high = held.min(axis=0), held.max(axis=0) + 1
    middle = (low + high) // 2
    rows = [f"plain,{low[2]},{high[2]},any,{low[0]},{low[1]},{middle[0]},{high[1]}"]
    planes = np.moveaxis(values(scans / "permuted_label.nii.gz"), 1, 0)
    k = int(planes.any(axis=(1, 2)).argmax()) + 1
    i, j = np.nonzero(planes[k])
    rows += [f"permuted,{k},,any,{i.min()},{j.min()},{i.min() + 2},{j.max() + 1}"]
    rows += [f"permuted,{k},,IPH,{i.max() - 1},{j.min()},{i.max() + 1},{j.max() + 1}"]
    return table(path, *rows, header="case_id,slice,slice_stop,subtype,i0,j0,i1,j1")


def test_a_persons_boxes_by_three_routes(scans: Path, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    file = corrected(scans, tmp_path / "corrected.csv")
    names = ("plain", "permuted", "clean")
    paths = [scans / f"{name}.nii.gz" for name in names]
    assert call("segment", *paths, "--out", tmp_path / "ours", f"bundle={bundle.path}", f"boxes={file}", *QUIET) == 0

    given = {"bundle_root": str(bundle.path), "boxes": str(file), "output_dir": str(tmp_path / "monai")}
    config = str(bundle.path / "configs" / "inference.yaml")
    workflow = ConfigWorkflow(config_file=config, workflow_type="infer", scans=[str(p) for p in paths], **given)
    workflow.initialize()
    workflow.run()
    workflow.finalize()

    parser = ConfigParser()
    parser.read_config(config)
    parser.update(given)
    for name, path in zip(names, paths, strict=True):
        mask = values(tmp_path / "ours" / path.name)
        np.testing.assert_array_equal(mask, values(tmp_path / "monai" / path.name))
        data = parser.get_parsed_content("preprocessing")({"image": str(path), "image_path": str(path)})  # MONAI Label
        with torch.no_grad():
            data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], Dense())[0]
        for step in parser.get_parsed_content("postprocessing").transforms[:-1]:
            data = step(data)
        np.testing.assert_array_equal(mask, np.asarray(data["pred"][0]).astype(np.uint8))

        label = values(scans / f"{name}_label.nii.gz")
        grid = (
            Segmenter(bundle, {**bundle.config("inference"), "boxes": "whole"}).read(CaseRecord(name, path)).scan.grid
        )
        boxes = [each for each in _read(file) if each.case_id == name]
        inside = boxes_on_native_grid(boxes, grid)
        assert not mask[~inside].any()
        if name == "clean":
            assert not mask.any()
            continue
        assert dice(mask, np.where(inside, label, 0)) > 0.9
        # Apart from each other, though one crop holds both.
        merged = boxes_on_native_grid(merge_slices(boxes), grid)
        assert (merged & ~inside & (label > 0)).any() == (name == "permuted")


def _read(file: Path) -> list[Any]:
    from ich_pipeline.detection import read_boxes

    return list(read_boxes(file))


def test_wrong_tables_are_refused(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    words = ("segment", scans / "plain.nii.gz", "--out", tmp_path / "out", f"bundle={bundle.path}", *QUIET)
    assert call(*words, f"boxes={table(tmp_path / 'b.csv', 'plane,3,any,1,2,4,5')}") == 2
    assert "b.csv: boxes of case 'plane' (1 such cases), expected cases among plain" in capsys.readouterr().err
    assert call(*words, f"boxes={table(tmp_path / 'b.csv', 'plain,3,any,1,2,400,5')}") == 1
    assert (
        "plain: b.csv has a box i 1 to 400, j 2 to 5 in slice 3, expected i within 0 to 44" in capsys.readouterr().err
    )
    assert call(*words, f"boxes={tmp_path / 'none.csv'}") == 2
    assert call(*words, "boxes=labels") == 2
    assert "boxes=labels: expected network, label, whole" in capsys.readouterr().err


def test_a_table_that_changed_is_another_run(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    file = table(tmp_path / "b.csv", "plain,8,any,1,2,40,45")
    words = (
        "segment",
        scans / "plain.nii.gz",
        "--out",
        tmp_path / "out",
        f"bundle={bundle.path}",
        f"boxes={file}",
        *QUIET,
    )
    assert call(*words) == call(*words) == 0
    table(file, "plain,8,any,1,2,40,46")
    assert call(*words) == 2
    assert "run with other settings" in capsys.readouterr().err


def test_the_mixture_needs_no_weights_and_no_training(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"bundle={BUNDLE.path}", "segmenter=em", f"spacing_mm={list(MODEL_MM)}", "crop_size=[64,64]", "device=cpu")
    file = corrected(scans, tmp_path / "corrected.csv")
    out = tmp_path / "out"
    scan = scans / "plain.nii.gz"
    file = table(
        file,
        *[line for line in file.read_text().splitlines()[1:] if line.startswith("plain")],
        header="case_id,slice,slice_stop,subtype,i0,j0,i1,j1",
    )
    assert call("segment", scan, "--out", out, *words, f"boxes={file}", *QUIET) == 0
    mask, label = values(out / scan.name), values(scans / "plain_label.nii.gz")
    inside = mask > 0
    assert (label[inside] > 0).mean() > 0.9
    assert call("train", *words, f"data={scans / 'cases.csv'}", f"out={tmp_path / 'run'}") == 2
    assert "has nothing to train" in capsys.readouterr().err


# ---------------------------------------------------------------- one box of one scan


def test_resegment_changes_the_box_and_nothing_else(scans: Path, tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path / "bundle")
    segmenter = Segmenter(bundle, {**bundle.config("inference"), "boxes": "whole"})
    case = CaseRecord("sheared", scans / "sheared.nii.gz")
    grid = segmenter.read(case).scan.grid
    label = values(scans / "sheared_label.nii.gz")
    held = np.argwhere(label)
    low, high = held.min(axis=0), held.max(axis=0) + 1
    boxes = [box(k, low[0], low[1], high[0], (low[1] + high[1]) // 2, "sheared") for k in range(low[2], high[2])]
    rng = np.random.default_rng(0)
    before = NativeMask(rng.integers(0, 2, grid.shape, dtype=np.uint8), grid)
    after = resegment(segmenter, case, boxes, before)
    inside = boxes_on_native_grid(boxes, grid)
    np.testing.assert_array_equal(after.values[~inside], before.values[~inside])
    assert dice(np.where(inside, after.values, 0), np.where(inside, label, 0)) > 0.9
    assert after.values.dtype == np.uint8
    alone = resegment(segmenter, case, boxes)
    np.testing.assert_array_equal(alone.values, np.where(inside, after.values, 0))
    with pytest.raises(ManifestError, match="sheared: the call has a box"):
        resegment(segmenter, case, [box(99, 0, 0, 1, 1, "sheared")])
    with pytest.raises(GeometryError, match="sheared: mask is on another grid"):
        resegment(segmenter, case, boxes, NativeMask(before.values[:, :, :-1], type(grid)((44, 50, 15), grid.affine)))
