"""MONAI Label's arithmetic without its server: what requests may say, boxes and clicks, scores, versions, training."""

import asyncio
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scan_files import MATRICES, nifti_image, save
from shapes import make_grid
from training_cases import TINY, write_cases

from ich_pipeline import cli, label_commands, training
from ich_pipeline.bundles import Bundle, find_bundle
from ich_pipeline.commands import Settings
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.files import sha256_of, write_json
from ich_pipeline.inference import Segmenter
from ich_pipeline.label_app import checks, learning, process, scores
from ich_pipeline.label_app.checks import RequestError
from ich_pipeline.label_app.guard import Guard
from ich_pipeline.label_app.prompt import NO_BLOOD, OUTSIDE, Prompt, PromptError, apply_prompt
from ich_pipeline.label_app.versions import Outcome, Versions
from ich_pipeline.manifest import read_manifest
from ich_pipeline.records import CaseRecord

SHAPE = (20, 20, 10)


pytestmark = pytest.mark.usefixtures("one_thread")


def with_random_weights(bundle: Path) -> Bundle:
    """Give a bundle that was prepared for training the weights that its network begins with."""
    torch.manual_seed(3)
    workflow = training.open_workflow(bundle)
    network = workflow.parser.get_parsed_content("network_def")
    weights = bundle / "models" / "model.pt"
    torch.save(network.state_dict(), weights)
    metadata = bundle / "configs" / "metadata.json"
    write_json(metadata, json.loads(metadata.read_text()) | {"weights_sha256": sha256_of(weights)})
    return Bundle(bundle)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def tiny(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A cascade3d of a few thousand weights that has learnt nothing."""
    out = tmp_path_factory.mktemp("tiny")
    settings = Settings.of(["bundle=cascade3d", f"data={cases}", *TINY, "tracking=false"])
    training.prepare_run(find_bundle("cascade3d"), settings, out, resume=False)
    return with_random_weights(out / "bundle")


# ---------------------------------------------------------------- what a request may say


@pytest.mark.parametrize("name", ["a", "scan-1", "patient_7.2", "0" * 100])
def test_ids_that_may_be_file_names(name: str) -> None:
    assert checks.image_id(name) == name


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x.nii.gz.y", "0" * 101, "a\n", "a\\b", "ü"])
def test_ids_that_may_not(name: str) -> None:
    with pytest.raises(RequestError, match="image id"):
        checks.image_id(name)


@pytest.mark.parametrize("tag", ["", "..", "../final", "a.b", "a/b", "0" * 41])
def test_tags_that_may_not_be_folders(tag: str) -> None:
    with pytest.raises(RequestError, match="label tag"):
        checks.label_tag(tag)
    assert checks.label_tag("final") == "final"


def test_of_a_file_name_only_the_suffix_counts() -> None:
    assert checks.nifti_suffix("../../etc/x.NII.GZ") == ".nii.gz"
    assert checks.nifti_suffix("a.nii") == ".nii"
    with pytest.raises(RequestError, match="expected NIfTI") as refused:
        checks.nifti_suffix("scan.nrrd")
    assert refused.value.status == 415


@pytest.mark.parametrize("key", ["image", "model_filename", "bundle_path"])
def test_params_choose_no_file(key: str) -> None:
    assert checks.own_params({"client_id": "slicer"}) == {"client_id": "slicer"}
    with pytest.raises(RequestError, match=f"params.{key} is not taken"):
        checks.own_params({key: "x"})


def test_params_are_an_object() -> None:
    with pytest.raises(RequestError, match="found list"):
        checks.own_params([])


def test_a_link_out_of_the_studies_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "studies" / "a").symlink_to(tmp_path / "secret")
    (tmp_path / "studies" / "b").write_text("y")
    with pytest.raises(RequestError, match="leads out"):
        checks.inside(tmp_path / "studies" / "a", tmp_path / "studies", "scan a")
    assert checks.inside(tmp_path / "studies" / "b", tmp_path / "studies", "scan b").read_text() == "y"


@pytest.mark.parametrize("epochs", [0, 1001, 1.5, "2", True, None])
def test_epochs_are_a_whole_number(epochs: Any) -> None:
    assert checks.epochs({"max_epochs": 3}, 20) == 3
    assert checks.epochs({}, 20) == 20
    with pytest.raises(RequestError, match="max_epochs"):
        checks.epochs({"max_epochs": epochs}, 20)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "30", True])
def test_a_threshold_is_a_volume(value: Any) -> None:
    assert checks.threshold_ml({"threshold_ml": 12}, 30) == 12
    with pytest.raises(RequestError, match="threshold_ml"):
        checks.threshold_ml({"threshold_ml": value}, 30)


def test_a_box_may_be_reversed_and_reach_out_of_the_scan() -> None:
    prompt = checks.prompt_of({"roi": [12, 3, -5, 100, 1.2, 4.9]}, SHAPE)
    # Voxels whose centres lie inside: 3 to 12, all of 0 to 19, and 2 to 4.
    assert prompt.box == ((3, 13), (0, 20), (2, 5))


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, "neither roi"),
        ({"roi": [1, 2, 3]}, "six numbers"),
        ({"roi": [1, 2, 3, 4, 5, "6"]}, "six numbers"),
        ({"roi": [1, 2, 3, 4, 5, float("nan")]}, "six numbers"),
        ({"roi": [30, 40, 0, 5, 0, 5]}, "along axis i"),
        ({"roi": [1, 2, 3, 4, 5.2, 5.8]}, "along axis k"),
        ({"foreground": [[1, 2]]}, "expected up to"),
        ({"foreground": "here"}, "expected up to"),
        ({"background": [[1, 2, 99]]}, "outside the scan"),
    ],
)
def test_a_prompt_that_is_none(params: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        checks.prompt_of(params, SHAPE)


# ---------------------------------------------------------------- boxes and clicks


def blobs() -> tuple[Any, Any]:
    """A probability with a sure piece (0.9), a piece beside the threshold (0.3), and two that a bridge of 0.6 joins."""
    p = np.zeros(SHAPE, np.float32)
    p[2:5, 2:5, 2:5] = 0.9
    p[2:5, 10:13, 2:5] = 0.3
    p[10:13, 2:5, 2:5] = p[16:19, 2:5, 2:5] = 0.95
    p[13:16, 3, 3] = 0.6
    current = np.zeros(SHAPE, bool)
    current[0, 0, 0] = current[10:12, 15:18, 6] = True
    return p, current


def test_outside_the_box_nothing_changes() -> None:
    p, current = blobs()
    mask, decided, flags = apply_prompt(p, 0.5, current, Prompt(box=((1, 7), (1, 7), (1, 7))))
    expected = current.copy()
    expected[2:5, 2:5, 2:5] = True
    assert np.array_equal(mask, expected)
    assert flags == ()
    assert np.array_equal(decided >= 0.5, expected)  # the probability goes with the mask
    assert decided[0, 0, 0] == 1


def test_a_box_takes_away_what_the_network_does_not_see_in_it() -> None:
    p, current = blobs()
    mask, *_ = apply_prompt(p, 0.5, current, Prompt(box=((8, 14), (14, 20), (0, 10))))
    assert mask.sum() == 1  # the voxel outside
    assert mask[0, 0, 0] == 1


def test_a_background_click_removes_its_piece_alone() -> None:
    p, current = blobs()
    mask, *_ = apply_prompt(p, 0.5, current, Prompt(box=((0, 20), (0, 8), (1, 10)), background=((3, 3, 3),)))
    assert not mask[2:5, 2:5, 2:5].any()
    assert mask[10:13, 2:5, 2:5].all()
    assert mask[current].all()


def test_a_background_click_beside_blood_changes_nothing() -> None:
    p, current = blobs()
    box = ((0, 20), (0, 8), (1, 10))
    plain, *_ = apply_prompt(p, 0.5, current, Prompt(box))
    clicked, *_ = apply_prompt(p, 0.5, current, Prompt(box, background=((8, 7, 8),)))
    assert np.array_equal(plain, clicked)


def test_clicks_part_what_a_weak_bridge_joins() -> None:
    p, current = blobs()
    prompt = Prompt(box=((8, 20), (0, 8), (0, 10)), foreground=((11, 3, 3),), background=((17, 3, 3),))
    mask, decided, _ = apply_prompt(p, 0.5, current, prompt)
    assert mask[10:13, 2:5, 2:5].all()
    assert not mask[13:19, 2:5, 2:5].any()
    assert decided[17, 3, 3] < 0.5


def test_clicks_that_nothing_parts_are_refused() -> None:
    p, current = blobs()
    with pytest.raises(PromptError, match="no higher cut"):
        apply_prompt(p, 0.5, current, Prompt(None, ((10, 15, 6),), ((11, 17, 6),)))


def test_a_foreground_click_adds_a_weaker_piece() -> None:
    p, current = blobs()
    mask, decided, flags = apply_prompt(p, 0.5, current, Prompt(((0, 8), (8, 16), (0, 10)), ((3, 11, 3),)))
    assert mask[2:5, 10:13, 2:5].all()
    assert flags == ()
    assert decided[3, 11, 3] == 0.5


def test_a_foreground_click_where_nothing_is_says_so() -> None:
    p, current = blobs()
    mask, _, flags = apply_prompt(p, 0.5, current, Prompt(None, ((8, 8, 8),)))
    assert flags == (NO_BLOOD,)
    assert np.array_equal(mask, current)


def test_clicks_outside_the_box_change_nothing_and_are_flagged() -> None:
    p, current = blobs()
    box = ((0, 20), (0, 8), (1, 10))
    plain, *_ = apply_prompt(p, 0.5, current, Prompt(box))
    clicked, _, flags = apply_prompt(p, 0.5, current, Prompt(box, ((3, 11, 3),), ((10, 15, 6),)))
    assert flags == (OUTSIDE,)
    assert np.array_equal(plain, clicked)


def test_clicks_alone_work_on_the_mask_as_it_is() -> None:
    p, current = blobs()
    mask, *_ = apply_prompt(p, 0.5, current, Prompt(None, ((3, 3, 3),), ((10, 15, 6),)))
    expected = np.zeros(SHAPE, bool)
    expected[0, 0, 0] = True
    expected[2:5, 2:5, 2:5] = True
    assert np.array_equal(mask, expected)


# ---------------------------------------------------------------- a box on the model grid


@pytest.mark.parametrize("kind", list(MATRICES))
def test_stage_two_sees_all_of_the_box_however_the_scan_is_stored(tiny: Bundle, tmp_path: Path, kind: str) -> None:
    segmenter = Segmenter(tiny, tiny.config("inference"))
    assert segmenter.takes_boxes
    loaded = segmenter.read(CaseRecord("a", save(nifti_image(MATRICES[kind]), tmp_path / "a.nii")))
    centre = np.array(loaded.scan.grid.shape) // 2
    box = tuple((int(c) - 4, int(c) + 3) for c in centre)
    probability = segmenter.look_in(loaded, box)
    assert probability.shape == loaded.scan.grid.shape
    # A softmax is above 0 wherever stage two looked, and is 0 elsewhere.
    assert (probability[tuple(slice(a, b) for a, b in box)] > 0).all()
    assert (probability == 0).any()


def test_stage_two_in_the_window_of_stage_one_says_what_the_whole_says(tiny: Bundle, cases: Path) -> None:
    case = read_manifest(cases)[0]
    segmenter = Segmenter(
        tiny, {**tiny.config("inference"), "coarse_threshold": 1.0}
    )  # finds nothing: one whole window
    loaded = segmenter.read(case)
    whole = segmenter.segment(loaded).probability
    in_box = segmenter.look_in(loaded, tuple((0, n) for n in loaded.scan.grid.shape))
    assert np.abs(whole - in_box).max() < 1e-6
    assert whole.max() > 0.1


def test_a_box_beside_the_head_is_refused(tiny: Bundle, tmp_path: Path) -> None:
    segmenter = Segmenter(tiny, tiny.config("inference"))
    loaded = segmenter.read(CaseRecord("a", save(nifti_image(shape=(90, 50, 16)), tmp_path / "a.nii")))
    with pytest.raises(ConfigError, match="beside the head"):
        segmenter.look_in(loaded, ((0, 2), (10, 20), (3, 9)))


def test_a_bundle_of_one_stage_takes_no_box(cases: Path) -> None:
    bundle = find_bundle("hu_threshold")
    segmenter = Segmenter(bundle, bundle.config("inference"))
    assert not segmenter.takes_boxes
    with pytest.raises(ConfigError, match="whole scans only"):
        segmenter.look_in(segmenter.read(read_manifest(cases)[0]), ((0, 9), (0, 9), (0, 9)))


# ---------------------------------------------------------------- scores


def test_entropy_is_the_volume_that_is_undecided() -> None:
    grid = make_grid((10, 10, 10), (2, 2, 5))  # 0.02 mL a voxel
    p = np.zeros((10, 10, 10), np.float32)
    p[:5] = 1
    assert scores.entropy_ml(p, grid) == 0
    p[0, 0, :] = 0.5
    assert scores.entropy_ml(p, grid) == pytest.approx(10 * 0.02)
    p[0, 0, :] = 0.11
    assert scores.entropy_ml(p, grid) == pytest.approx(10 * 0.02 * 0.4999, rel=1e-3)  # H(0.11) is half a bit


def test_disagreement_is_what_some_masks_hold_and_others_do_not() -> None:
    grid = make_grid((10, 10, 10), (2, 2, 5))
    one, other = np.zeros((2, 10, 10, 10), np.uint8)
    one[:4], other[2:6] = 1, 1
    assert scores.disagreement_ml([one, other], grid) == pytest.approx(400 * 0.02)
    assert scores.disagreement_ml([one, one], grid) == 0
    assert scores.disagreement_ml([one], grid) == 0


def scored(**values: tuple[float, float, float]) -> scores.Scores:
    return {
        name: {"models": {"m": {"entropy_ml": entropy, "volume_ml": volume}}, "disagreement_ml": differs}
        for name, (entropy, volume, differs) in values.items()
    }


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        ("uncertainty", [("b", 3.0), ("a", 1.0), ("c", 0.5)]),
        ("near_threshold", [("c", 1.0), ("a", 20.0), ("b", 30.0)]),
        ("disagreement", [("a", 9.0), ("c", 8.0), ("b", 0.0)]),
    ],
)
def test_each_strategy_has_its_order(strategy: str, order: list[tuple[str, float]]) -> None:
    found = scored(a=(1.0, 10.0, 9.0), b=(3.0, 0.0, 0.0), c=(0.5, 31.0, 8.0)) | {"bad": {"error": "no HU"}}
    assert scores.ranked(found, ["c", "b", "a", "bad", "new"], strategy, model="m", threshold_ml=30) == order


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="no strategy"):
        scores.ranked({}, [], "luck", model="m", threshold_ml=30)


def test_scans_are_scored_once_and_again_for_other_weights(tiny: Bundle, cases: Path, tmp_path: Path) -> None:
    images = {}
    for case in read_manifest(cases)[:2]:
        images[case.case_id] = Path(shutil.copy(case.image, tmp_path))
    (tmp_path / "bad.nii.gz").write_bytes(b"no gzip")
    images["bad"] = tmp_path / "bad.nii.gz"
    threshold = find_bundle("hu_threshold")
    segmenters = {
        "tiny": Segmenter(tiny, tiny.config("inference")),
        "hu": Segmenter(threshold, threshold.config("inference")),
    }
    file, seen = tmp_path / "scores.json", list[str]()
    assert scores.score_images(file, images, segmenters, seen.append) == 3
    assert sorted(seen) == ["bad", "case-0", "case-1"]
    found = scores.read_scores(file)
    assert "gzip" in found["bad"]["error"]
    one = segmenters["tiny"].segment(segmenters["tiny"].read(read_manifest(cases)[0]))
    expected = scores.entropy_ml(one.probability, one.scan.grid)
    assert found["case-0"]["models"]["tiny"]["entropy_ml"] == pytest.approx(expected, abs=1e-6)
    assert found["case-0"]["disagreement_ml"] > 0
    assert scores.score_images(file, images, segmenters, seen.append) == 0
    weights = {name: each.weights_sha256 for name, each in segmenters.items()}
    assert scores.stale(found, images, weights) == []
    assert scores.stale(found, images, weights | {"tiny": "ab"}) == list(images)
    os.utime(images["case-1"], ns=(1, 1))
    assert scores.stale(found, images, weights) == ["case-1"]


# ---------------------------------------------------------------- versions and training


def outcome(version: int, before: float, after: float) -> Outcome:
    return Outcome(version, 0, before, after, n_train=1, n_val=1, weights_sha256="ab", mlflow_run_id=None)


def test_a_version_is_served_only_when_dice_does_not_fall(tiny: Bundle, tmp_path: Path) -> None:
    versions = Versions("tiny", tiny, tmp_path)
    assert (versions.served, versions.numbers()) == (0, [0])
    assert versions.next_folder().name == "1"
    for number, before, after, served in (
        (1, 0.5, 0.5, 1),
        (2, 0.5, 0.4999, 1),
        (3, 0.5, float("nan"), 1),
        (4, 0, 1, 4),
    ):
        shutil.copytree(tiny.path, tmp_path / str(number) / "bundle")
        if after == after:  # a run that ends in NaN has no outcome to write: JSON has no NaN
            versions.record(outcome(number, before, after))
        else:
            assert not outcome(number, before, after).served
        assert versions.served == served
    assert versions.numbers() == [0, 1, 2, 4]
    assert versions.next_folder().name == "5"
    versions.serve(0)
    assert versions.bundle(versions.served).path == tiny.path
    with pytest.raises(ConfigError, match="no version 3"):
        versions.serve(3)
    (tmp_path / "1" / "bundle" / "models" / "model.pt").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        versions.serve(1)


def studies_of(cases: Path, folder: Path) -> dict[str, tuple[Path, Path]]:
    folder.mkdir()
    found = {}
    for case in read_manifest(cases):
        assert case.label is not None
        found[case.case_id] = (Path(shutil.copy(case.image, folder)), Path(shutil.copy(case.label, folder)))
    return found


def test_a_case_keeps_its_part_for_good(cases: Path, tmp_path: Path) -> None:
    labelled = studies_of(cases, tmp_path / "studies")
    names = list(labelled)
    with pytest.raises(ManifestError, match="1 scans with a final label"):
        learning.assign_cases(tmp_path / "studies", {names[0]: labelled[names[0]]})
    first = {name: labelled[name] for name in names[:3]}
    manifest = learning.assign_cases(tmp_path / "studies", first)
    before = {r.case_id: r.split for r in read_manifest(manifest, require_label=True)}
    assert list(before.values()) == ["train", "val", "train"]
    # Labelled again later, so in another order: the parts stay.
    learning.assign_cases(tmp_path / "studies", {name: labelled[name] for name in reversed(names)})
    after = {r.case_id: r.split for r in read_manifest(manifest)}
    assert {name: after[name] for name in before} == before
    assert list(after.values()).count("val") == 2


def test_scans_of_a_patient_stay_together(cases: Path, tmp_path: Path) -> None:
    labelled = studies_of(cases, tmp_path / "studies")
    names = list(labelled)[:4]
    patients = ["image,patient_id", f"{names[1]},p", f"{names[2]},p", f"{names[3]},q"]
    (tmp_path / "studies" / learning.PATIENTS_FILE).write_text("\n".join(patients))
    manifest = learning.assign_cases(tmp_path / "studies", {name: labelled[name] for name in names})
    assert [r.split for r in read_manifest(manifest)] == ["train", "val", "val", "train"]
    (tmp_path / "studies" / learning.PATIENTS_FILE).write_text("scan,who\na,b\n")
    with pytest.raises(ManifestError, match="expected image and patient_id"):
        learning.assign_cases(tmp_path / "studies", labelled)


def test_training_begins_with_the_served_weights_and_leaves_them(tiny: Bundle, cases: Path, tmp_path: Path) -> None:
    manifest = learning.assign_cases(tmp_path / "studies", studies_of(cases, tmp_path / "studies"))
    versions = Versions("tiny", tiny, tmp_path / "versions")
    before = sha256_of(tiny.path)
    first = learning.fine_tune(versions, manifest, 1, run={"tracking": False})
    assert sha256_of(tiny.path) == before
    assert (first.version, first.started_from, first.n_train, first.n_val) == (1, 0, 5, 2)
    assert versions.served == (1 if first.dice_after >= first.dice_before else 0)
    trained = versions.bundle(1)
    assert trained.metadata["weights_sha256"] == first.weights_sha256 != tiny.metadata["weights_sha256"]
    assert trained.metadata["version"] == f"{tiny.metadata['version']}+label.1"
    assert trained.config("train")["learning_rate"] == pytest.approx(0.001)  # a tenth of the bundle's
    # Few steps at such a rate move a weight by little: it began there, not at random.
    old, new = (torch.load(b.weights, weights_only=True) for b in (tiny, trained))  # type: ignore[arg-type]
    moved = max(float((old[name] - new[name]).abs().max()) for name in old if "running" not in name and old[name].dim())
    assert 0 < moved < 0.01


def test_weights_that_got_worse_are_not_served(
    tiny: Bundle, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = learning.assign_cases(tmp_path / "studies", studies_of(cases, tmp_path / "studies"))
    versions = Versions("tiny", tiny, tmp_path / "versions")
    monkeypatch.setattr(learning, "RATE_SHARE", 1.0)
    learned = learning.fine_tune(versions, manifest, 12, run={"tracking": False})
    assert learned.dice_after > 0.1
    assert versions.served == 1
    monkeypatch.setattr(learning, "RATE_SHARE", 1e3)  # blows the network up
    found = learning.fine_tune(versions, manifest, 1, run={"tracking": False})
    assert found.dice_after < found.dice_before == pytest.approx(learned.dice_after)
    assert versions.served == 1
    assert [row["served"] for row in versions.history()] == [True, False]
    assert versions.bundle(2).weights is not None  # it stays, to be looked at


# ---------------------------------------------------------------- who may ask


def ask(guard: Guard, path: str = "/info/", body: bytes = b"", chunks: int = 1, **headers: str) -> tuple[int, str]:
    """Status and body of one request."""
    sent: list[dict[str, Any]] = []
    left = [body] * chunks

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    head = {"host": "127.0.0.1:8000", **headers}
    scope = {
        "type": "http",
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in head.items()],
    }
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def reader(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole body, and calls every failure its own, as frameworks do."""
    status = 200
    try:
        while (await receive())["more_body"]:
            pass
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def guarded(token: str | None = None, origins: tuple[str, ...] = (), **more: Any) -> Guard:
    return Guard(reader, **{"token": token, "hosts": ("127.0.0.1",), "origins": origins, "max_bytes": 2**20, **more})


def test_the_guard_lets_through_what_is_right() -> None:
    assert ask(guarded()) == (200, "done")
    assert ask(guarded(), origin="http://127.0.0.1:8000") == (200, "done")
    assert ask(guarded(origins=("https://viewer",)), origin="https://viewer") == (200, "done")
    assert ask(guarded("t" * 20), authorization="Bearer " + "t" * 20) == (200, "done")
    assert ask(guarded("t" * 20), path="/auth/token") == (200, "done")
    assert ask(guarded(), body=b"x" * 2**18, chunks=4) == (200, "done")
    assert ask(guarded(hosts=()), host="anything") == (200, "done")


@pytest.mark.parametrize(
    ("guard", "headers", "status", "sentence"),
    [
        (guarded(), {"host": "evil.example:8000"}, 400, "not this server's name"),
        (guarded(), {"origin": "https://evil.example"}, 403, "may not ask"),
        (guarded(), {"origin": "null"}, 403, "may not ask"),
        (guarded("t" * 20), {}, 401, "no valid token"),
        (guarded("t" * 20), {"authorization": "Bearer wrong"}, 401, "no valid token"),
        (guarded("t" * 20), {"authorization": "Basic " + "t" * 20}, 401, "no valid token"),
        (guarded(), {"content_length": str(2**20 + 1)}, 413, "more than 1 MiB"),
        (guarded(), {"content_length": "many"}, 400, "expected a number"),
    ],
)
def test_the_guard_refuses(guard: Guard, headers: dict[str, str], status: int, sentence: str) -> None:
    found, body = ask(guard, **headers)
    assert found == status
    assert sentence in json.loads(body)["detail"]


def test_a_refusal_comes_after_what_was_sent_and_not_after_all_that_could_be() -> None:
    """A client that still sends when the connection closes never reads the answer; one that never ends is let go."""
    asked: list[int] = []

    def body_of(chunks: int) -> tuple[int, str]:
        asked.clear()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            asked.append(1)
            return {"type": "http.request", "body": b"x" * 2**18, "more_body": len(asked) < chunks}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "headers": [(b"host", b"evil")]}
        asyncio.run(guarded()(scope, receive, send))
        return sent[0]["status"], sent[1]["body"].decode()

    assert body_of(3)[0] == 400
    assert len(asked) == 3
    assert body_of(1000)[0] == 400
    assert len(asked) == 5


def test_the_guard_counts_what_comes_without_a_length() -> None:
    status, body = ask(guarded(), body=b"x" * 2**18, chunks=5)
    assert status == 413
    assert "more than 1 MiB" in body


# ---------------------------------------------------------------- the commands


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "ich-pipeline[label]"' in refused(capsys, "label", "start", "--studies", tmp_path)


@pytest.fixture
def _extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if MONAI Label were there: these calls are refused before it is imported."""
    monkeypatch.setattr(process, "require_extra", lambda: None)


@pytest.mark.usefixtures("_extra")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--studies", "gone"], "no such folder"),
        (["--origin", "https://a/b"], "expected scheme, host and port"),
        (["--origin", "viewer"], "expected scheme, host and port"),
        (["--host", "0.0.0.0"], "Set ICH_LABEL_TOKEN"),
        (["--bundles", "no_such"], "no bundle 'no_such'"),
        (["--bundles", "hu_threshold,hu_threshold"], "each once"),
        (["--bundles", "unet3d"], "has no weights"),
    ],
)
def test_a_wrong_start_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    given = ["--studies", tmp_path] if "--studies" not in words else []
    assert sentence in refused(capsys, "label", "start", *given, "--out", tmp_path / "out", *words)


@pytest.mark.usefixtures("_extra")
def test_a_short_token_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(process.TOKEN_VARIABLE, "secret")
    words = ("label", "start", "--studies", tmp_path, "--host", "0.0.0.0")
    assert "6 characters" in refused(capsys, *words)
    monkeypatch.setenv(process.TOKEN_VARIABLE, "s" * 20)
    assert process.token_for("0.0.0.0") == "s" * 20


@pytest.mark.usefixtures("_extra")
def test_a_taken_port_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ("--bundles", "hu_threshold", "--port", str(taken.getsockname()[1]), "--out", tmp_path / "out")
        assert "in use" in refused(capsys, "label", "start", "--studies", tmp_path, *words)


@pytest.mark.usefixtures("_extra")
def test_one_server_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    me = psutil.Process()
    record = {"pid": me.pid, "created": me.create_time(), "url": "http://127.0.0.1:1/"}
    write_json(tmp_path / process.SERVER_FILE, record)
    words = ("label", "start", "--studies", tmp_path, "--bundles", "hu_threshold", "--out", tmp_path)
    assert "runs with" in refused(capsys, *words)
    # Another process with its number: the server was killed, and left its file.
    write_json(tmp_path / process.SERVER_FILE, record | {"created": 1.0})
    assert process.read_server(tmp_path) is None


def test_stop_where_nothing_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert label_commands.stop(tmp_path) == 0
    assert "no server runs" in capsys.readouterr().out


def test_models_of_one_name_get_numbers(tiny: Bundle, tmp_path: Path) -> None:
    again = Bundle(shutil.copytree(tiny.path, tmp_path / "again"))
    assert process.named([tiny, find_bundle("unet3d"), again]) == {
        "cascade3d": tiny.path,
        "unet3d": find_bundle("unet3d").path,
        "cascade3d_2": again.path,
    }


def test_versions_are_listed_and_taken_back(tiny: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no server was started" in refused(capsys, "label", "versions", "--out", tmp_path)
    write_json(tmp_path / label_commands.BUNDLES_FILE, {"tiny": str(tiny.path)})
    folder = tmp_path / "versions" / "tiny"
    shutil.copytree(tiny.path, folder / "1" / "bundle")
    Versions("tiny", tiny, folder).record(outcome(1, 0.5, 0.75))
    assert label_commands.versions(None, None, tmp_path) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"tiny 0  {tiny.path}"
    assert second == "tiny 1  from 0, Dice 0.5000 before, 0.7500 after, 1 + 1 cases  (served)"
    assert label_commands.versions("tiny", 0, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("(served)")
    assert "no version 7" in refused(capsys, "label", "versions", "tiny", "--serve", "7", "--out", tmp_path)
    assert "of which model" in refused(capsys, "label", "versions", "--serve", "0", "--out", tmp_path)
    assert "did you mean 'tiny'" in refused(capsys, "label", "versions", "tinny", "--out", tmp_path)


def test_what_outlives_a_server_is_ended() -> None:
    child = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.kill([psutil.Process(child.pid)])
    assert child.wait(5) != 0
    process.kill([child])  # one that is gone is no failure
