"""Published figures are the papers', ours are the evaluation's, and no row is without its data."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heads import oracle_bundle, write_heads
from shapes import ellipsoid, empty, make_grid

from ich_pipeline import commands
from ich_pipeline.bundles import Bundle, read_yaml, resource
from ich_pipeline.comparison import paired_differences, write_comparison
from ich_pipeline.errors import ConfigError
from ich_pipeline.evaluation import Evaluation, Scored
from ich_pipeline.manifest import write_manifest
from ich_pipeline.overlap import compare_masks, summarise
from ich_pipeline.paper_tables import Method, write_paper_tables
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.settings import Settings
from ich_pipeline.volumetry import measure

TABLES: list[dict[str, Any]] = read_yaml(resource("configs") / "published.yaml")["tables"]
GRID = make_grid((64, 64, 12), (2, 2, 5))


def evaluated(shrink: int, subtypes: tuple[str, ...] = ("IPH", "IPH+IVH", "SAH", "SDH", "")) -> Evaluation:
    """Five patients, the last without blood; the prediction has `shrink` slices less than the label."""
    scored = []
    for n, kinds in enumerate(subtypes):
        label = ellipsoid(GRID, (20 + n, 15, 20)) if kinds else empty(GRID)
        pred = NativeMask(label.values.copy(), GRID)
        held = np.flatnonzero(label.values.any(axis=(0, 1)))
        pred.values[:, :, held[:shrink]] = 0
        scores = compare_masks(f"c{n}", pred, label, patient_id=f"p{n}")
        scored.append(Scored(scores, measure(f"c{n}", label), kinds, seconds=1.0 + n))
    return Evaluation(scored, summarise([each.scores for each in scored]))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestPublished:
    @pytest.mark.parametrize("table", TABLES, ids=lambda table: table["id"])
    def test_every_row_has_its_data_and_no_more_figures_than_columns(self, table):
        for row in table["rows"]:
            assert row.get("data", table.get("data"))
            assert 0 < len(row["values"]) <= len(table["columns"])
            assert len(row.get("sd", row["values"])) == len(row["values"])

    @pytest.mark.realdata
    @pytest.mark.parametrize("table", TABLES, ids=lambda table: table["id"])
    def test_figures_are_those_of_the_paper(self, table, real_data):
        """Method and figures of a row stand in this order in the paper's text, whatever stands between them."""
        paper = real_data.parent / "papers" / f"{table['id'].partition('_table')[0]}.txt"
        if not paper.is_file():
            pytest.skip(f"no text of the paper at {paper}")
        printed = [float(n) for n in re.findall(r"(?<![\w.])\d+\.?\d*", paper.read_text())]
        found = {n for row in table["rows"] for n in (*row["values"], *row.get("sd", ())) if n is not None}
        assert found <= set(printed)
        for row in table["rows"]:
            pairs = zip(row["values"], row.get("sd", ()), strict=False)
            wanted = [n for pair in pairs for n in pair] or [n for n in row["values"] if n is not None]
            if table["id"] != "symmetry_gan_unet_table_1":  # which is printed a column a method
                windows = (printed[k : k + len(wanted)] for k in range(len(printed)))
                assert wanted in list(windows), row


class TestTables:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        write_paper_tables([Method("a", "phantoms", evaluated(2)), Method("b", "phantoms", evaluated(0))], tmp_path)
        return tmp_path

    def test_shape_is_the_papers(self, folder):
        text = (folder / "paper_tables.md").read_text()
        assert "| Method | Data | DSC (%) | IOU (%) | Precision (%) | Recall (%) |" in text
        assert "| 3D-Cascade (published) | 103 test patients, private | 85.66 | 76.82 | 88.46 | 84.11 |" in text
        assert "| U-Net++ (published) | UH, 27 slices, private | 0.638 ± 0.014 | 22.16 ± 0.343 | - |" in text
        assert "| Two-stage | YOLOv5 + TransDeepLab (published) |" in text
        assert {path.stem for path in (folder / "paper_tables").iterdir()} == {table["id"] for table in TABLES}

    def test_ours_are_the_evaluations(self, folder):
        rows = read(folder / "paper_tables" / "cascade3d_table_1.csv")
        ours = {row["method"]: row for row in rows if row["source"] == "this run"}
        expected = evaluated(2).summary["dice"]
        assert float(ours["a"]["dsc_percent"]) == pytest.approx(100 * expected.mean.value, abs=1e-5)
        assert float(ours["a"]["dsc_percent_low"]) == pytest.approx(100 * expected.mean.low, abs=1e-5)
        assert (ours["a"]["dsc_percent_n"], ours["a"]["dsc_percent_missed"]) == ("4", "0")
        assert float(ours["b"]["recall_percent"]) == 100
        assert {row["data"] for row in ours.values()} == {"phantoms"}
        assert all(row["dsc_percent_n"] == "" for row in rows if row["source"] == "published")

    def test_volumes_by_the_subtypes_of_the_paper(self, folder):
        rows = read(folder / "paper_tables" / "cascade3d_table_2.csv")
        ours = {row["method"]: row for row in rows if row["source"] == "this run"}
        scored = evaluated(2).scored
        errors = [abs(each.scores.error_ml) for each in scored]
        assert float(ours["a"]["mae_iph_ivh_ml"]) == pytest.approx(np.mean(errors[:2]), abs=1e-5)
        assert float(ours["a"]["mae_sah_ml"]) == pytest.approx(errors[2], abs=1e-5)
        assert ours["a"]["mae_iph_ivh_ml_n"] == "2"
        assert float(ours["a"]["seconds"]) == 3.0
        tada = [abs(each.reference.tada_ml - each.scores.label_ml) for each in scored]
        assert float(ours["Tada formula"]["mae_iph_ivh_ml"]) == pytest.approx(np.mean(tada[:2]), abs=1e-5)
        assert ours["Tada formula"]["seconds"] == ""

    def test_without_subtypes_the_cell_is_empty(self, tmp_path):
        unknown = evaluated(1)
        unknown = replace(unknown, scored=[replace(each, subtypes="") for each in unknown.scored])
        write_paper_tables([Method("a", "phantoms", unknown)], tmp_path)
        (ours,) = (r for r in read(tmp_path / "paper_tables" / "cascade3d_table_2.csv") if r["method"] == "a")
        assert (ours["mae_iph_ivh_ml"], ours["mae_iph_ivh_ml_n"]) == ("", "0")

    def test_nothing_scored(self, tmp_path):
        write_paper_tables([Method("a", "phantoms", Evaluation([], summarise([], n_failed=3)))], tmp_path)
        assert "| a (this run) | phantoms | - | - |" in (tmp_path / "paper_tables.md").read_text()


class TestComparison:
    def test_paired_differences(self, tmp_path):
        first, second = Method("a", "phantoms", evaluated(2)), Method("b", "phantoms", evaluated(0))
        found = paired_differences(first, second)
        dice = [row.dice for row in first.evaluation.rows if row.positive]
        assert found["dice"].n == 4
        assert found["dice"].mean.value == pytest.approx(1 - np.mean(dice))
        assert found["dice"].mean.low > 0
        fewer = replace(second.evaluation, scored=second.evaluation.scored[1:])
        assert paired_differences(first, replace(second, evaluation=fewer))["dice"].n == 3
        text = write_comparison([first, second], tmp_path)
        assert "| b | 4 | 0." in text
        rows = read(tmp_path / "comparison.csv")
        assert {row["method"] for row in rows} == {"a", "b"}

    def test_a_method_without_common_cases(self, tmp_path):
        nothing = Method("b", "phantoms", Evaluation([], summarise([], n_failed=5)))
        assert "| b | 0 | - | - | - |" in write_comparison([Method("a", "phantoms", evaluated(1)), nothing], tmp_path)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A manifest, a bundle that is right and one of the same name that sees less."""
    folder = tmp_path_factory.mktemp("heads")
    images = write_heads(folder / "images", 3, folder / "labels")
    cases = [
        CaseRecord(f"h{n}", image, folder / "labels" / image.name, f"p{n}", "test") for n, image in enumerate(images)
    ]
    write_manifest(folder / "cases.csv", cases)
    right, strict = oracle_bundle(folder / "right"), oracle_bundle(folder / "strict", threshold=1.0)
    return folder / "cases.csv", right, strict


def test_evaluate_several_bundles(heads, tmp_path, capsys):
    manifest, right, strict = heads
    words = [f"bundle={right},{strict}", f"data={manifest}", f"out={tmp_path}", "device=cpu", "pictures=false"]
    assert commands.evaluate(Settings.of([*words, "tracking=false", "html=false"])) == 0
    rows = read(tmp_path / "comparison.csv")
    dice = {row["method"]: float(row["value"]) for row in rows if row["score"] == "dice"}
    assert dice["cascade3d"] > 0.9
    assert 0 < dice["cascade3d_2"] < 0.5
    for name in ("cascade3d", "cascade3d_2"):
        assert (tmp_path / name / "evaluation.csv").is_file()
    assert "cascade3d_2 (this run)" in (tmp_path / "paper_tables.md").read_text()
    assert (tmp_path / "comparison.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("given", ["cascade3d,cascade3d", "cascade3d,", "cascade3d,,segresnet2d"])
def test_names_that_are_no_list_of_bundles(given):
    with pytest.raises(ConfigError, match="each once, with commas between them"):
        Settings.of([f"bundle={given}"]).each_bundle()


def test_a_folder_with_a_comma_is_one_bundle(heads, tmp_path):
    _, right, _ = heads
    (tmp_path / "a,b").symlink_to(right)
    (only,) = Settings.of([f"bundle={tmp_path / 'a,b'}"]).each_bundle()
    assert isinstance(only.bundle(), Bundle)


def test_an_unknown_key_of_the_last_bundle_is_said_first(heads, tmp_path):
    manifest, right, _ = heads
    words = [f"bundle={right},segresnet2d", f"data={manifest}", f"out={tmp_path}", "coarse_threshold=0.5"]
    with pytest.raises(ConfigError, match="segresnet2d has no key 'coarse_threshold'"):
        commands.evaluate(Settings.of(words))
    assert not any(tmp_path.iterdir())
