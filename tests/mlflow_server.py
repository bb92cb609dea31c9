"""A real MLflow server for tests, stopped with all its workers."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Address of a server whose database and artifacts lie in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --workers 1 --serve-artifacts --backend-store-uri sqlite:///mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", *options.split(), "--artifacts-destination", "artifacts"]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its job runners start slowly
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        orphans = _end(process)
    assert orphans == []


def _wait_until_healthy(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def _end(process: subprocess.Popen) -> list[psutil.Process]:
    """Stop a server with its workers; returns what is still alive."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):  # a server that died by itself is told by whoever waited for it
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    _, stubborn = psutil.wait_procs(family, timeout=5)
    for one in stubborn:
        one.kill()
    process.wait(10)
    lost = [one for one in psutil.process_iter() if _session(one) == process.pid]
    return [*psutil.wait_procs(stubborn, timeout=10)[1], *lost]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None
