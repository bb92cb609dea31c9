"""What a cascade's first stage finds is kept by `evaluate` and scored by lesion size; others have no such score."""

from pathlib import Path

import numpy as np
import pytest
import torch
from heads import OracleCascade, oracle_bundle, write_heads

from ich_pipeline import commands, overlap
from ich_pipeline.cascade import CascadeInferer
from ich_pipeline.commands import Settings
from ich_pipeline.engines import EngineInferer
from ich_pipeline.evaluation import compare, labelled_cases, write_evaluation
from ich_pipeline.manifest import write_manifest
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord
from ich_pipeline.restoring import write_mask


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Bleeds of 4 to 14 mL, three of them above 5 mL, and a clean head."""
    folder = tmp_path_factory.mktemp("heads")
    images = write_heads(folder / "images", 5, folder / "labels")
    cases = [
        CaseRecord(f"head{n}", image, folder / "labels" / image.name, f"patient{n}", "test")
        for n, image in enumerate(images)
    ]
    write_manifest(folder / "cases.csv", cases)
    return folder / "cases.csv"


@pytest.fixture(scope="module")
def evaluated(manifest, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    bundle = oracle_bundle(folder / "bundle")
    words = [f"bundle={bundle}", f"data={manifest}", "device=cpu", f"out={folder / 'out'}", "tracking=false"]
    assert commands.evaluate(Settings.of([*words, "pictures=false"])) == 0
    return folder / "out"


def test_surfaces_are_measured_of_masks_alone(manifest, evaluated, monkeypatch):
    """Of a region as large as the head that took minutes a case, and nothing reads it."""
    measured = []
    surface = overlap._surface_scores
    monkeypatch.setattr(overlap, "_surface_scores", lambda *given: measured.append(given) or surface(*given))
    cases = labelled_cases(manifest, "test")
    found = compare(cases, evaluated / "volumes.csv", regions=evaluated / "regions")
    assert found.coarse_recall
    assert len(measured) == len(cases)


def test_evaluate_reports_coarse_recall_by_lesion_size(manifest, evaluated):
    text = (evaluated / "evaluation.md").read_text()
    assert "| coarse_lesion_recall | positive | 4 | 0 | 1.000" in text
    assert "| coarse_lesion_recall_5_to_30ml | positive | 3 | 0 | 1.000" in text
    assert "| coarse_lesion_recall_under_1ml | positive | 0 | 0 | - | - |" in text
    for case in labelled_cases(manifest, "test"):
        (region, _), (label, _) = (read_mask(f) for f in (evaluated / "regions" / f"{case.case_id}.nii.gz", case.label))
        both = np.logical_and(region.values, label.values).sum()
        assert 2 * both >= 0.9 * (region.values.sum() + label.values.sum())


def test_the_html_report_has_the_scores(evaluated):
    page = (evaluated / "report.html").read_text()
    assert 'data-case="head0"' in page
    assert "Dice" in page
    assert "Predicted against reference volume" in page


def test_a_region_that_misses_its_lesion_lowers_coarse_recall_only(manifest, evaluated, tmp_path):
    cases = labelled_cases(manifest, "test")
    for case in cases:
        mask, forms = read_mask(evaluated / "regions" / f"{case.case_id}.nii.gz")
        values = np.zeros_like(mask.values) if case.case_id == "head1" else mask.values
        write_mask(tmp_path / f"{case.case_id}.nii.gz", values, mask.grid, forms)
    metrics = compare(cases, evaluated / "volumes.csv", regions=tmp_path).metrics()
    assert metrics["positive/coarse_lesion_recall"] == 0.75
    assert metrics["positive/lesion_recall"] == 1


def test_no_first_stage_no_coarse_recall(manifest, evaluated, tmp_path):
    evaluation = compare(labelled_cases(manifest, "test"), evaluated / "volumes.csv", regions=tmp_path / "nothing")
    assert evaluation.coarse_recall == ()
    assert "first stage" not in write_evaluation(evaluation, tmp_path)


def test_inferer_keeps_what_stage_one_found_not_its_mirror_image():
    network = OracleCascade(coarse_scale=1, resize=False, margin=(1, 4, 4)).eval()
    image = torch.zeros(1, 1, 8, 40, 40)
    image[..., 2:4, 5:12, 20:30] = 0.78
    inferer = EngineInferer(CascadeInferer(mode="fast", mirror_axes=(2,)), amp="off")
    assert inferer.regions is None
    inferer(image, network)
    assert torch.equal(inferer.regions, image > 0.66)
    assert EngineInferer(torch.nn.Identity()).regions is None
