"""The server as a process: what it is given, started in the foreground, stopped with everything it started."""

import importlib.util
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import write_json
from ich_pipeline.label_app.guard import LOOPBACK
from ich_pipeline.label_app.serving import Serving

SERVER_FILE = "server.json"
TOKEN_VARIABLE = "ICH_LABEL_TOKEN"
SHORTEST_TOKEN = 20  # characters
STOP_SECONDS = 60


def require_extra() -> None:
    """Refuse to go on without MONAI Label.

    Raises:
        ConfigError: the extra `label` is not installed.
    """
    if importlib.util.find_spec("monailabel") is None:
        raise ConfigError(
            "the server needs MONAI Label, not installed here. It wants numpy 1 and pydicom 2, so give it an "
            'environment of its own: pip install "ich-pipeline[label]"'
        )


def token_for(host: str) -> str | None:
    """The token that requests must carry: none on loopback unless one is set.

    Raises:
        ConfigError: another host without a token, or one that could be guessed.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: whoever reaches it could read and change scans. Set {TOKEN_VARIABLE} to a secret, such as "
            f"{secrets.token_urlsafe(24)}, or stay on 127.0.0.1 behind a proxy that asks who it is."
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"{TOKEN_VARIABLE} has {len(token)} characters, expected at least {SHORTEST_TOKEN}.")
    return token


def named(bundles: Sequence[Bundle]) -> dict[str, Path]:
    """Folders by model name: the bundle's name, with a number where two have the same."""
    found: dict[str, Path] = {}
    for bundle in bundles:
        n = sum(name.rpartition("_")[0] == bundle.name or name == bundle.name for name in found)
        found[f"{bundle.name}_{n + 1}" if n else bundle.name] = bundle.path
    return found


def start(serving: Serving) -> NoReturn:
    """Serve until Ctrl-C or `stop`, then end this process (0, or 130 after Ctrl-C) and all that it started.

    Raises:
        ConfigError: a server runs with this folder already, or the port is taken.
    """
    running = read_server(serving.out)
    if running is not None:
        raise ConfigError(
            f"a server runs with {serving.out} already: {running['url']}. Stop it: ich-pipeline label stop"
        )
    _require_port(serving.host, serving.port)
    serving.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ich-label-", ignore_cleanup_errors=True) as scratch:
        # Before anything of MONAI Label is imported: it reads its settings then, and its child processes inherit them.
        os.environ |= _environment(serving, scratch)
        tempfile.tempdir = scratch
        import psutil

        from ich_pipeline.label_app.server import run

        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        me = psutil.Process()
        record = {"pid": me.pid, "created": me.create_time(), "url": f"http://{host}:{serving.port}/"}
        _say_when_up(serving, record)
        try:
            ended_by = run(serving)
        finally:
            kill(me.children(recursive=True))
            (serving.out / SERVER_FILE).unlink(missing_ok=True)
    # At once: the interpreter would first wait for the thread of a scan that is still being inferred.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if ended_by == signal.SIGINT else 0)


def _environment(serving: Serving, scratch: str) -> dict[str, str]:
    conf = {"bundles": {name: str(path) for name, path in serving.bundles.items()}, "out": str(serving.out)}
    return {
        "MONAI_LABEL_APP_DIR": str(Path(__file__).parent),
        "MONAI_LABEL_STUDIES": str(serving.studies),
        "MONAI_LABEL_APP_CONF": json.dumps(conf),
        "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps(["*.nii.gz", "*.nii"]),
        # Its watcher empties the list of scans for a moment; the server looks into the folder when it is asked.
        "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "MONAI_LABEL_SESSIONS": "false",
        "MONAI_LABEL_TASKS_BATCH_INFER": "false",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # its child processes fail without one
        "TMPDIR": scratch,
    }


def _require_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}. Give another one.") from error


def _say_when_up(serving: Serving, record: dict[str, Any]) -> None:
    """Once the port answers, leave the server's file and one line on stdout."""

    def wait() -> None:
        while True:
            try:
                socket.create_connection((serving.host, serving.port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        write_json(serving.out / SERVER_FILE, record)
        seconds = time.time() - record["created"]
        print(f"{record['url']} after {seconds:.0f} s; models: {', '.join(serving.bundles)}", flush=True)

    threading.Thread(target=wait, daemon=True).start()


def read_server(out: Path) -> dict[str, Any] | None:
    """The file of the server that runs with this folder; None where none does, whatever a killed one left."""
    import psutil

    file = out / SERVER_FILE
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    try:
        same = abs(psutil.Process(record["pid"]).create_time() - record["created"]) < 1
    except psutil.NoSuchProcess:
        same = False
    return record if same else None


def stop(out: Path) -> str | None:
    """Stop the server that runs with this folder, and all it has started.

    Returns:
        Its address; None where none ran.
    """
    import psutil

    record = read_server(out)
    if record is None:
        return None
    server = psutil.Process(record["pid"])
    children = server.children(recursive=True)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except psutil.TimeoutExpired:
        server.kill()
    kill(children)
    (out / SERVER_FILE).unlink(missing_ok=True)
    return str(record["url"])


def kill(processes: Sequence[Any]) -> None:
    """End processes that still are, and wait until they are gone."""
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        print(f"process {process.pid} does not end", file=sys.stderr)
