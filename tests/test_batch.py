"""Many cases: each keeps its row, failures stay apart, and a kill costs only the case that was under way."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import INVALID, VALID
from heads import bleeding_head, oracle_bundle, save_nifti, write_heads

from ich_pipeline import batch, cli, commands
from ich_pipeline.batch import run_batch
from ich_pipeline.errors import ConfigError, ReadError, reason
from ich_pipeline.finding import find_scans
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.memory import BYTES_PER_VOXEL
from ich_pipeline.nifti import nifti_stem
from ich_pipeline.pipeline import Pipeline
from ich_pipeline.report import read_rows, write_tables
from ich_pipeline.run_report import RunReport

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return oracle_bundle(tmp_path_factory.mktemp("bundle") / "oracle")


@pytest.fixture(scope="module")
def segmenter(bundle) -> Segmenter:
    from ich_pipeline.bundles import Bundle, resolve

    return Segmenter(Bundle(bundle), resolve(Bundle(bundle), ["inference"], {}, None)["inference"])


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_heads(folder, 5)
    return folder


def run(scans: Path, out: Path, segmenter: Segmenter, **changes):
    """Rows, report and what `on_row` was told."""
    pipeline = replace(Pipeline(segmenter, out / "masks", None, RunReport({}, command=["test"])), **changes)
    told = []
    rows = run_batch(find_scans([scans]), pipeline, out / "volumes.csv", on_row=told.append)
    return rows, pipeline.report, told


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_the_series_that_was_read_stands_in_the_row(tmp_path, segmenter, scans):
    both = tmp_path / "in"
    VALID["bone_kernel_beside"](both / "study")
    INVALID["cut_off_pixels"][0](both / "cut")
    shutil.copy(next(scans.iterdir()), both / "nifti.nii.gz")
    shutil.make_archive(str(both / "packed"), "zip", both / "study")
    run(both, tmp_path / "out", segmenter)
    rows = {row["case_id"]: row for row in table(tmp_path / "out" / "volumes.csv")}
    assert {case_id: row["status"] for case_id, row in rows.items()} == {
        "cut": "failed",
        "nifti": "ok",
        "packed": "ok",
        "study": "ok",
    }
    series = {
        case_id: [row[f"series_{name}"] for name in ("number", "kernel", "slices")] for case_id, row in rows.items()
    }
    assert series["study"] == series["packed"] == ["2", "STD", "14"]
    assert series["nifti"] == series["cut"] == ["", "", ""]
    assert rows["study"]["series_uid"] == rows["packed"]["series_uid"] != ""
    assert rows["packed"]["image"] == "../in/packed.zip"
    assert read_rows(tmp_path / "out" / "volumes.csv")[-1].extra["series_number"] == "2"


class Broken(Segmenter):
    """The same segmenter with one step that fails on some cases."""

    def __init__(self, segmenter: Segmenter, step: str, error: Exception, cases: set[str]) -> None:
        self.__dict__.update(segmenter.__dict__)
        self.step, self.error, self.cases = step, error, cases

    def read(self, case, *options, **named):
        if self.step == "read" and case.case_id in self.cases:
            raise self.error
        return super().read(case, *options, **named)

    def segment(self, loaded, *options, **named):
        if self.step == "segment" and loaded.scan.case_id in self.cases:
            raise self.error
        return super().segment(loaded, *options, **named)


def test_every_case_has_its_row_in_order(scans, segmenter, tmp_path):
    rows, report, told = run(scans, tmp_path, segmenter)
    assert [row.case_id for row in rows] == [f"head{n}" for n in range(5)]
    assert told == rows
    assert [row.status for row in rows] == ["ok"] * 5
    assert all(row.mask.is_file() for row in rows)
    assert rows[3].report.volume_ml == 0  # no bleed in it
    assert all(rows[n].report.volume_ml > 3 for n in (0, 1, 2, 4))
    assert [cells["case_id"] for cells in table(tmp_path / "volumes.csv")] == [row.case_id for row in rows]
    # seconds are a case's own, although three cases are under way at once
    assert all(row.seconds == pytest.approx(report.case_seconds(row.case_id)) for row in rows)
    assert all(row.seconds > 0 for row in rows)


def test_one_by_one_gives_the_same_rows(scans, segmenter, tmp_path):
    pipeline = Pipeline(segmenter, tmp_path / "masks", None, RunReport({}, command=["test"]))
    alone = [pipeline.run(case) for case in find_scans([scans])]
    overlapped, _, _ = run(scans, tmp_path, segmenter)
    assert [replace(row, seconds=None) for row in overlapped] == alone


@pytest.mark.parametrize("step", ["read", "segment"])
@pytest.mark.parametrize("cases", [{"head0"}, {"head4"}, {"head1", "head2"}, {f"head{n}" for n in range(5)}], ids=len)
def test_a_step_that_fails_costs_its_case_only(scans, segmenter, tmp_path, step, cases):
    broken = Broken(segmenter, step, RuntimeError("out of luck"), cases)
    rows, report, told = run(scans, tmp_path, segmenter=broken)
    assert [row.case_id for row in rows] == [row.case_id for row in told] == [f"head{n}" for n in range(5)]
    assert {row.case_id for row in rows if row.status == "failed"} == cases
    for row in rows:
        if row.case_id in cases:
            assert row.error == "RuntimeError: out of luck"
            assert row.report is None
            assert not (tmp_path / "masks" / f"{row.case_id}.nii.gz").exists()
    report.write(tmp_path / "run.json", exit_status=1)
    said = {case["case_id"]: case["error"] for case in json.loads((tmp_path / "run.json").read_text())["cases"]}
    assert {case_id for case_id, error in said.items() if error} == cases


def test_wrong_files_fail_in_our_own_words(segmenter, tmp_path):
    scans = tmp_path / "scans"
    write_heads(scans, 6)
    image_hu, _, grid = bleeding_head()
    (scans / "head1.nii.gz").write_bytes((scans / "head1.nii.gz").read_bytes()[:2000])  # cut off
    save_nifti(scans / "head2.nii.gz", (image_hu + 1024).astype(np.int16), grid)  # not HU
    cases = find_scans([scans])
    (scans / "head4.nii.gz").unlink()  # gone since it was listed
    pipeline = Pipeline(segmenter, tmp_path / "masks", None, RunReport({}, command=["test"]))
    rows = {row.case_id: row for row in run_batch(cases, pipeline, tmp_path / "volumes.csv")}
    assert {case_id for case_id, row in rows.items() if row.status == "failed"} == {"head1", "head2", "head4"}
    assert "HU of a head CT" in rows["head2"].error
    assert "does not exist" in rows["head4"].error
    for row in rows.values():
        assert "applying transform" not in row.error
        assert "\n" not in row.error
        if row.status == "failed":
            assert row.error.startswith(row.case_id)  # names the case
    pipeline.report.write(tmp_path / "run.json", exit_status=1)  # a file that is gone has no hash, and that is said
    gone = json.loads((tmp_path / "run.json").read_text())["inputs"][4]
    assert gone["sha256"] is None
    assert "head4" in gone["error"]


def test_masks_that_cannot_be_written_fail_their_cases(scans, segmenter, tmp_path):
    (tmp_path / "masks").write_text("a file where the folder should be")
    rows, _, _ = run(scans, tmp_path, segmenter)
    assert [row.status for row in rows] == ["failed"] * 5
    assert all("masks" in row.error for row in rows)


def test_a_scan_too_large_for_the_memory_fails_alone(segmenter, tmp_path, monkeypatch):
    write_heads(tmp_path / "scans", 2)
    large = nib.Nifti1Image(np.zeros((400, 400, 10), np.int16), np.diag([0.5, 0.5, 5, 1]))
    nib.save(large, tmp_path / "scans" / "head0_large.nii.gz")
    free = SimpleNamespace(available=BYTES_PER_VOXEL * 400 * 400 * 9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    rows, _, _ = run(tmp_path / "scans", tmp_path, segmenter)
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert rows[1].error.startswith("head0_large: (400, 400, 10) voxels need about 0.1 GiB, and 0.1 GiB are free.")


def test_our_own_error_behind_the_wrapping():
    wrapped = RuntimeError("applying transform <object>")
    wrapped.__cause__ = ReadError("head: values run\n from 0 to 1")
    assert reason(wrapped) == "head: values run from 0 to 1"
    assert reason(KeyError("x")) == "KeyError: 'x'"


def test_no_more_than_three_cases_are_in_memory(scans, segmenter, tmp_path):
    class Counting(Pipeline):
        alive, most = 0, 0

        def read(self, case):
            Counting.alive += 1
            Counting.most = max(Counting.most, Counting.alive)
            return super().read(case)

        def finish(self, prediction):
            time.sleep(0.05)
            row = super().finish(prediction)
            Counting.alive -= 1
            return row

    pipeline = Counting(segmenter, tmp_path / "masks", None, RunReport({}, command=["test"]))
    run_batch(find_scans([scans]), pipeline, tmp_path / "volumes.csv")
    assert 2 <= Counting.most <= 3
    assert Counting.alive == 0


# --- the command: resuming, interrupting, refusing -----------------------------------------------------------------


def segment(scans: Path, out: Path, bundle: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["segment", str(scans), "--out", str(out), f"bundle={bundle}", "pictures=false", *words])
    return exit_.value.code


def numbers(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table(out / "volumes.csv")]


def hidden(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.startswith(".")]


@contextmanager
def running(scans: Path, out: Path, bundle: Path):
    """`ich-pipeline segment` as a process of its own."""
    command = [sys.executable, "-m", "ich_pipeline", "segment", str(scans), "--out", str(out), f"bundle={bundle}"]
    process = subprocess.Popen(
        [*command, "pictures=false"],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_rows(out: Path, n: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "volumes.csv").is_file() and len(table(out / "volumes.csv")) >= n:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {n} rows; the process says {process.poll()}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory) -> Path:
    """Half a second a scan, so that there is a middle to be killed in."""
    return oracle_bundle(tmp_path_factory.mktemp("slow") / "oracle", delay_s=0.5)


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eight")
    write_heads(folder, 8)
    return folder


def test_killed_run_goes_on_where_it_stopped(eight, slow_bundle, tmp_path):
    out = tmp_path / "out"
    with running(eight, out, slow_bundle) as process:
        wait_for_rows(out, 3, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = [row["case_id"] for row in table(out / "volumes.csv")]
    assert 3 <= len(done) < 8
    before = {case_id: (out / f"{case_id}.nii.gz").stat().st_mtime_ns for case_id in done}
    # What a process leaves that is killed between the temporary name and the rename.
    (out / f".{process.pid}-0123456789ab-head7.nii.gz").write_bytes(b"half")

    assert segment(eight, out, slow_bundle) == 0
    assert {case_id: (out / f"{case_id}.nii.gz").stat().st_mtime_ns for case_id in done} == before
    assert hidden(out) == []
    report = json.loads((out / "run.json").read_text())
    assert [case["case_id"] for case in report["cases"]] == sorted(f"head{n}" for n in range(8))
    assert {case["case_id"] for case in report["cases"] if not case["seconds"]} == set(done)
    assert report["exit_status"] == 0

    undisturbed = tmp_path / "undisturbed"
    assert segment(eight, undisturbed, slow_bundle) == 0
    assert numbers(out) == numbers(undisturbed)
    assert (out / "lesions.csv").read_bytes() == (undisturbed / "lesions.csv").read_bytes()
    for file in undisturbed.glob("*.nii.gz"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_full_disk_stops_and_what_was_done_is_whole(scans, bundle, tmp_path, monkeypatch, capsys):
    written = 0

    def until_full(*given):
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "volumes.csv")
        write_tables(*given)

    monkeypatch.setattr(batch, "write_tables", until_full)
    assert segment(scans, tmp_path / "out", bundle) == 1
    assert "volumes.csv: No space left on device. What was finished before is whole" in capsys.readouterr().err
    assert [row["status"] for row in table(tmp_path / "out" / "volumes.csv")] == ["ok"] * 3
    monkeypatch.undo()
    assert segment(scans, tmp_path / "out", bundle) == 0
    assert len(table(tmp_path / "out" / "volumes.csv")) == 5
    assert hidden(tmp_path / "out") == []


def test_a_table_that_is_slow_to_write_is_not_written_after_every_case(scans, segmenter, tmp_path, monkeypatch):
    lengths = []

    def slowly(table_file, rows):
        lengths.append(len(rows))
        time.sleep(0.4)
        write_tables(table_file, rows)

    monkeypatch.setattr(batch, "write_tables", slowly)
    monkeypatch.setattr(batch, "SHARE", 1e-6)  # of no batch that a test can wait for
    run(scans, tmp_path, segmenter)
    assert lengths == [1, 5]
    assert len(table(tmp_path / "volumes.csv")) == 5


def test_an_interrupted_batch_writes_the_rows_it_has_not_written_yet(scans, segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "QUICK_S", -1.0)  # as if every writing had been slow
    monkeypatch.setattr(batch, "SHARE", 1e-9)

    def interrupted(row):
        if row.case_id == "head3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(
            find_scans([scans]),
            Pipeline(segmenter, tmp_path / "masks", None, RunReport({}, command=["test"])),
            tmp_path / "volumes.csv",
            on_row=interrupted,
        )
    assert [row["case_id"] for row in table(tmp_path / "volumes.csv")] == ["head0", "head1", "head2", "head3"]


def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path):
    write_heads(tmp_path / "heads", 2, tmp_path / "labels")
    labels, out = str(tmp_path / "labels"), str(tmp_path / "v.csv")
    command = [sys.executable, "-m", "ich_pipeline", "volume", labels, "--masks", "--out", out]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert ended.returncode == 1
    assert "File too large. What was finished before is whole; make room" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "labels"]


def test_interrupt_exits_130_with_whole_files_only(eight, slow_bundle, tmp_path):
    out = tmp_path / "out"
    with running(eight, out, slow_bundle) as process:
        wait_for_rows(out, 2, process)
        os.kill(process.pid, signal.SIGINT)
        start = time.monotonic()
        _, said = process.communicate(timeout=60)
        # a case under way is half a second; the rest is a busy machine
        assert time.monotonic() - start < 20
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert hidden(out) == []
    assert 2 <= len(table(out / "volumes.csv")) < 8
    for mask in out.glob("*.nii.gz"):
        assert nifti_stem(mask).startswith("head")
        assert np.isin(load(mask), (0, 1)).all()
    report = json.loads((out / "run.json").read_text())
    assert report["exit_status"] is None
    assert len(report["cases"]) == len(table(out / "volumes.csv"))


def load(path: Path) -> np.ndarray:
    import nibabel as nib

    return np.asarray(nib.load(path).dataobj)


class TestResume:
    @pytest.fixture
    def finished(self, scans, bundle, tmp_path) -> Path:
        assert segment(scans, tmp_path / "out", bundle) == 0
        return tmp_path / "out"

    def times(self, out: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("*.nii.gz"))}

    def test_finished_run_does_nothing_again(self, scans, bundle, finished):
        before = self.times(finished), (finished / "volumes.csv").read_bytes()
        assert segment(scans, finished, bundle) == 0
        assert (self.times(finished), (finished / "volumes.csv").read_bytes()) == before

    def test_only_what_is_missing_is_done(self, scans, bundle, finished):
        before = self.times(finished)
        (finished / "head2.nii.gz").unlink()
        assert segment(scans, finished, bundle) == 0
        after = self.times(finished)
        assert {name for name in after if after[name] != before[name]} == {"head2.nii.gz"}

    def test_failed_cases_are_tried_again_and_new_ones_added(self, bundle, tmp_path):
        scans, out = tmp_path / "scans", tmp_path / "out"
        write_heads(scans, 3)
        whole = (scans / "head1.nii.gz").read_bytes()
        (scans / "head1.nii.gz").write_bytes(whole[:1000])
        assert segment(scans, out, bundle) == 1
        before = self.times(out)
        assert [row["status"] for row in table(out / "volumes.csv")] == ["ok", "failed", "ok"]
        (scans / "head1.nii.gz").write_bytes(whole)
        (scans / "another.nii.gz").write_bytes(whole)
        assert segment(scans, out, bundle) == 0
        assert [row["case_id"] for row in table(out / "volumes.csv")] == ["another", "head0", "head1", "head2"]
        assert {name: self.times(out)[name] for name in before} == before

    def test_scan_that_changed_is_done_again(self, bundle, tmp_path):
        scans, out = tmp_path / "scans", tmp_path / "out"
        write_heads(scans, 2)
        assert segment(scans, out, bundle) == 0
        before = table(out / "volumes.csv")
        image_hu, _, grid = bleeding_head(lesion_radius_mm=25)
        save_nifti(scans / "head0.nii.gz", image_hu, grid)
        assert segment(scans, out, bundle) == 0
        after = table(out / "volumes.csv")
        assert float(after[0]["volume_ml"]) > 2 * float(before[0]["volume_ml"])
        assert after[1] == before[1]

    @pytest.mark.parametrize("words", [["threshold=0.6"], ["pictures=true"]])
    def test_other_settings_are_refused(self, scans, bundle, finished, words, capsys):
        before = (finished / "run.json").read_bytes(), (finished / "volumes.csv").read_bytes()
        with pytest.raises(SystemExit) as exit_:
            cli.main(["segment", str(scans), "--out", str(finished), f"bundle={bundle}", *words])
        assert exit_.value.code == 2
        assert "other settings or weights" in capsys.readouterr().err
        assert ((finished / "run.json").read_bytes(), (finished / "volumes.csv").read_bytes()) == before

    def test_other_weights_are_refused(self, scans, finished, tmp_path, capsys):
        import torch
        from heads import OracleCascade, save_weights

        other = oracle_bundle(tmp_path / "other")
        network = OracleCascade()
        torch.nn.init.constant_(network.fine_stage.gain, 9.0)
        save_weights(other, network)
        assert segment(scans, finished, other) == 2
        assert "other settings or weights" in capsys.readouterr().err

    def test_settings_that_change_nothing_go_on(self, scans, bundle, finished):
        before = self.times(finished)
        assert segment(scans, finished, bundle, "run_name=again") == 0
        assert self.times(finished) == before

    def test_overwrite_replaces_everything(self, scans, bundle, finished, tmp_path):
        before = self.times(finished)
        assert segment(scans, finished, bundle, "threshold=0.6", "overwrite=true") == 0
        assert all(self.times(finished)[name] > before[name] for name in before)
        # and is then a run like any other
        after = self.times(finished)
        assert segment(scans, finished, bundle, "threshold=0.6") == 0
        assert self.times(finished) == after

    def test_overwrite_leaves_no_mask_of_a_case_that_fails_now(self, bundle, tmp_path):
        scans, out = tmp_path / "scans", tmp_path / "out"
        write_heads(scans, 2)
        assert segment(scans, out, bundle) == 0
        (scans / "head0.nii.gz").write_bytes(b"broken")
        assert segment(scans, out, bundle, "overwrite=true") == 1
        assert not (out / "head0.nii.gz").exists()

    def test_other_scans_are_refused(self, bundle, finished, tmp_path, capsys):
        # Their rows would replace those of the earlier scans without a word.
        write_heads(tmp_path / "others", 2)
        assert segment(tmp_path / "others", finished, bundle) == 2
        assert "not among these scans" in capsys.readouterr().err
        assert len(table(finished / "volumes.csv")) == 5


class TestTargets:
    def test_masks_among_the_scans_are_refused(self, bundle, tmp_path, capsys):
        write_heads(tmp_path / "scans", 1)
        for out in (tmp_path / "scans", tmp_path / "scans" / "masks"):
            assert segment(tmp_path / "scans", out, bundle) == 2
            assert "would be taken for scans" in capsys.readouterr().err

    def test_mask_over_its_scan_is_refused(self, bundle, tmp_path, capsys):
        (scan,) = write_heads(tmp_path / "scans", 1)
        before = scan.read_bytes()
        assert segment(scan, tmp_path / "scans", bundle) == 2
        assert "would replace the scan" in capsys.readouterr().err
        assert scan.read_bytes() == before

    def test_temporaries_of_a_living_process_stay(self, scans, bundle, tmp_path):
        living = tmp_path / "out" / f".{os.getpid()}-0123456789ab-x.nii.gz"
        living.parent.mkdir()
        living.write_bytes(b"being written")
        other = tmp_path / "out" / ".a-file-of-the-user"
        other.write_text("")
        assert segment(scans, tmp_path / "out", bundle) == 0
        assert set(hidden(tmp_path / "out")) == {other, living}


def test_measuring_masks_does_not_replace_a_segmented_table(tmp_path: Path) -> None:
    table, masks = tmp_path / "volumes.csv", tmp_path / "masks"
    mask = np.zeros((128, 128, 8), np.uint8)
    mask[60:70, 60:70, 3:5] = 1
    masks.mkdir()
    save_nifti(masks / "a.nii.gz", mask, Grid(mask.shape, np.diag([1.0, 1.0, 5.0, 1.0])))
    assert commands.measure_masks([masks], table, commands.Settings.of([])) == 0
    assert commands.measure_masks([masks], table, commands.Settings.of([])) == 0  # its own table it makes again
    rows = [replace(row, bundle="cascade3d") for row in read_rows(table)]
    write_tables(table, rows)
    with pytest.raises(ConfigError, match="holds what a bundle segmented"):
        commands.measure_masks([masks], table, commands.Settings.of([]))
    assert read_rows(table) == rows
    assert commands.measure_masks([masks], table, commands.Settings.of(["overwrite=true"])) == 0
    assert not any(row.bundle for row in read_rows(table))
