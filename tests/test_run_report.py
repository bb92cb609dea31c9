"""run.json: time, memory, hashes and status of each case."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ich_pipeline import run_report
from ich_pipeline.run_report import RunReport, git_revision, peak_rss_mib, plain, without_password


@pytest.fixture
def report() -> RunReport:
    return RunReport({"bundle": "cascade3d"}, seeds={"split": 7}, command=["ich-pipeline", "segment"])


def written(report: RunReport, folder: Path, exit_status: int | None = 0) -> dict:
    report.write(folder / "run.json", exit_status=exit_status)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_says_what_ran_on_what(report, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"voxels")
    report.add_input(scan)
    report.bundle = {"name": "cascade3d", "weights_sha256": "ab" * 32}
    found = written(report, tmp_path)
    assert found["command"] == ["ich-pipeline", "segment"]
    assert found["config"] == {"bundle": "cascade3d"}
    assert found["seeds"] == {"split": 7}
    assert found["bundle"] == {"name": "cascade3d", "weights_sha256": "ab" * 32}
    assert found["inputs"] == [{"path": str(scan), "sha256": hashlib.sha256(b"voxels").hexdigest()}]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["numpy"] == np.__version__
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
    assert found["exit_status"] == 0
    assert found["started"] <= found["ended"]


def test_a_run_that_still_runs_has_no_end_and_does_not_wait_for_hashes(report, tmp_path, monkeypatch):
    hashing, may_go_on = threading.Event(), threading.Event()

    def slow_hash(path: Path) -> str:
        hashing.set()
        may_go_on.wait(30)
        return "done"

    monkeypatch.setattr(run_report, "sha256_of", slow_hash)
    report.add_input(tmp_path)
    assert hashing.wait(10)  # another thread hashes: this one is here
    early = written(report, tmp_path, exit_status=None)
    assert early["ended"] is None
    assert early["exit_status"] is None
    assert early["inputs"][0]["sha256"] is None
    may_go_on.set()
    assert written(report, tmp_path)["inputs"][0]["sha256"] == "done"


def test_an_input_is_hashed_once_and_one_that_vanished_is_told(report, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run_report, "sha256_of", lambda path: calls.append(path) or "hash")
    report.add_input(tmp_path)
    report.add_input(tmp_path)
    monkeypatch.undo()
    report.add_input(tmp_path / "gone.nii")
    first, gone = written(report, tmp_path)["inputs"]
    assert calls == [tmp_path]
    assert first["sha256"] == "hash"
    assert gone["sha256"] is None
    assert "gone.nii" in gone["error"]


def test_stages_sum_over_threads_and_count(report, tmp_path):
    def work() -> None:
        with report.stage("network", case_id=threading.current_thread().name):
            time.sleep(0.05)

    threads = [threading.Thread(target=work, name=f"case{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.add_case("case0", "ok")
    found = written(report, tmp_path)
    assert found["stages"]["network"]["count"] == 4
    assert found["stages"]["network"]["seconds"] >= 0.2
    assert 0.05 <= found["cases"][0]["seconds"]["network"] < found["stages"]["network"]["seconds"]


def test_a_stage_within_itself_counts_once_and_within_another_counts_in_both(report, tmp_path):
    with report.stage("read"), report.stage("decode"), report.stage("read"):
        time.sleep(0.02)
    stages = written(report, tmp_path)["stages"]
    assert stages["read"]["count"] == 1
    assert 0.02 <= stages["decode"]["seconds"] <= stages["read"]["seconds"]
    with report.stage("read"):  # and is open again after it was left
        pass
    assert written(report, tmp_path)["stages"]["read"]["count"] == 2


def test_a_stage_that_fails_is_timed_and_the_error_goes_on(report, tmp_path):
    with pytest.raises(RuntimeError, match="broken"), report.stage("read"):
        raise RuntimeError("broken")
    assert written(report, tmp_path)["stages"]["read"]["count"] == 1


def test_peak_memory_rises_in_the_stage_that_needs_it(report, tmp_path):
    with report.stage("small"):
        pass
    with report.stage("large"):
        # More than this process ever held, whatever ran before in it.
        block = np.ones(int((peak_rss_mib() + 64) * 2**20), dtype=np.uint8)
    del block
    stages = written(report, tmp_path)["stages"]
    assert stages["large"]["process_peak_rss_mib"] >= stages["small"]["process_peak_rss_mib"] + 60


def test_every_case_has_its_status_and_reason(report, tmp_path):
    report.add_case("a", "ok", {"read": 0.5})
    report.add_case("b", "failed", error="b: zero spacing, expected above 0. Repair the header.")
    report.add_case("c", "skipped")
    cases = written(report, tmp_path, exit_status=1)["cases"]
    assert [(case["case_id"], case["status"]) for case in cases] == [("a", "ok"), ("b", "failed"), ("c", "skipped")]
    assert cases[0]["seconds"] == {"read": 0.5}
    assert "zero spacing" in cases[1]["error"]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [("done", None, "none of ok"), ("failed", None, "does not go with"), ("ok", "why", "does not go with")],
)
def test_a_status_that_makes_no_sense_is_refused(report, status, error, words):
    with pytest.raises(ValueError, match=words):
        report.add_case("a", status, error=error)


def test_a_case_is_reported_once(report):
    report.add_case("a", "ok")
    with pytest.raises(ValueError, match="reported twice"):
        report.add_case("a", "failed", error="later")


def test_a_failed_write_leaves_the_report_that_was_there(report, tmp_path, monkeypatch):
    before = written(report, tmp_path)

    def no_space(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path / "run.json", exit_status=1)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run.json").read_text()) == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_plain_says_everything_that_json_can(tmp_path):
    value = {"window": (0, np.float32(80)), 1: tmp_path, "top": float("inf"), "shape": np.array([2, 3]), "off": None}
    expected = {"window": [0, 80.0], "1": str(tmp_path), "top": "inf", "shape": [2, 3], "off": None}
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


def test_passwords_are_not_written(tmp_path):
    address = "https://user:secret@server:5000/x"
    assert without_password(address) == "https://***@server:5000/x"
    assert without_password("mail a@b, https://server") == "mail a@b, https://server"
    report = RunReport({"tracking_uri": address}, command=["ich-pipeline", f"tracking_uri={address}"])
    report.write(tmp_path / "run.json", exit_status=0)
    assert "secret" not in (tmp_path / "run.json").read_text()


def test_git_revision_only_of_a_checkout_that_tracks_the_package(tmp_path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_revision(package) is None  # no checkout
    git("init", "-q")
    assert git_revision(package) is None  # in a checkout that does not track it
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert git_revision(package) == head
    (package / "__init__.py").write_text("changed = True\n")
    assert git_revision(package) == f"{head}-dirty"


def test_importing_is_light():
    code = "import sys, ich_pipeline.run_report as r; r.RunReport({}); r.machine(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.gpu
def test_gpu_and_its_peak_memory_are_told(report, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with report.stage("network"):
        block = torch.ones(2**24, device="cuda")
    found = written(report, tmp_path)
    assert found["machine"]["gpus"][0] == torch.cuda.get_device_name(0)
    assert found["stages"]["network"]["cuda_peak_mib"] >= block.nbytes / 2**20
