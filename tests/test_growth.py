"""Growth between two scans: what is a pair, what counts as expansion, and how sure the answer is."""

import csv
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from heads import bleeding_head, oracle_bundle, save_nifti
from shapes import ellipsoid, empty, make_grid

from ich_pipeline import cli
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.geometry import Grid
from ich_pipeline.growth import NAMED_CRITERIA, Criterion, Growth, Threshold, measure_growth, parse_criterion
from ich_pipeline.labels import Subtype
from ich_pipeline.pairing import Pair, pair_by_id, pair_by_time
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import read_rows, write_growth
from ich_pipeline.volumetry import VolumeReport, measure

CLEAN = measure("clean", empty(make_grid((30, 30, 5), (2, 2, 5))))
PAIR = Pair("p", CaseRecord("p_0", Path("p_0.nii")), CaseRecord("p_1", Path("p_1.nii")), patient_id="P")


def volume(ml: float, low_ml: float | None = None, high_ml: float | None = None, ivh_ml: float | None = None):
    """Measures of a mask of this volume; without a band it is certain, without `ivh_ml` it has no subtypes."""
    subtype_ml = None if ivh_ml is None else dict.fromkeys(Subtype, 0.0) | {Subtype.IVH: ivh_ml}
    low_ml, high_ml = ml if low_ml is None else low_ml, ml if high_ml is None else high_ml
    return replace(CLEAN, volume_ml=ml, volume_low_ml=low_ml, volume_high_ml=high_ml, subtype_ml=subtype_ml)


def grown(baseline: VolumeReport, followup: VolumeReport, criterion: str = "standard") -> Growth:
    return measure_growth(PAIR, baseline, followup, parse_criterion(criterion))


# ---------------------------------------------------------------- criteria


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        (">=6mL or >=33%", Criterion(Threshold(6, True), Threshold(0.33, True))),
        (">12.5mL", Criterion(Threshold(12.5, False))),
        ("  > 33 %  OR  NEW  ivh ", Criterion(relative=Threshold(0.33, False), new_ivh=True)),
        ("new IVH or >=1ml", Criterion(Threshold(1, True), new_ivh=True)),
        ("Standard", parse_criterion(">=6mL or >=33%")),
        ("strict", parse_criterion(">6mL or >33%")),
        ("revised", parse_criterion(">=6mL or >=33% or new IVH")),
    ],
)
def test_criteria_are_parsed(text: str, criterion: Criterion) -> None:
    assert parse_criterion(text) == criterion


@pytest.mark.parametrize("name", NAMED_CRITERIA)
def test_normal_form_is_parsed_to_the_same(name: str) -> None:
    criterion = parse_criterion(name)
    assert str(criterion) == NAMED_CRITERIA[name]
    assert parse_criterion(str(criterion)) == criterion


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("standart", "'standart' is no term"),
        ("", "'' is no term"),
        ("6mL", "'6mL' is no term"),  # > or >=: which?
        (">=6", "'>=6' is no term"),
        ("<6mL", "'<6mL' is no term"),
        (">=-6mL", "'>=-6mL' is no term"),
        (">=6mL and >=33%", "'>=6mL and >=33%' is no term"),
        (">=6mL or", "'>=6mL or' is no term"),
        (">=6mL or standard", "'standard' is no term"),
        (">=6mL or >7mL", "'>7mL' is a second term of its kind"),
        ("new IVH or new IVH", "'new IVH' is a second term of its kind"),
    ],
)
def test_a_criterion_that_is_none_shows_names_and_grammar(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_criterion(text)
    assert f"criterion={text}: {wrong}" in str(error.value)
    assert "standard, strict" in str(error.value)
    assert "'>=6mL', '>=33%' and 'new IVH'" in str(error.value)


# ---------------------------------------------------------------- growth


@pytest.mark.parametrize(
    ("baseline_ml", "followup_ml", "criterion", "met"),
    [
        (100, 106, ">=6mL", True),
        (100, 106, ">6mL", False),
        (100, 105.999999, ">=6mL", False),
        (100, 106.000001, ">6mL", True),
        # In binary 8.2 less 2.2 is below 6, and 8.3 less 2.3 above it; of the ratios the first is below 0.33.
        (2.2, 8.2, ">=6mL", True),
        (2.3, 8.3, ">6mL", False),
        (19, 25.27, ">=33%", True),
        (3, 3.99, ">33%", False),
        (3, 3.989999, ">=33%", False),
        (3, 3.990004, ">33%", True),
        (3, 3.99, "standard", True),  # by the relative term alone
        (100, 106, "standard", True),  # by the absolute one alone
        (100, 105, "standard", False),
        (100, 90, "standard", False),
        (100, 112.5, "absolute_12_5ml", True),
    ],
)
def test_exactly_at_the_threshold(baseline_ml: float, followup_ml: float, criterion: str, met: bool) -> None:
    growth = grown(volume(baseline_ml), volume(followup_ml), criterion)
    assert growth.expansion is met
    assert growth.expansion_certain is True  # no band here


def test_binary_fractions_alone_would_decide() -> None:
    assert 8.2 - 2.2 < 6 < 8.3 - 2.3
    assert 6.27 / 19 < 0.33 < (3.99 - 3) / 3


def test_numbers_of_a_pair() -> None:
    growth = grown(volume(10, 9, 12), volume(20, 18, 21))
    assert (growth.pair_id, growth.patient_id, growth.status, growth.error) == ("p", "P", "ok", "")
    assert (growth.baseline, growth.followup, growth.criterion) == ("p_0", "p_1", ">=6mL or >=33%")
    assert (growth.baseline_ml, growth.baseline_low_ml, growth.baseline_high_ml) == (10, 9, 12)
    assert (growth.followup_ml, growth.followup_low_ml, growth.followup_high_ml) == (20, 18, 21)
    # the least is from 12 to 18 mL, the most from 9 to 21
    assert (growth.growth_low_ml, growth.growth_ml, growth.growth_high_ml) == (6, 10, 12)
    assert (growth.relative_growth_low, growth.relative_growth) == (0.5, 1)
    assert growth.relative_growth_high == pytest.approx(12 / 9, abs=1e-6)
    assert (growth.distance_ml, growth.distance_relative) == (4, pytest.approx(0.67))
    assert (growth.new_ivh, growth.ivh_growth_ml) == (None, None)
    assert (growth.expansion, growth.expansion_certain) == (True, True)


def test_distance_exists_for_the_terms_of_the_criterion() -> None:
    absolute, relative = (grown(volume(10), volume(12), name) for name in ("absolute_6ml", "relative_33"))
    assert (absolute.distance_ml, absolute.distance_relative) == (-4, None)
    assert (relative.distance_ml, relative.distance_relative) == (None, pytest.approx(-0.13))


@pytest.mark.parametrize(
    ("baseline", "followup", "expansion", "certain"),
    [
        (volume(50, 49, 51), volume(58, 57, 59), True, True),  # 6 to 10 mL
        (volume(50, 49, 51.1), volume(58, 57, 59), True, False),  # 5.9 mL is possible
        (volume(50, 49, 51), volume(52, 51, 54.9), False, True),  # 5.9 mL at most
        (volume(50, 49, 51), volume(52, 51, 55), False, False),  # 6 mL is possible
        (volume(6, 5, 6), volume(6.6, 6.6, 6.65), False, False),  # 33 % is possible where 6 mL is not
        (volume(6, 5.01, 6), volume(6.6, 6.6, 6.65), False, True),  # 32.7 % at most
    ],
)
def test_a_verdict_is_certain_when_the_whole_band_agrees(
    baseline: VolumeReport, followup: VolumeReport, expansion: bool, certain: bool
) -> None:
    growth = grown(baseline, followup)
    assert (growth.expansion, growth.expansion_certain) == (expansion, certain)


def test_certain_is_what_trying_every_volume_in_the_bands_says() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        before, after = np.sort(random.uniform(0.5, 30, (2, 3)))
        criterion = parse_criterion(str(random.choice(["standard", "strict", "relative_33", "absolute_12_5ml"])))
        growth = measure_growth(PAIR, volume(before[1], *before[::2]), volume(after[1], *after[::2]), criterion)
        tried = {
            criterion.met(y - x, (y - x) / x, None) for x in np.linspace(*before[::2]) for y in np.linspace(*after[::2])
        }
        assert growth.expansion_certain is (len(tried) == 1)
        seen.add((growth.expansion, growth.expansion_certain))
    assert len(seen) == 4


@pytest.mark.parametrize(("slice_mm", "low_ml", "high_ml", "certain"), [(1.0, 10, 14, True), (5.0, 2, 23, False)])
def test_thick_slices_leave_it_open(slice_mm: float, low_ml: float, high_ml: float, certain: bool) -> None:
    grid = make_grid((96, 96, round(70 / slice_mm)), (0.45, 0.45, slice_mm))
    radii_mm = [(ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3) for ml in (20, 32)]
    growth = grown(*(measure("sphere", ellipsoid(grid, (radius,) * 3)) for radius in radii_mm))
    assert growth.growth_ml == pytest.approx(12, abs=0.5)
    assert [growth.growth_low_ml, growth.growth_high_ml] == pytest.approx([low_ml, high_ml], abs=0.6)
    assert (growth.expansion, growth.expansion_certain) == (True, certain)


def test_without_blood_at_baseline_nothing_is_relative() -> None:
    small, large = grown(volume(0), volume(5.9)), grown(volume(0), volume(6))
    for growth in (small, large):
        assert growth.relative_growth is None
        assert growth.relative_growth_low is growth.relative_growth_high is None
        assert growth.distance_relative is None
        assert growth.expansion_certain is True
    assert (small.expansion, large.expansion) == (False, True)
    assert grown(volume(0), volume(50), "relative_33").expansion is False


def test_a_baseline_band_that_reaches_0_leaves_relative_growth_open() -> None:
    growth = grown(volume(1, 0, 2), volume(1.1, 1, 1.2))
    assert (growth.relative_growth, growth.relative_growth_low, growth.relative_growth_high) == (0.1, -0.5, None)
    assert (growth.expansion, growth.expansion_certain) == (False, False)
    assert grown(volume(1, 0, 2), volume(0)).expansion_certain is True  # it cannot have grown
    # Nothing at baseline, but perhaps a little: then 2 mL would be many times that.
    doubtful = grown(volume(0, 0, 0.5), volume(2, 1, 3))
    assert (doubtful.relative_growth_low, doubtful.relative_growth_high) == (None, None)
    assert (doubtful.expansion, doubtful.expansion_certain) == (False, False)


@pytest.mark.parametrize(
    ("before_ml", "after_ml", "new"),
    [(0, 0.5, True), (0, 0, False), (1, 3, False), (1, 0, False)],
)
def test_new_ivh(before_ml: float, after_ml: float, new: bool) -> None:
    growth = grown(volume(50, ivh_ml=before_ml), volume(51, ivh_ml=after_ml), "revised")
    assert growth.new_ivh is new
    assert growth.ivh_growth_ml == after_ml - before_ml
    assert (growth.expansion, growth.expansion_certain) == (new, True)
    assert grown(volume(50, ivh_ml=before_ml), volume(51, ivh_ml=after_ml), "standard").expansion is False


def test_new_ivh_is_unknown_when_one_mask_has_no_subtypes() -> None:
    growth = grown(volume(50, ivh_ml=0), volume(51))
    assert (growth.new_ivh, growth.ivh_growth_ml) == (None, None)
    with pytest.raises(ValueError, match="p: new IVH is asked for, expected masks with subtypes"):
        grown(volume(50, ivh_ml=0), volume(51), "revised")


def test_lines_to_read() -> None:
    line = grown(volume(10, 9, 11), volume(17, 16, 18)).line()
    assert line == (
        "p: 10.00 to 17.00 mL, growth +7.00 mL [+5.00, +9.00], +70% [+45%, +100%]: expansion (>=6mL or >=33%)"
    )
    assert (
        grown(volume(50, 49, 51), volume(52, 51, 55))
        .line()
        .endswith(": no expansion (>=6mL or >=33%), uncertain: the band holds both answers")
    )
    assert "+10% [-50%, no limit]: no expansion" in grown(volume(1, 0, 2), volume(1.1, 1, 1.2)).line()
    assert "no blood at baseline, new IVH: " in grown(volume(0, ivh_ml=0), volume(2, ivh_ml=1)).line()


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="p: growth_ml is nan"):
        write_growth(tmp_path / "growth.csv", [replace(grown(volume(1), volume(2)), growth_ml=float("nan"))])
    assert not list(tmp_path.iterdir())


def test_every_column_and_criterion_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "measurement.md").read_text()
    assert [each.name for each in fields(Growth) if f"`{each.name}`" not in page] == []
    assert [name for name, text in NAMED_CRITERIA.items() if f"| `{name}` | `{text}` |" not in page] == []


# ---------------------------------------------------------------- pairing


def record(case_id: str, timepoint: str = "", patient: str = "", image: str = "") -> CaseRecord:
    image = image or f"{case_id}{timepoint.replace(':', '')}.nii.gz"
    return CaseRecord(case_id, Path(image), patient_id=patient, extra={"timepoint": timepoint})


def test_cases_in_two_places_pair_by_id() -> None:
    before = [record("b", image="0/b"), record("a", image="0/a"), record("old", image="0/old")]
    after = [record("new", image="1/new"), record("a", image="1/a"), record("b", image="1/b")]
    pairs = {pair.pair_id: pair for pair in pair_by_id(before, after)}
    assert list(pairs) == ["a", "b", "new", "old"]
    assert [case.case_id for case in pairs["a"].cases] == ["a_baseline", "a_followup"]
    assert [case.image for case in pairs["b"].cases] == [Path("0/b"), Path("1/b")]
    assert pairs["new"].error.startswith("new: no baseline, only a follow-up")
    assert pairs["old"].error.startswith("old: no follow-up, only a baseline")
    assert pairs["new"].cases == pairs["old"].cases == []


def test_one_patient_is_not_compared_with_another() -> None:
    (pair,) = pair_by_id([record("a", patient="P1", image="0/a")], [record("a", patient="P2", image="1/a")])
    assert pair.error.startswith("a: patients 'P1' and 'P2', expected one")
    (pair,) = pair_by_id([record("a", patient="P1", image="0/a")], [record("a", patient="P1", image="1/a")])
    assert (pair.error, pair.patient_id) == ("", "P1")


@pytest.mark.parametrize(
    "times",
    [
        ("0", "6", "24"),
        ("-1.5", "9", "1e1"),  # as numbers: as text 1e1 comes before 9
        ("2024-01-31", "2024-01-31T01:00", "2024-02-01"),
        ("2024-01-31T23:00+01:00", "2024-01-31T22:30+00:00", "2024-01-31T23:00+00:00"),
    ],
)
def test_the_earliest_is_compared_with_every_later_one(times: tuple[str, str, str]) -> None:
    cases = [record(name, time, "P") for name, time in zip(("first", "second", "third"), times, strict=True)]
    pairs = pair_by_time([cases[2], cases[0], cases[1]])
    assert [(pair.pair_id, [case.case_id for case in pair.cases]) for pair in pairs] == [
        ("second", ["first", "second"]),
        ("third", ["first", "third"]),
    ]
    assert {pair.patient_id for pair in pairs} == {"P"}


def test_a_patient_with_one_scan_keeps_a_row() -> None:
    one, two = pair_by_time([record("x", "0", "P1"), record("y", "0", "P2"), record("z", "1", "P2")])
    assert one.error.startswith("x: the only scan of patient P1")
    assert (one.pair_id, one.patient_id, one.cases) == ("x", "P1", [])
    assert two.error == ""


@pytest.mark.parametrize("time", ["", "day 2", "nan", "inf", "31.01.2024"])
def test_a_time_that_is_none_is_refused_by_name(time: str) -> None:
    with pytest.raises(ManifestError, match=f"second: timepoint '{time}', expected a number"):
        pair_by_time([record("first", "0", "P"), record("second", time, "P")])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (("1", "2024-01-31"), "timepoint is a date without a time zone and a number"),
        (("2024-01-31", "2024-01-31T10:00+00:00"), "timepoint is a date with a time zone and a date without"),
        (("1", "1.0"), "first and second are both at timepoint 1.0"),
        (("2024-01-31", "2024-01-31T00:00"), "first and second are both at timepoint 2024-01-31T00:00"),
    ],
)
def test_times_that_give_no_order_are_refused(times: tuple[str, str], message: str) -> None:
    with pytest.raises(ManifestError, match=f"patient P: .*{message}"):
        pair_by_time([record("first", times[0], "P"), record("second", times[1], "P")])
    # two patients may have any of these
    assert len(pair_by_time([record("first", times[0], "P"), record("second", times[1], "Q")])) == 2


# ---------------------------------------------------------------- the command


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *map(str, words)])
    return end.value.code


def block(path: Path, slices: int, ivh_slices: int = 0) -> Path:
    """A mask of 2 mL a slice, of value 2, in the last slices of value 3."""
    values = np.zeros((32, 32, 14), np.uint8)
    values[8:18, 8:18, 1 : 1 + slices] = Subtype.IPH
    values[8:18, 8:18, 1 + slices - ivh_slices : 1 + slices] = Subtype.IVH
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_nifti(path, values, Grid(values.shape, np.diag([2.0, 2.0, 5.0, 1.0])))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("criterion", "expansion"), [(">=6mL", "1"), (">6mL", "0")])
def test_two_masks_at_the_threshold(folder: Path, capsys, criterion: str, expansion: str) -> None:
    block(folder / "monday.nii.gz", 3), block(folder / "tuesday.nii.gz", 6)
    assert run("monday.nii.gz", "tuesday.nii.gz", "--masks", "--out", "r/g.csv", f"criterion={criterion}") == 0
    (row,) = table(folder / "r" / "g.csv")
    assert row["pair_id"] == "monday_tuesday"
    assert (row["status"], row["error"], row["patient_id"]) == ("ok", "", "")
    assert (row["baseline"], row["followup"]) == ("monday_tuesday_baseline", "monday_tuesday_followup")
    assert (row["baseline_ml"], row["followup_ml"], row["growth_ml"]) == ("6.000000", "12.000000", "6.000000")
    assert (row["relative_growth"], row["distance_ml"], row["distance_relative"]) == ("1.000000", "0.000000", "")
    assert (row["new_ivh"], row["ivh_growth_ml"]) == ("", "")
    assert (row["criterion"], row["expansion"], row["expansion_certain"]) == (criterion, expansion, "0")
    volumes = {each.case_id: each.report for each in read_rows(folder / "r" / "volumes.csv")}
    assert float(row["growth_low_ml"]) == pytest.approx(
        volumes[row["followup"]].volume_low_ml - volumes[row["baseline"]].volume_high_ml, abs=1e-6
    )
    assert float(row["growth_low_ml"]) < 6 < float(row["growth_high_ml"])
    said = capsys.readouterr().out
    assert said.startswith("monday_tuesday: 6.00 to 12.00 mL, growth +6.00 mL [")
    assert f"{'expansion' if expansion == '1' else 'no expansion'} ({criterion}), uncertain" in said
    report = json.loads((folder / "r" / "run.json").read_text())
    assert report["exit_status"] == 0
    assert report["config"]["run"]["criterion"] == criterion
    assert [case["case_id"] for case in report["cases"]] == [row["baseline"], row["followup"], "pair/monday_tuesday"]


def test_two_folders_with_a_lonely_and_a_broken_mask(folder: Path, capsys) -> None:
    for side, slices in (("0", 2), ("1", 6)):
        block(folder / side / "a.nii.gz", slices)
        block(folder / side / "broken.nii.gz", slices)
    block(folder / "0" / "lost.nii.gz", 2)
    (folder / "1" / "broken.nii.gz").write_bytes(b"no mask")
    assert run("0", "1", "--masks", "--out", "g.csv") == 1
    a, broken, lost = table(folder / "g.csv")
    assert (a["pair_id"], a["status"], a["growth_ml"]) == ("a", "ok", "8.000000")
    assert (broken["status"], lost["status"]) == ("failed", "failed")
    assert broken["error"].startswith("broken_followup: ")
    assert lost["error"].startswith("lost: no follow-up, only a baseline")
    named = ("pair_id", "patient_id", "status", "error", "baseline", "followup")
    assert {value for row in (broken, lost) for name, value in row.items() if name not in named} == {""}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["a", "broken", "lost"]
    assert said[2].startswith("lost: failed: no follow-up, only a baseline")
    report = json.loads((folder / "run.json").read_text())
    assert report["exit_status"] == 1
    ended = {case["case_id"]: case["status"] for case in report["cases"]}
    assert {name for name, status in ended.items() if status == "ok"} == {
        *("a_baseline", "a_followup", "broken_baseline", "pair/a"),
    }
    assert {name for name, status in ended.items() if status == "failed"} == {
        *("broken_followup", "pair/broken", "pair/lost"),
    }


def test_a_manifest_of_time_points(folder: Path) -> None:
    for name, slices, ivh_slices in (("p0", 5, 0), ("p1", 6, 1), ("p2", 5, 0), ("q0", 1, 0)):
        block(folder / f"{name}.nii.gz", slices, ivh_slices)
    (folder / "ct.nii.gz").write_bytes(b"not read")
    (folder / "cases.csv").write_text(
        "case_id,patient_id,timepoint,image,label\n"
        "p24,P,24,ct.nii.gz,p1.nii.gz\n"  # the mask is the label
        "p00,P,0,p0.nii.gz,\n"  # where there is none, the image
        "p48,P,48,p2.nii.gz,\n"
        "q,Q,0,q0.nii.gz,\n"
    )
    assert run("cases.csv", "--masks", "--out", "g.csv", "criterion=revised", "subtypes=true") == 1
    first, second, lonely = table(folder / "g.csv")
    assert (first["pair_id"], first["patient_id"], first["baseline"], first["followup"]) == ("p24", "P", "p00", "p24")
    assert (first["new_ivh"], first["ivh_growth_ml"], first["expansion"]) == ("1", "2.000000", "1")
    assert (second["pair_id"], second["baseline"], second["new_ivh"], second["expansion"]) == ("p48", "p00", "0", "0")
    assert (lonely["pair_id"], lonely["patient_id"], lonely["status"]) == ("q", "Q", "failed")
    assert [row["case_id"] for row in table(folder / "volumes.csv")] == ["p00", "p24", "p48"]
    report = json.loads((folder / "run.json").read_text())
    assert str(folder / "cases.csv") in [each["path"] for each in report["inputs"]]


def test_two_manifests_pair_by_case_id(folder: Path) -> None:
    for day, slices in ((0, 2), (1, 3)):
        block(folder / f"day{day}.nii.gz", slices)
        (folder / f"{day}.csv").write_text(f"case_id,image\nx,day{day}.nii.gz\n")
    assert run("0.csv", "1.csv", "--masks", "--out", "g.csv") == 0
    (row,) = table(folder / "g.csv")
    assert (row["pair_id"], row["patient_id"], row["growth_ml"]) == ("x", "x", "2.000000")


WRONG = {
    "one path": (["a.nii.gz"], "1 paths, expected BASELINE and FOLLOWUP"),
    "three paths": (["a.nii.gz", "b.nii.gz", "m.csv"], "3 paths, expected BASELINE and FOLLOWUP"),
    "no such path": (["a.nii.gz", "c.nii.gz"], "c.nii.gz: no such file"),
    "same file": (["a.nii.gz", "./a.nii.gz"], "a.nii.gz is both baseline and follow-up"),
    "nothing in common": (["x", "y"], "nothing to compare (2 without a partner), such as a: no follow-up"),
    "no patient twice": (["m.csv"], "nothing to compare (1 without a partner), such as a: the only scan of patient"),
    "criterion": (["a.nii.gz", "b.nii.gz", "criterion=standart"], "criterion=standart: 'standart' is no term"),
    "no subtypes": (["a.nii.gz", "b.nii.gz", "criterion=revised"], "new IVH shows in masks with subtypes only"),
    "bundle": (["a.nii.gz", "b.nii.gz", "bundle=cascade3d"], "--masks measures masks that exist"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_write_nothing(folder: Path, capsys, words: list[str], message: str) -> None:
    for name, slices in (("a", 2), ("b", 3), ("x/a", 2), ("y/b", 2)):
        block(folder / f"{name}.nii.gz", slices)
    (folder / "m.csv").write_text("case_id,image,timepoint\na,a.nii.gz,0\n")
    before = sorted(folder.rglob("*"))
    assert run(*words, "--masks", "--out", "g.csv") == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_bundle_predicts_no_subtypes(folder: Path, capsys) -> None:
    block(folder / "a.nii.gz", 2), block(folder / "b.nii.gz", 3)
    words = ["bundle=cascade3d", "criterion=revised", "subtypes=true"]
    assert run("a.nii.gz", "b.nii.gz", "--out", "g.csv", *words) == 2
    assert "new IVH shows in masks with subtypes only" in capsys.readouterr().err
    assert run(folder, folder, "--out", "g.csv", "bundle=cascade3d") == 2
    assert "would be taken for scans" in capsys.readouterr().err


def test_no_other_table_is_replaced(folder: Path, capsys) -> None:
    for name, slices in (("0/a", 2), ("1/a", 3), ("0/b", 2), ("1/b", 3)):
        block(folder / f"{name}.nii.gz", slices)
    (folder / "mine.csv").write_text("case_id,image\na,0/a.nii.gz\n")
    for out in ("mine.csv", "volumes.csv", "lesions.csv", "run.json"):
        assert run("0", "1", "--masks", "--out", out) == 2
        assert "Give another --out" in capsys.readouterr().err
    assert (folder / "mine.csv").read_text().startswith("case_id,image\n")

    assert run("0", "1", "--masks", "--out", "g.csv") == 0
    assert run("0", "1", "--masks", "--out", "g.csv") == 0  # its own it makes again
    # with fewer cases the volumes of the others would be lost
    pair = ("0/a.nii.gz", "1/a.nii.gz", "--masks", "--out", "g.csv")
    assert run(*pair) == 2
    assert "volumes.csv also holds b_baseline" in capsys.readouterr().err
    assert len(table(folder / "volumes.csv")) == 4
    assert run(*pair, "overwrite=true") == 0
    assert [row["case_id"] for row in table(folder / "volumes.csv")] == ["a_baseline", "a_followup"]


def test_two_scans_are_segmented_and_compared(folder: Path) -> None:
    bundle = oracle_bundle(folder / "oracle", device="cpu")
    for name, radius_mm in (("before", 12.0), ("after", 18.0)):
        image_hu, label, grid = bleeding_head(lesion_radius_mm=radius_mm)
        save_nifti(folder / f"{name}.nii.gz", image_hu, grid)
        save_nifti(folder / f"{name}_label.nii.gz", label, grid)
    words = ["before.nii.gz", "after.nii.gz", "--out", "r/g.csv", f"bundle={bundle}", "pictures=false"]
    assert run(*words) == 0
    (row,) = table(folder / "r" / "g.csv")
    assert run("before_label.nii.gz", "after_label.nii.gz", "--masks", "--out", "labels/g.csv") == 0
    (true,) = table(folder / "labels" / "g.csv")
    # the oracle's edge is off by parts of a voxel
    assert float(row["growth_ml"]) == pytest.approx(float(true["growth_ml"]), rel=0.05)
    # Voxels of 4 x 4.5 x 11 mm leave room for growth below 6 mL and below 33 %; the oracle is surer of its outline.
    assert (true["expansion"], true["expansion_certain"]) == ("1", "0")
    assert (row["expansion"], row["expansion_certain"]) == ("1", "1")
    masks = sorted(path.name for path in (folder / "r" / "masks").iterdir())
    assert masks == ["before_after_baseline.nii.gz", "before_after_followup.nii.gz"]
    assert {each.report.band for each in read_rows(folder / "r" / "volumes.csv")} == {"probability"}

    # Another criterion goes on with the masks that are there.
    times = [path.stat().st_mtime_ns for path in (folder / "r" / "masks").iterdir()]
    assert run(*words, "criterion=>500mL") == 0
    assert [path.stat().st_mtime_ns for path in (folder / "r" / "masks").iterdir()] == times
    assert table(folder / "r" / "g.csv")[0]["expansion"] == "0"
    report = json.loads((folder / "r" / "run.json").read_text())
    assert (report["exit_status"], report["bundle"]["name"]) == (0, "cascade3d")
    assert [case["case_id"] for case in report["cases"]][2] == "pair/before_after"
