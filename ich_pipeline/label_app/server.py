"""MONAI Label's contract over HTTP: of its routes those that are safe, in threads, so that no scan stops the others.

Its own server takes any path as an image, any bytes as a label and new weights from anybody, and answers nothing while
it infers. Here every route is written out; what is not here is not offered.
"""

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader
from monailabel.endpoints import activelearning
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks import utils as background
from monailabel.utils.async_tasks.task import AsyncTask
from requests_toolbelt import MultipartEncoder
from starlette.exceptions import HTTPException

from ich_pipeline.errors import IchError, reason
from ich_pipeline.files import sha256_of
from ich_pipeline.geometry import require_same_grid
from ich_pipeline.label_app import checks, scores
from ich_pipeline.label_app.checks import RequestError
from ich_pipeline.label_app.guard import LOOPBACK, Guard
from ich_pipeline.label_app.serving import Serving
from ich_pipeline.nifti import read_header
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.restoring import write_mask

TASKS = ("train", "scoring")
RUNNING = ("SUBMITTED", "RUNNING")
# MONAI Label's list of scans and labels is not made for threads.
store_lock = threading.RLock()

Words = Annotated[str, Form()]
Upload = Annotated[UploadFile, File()]
MaybeUpload = Annotated[UploadFile | None, File()]


def build(serving: Serving) -> FastAPI:
    """The server's routes, with the guard before them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app_instance().server_mode(True)
        score_what_is_new()
        yield
        stop_tasks()

    app = FastAPI(title="ich-pipeline", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(
        Guard,  # type: ignore[arg-type]
        token=serving.token,
        hosts=(*LOOPBACK, serving.host) if serving.host in LOOPBACK else (),
        origins=serving.origins,
        max_bytes=serving.max_upload_mib * 2**20,
    )
    if serving.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(serving.origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_exception_handler(IchError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _not_offered)
    app.add_exception_handler(Exception, _failed)
    _add_reading(app)
    _add_writing(app)
    _add_tasks(app)
    _add_login(app, serving.token)
    return app


# ---------------------------------------------------------------- what goes wrong


def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": reason(error)}, getattr(error, "status", 422))


def _malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{where}: {first['msg']}. See docs/annotation.md for what a request holds."}, 422)


def _not_offered(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path[:200]} is not offered by this server: see docs/annotation.md."
    return JSONResponse({"detail": words if error.status_code in (404, 405) else error.detail}, error.status_code)


def _failed(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"failed: {reason(error)}. The server goes on; its log has the traceback."}, 500)


# ---------------------------------------------------------------- scans and labels


def _datastore() -> Any:
    return app_instance().datastore()


def _studies() -> Path:
    return Path(app_instance().studies)


def _refresh() -> None:
    """Take in what was put into the studies folder since."""
    with store_lock:
        _datastore().refresh()


def _image(image_id: str) -> Path:
    """File of a scan.

    Raises:
        RequestError: no such scan, or a link that leads out of the studies folder.
    """
    with store_lock:
        if image_id not in _datastore().list_images():
            _datastore().refresh()
        uri = _datastore().get_image_uri(image_id)
        if not uri or not Path(uri).is_file():
            raise RequestError(f"no scan {image_id[:100]!r} here. GET /datastore/?output=all lists them.", 404)
    return checks.inside(Path(uri), _studies(), f"scan {image_id}")


def _label(label_id: str, tag: str) -> Path:
    with store_lock:
        uri = _datastore().get_label_uri(label_id, tag)
    if not uri or not Path(uri).is_file():
        raise RequestError(f"no label {label_id[:100]!r} with tag {tag[:100]!r} here.", 404)
    return checks.inside(Path(uri), _studies(), f"label {label_id}")


@contextmanager
def _received(upload: UploadFile | None) -> Iterator[Path | None]:
    """What was sent as a file under a name of ours, gone with the block."""
    if upload is None:
        yield None
        return
    suffix = checks.nifti_suffix(upload.filename)
    with tempfile.TemporaryDirectory(prefix="ich-label-") as folder:
        file = Path(folder, f"upload{suffix}")
        with file.open("wb") as stream:
            shutil.copyfileobj(upload.file, stream)
        yield file


def _parsed(text: str) -> dict[str, Any]:
    try:
        return checks.own_params(json.loads(text or "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"params: no JSON: {error}. Send an object of names and values.", 400) from error


def _add_reading(app: FastAPI) -> None:
    @app.get("/info/")
    def info() -> Any:
        _refresh()
        with store_lock:
            return app_instance().info()

    @app.get("/datastore/")
    def datastore(output: str = "stats") -> Any:
        _refresh()
        with store_lock:
            return _datastore().json() if output == "all" else _datastore().status()

    @app.api_route("/datastore/image", methods=["GET", "HEAD"])
    def image(image: str) -> FileResponse:
        file = _image(image)
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    @app.get("/datastore/image/info")
    def image_info(image: str) -> Any:
        _image(image)
        with store_lock:
            return _datastore().get_image_info(image)

    @app.api_route("/datastore/label", methods=["GET", "HEAD"])
    def label(label: str, tag: str) -> FileResponse:
        file = _label(label, tag)
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    @app.get("/datastore/label/info")
    def label_info(label: str, tag: str) -> Any:
        _label(label, tag)
        with store_lock:
            return _datastore().get_label_info(label, tag)

    @app.get("/")
    def status() -> HTMLResponse:
        return HTMLResponse(status_page())


def _add_writing(app: FastAPI) -> None:
    @app.put("/datastore/")
    @app.put("/datastore/image")
    def add_image(image: str, file: Upload, params: Words = "{}") -> dict[str, str]:
        name = checks.image_id(image)
        saved = _parsed(params)
        with _received(file) as received:
            assert received is not None
            read_scan(received, name)  # refuses what no model could read
            with store_lock:
                _datastore().refresh()
                if name in _datastore().list_images():
                    if sha256_of(_image(name)) != sha256_of(received):
                        raise RequestError(f"there is another scan {name!r} here. Give this one an id of its own.", 409)
                    return {"image": name}
                _datastore().add_image(name, str(received), saved)
        score_what_is_new()
        return {"image": name}

    @app.put("/datastore/label")
    def save_label(image: str, label: Upload, params: Words = "{}", tag: str = checks.FINAL) -> dict[str, str]:
        tag = checks.label_tag(tag or checks.FINAL)
        saved, scan = _parsed(params), _image(image)
        with _received(label) as received:
            assert received is not None
            mask, _ = read_mask(received, image)
            header = read_header(scan, image)
            require_same_grid(image, "label", mask.grid, header.grid)
            # In the scan's own header: what a viewer wrote has gone through a rotation, as float32.
            own = received.with_name("label.nii.gz")
            write_mask(own, mask.values, header.grid, header.forms)
            with store_lock:
                _datastore().save_label(image, str(own), tag, saved)
        if tag == checks.FINAL:
            app_instance().masks.forget(image)
        return {"image": image, "label": image}

    @app.post("/infer/{model}")
    def infer(
        model: str,
        image: str = "",
        session_id: str = "",
        params: Words = "{}",
        file: MaybeUpload = None,
        label: MaybeUpload = None,
        output: str = "all",
    ) -> Response:
        if model not in app_instance()._infers:
            raise RequestError(f"no model {model[:100]!r}; there are {', '.join(app_instance()._infers)}.", 404)
        if session_id:
            raise RequestError(
                "sessions are not offered. Upload the scan (PUT /datastore/) and name it by its id.", 400
            )
        if output not in ("all", "image", "json"):
            raise RequestError(f"output={output[:50]!r}: expected all, image or json.")
        request: dict[str, Any] = {"model": model, "params": _parsed(params)}
        with _received(file) as own_scan, _received(label) as own_label:
            if own_scan is None and not image:
                raise RequestError("neither an image id nor a file. Name a scan (?image=) or send one.", 400)
            if own_scan is None:
                request |= {"image": str(_image(image)), "image_id": image}
                with store_lock:
                    saved = _datastore().get_label_uri(image, checks.FINAL)
                request["saved_label"] = saved if saved and Path(saved).is_file() else None
            else:
                request |= {"image": str(own_scan), "image_id": own_scan.parent.name}
            request["label"] = str(own_label) if own_label else None
            result = app_instance().infer(request)
            if own_scan is not None:
                app_instance().masks.forget(request["image_id"])
        mask = Path(result["file"])
        try:
            return _answer(mask, f"{image or 'upload'}.nii.gz", result["params"], output)
        finally:
            shutil.rmtree(mask.parent)


def _answer(mask: Path, name: str, params: dict[str, Any], output: str) -> Response:
    if output == "json":
        return JSONResponse(params)
    if output == "image":
        return Response(mask.read_bytes(), media_type="application/octet-stream")
    fields = {
        "params": (None, json.dumps(params), "application/json"),
        "image": (name, mask.read_bytes(), "application/octet-stream"),
    }
    message = MultipartEncoder(fields=fields)
    return Response(message.to_string(), media_type=message.content_type)


# ---------------------------------------------------------------- tasks


def _add_tasks(app: FastAPI) -> None:
    @app.post("/activelearning/{strategy}")
    def next_sample(strategy: str, params: Annotated[Any, Body()] = None) -> Any:
        instance, given = app_instance(), checks.own_params(params or {})
        if strategy not in instance._strategies:
            raise RequestError(f"no strategy {strategy[:100]!r}; there are {', '.join(instance._strategies)}.", 404)
        checks.threshold_ml(given, 1.0)
        model = given.get("of_model")
        if model is not None and model not in instance.served:
            raise RequestError(f"of_model={model!r}: expected one of {', '.join(instance.served)}.")
        _refresh()
        with store_lock:
            found = activelearning.sample(strategy, given)
        score_what_is_new()
        return found

    @app.post("/train/{model}")
    def train(model: str, params: Annotated[Any, Body()] = None) -> Any:
        instance, given = app_instance(), checks.own_params(params or {})
        if model not in instance._trainers:
            known = ", ".join(instance._trainers) or "none"
            raise RequestError(f"no model {model[:100]!r} that learns here; there are: {known}.", 404)
        epochs = checks.epochs(given, instance._trainers[model].config()["max_epochs"])
        if _is_running("train"):
            raise RequestError("a training is running. Wait for it (GET /train/), or stop it (DELETE /train/).", 429)
        with store_lock:
            n = len(_datastore().get_labeled_images())
        if n < 2:
            raise RequestError(
                f"{n} scans have a final label, expected at least 2: one to learn from, one to validate on."
            )
        return AsyncTask.run("train", request={"model": model, "max_epochs": epochs})[0]

    for name in TASKS:
        _add_task_routes(app, name)

    @app.post(f"/scoring/{scores.SCORING}")
    def score() -> Any:
        return score_what_is_new() or {"status": "DONE", "details": ["every scan has its scores"]}


def _add_task_routes(app: FastAPI, name: str) -> None:
    @app.get(f"/{name}/", name=f"{name}_status")
    def status(all: bool = False, check_if_running: bool = False) -> Any:
        found, _ = AsyncTask.status(name, all, check_if_running)
        if found is None:
            raise RequestError(f"no {name} task {'is running' if check_if_running else 'was started'}.", 404)
        return found

    @app.delete(f"/{name}/", name=f"{name}_stop")
    def stop() -> Any:
        return AsyncTask.stop(name) or {}


def _is_running(name: str) -> bool:
    return any(task["status"] in RUNNING for task in background.tasks(name))


def score_what_is_new() -> Any:
    """Start scoring in the background where a scan has no scores of the served weights; the task, or None."""
    instance = app_instance()
    with store_lock:
        if _is_running("scoring"):
            return None
        images = {name: Path(_datastore().get_image_uri(name)) for name in _datastore().list_images()}
        images = {n: p for n, p in images.items() if p.is_file() and p.is_relative_to(_studies().resolve())}
        weights = {n: _weights(each.versions) for n, each in instance.served.items()}
        if not scores.stale(scores.read_scores(instance.scores_file), images, weights):
            return None
        return AsyncTask.run("scoring", request={"method": scores.SCORING})[0]


def _weights(versions: Any) -> str | None:
    bundle = versions.bundle(versions.served)
    return bundle.metadata["weights_sha256"] if bundle.weights else None


def stop_tasks() -> None:
    """Let no training or scoring begin any more; those that run are ended with the server's other child processes."""
    for executor in background.background_executors.values():
        executor.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- the rest


def _add_login(app: FastAPI, token: str | None) -> None:
    """What 3D Slicer's login asks for: the token is the password, whoever the user."""

    @app.get("/auth/")
    def enabled() -> dict[str, Any]:
        return {"enabled": token is not None, "client_id": None, "realm": None}

    @app.post("/auth/token")
    def login(password: Words = "") -> dict[str, str]:
        guard = Guard(app, token=token, hosts=(), origins=(), max_bytes=0)
        if guard.refusal("/", {"authorization": f"Bearer {password}"}):
            raise RequestError("no valid token. Give the server's token as password.", 401)
        return {"access_token": password, "token_type": "bearer"}

    @app.get("/auth/token/valid")
    def valid() -> dict[str, str]:
        return {"username": "user"}  # the guard has let it through


def status_page() -> str:
    """Models, scans, scores and trainings, as a page that needs nothing from elsewhere."""
    instance = app_instance()
    _refresh()
    with store_lock:
        state = _datastore().status()
        labelled = set(_datastore().get_labeled_images())
        names = sorted(_datastore().list_images())
    found = scores.read_scores(instance.scores_file)
    page = Environment(loader=PackageLoader("ich_pipeline.label_app", "."), autoescape=True).get_template(
        "status.html.jinja"
    )
    models = [
        {
            "name": name,
            "description": each.versions.source.metadata["description"],
            "served": each.versions.served,
            "sha256": (_weights(each.versions) or "none")[:12],
            "box": [n for n in instance._infers if n == name + checks.BOX_SUFFIX],
            "history": each.versions.history(),
        }
        for name, each in instance.served.items()
    ]
    tasks = [{"kind": kind, **task} for kind in TASKS for task in background.tasks(kind)]
    return page.render(
        models=models,
        state=state,
        scans=[{"name": n, "labelled": n in labelled, **found.get(n, {})} for n in names],
        tasks=tasks,
        version=instance.version,
        monailabel=metadata.version("monailabel"),
    )


class _Server(uvicorn.Server):
    """uvicorn that remembers which signal ended it; by itself it would raise that again before we have cleaned up."""

    ended_by = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def leave(number: int, frame: object) -> None:
            # A second one does not wait for requests that still run.
            self.force_exit = self.ended_by != 0
            self.ended_by, self.should_exit = number, True

        before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(serving: Serving) -> int:
    """Serve until a signal comes; the number of that signal, 0 where the server ended by itself."""
    config = uvicorn.Config(
        build(serving),
        host=serving.host,
        port=serving.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
        ws="none",
        server_header=False,
    )
    server = _Server(config)
    server.run()
    return server.ended_by
