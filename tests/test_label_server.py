"""A real MONAI Label server on loopback, asked by MONAI Label's own client, and by those who mean it no good.

Runs where the extra `label` is installed: `make label`. Each request goes to one server, which must outlive them all.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from scan_files import MATRICES, nifti_image, save
from training_cases import TINY, write_cases

from ich_pipeline import commands
from ich_pipeline.bundles import Bundle
from ich_pipeline.commands import Settings
from ich_pipeline.inference import Segmenter
from ich_pipeline.records import CaseRecord

pytestmark = pytest.mark.label
client_module = pytest.importorskip("monailabel.client.client", reason="no extra `label` here: make label")
requests = pytest.importorskip("requests")
MONAILabelClient, Refused = client_module.MONAILabelClient, client_module.MONAILabelClientException

UP_SECONDS = 20  # of the processor: on a busy machine the clock says nothing
WAIT = 900
SCANS = {"scan-0": "case-0", "scan-2": "case-2", "scan-3": "case-3"}


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    studies: Path
    out: Path

    @property
    def client(self) -> Any:
        return MONAILabelClient(self.url, tmpdir=str(self.out), client_id="test")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def start(studies: Path, out: Path, bundles: str, *more: str, **environment: str) -> Server:
    """Start a server and wait for the line that says it is up."""
    words = ["label", "start", "--studies", str(studies), "--bundles", bundles, "--out", str(out)]
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    # MLflow's own file, and nothing from anywhere: a proxy that does not exist refuses every other host.
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(out / "tmp"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        **environment,
    }
    port = free_port()
    with (out / "stderr").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ich_pipeline", *words, "--port", str(port), *more],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            cwd=out,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f":{port}/ after " in line, (line, (out / "stderr").read_text())
    return Server(process, f"http://127.0.0.1:{port}", studies, out)


def ended(server: Server, number: int) -> int:
    server.process.send_signal(number)
    return server.process.wait(WAIT)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases")).parent


@pytest.fixture(scope="module")
def bundle(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A cascade that has seen enough to find something."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = [f"data={cases / 'cases.csv'}", f"out={out}", "epochs=8", "validate_every=4", "seed=7", "tracking=false"]
    assert commands.train(Settings.of(["bundle=cascade3d", *TINY, *words])) == 0
    return Bundle(out / "bundle")


@pytest.fixture(scope="module")
def studies(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label") / "studies"
    folder.mkdir()
    for name, case in SCANS.items():
        shutil.copy(cases / f"image-{case[-1]}.nii.gz", folder / f"{name}.nii.gz")
    for kind, matrix in MATRICES.items():
        save(nifti_image(matrix), folder / f"{kind.replace(' ', '-')}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(bundle: Bundle, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(studies, tmp_path_factory.mktemp("out"), f"{bundle.path},hu_threshold")
    yield found
    assert found.process.poll() is None, (found.out / "stderr").read_text()
    children = found.children()
    assert ended(found, signal.SIGTERM) == 0
    assert not any(child.is_running() for child in children)


@pytest.fixture(scope="module")
def segmented(bundle: Bundle, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ich-pipeline segment` makes of the same scans."""
    out = tmp_path_factory.mktemp("segmented")
    words = Settings.of([f"bundle={bundle.path}", "pictures=false", "html=false"])
    scans = sorted(studies.glob("*.nii.gz"))
    assert commands.segment(scans, out, out / "volumes.csv", words) == 0
    return out


def values(path: Any) -> Any:
    return np.asarray(nib.load(path).dataobj)


# ---------------------------------------------------------------- what a client does


def test_it_is_up_soon_and_says_what_it_has(server: Server) -> None:
    times = psutil.Process(server.process.pid).cpu_times()
    assert times.user + times.system < UP_SECONDS
    info = server.client.info()
    assert set(info["models"]) == {"cascade3d", "cascade3d_box", "hu_threshold"}
    assert info["models"]["cascade3d"]["type"] == "segmentation"
    assert (info["models"]["cascade3d_box"]["type"], info["models"]["cascade3d_box"]["dimension"]) == ("deepgrow", 3)
    assert set(info["trainers"]) == {"cascade3d"}
    assert set(info["strategies"]) == {"uncertainty", "near_threshold", "disagreement"}
    assert info["labels"] == ["hemorrhage"]


@pytest.mark.parametrize("name", [*SCANS, *(kind.replace(" ", "-") for kind in MATRICES)])
def test_a_mask_is_that_of_segment_to_the_byte(server: Server, segmented: Path, name: str) -> None:
    file, params = server.client.infer("cascade3d", name, {})
    assert Path(file).read_bytes() == (segmented / f"{name}.nii.gz").read_bytes()
    header, *rows = (segmented / "volumes.csv").read_text().splitlines()
    row = next(dict(zip(header.split(","), r.split(","), strict=True)) for r in rows if r.startswith(f"{name},"))
    for column in ("volume_ml", "abc2_ml", "tada_ml", "a_mm", "b_mm", "c_mm"):
        assert params[column] == pytest.approx(float(row[column]), abs=1e-6)
    assert ";".join(params["flags"]) == row["flags"]
    assert params["weights_sha256"] == row["weights_sha256"]
    assert params["volume_ml"] > 0


def test_a_scan_stored_otherwise_gives_the_same_anatomy(server: Server, tmp_path: Path) -> None:
    scan = nib.load(server.studies / "scan-0.nii.gz")
    turned = scan.as_reoriented(nib.orientations.axcodes2ornt(("S", "L", "A")))
    nib.save(turned, tmp_path / "turned.nii.gz")
    assert server.client.upload_image(str(tmp_path / "turned.nii.gz"), "turned") == {"image": "turned"}
    one, _ = server.client.infer("cascade3d", "scan-0", {})
    mask = values(one) > 0
    other, _ = server.client.infer("cascade3d", "turned", {})
    back = nib.as_closest_canonical(nib.load(other))  # RAS, as the first one is stored
    assert np.allclose(back.affine, scan.affine, atol=1e-3)
    found = np.asarray(back.dataobj) > 0
    assert mask.any()
    assert 2 * (mask & found).sum() / (mask.sum() + found.sum()) >= 0.99
    # The same bytes again change nothing; another scan under the name does not replace it.
    assert server.client.upload_image(str(tmp_path / "turned.nii.gz"), "turned") == {"image": "turned"}
    with pytest.raises(Refused) as refused:
        server.client.upload_image(str(server.studies / "scan-0.nii.gz"), "turned")
    assert "Status: 409" in refused.value.msg


def test_a_scan_may_come_with_the_request(server: Server, segmented: Path) -> None:
    file, _ = server.client.infer("cascade3d", "", {}, file=str(server.studies / "scan-2.nii.gz"))
    assert np.array_equal(values(file), values(segmented / "scan-2.nii.gz"))


def test_a_label_comes_back_as_it_was_sent_on_the_scans_own_grid(server: Server, tmp_path: Path) -> None:
    scan = nib.load(server.studies / "sheared.nii.gz")
    drawn = np.zeros(scan.shape, np.int16)
    drawn[20:26, 22:30, 6:9] = 1
    # As a viewer writes it: float32 affine, other codes, another type.
    sent = nib.Nifti1Image(drawn, scan.affine.astype(np.float32))
    sent.set_sform(scan.affine, 2)
    nib.save(sent, tmp_path / "label.nii.gz")
    assert server.client.save_label("sheared", str(tmp_path / "label.nii.gz"), "draft")["label"] == "sheared"
    back = nib.load(server.client.download_label("sheared", "draft"))
    assert np.array_equal(np.asarray(back.dataobj), drawn)
    assert back.get_data_dtype() == np.uint8
    assert np.array_equal(back.affine, scan.affine)
    assert (int(back.header["sform_code"]), int(back.header["qform_code"])) == (1, 0)


# ---------------------------------------------------------------- box and clicks


def test_a_box_changes_nothing_outside_it(server: Server, bundle: Bundle) -> None:
    before = values(server.client.infer("cascade3d", "scan-3", {})[0]) > 0
    roi = [35, 8, 10, 40, 3, 60]  # reversed along i, beyond the scan along k
    inside = np.zeros(before.shape, bool)
    inside[8:36, 10:41, 3:] = True
    file, params = server.client.infer("cascade3d_box", "scan-3", {"roi": roi})
    after = values(file) > 0
    assert np.array_equal(after[~inside], before[~inside])
    segmenter = Segmenter(bundle, bundle.config("inference"))
    loaded = segmenter.read(CaseRecord("scan-3", server.studies / "scan-3.nii.gz"))
    expected = segmenter.look_in(loaded, ((8, 36), (10, 41), (3, 16))) >= segmenter.threshold
    assert np.array_equal(after[inside], expected[inside])
    assert params["volume_ml"] == pytest.approx(after.sum() * 4.0 * 4.5 * 11.0 / 1000)
    # A second box goes on from there.
    smaller = np.zeros(before.shape, bool)
    smaller[12:20, 12:20, 5:9] = True
    again = values(server.client.infer("cascade3d_box", "scan-3", {"roi": [12, 19, 12, 19, 5, 8]})[0]) > 0
    assert np.array_equal(again[~smaller], after[~smaller])


def test_a_mask_that_comes_with_the_box_is_what_stays_outside(server: Server, tmp_path: Path) -> None:
    scan = nib.load(server.studies / "scan-3.nii.gz")
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[0:2, 0:2, 0:2] = 1
    nib.save(nib.Nifti1Image(drawn, scan.affine), tmp_path / "drawn.nii.gz")
    roi = [20, 24, 20, 24, 6, 9]
    file, _ = server.client.infer("cascade3d_box", "scan-3", {"roi": roi}, label_in=str(tmp_path / "drawn.nii.gz"))
    outside = np.ones(scan.shape, bool)
    outside[20:25, 20:25, 6:10] = False
    assert np.array_equal(values(file)[outside], drawn[outside])


def test_clicks_take_a_piece_away_and_bring_it_back(server: Server) -> None:
    import cc3d

    before = values(server.client.infer("cascade3d", "scan-2", {})[0])
    pieces = cc3d.connected_components(before, connectivity=26)
    sizes = np.bincount(pieces.ravel())[1:]
    number = int(np.argmax(sizes)) + 1
    click = [int(n) for n in np.argwhere(pieces == number)[0]]
    file, params = server.client.infer("cascade3d_box", "scan-2", {"background": [click], "foreground": []})
    assert np.array_equal(values(file), np.where(pieces == number, 0, before))
    assert params["n_lesions"] == len(sizes) - 1
    file, _ = server.client.infer("cascade3d_box", "scan-2", {"foreground": [click]})
    assert values(file)[tuple(click)] == 1


# ---------------------------------------------------------------- while another is inferred


def test_a_scan_that_is_inferred_does_not_stop_the_others(server: Server, tmp_path: Path) -> None:
    shutil.copy(server.studies / "scan-0.nii.gz", tmp_path / "while.nii.gz")
    done: list[str] = []

    def infer(name: str) -> None:
        server.client.infer("cascade3d", name, {})
        done.append(name)

    workers = [threading.Thread(target=infer, args=(name,)) for name in [*SCANS, "oblique", "sheared"] * 3]
    for worker in workers:
        worker.start()
    server.client.info()
    before = len(done)
    MONAILabelClient(server.url, tmpdir=str(tmp_path)).upload_image(str(tmp_path / "while.nii.gz"), "while")
    assert "while" in server.client.datastore()["objects"]
    for worker in workers:
        worker.join(WAIT)
    assert before < len(workers)
    assert sorted(done) == sorted([*SCANS, "oblique", "sheared"] * 3)


# ---------------------------------------------------------------- what is next


def scored(server: Server) -> dict[str, Any]:
    """Scores, once every scan has them."""
    file = server.out / "scores.json"

    def complete() -> Any:
        requests.post(f"{server.url}/scoring/ich", timeout=WAIT)
        found = json.loads(file.read_text()) if file.is_file() else {}
        return found if set(found) == set(server.client.datastore()["objects"]) else None

    return dict(until(complete, "scores"))


@pytest.mark.parametrize("strategy", ["uncertainty", "near_threshold", "disagreement"])
def test_the_next_scan_is_the_one_that_its_scores_say(server: Server, strategy: str) -> None:
    found = scored(server)
    objects = server.client.datastore()["objects"]
    waiting = [name for name in sorted(found) if "final" not in objects[name]["labels"]]
    keys: Mapping[str, Callable[[str], float]] = {
        "uncertainty": lambda n: -found[n]["models"]["cascade3d"]["entropy_ml"],
        "near_threshold": lambda n: abs(found[n]["models"]["cascade3d"]["volume_ml"] - 20),
        "disagreement": lambda n: -found[n]["disagreement_ml"],
    }
    sample = server.client.next_sample(strategy, {"threshold_ml": 20})
    assert sample["id"] == min(waiting, key=keys[strategy])
    assert sample["score_ml"] == pytest.approx(abs(keys[strategy](sample["id"])))
    assert Path(sample["path"]).parent == server.studies


# ---------------------------------------------------------------- training


def test_training_makes_a_version_and_serves_it_only_if_it_is_as_good(
    server: Server, bundle: Bundle, cases: Path
) -> None:
    weights = bundle.weights
    assert weights is not None
    before = weights.read_bytes()
    for name, case in SCANS.items():
        server.client.save_label(name, str(cases / f"label-{case[-1]}.nii.gz"), "final")
    task = server.client.train_start("cascade3d", {"max_epochs": 1})
    assert requests.post(f"{server.url}/train/cascade3d", json={}, timeout=WAIT).status_code == 429

    def mine() -> Any:
        found = requests.get(f"{server.url}/train/?all=true", timeout=WAIT).json()
        one = next(each for each in found if each["id"] == task["id"])
        return one if one["status"] not in ("SUBMITTED", "RUNNING") else None

    done = until(mine, "training")
    assert done["status"] == "DONE", "\n".join(done["details"])
    stats = server.client.info()["train_stats"]["cascade3d"]
    [version] = stats["versions"]
    assert (version["n_train"], version["n_val"]) == (2, 1)
    assert version["served"] == (version["dice_after"] >= version["dice_before"])
    assert stats["served"] == (1 if version["served"] else 0)
    assert weights.read_bytes() == before
    _, params = server.client.infer("cascade3d", "scan-0", {})
    assert params["label_version"] == stats["served"]
    import mlflow

    run = mlflow.MlflowClient(f"sqlite:///{server.out}/mlflow.db").get_run(version["mlflow_run_id"])
    assert run.data.metrics["dice_after"] == pytest.approx(version["dice_after"])
    assert run.data.tags["label_version"] == "1"
    # The other one can be had: forth, and back.
    for wanted in (1, 0):
        words = [sys.executable, "-m", "ich_pipeline", "label", "versions", "cascade3d", "--serve", str(wanted)]
        subprocess.run([*words, "--out", str(server.out)], check=True, capture_output=True)
        _, params = server.client.infer("cascade3d", "scan-0", {})
        assert params["label_version"] == wanted
        assert (params["weights_sha256"] == version["weights_sha256"]) == (wanted == 1)


# ---------------------------------------------------------------- those who mean it no good


def nifti(
    folder: Path, name: str = "label.nii.gz", shape: tuple[int, int, int] = (44, 50, 16), shift: float = 0
) -> Path:
    affine = nib.load(folder / "scan-0.nii.gz").affine.copy()
    affine[0, 3] += shift
    path = folder.parent / name
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), affine), path)
    return path


Call = Callable[[str, Path], Any]


def infer(model: str = "cascade3d", image: str = "scan-0", params: str = "{}", **more: Any) -> Call:
    query = {"image": image, **more.pop("query", {})}
    return lambda url, _: requests.post(
        f"{url}/infer/{model}", params=query, data={"params": params}, timeout=WAIT, **more
    )


def upload(image: str, content: bytes, name: str = "scan.nii.gz") -> Call:
    files = {"file": (name, content)}
    return lambda url, _: requests.put(f"{url}/datastore/image", params={"image": image}, files=files, timeout=WAIT)


def label(image: str, make: Callable[[Path], Path | bytes], tag: str = "final", name: str = "label.nii.gz") -> Call:
    def call(url: str, studies: Path) -> Any:
        made = make(studies)
        content = made if isinstance(made, bytes) else made.read_bytes()
        query = {"image": image, "tag": tag}
        return requests.put(f"{url}/datastore/label", params=query, files={"label": (name, content)}, timeout=WAIT)

    return call


def plain(method: str, path: str, **more: Any) -> Call:
    return lambda url, _: requests.request(method, f"{url}{path}", timeout=WAIT, **more)


BAD: dict[str, tuple[Call, int, str]] = {
    "image id leads out": (infer(image="../secret"), 404, "no scan"),
    "image is a path": (infer(image="/etc/passwd"), 404, "no scan"),
    "image is unknown": (infer(image="scan-99"), 404, "no scan"),
    "image is a link that leads out": (infer(image="linked"), 403, "leads out"),
    "image is corrupt": (infer(image="corrupt"), 422, "corrupt"),
    "image is no head": (infer(image="mask-like"), 422, "HU"),
    "model is unknown": (infer(model="no_such"), 404, "no model"),
    "params.image": (infer(params='{"image": "/etc/passwd"}'), 422, "params.image is not taken"),
    "params.model_filename": (infer(params='{"model_filename": "x.pt"}'), 422, "params.model_filename is not taken"),
    "params are no JSON": (infer(params="{"), 400, "no JSON"),
    "params without end": (infer(params="[" * 100_000), 400, "no JSON"),
    "params are a list": (infer(params="[]"), 400, "found list"),
    "a session": (infer(query={"session_id": "../x"}), 400, "sessions are not offered"),
    "a box of text": (infer("cascade3d_box", params='{"roi": ["a", 1, 2, 3, 4, 5]}'), 422, "six numbers"),
    "a box beside the scan": (infer("cascade3d_box", params='{"roi": [90, 99, 0, 5, 0, 5]}'), 422, "along axis i"),
    "neither box nor click": (infer("cascade3d_box"), 422, "neither roi"),
    "upload leads out": (upload("../evil", b"x"), 422, "image id"),
    "upload into labels": (upload("labels/final/evil", b"x"), 422, "image id"),
    "upload of no gzip": (upload("evil", b"no gzip"), 422, "evil"),
    "upload of a script": (upload("evil", b"x", "evil.sh"), 415, "expected NIfTI"),
    "upload too large": (upload("evil", b"0" * (3 * 2**20)), 413, "more than 2 MiB"),
    "label tag leads out": (label("scan-0", nifti, tag="../../evil"), 422, "label tag"),
    "label of an unknown scan": (label("scan-99", nifti), 404, "no scan"),
    "label of another shape": (label("scan-0", lambda s: nifti(s, shape=(44, 50, 15))), 422, "another grid"),
    "label that was moved": (label("scan-0", lambda s: nifti(s, shift=3)), 422, "another grid"),
    "label that cannot be read": (label("scan-0", lambda s: b"no gzip"), 422, "scan-0"),
    "label of another kind": (label("scan-0", nifti, name="label.nrrd"), 415, "expected NIfTI"),
    "weights replaced": (plain("PUT", "/model/cascade3d", files={"file": ("m.pt", b"x")}), 404, "not offered"),
    "weights deleted": (plain("DELETE", "/model/cascade3d"), 404, "not offered"),
    "scan deleted": (plain("DELETE", "/datastore/image?id=scan-0"), 405, "not offered"),
    "session made": (plain("PUT", "/session/", files={"files": ("a.zip", b"x")}), 404, "not offered"),
    "proxy asked": (plain("GET", "/proxy/dicom/x"), 404, "not offered"),
    "logs asked": (plain("GET", "/logs/"), 404, "not offered"),
    "reload": (plain("POST", "/reload"), 404, "not offered"),
    "file of the server": (plain("GET", "/datastore/image?image=../../etc/passwd"), 404, "no scan"),
    "label of the server": (plain("GET", "/datastore/label?label=../x&tag=final"), 404, "no label"),
    "strategy unknown": (plain("POST", "/activelearning/luck", json={}), 404, "no strategy"),
    "threshold of text": (
        plain("POST", "/activelearning/uncertainty", json={"threshold_ml": "x"}),
        422,
        "threshold_ml",
    ),
    "training of an unknown model": (plain("POST", "/train/no_such", json={}), 404, "learns here"),
    "training of what has no weights": (plain("POST", "/train/hu_threshold", json={}), 404, "learns here"),
    "training without end": (plain("POST", "/train/cascade3d", json={"max_epochs": 10**9}), 422, "max_epochs"),
    "training with code": (plain("POST", "/train/cascade3d", json={"bundle_path": "/tmp"}), 422, "bundle_path"),
    "another page": (plain("GET", "/info/", headers={"Origin": "https://evil.example"}), 403, "may not ask"),
    "another name": (plain("GET", "/info/", headers={"Host": "evil.example"}), 400, "not this server's name"),
}


@pytest.fixture(scope="module")
def guarded(bundle: Bundle, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own for bad requests: with little room for uploads, a corrupt scan, and a link that leads out."""
    folder = tmp_path_factory.mktemp("guarded")
    studies = folder / "studies"
    studies.mkdir()
    shutil.copy(cases / "image-0.nii.gz", studies / "scan-0.nii.gz")
    shutil.copy(cases / "image-2.nii.gz", folder / "secret.nii.gz")
    (studies / "linked.nii.gz").symlink_to(folder / "secret.nii.gz")
    (studies / "corrupt.nii.gz").write_bytes((studies / "scan-0.nii.gz").read_bytes()[:5000])
    shutil.copy(cases / "label-0.nii.gz", studies / "mask-like.nii.gz")
    words = ("--max-upload-mib", "2", "--origin", "https://viewer.example")
    found = start(studies, folder / "out", f"{bundle.path},hu_threshold", *words)
    until(lambda: (found.out / "scores.json").is_file() and not found.children(), "scores")
    yield found
    ended(found, signal.SIGTERM)


def tree(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "stderr"
    }


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_request_is_refused_with_a_sentence_and_leaves_nothing(guarded: Server, name: str) -> None:
    call, status, sentence = BAD[name]
    nifti(guarded.studies)  # beside the studies, before the picture of what there is
    before = tree(guarded.studies.parent)
    answer = call(guarded.url, guarded.studies)
    assert (answer.status_code, sentence in answer.json()["detail"]) == (status, True), answer.text
    assert set(answer.json()) == {"detail"}
    assert "Traceback" not in answer.text
    after = tree(guarded.studies.parent)
    assert set(after) == set(before)
    assert guarded.client.info()["datastore"]["total"] == 4
    assert guarded.process.poll() is None


def test_only_named_pages_may_ask(guarded: Server) -> None:
    asked = {"Origin": "https://viewer.example", "Access-Control-Request-Method": "GET"}
    answer = requests.options(f"{guarded.url}/info/", headers=asked, timeout=WAIT)
    assert answer.headers["access-control-allow-origin"] == "https://viewer.example"
    answer = requests.options(f"{guarded.url}/info/", headers=asked | {"Origin": "https://evil.example"}, timeout=WAIT)
    assert "access-control-allow-origin" not in answer.headers


def test_a_scan_that_cannot_be_scored_says_why(guarded: Server) -> None:
    found = json.loads((guarded.out / "scores.json").read_text())
    assert "corrupt" in found["corrupt"]["error"]
    assert found["scan-0"]["models"]["cascade3d"]["entropy_ml"] > 0
    assert "linked" not in found


# ---------------------------------------------------------------- the end, and other hosts


@pytest.mark.parametrize("how", ["Ctrl-C", "stop"])
def test_nothing_outlives_the_server(bundle: Bundle, cases: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "studies").mkdir()
    for n in range(4):
        shutil.copy(cases / f"image-{n}.nii.gz", tmp_path / "studies" / f"scan-{n}.nii.gz")
    server = start(tmp_path / "studies", tmp_path / "out", str(bundle.path))
    children = until(server.children, "the process that scores")
    # The one that trains waits behind it or runs beside it, and ends as well.
    for n in (0, 1):
        server.client.save_label(f"scan-{n}", str(cases / f"label-{n}.nii.gz"), "final")
    server.client.train_start("cascade3d", {"max_epochs": 1000})
    until(lambda: any("train" in each.cmdline() for each in server.children()), "the process that trains")
    children = {*children, *server.children()}
    assert children
    if how == "stop":
        words = [sys.executable, "-m", "ich_pipeline", "label", "stop", "--out", str(server.out)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout == f"stopped {server.url}/\n"
        assert server.process.wait(WAIT) == 0
    else:
        assert ended(server, signal.SIGINT) == 130
    _, left = psutil.wait_procs(list(children), timeout=10)
    assert left == []
    assert not (server.out / "server.json").exists()


def test_another_host_needs_the_token(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    token = "a-secret-of-some-length"
    words = ("--host", "0.0.0.0")
    server = start(tmp_path / "studies", tmp_path / "out", "hu_threshold", *words, ICH_LABEL_TOKEN=token)
    try:
        client = server.client
        assert client.auth_enabled()
        with pytest.raises(Refused) as refused:
            client.info()
        assert refused.value.status_code == 401
        with pytest.raises(Refused) as refused:
            client.auth_token("anybody", "wrong")
        assert refused.value.status_code == 401
        client.update_auth(client.auth_token("anybody", token))
        assert client.auth_valid_token()
        assert client.info()["models"].keys() == {"hu_threshold"}
        for path in ("/", "/datastore/", "/datastore/image?image=x", "/docs", "/openapi.json", "/static/x"):
            assert requests.get(server.url + path, timeout=WAIT).status_code == 401
    finally:
        ended(server, signal.SIGTERM)


# ---------------------------------------------------------------- in a browser


@pytest.mark.browser
def test_the_status_page_shows_what_there_is_and_asks_for_nothing_else(server: Server, tmp_path: Path) -> None:
    binary, service = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and service):
        pytest.skip("no chromium with chromedriver; `make browser` installs them on Debian")
    from selenium import webdriver

    scored(server)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,1500"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(service))
    try:
        browser.get(server.url)
        models = browser.find_element("css selector", "#models").text
        assert re.search(r"cascade3d 0 [0-9a-f]{12} cascade3d_box", models)
        scans = [row.text for row in browser.find_elements("css selector", "#scans tr")]
        assert sum(bool(re.fullmatch(r"sheared\s+cascade3d [\d.]+ [\d.]+ [\d.]+", row)) for row in scans) == 1
        assert browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert {u for u in urls if not u.startswith((f"{server.url}/", "data:", "chrome"))} == set()
        if "ICH_LABEL_PICTURE" in os.environ:
            browser.save_screenshot(os.environ["ICH_LABEL_PICTURE"])
    finally:
        browser.quit()
