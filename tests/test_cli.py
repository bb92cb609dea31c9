"""The command line as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heads import bleeding_head, oracle_bundle, save_nifti, write_heads

from ich_pipeline import __version__, cli

COMMANDS = [
    *(["segment"], ["volume"], ["agreement"], ["compare"], ["train"], ["evaluate"], ["phantom"], ["demo"], ["bundles"]),
    *(["plan"], ["tune"], ["calibrate"], ["data", "index"], ["data", "boxes"]),
    *(["label", "start"], ["label", "stop"], ["label", "versions"]),
]
# What makes a light command slow to start.
HEAVY = ("torch", "monai", "mlflow", "scipy", "pandas", "matplotlib", "SimpleITK", "openvino")


class Call:
    """Runs the command line in this process; keeps status, stdout and stderr of the last call."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        self.out, self.err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    return Call(capsys)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that finds the phantom's bleed without training."""
    return oracle_bundle(tmp_path_factory.mktemp("bundle") / "oracle", device="cpu")


# ---------------------------------------------------------------- light commands


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example(call: Call, command: list[str]) -> None:
    assert call(*command, "--help") == 0
    text = " ".join(call.out.split())
    assert f"Example: ich-pipeline {' '.join(command)} " in text


def test_every_command_is_tested_here(call: Call) -> None:
    listed = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    groups = {group.name for group in cli.app.registered_groups}
    assert listed | groups == {command[0] for command in COMMANDS}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["bundles"], 0),
        (["bundles", "--json"], 0),
        (["train", "--help"], 0),
        (["train", "bundle=cascade3d", "epoch=5", "data=x.csv"], 2),
        (["segment", "nowhere.nii.gz", "--out", "m", "bundle=cascade3d"], 2),
        (["segment", ".", "--out", "m", "bundle=cascade3d", "thresold=1"], 2),
        (["evaluate", "bundle=cascad3d"], 2),
        (["compare", ".", ".", "--out", "g.csv", "criterion=>6"], 2),
        (["segment"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_light_calls_import_nothing_heavy(tmp_path: Path, words: list[str], status: int) -> None:
    check = f"""
import sys
from ich_pipeline import cli
try:
    cli.main({words!r})
finally:
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    if heavy:
        sys.exit("imported " + ", ".join(heavy))
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    check = f"import sys, scipy; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "scipy\n"


def test_listing(call: Call) -> None:
    assert call("bundles", "--json") == 0
    shown = {b["name"]: b for b in json.loads(call.out)}
    assert shown.keys() >= {"cascade3d", "segresnet2d"}
    assert (shown["hu_threshold"]["needs_weights"], shown["cascade3d"]["needs_weights"]) == (False, True)
    assert shown["cascade3d"].keys() >= {"version", "weights", "description", "presets", "variants"}
    assert call("bundles") == 0
    assert all(name in call.out for name in shown)
    assert "hu_threshold           0.1.0    needs none" in call.out
    assert call("--version") == 0
    assert call.out == f"ich-pipeline {__version__}\n"


# ---------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "bundle=cascade3d", "epoch=5"], "cascade3d has no key 'epoch'; did you mean 'epochs'"),
        (["train", "bundle=cascade3d", "ot=x"], "no key 'ot'"),
        (["train", "bundle=cascade3d", "trackin=x"], "(or tracking= of the run)"),
        (["train", "bundle=cascad3d"], "no bundle 'cascad3d'; did you mean 'cascade3d'"),
        (["train", "bundle=cascade3d", "preset=gpuu"], "no preset 'gpuu'; did you mean 'gpu'"),
        (["train", "bundle=cascade3d", "variant=2d"], "no variant '2d'"),
        (["train", "bundle=cascade3d", "epochs=1", "epochs=2"], "'epochs' is given twice"),
        (["train", "bundle=cascade3d"], "training needs data=MANIFEST"),
        (["train", "preset=cpu"], "which bundle? Give bundle=NAME; known: cascade3d"),
        (["evaluate", "bundle=cascade3d"], "evaluation needs data=MANIFEST"),
        (["segment", "here.nii.gz", "--out", "m", "bundle=cascade3d"], "here.nii.gz: no such file or folder"),
        (["volume", ".", "--masks", "--out", "v.csv", "bundle=cascade3d"], "--masks measures masks that exist"),
        (["segment", ".", "--out", "m", "--oops"], "--oops"),
        (["segmentt"], "segmentt"),
        (["segment", "."], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_calls_say_what_is_wrong_and_write_nothing(
    call: Call, tmp_path: Path, words: list[str], message: str
) -> None:
    assert call(*words) == 2
    assert message in call.err
    assert "Traceback" not in call.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_wrong_call(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "scans", 1)
    (tmp_path / "file").write_text("not a folder")
    assert call("segment", "scans", "--out", "file/masks", f"bundle={oracle}") == 2
    assert "file/masks" in call.err
    assert "Traceback" not in call.err


def test_our_error_is_shown_without_what_a_library_wrapped_around_it(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "scans", 1)
    assert call("segment", "scans", "--out", "m", f"bundle={oracle}", "engine=tensorrt") == 2
    assert call.err.strip().endswith("error: engine='tensorrt': expected one of torch, openvino")


def test_an_error_that_is_not_ours_is_not_hidden(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(as_json: bool) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ich_pipeline.commands.list_bundles", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["bundles"])


def test_an_interrupt_has_its_own_status(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(as_json: bool) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("ich_pipeline.commands.list_bundles", stopped)
    assert call("bundles") == 130
    assert "goes on where this one stopped" in call.err


# ---------------------------------------------------------------- what commands do


def test_what_exists_is_a_path_whatever_it_contains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel=soft.nii.gz").touch()
    (tmp_path / "epochs=5").mkdir()
    words = ["kernel=soft.nii.gz", "epochs=5", "epochs=6"]
    assert cli.split_words(words) == ([Path(words[0]), Path(words[1])], ["epochs=6"])


def test_segment_writes_masks_table_and_run_report(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "a=b", 2)
    assert call("segment", "a=b", "--out", "m", f"bundle={oracle}", "pictures=false") == 0
    run = json.loads((tmp_path / "m" / "run.json").read_text())
    assert run["exit_status"] == 0
    assert len(run["cases"]) == 2
    table = (tmp_path / "m" / "volumes.csv").read_text().splitlines()
    assert len(table) == 3
    for number in range(2):
        scan, mask = (nib.load(tmp_path / folder / f"head{number}.nii.gz") for folder in ("a=b", "m"))
        assert mask.shape == scan.shape
        assert np.asarray(mask.dataobj).any()


def test_a_failed_case_has_its_row_and_status_1(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "scans", 1)
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"no image")
    assert call("segment", "scans", "--out", "m", f"bundle={oracle}", "pictures=false") == 1
    assert "broken: " in call.err
    rows = (tmp_path / "m" / "volumes.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[:2] for row in rows) == [["broken", "failed"], ["head0", "ok"]]
    run = json.loads((tmp_path / "m" / "run.json").read_text())
    assert run["exit_status"] == 1


def test_the_same_command_again_does_only_what_is_missing(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "scans", 2)
    words = ["segment", "scans", "--out", "m", f"bundle={oracle}", "pictures=false"]
    assert call(*words) == 0
    kept, lost = (tmp_path / "m" / f"head{n}.nii.gz" for n in range(2))
    before, again = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert call(*words) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == again

    assert call(*words, "threshold=0.7") == 2
    assert "run with other settings" in call.err
    assert call(*words, "threshold=0.7", "overwrite=true") == 0
    assert kept.stat().st_mtime_ns > before


def test_volume_puts_masks_beside_the_table(call: Call, oracle: Path, tmp_path: Path) -> None:
    write_heads(tmp_path / "scans", 1)
    assert call("volume", "scans", "--out", "r/v.csv", f"bundle={oracle}") == 0
    found = {str(p.relative_to(tmp_path / "r")) for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert found == {"v.csv", "lesions.csv", "run.json", "report.html", "masks/head0.nii.gz", "pictures/head0.png"}
    assert call.out == f"{Path('r/report.html')}\n"
    assert 'data-case="head0"' in (tmp_path / "r" / "report.html").read_text()


def test_volume_measures_masks_that_exist(call: Call, tmp_path: Path) -> None:
    _, label, grid = bleeding_head()
    (tmp_path / "masks").mkdir()
    save_nifti(tmp_path / "masks" / "one.nii.gz", label, grid)
    assert call("volume", "masks", "--masks", "--out", "v.csv") == 0
    head, row = (line.split(",") for line in (tmp_path / "v.csv").read_text().splitlines())
    volume_ml = float(dict(zip(head, row, strict=True))["volume_ml"])
    assert volume_ml == pytest.approx(label.sum() * abs(np.linalg.det(grid.affine[:3, :3])) / 1000, rel=1e-6)
    assert json.loads((tmp_path / "run.json").read_text())["exit_status"] == 0

    (tmp_path / "masks" / "two.nii.gz").write_bytes(b"no mask")
    assert 'data-case="one"' in (tmp_path / "report.html").read_text()
    assert call("volume", "masks", "--masks", "--out", "v.csv", "html=false") == 1
    assert (call.out, (tmp_path / "report.html").exists()) == ("", False)
    rows = [row.split(",")[:2] for row in (tmp_path / "v.csv").read_text().splitlines()[1:]]
    assert rows == [["one", "ok"], ["two", "failed"]]


def test_module_runs_as_the_command_does(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ich_pipeline", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ich-pipeline {__version__}\n")
