"""Phantoms that are made while a network trains: which is drawn when, and that it is the same one again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised

from ich_pipeline import streaming
from ich_pipeline.bundles import Bundle, find_bundle
from ich_pipeline.commands import Settings
from ich_pipeline.manifest import read_manifest
from ich_pipeline.phantom import PhantomSettings, dataset, make_case
from ich_pipeline.phantom.settings import STREAMED
from ich_pipeline.streaming import PhantomStream, StreamSampler, scanned_otherwise
from ich_pipeline.training import Draw, prepare_run
from ich_pipeline.transforms import ModelGridd, ReadMaskd, ReadScand

COARSE = replace(STREAMED, matrix=64, slice_mm=(8.0,))


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phantom in a second."""
    monkeypatch.setattr(streaming, "STREAMED", COARSE)


def stream(**more: Any) -> PhantomStream:
    preprocessing = Compose(
        [ReadScand(keys="image"), ReadMaskd(keys="label"), ModelGridd(keys=["image", "label"], spacing_mm=[8, 6, 6])]
    )
    augmentation = Compose(
        [
            RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=2),
            RandGaussianNoised(keys="image", prob=1.0, std=1.0),
        ]
    )
    return PhantomStream(preprocessing, augmentation, matrix=64, **more)


def draws(sampler: StreamSampler, epoch: int) -> list[Draw]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    given = {"draws": 60, "batch_size": 3, "workers": 2}
    first, again, other = StreamSampler(**given), StreamSampler(**given), StreamSampler(**given, seed=1)
    draws(first, 1)
    assert draws(first, 2) == draws(again, 2)
    assert draws(first, 2) != draws(other, 2)
    assert draws(first, 2) != draws(first, 3)


def test_each_worker_makes_phantoms_of_its_own() -> None:
    sampler = StreamSampler(draws=120, batch_size=3, workers=2, draws_per_case=5)
    chosen = draws(sampler, 4)
    for n, draw in enumerate(chosen):
        assert draw.case % 2 == n // 3 % 2  # the loader gives its batches to the workers in turn


def test_the_window_moves_on_and_is_never_larger() -> None:
    sampler = StreamSampler(draws=200, batch_size=2, workers=1, draws_per_case=10, window=8)
    for epoch in (1, 2, 5):
        before = (epoch - 1) * 200
        for n, draw in enumerate(draws(sampler, epoch)):
            newest = (before + n) // 10
            assert max(0, newest - 7) <= draw.case <= newest
    assert len({draw.case for draw in draws(sampler, 5)}) > 20


def test_a_draw_is_the_same_whatever_was_drawn_before() -> None:
    one, other = stream(), stream()
    other[Draw(1, 3)]
    a, b = one[Draw(0, 5)], other[Draw(0, 5)]
    np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    c = one[Draw(0, 6)]
    assert not np.array_equal(np.asarray(a["image"]), np.asarray(c["image"]))
    # Augmentation left the phantom that is kept as it was.
    np.testing.assert_array_equal(np.asarray(one[Draw(0, 5)]["image"]), np.asarray(a["image"]))


def test_memory_holds_a_bounded_number_of_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = stream(kept=3)
    made: list[int] = []
    monkeypatch.setattr(cases, "prepared", lambda number: made.append(number) or {"image": torch.zeros(1, 2, 2, 2)})
    cases.each_time = Compose([])
    for number in (0, 1, 2, 1, 3, 0):
        cases[Draw(number, 0)]
    assert made == [0, 1, 2, 3, 0]
    assert len(cases._made) == 3


def test_no_phantom_of_a_stream_is_one_of_a_set() -> None:
    numbers = range(20)
    stream_seeds = {int(np.random.SeedSequence([0, n, 1]).generate_state(1, np.uint64)[0]) for n in numbers}
    set_seeds = {int(np.random.SeedSequence([0, n]).generate_state(1, np.uint64)[0]) for n in numbers}
    assert not stream_seeds & set_seeds


def a_scan() -> Any:
    return make_case(
        "patient", 21, PhantomSettings(matrix=96, slice_mm=(2.5,), clean_fraction=1.0, cut_fraction=0)
    ).scan


def test_some_phantoms_are_put_into_the_background(tmp_path: Path) -> None:
    scan = a_scan()
    nib.save(nib.Nifti1Image(scan.image_hu, scan.grid.affine), tmp_path / "head.nii.gz")
    cases = stream(background=str(tmp_path / "head.nii.gz"), background_share=0.5)
    found = [cases.phantom(n).truth["background"] for n in range(8)]
    assert 0 < found.count("head") < 8
    item = cases[Draw(found.index("head"), 0)]
    assert item["image"].shape == item["label"].shape


def test_one_head_is_scanned_in_many_ways_with_its_blood() -> None:
    settings = replace(COARSE, clean_fraction=0.0, volume_ml=(30.0, 60.0), subtype_weights={"IPH": 1.0})
    case = make_case("bled", 5, settings, background=a_scan())
    ml = case.scan.grid.foreground_ml(case.label)
    shapes, sides = set(), set()
    for seed in range(12):
        other = scanned_otherwise(case, np.random.default_rng(seed))
        assert other.scan.image_hu.dtype == np.int16
        assert other.label.shape == other.scan.image_hu.shape == other.scan.grid.shape
        shapes.add(other.scan.grid.shape)
        sides.add(np.sign(np.linalg.det(other.scan.grid.affine[:3, :3])))
        # Scaled by up to a tenth along two axes; what thick slices do to an edge is small.
        assert 0.7 * ml < other.scan.grid.foreground_ml(other.label) < 1.3 * ml
        inside = other.scan.image_hu[other.label > 0]
        assert np.median(inside) > 40
    assert len(shapes) > 2
    assert sides == {-1.0, 1.0}


def test_a_stream_needs_no_manifest_and_makes_its_own_to_validate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset.write_validation_phantoms, "__defaults__", (2,))
    monkeypatch.setattr(dataset, "STREAMED", COARSE)
    settings = Settings.of(["bundle=cascade3d", "variant=synthesis", "preset=tiny", "tracking=false"])
    prepare_run(find_bundle("cascade3d"), settings, tmp_path / "run", resume=False)
    bundle = Bundle(tmp_path / "run" / "bundle")
    records = read_manifest(Path(bundle.config("train")["data"]), require_label=True)
    assert [record.split for record in records] == ["val", "val"]
    assert streaming.validation_cases(bundle.config("train")["data"])["train"] == []
    assert bundle.metadata["trained_on_phantoms"] is True
    assert bundle.metadata["trained_slice_mm"] == [8.0, 8.0]
