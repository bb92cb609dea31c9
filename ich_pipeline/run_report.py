"""`run.json`: what ran on which inputs, how long and how much memory each stage took, and how each case ended.

The file stays on the machine, beside the results, and may therefore name paths and cases; `tracking.py` decides what
may leave. Importing this module is light: torch is only asked when somebody else has imported it.
"""

import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

import ich_pipeline
from ich_pipeline.files import sha256_of, write_json

CaseStatus = Literal["ok", "failed", "skipped"]
_STATUSES = ("ok", "failed", "skipped")
_MIB = 2**20
_PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "scipy", "nibabel", "pydicom", "SimpleITK")
_PACKAGES_WHEN_IMPORTED = ("openvino", "mlflow")


@dataclass
class _Stage:
    seconds: float = 0.0
    count: int = 0
    process_peak_rss_mib: float = 0.0
    cuda_peak_mib: float | None = None


class RunReport:
    """Collects what `run.json` says. Every method may be called from several threads at once.

    Attributes:
        bundle: name, version and weights hash of the bundle in use; set by the command, None without one.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        *,
        seeds: Mapping[str, int] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """Start the clock.

        Args:
            config: the resolved settings, after every default and override.
            seeds: name of each random source and its seed.
            command: the command line; default is that of this process.
        """
        self.bundle: dict[str, object] | None = None
        self._config = plain(config)
        self._seeds = dict(seeds or {})
        self._command = [without_password(word) for word in (sys.argv if command is None else command)]
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()
        self._stages: defaultdict[str, _Stage] = defaultdict(_Stage)
        self._case_seconds: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._cases: dict[str, dict[str, object]] = {}
        self._inputs: dict[Path, Future[str]] = {}
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash-inputs")
        self._lock = threading.Lock()
        self._open_stages = threading.local()

    @contextmanager
    def stage(self, name: str, case_id: str | None = None) -> Iterator[None]:
        """Time a block, also when it raises.

        Stages may nest and may run in several threads: seconds are summed over threads, so they may exceed the wall
        clock, and a stage inside one of the same name in the same thread counts once. GPU kernels run on after they are
        launched; a stage that ends before its result is fetched is too short by that.

        Args:
            name: the stage.
            case_id: also book the seconds on this case.
        """
        open_names: set[str] = self._open_stages.__dict__.setdefault("names", set())
        if name in open_names:
            yield
            return
        open_names.add(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.book(name, time.perf_counter() - start, case_id)
            open_names.remove(name)

    def add_input(self, path: Path) -> None:
        """Name a file or folder that is read; it is hashed by one thread while the work goes on.

        SHA-256 lets other threads run and is many times faster than reading and segmenting a scan, whose bytes are in
        the page cache by then, so only the last file's hash is ever waited for (`docs/tracking.md` has numbers).
        """
        path = path.absolute()
        with self._lock:
            if path not in self._inputs:
                self._inputs[path] = self._hasher.submit(sha256_of, path)

    def add_case(
        self,
        case_id: str,
        status: CaseStatus,
        seconds_by_stage: Mapping[str, float] | None = None,
        error: str | None = None,
    ) -> None:
        """Say how one case ended.

        Args:
            case_id: unique in the run.
            status: ok, failed or skipped.
            seconds_by_stage: default is what `stage(..., case_id=case_id)` booked.
            error: reason in words; required for a failed case, refused for one that is ok.

        Raises:
            ValueError: an unknown status, a case named twice, or a status that does not go with the error.
        """
        if status not in _STATUSES:
            raise ValueError(f"{case_id}: status {status!r} is none of {', '.join(_STATUSES)}")
        if (status == "failed" and not error) or (status == "ok" and error):
            raise ValueError(f"{case_id}: status {status!r} does not go with error {error!r}")
        with self._lock:
            if case_id in self._cases:
                raise ValueError(f"{case_id}: reported twice, as {self._cases[case_id]['status']!r} and {status!r}")
            seconds = self._case_seconds[case_id] if seconds_by_stage is None else seconds_by_stage
            self._cases[case_id] = {
                "case_id": case_id,
                "status": status,
                "error": error,
                "seconds": {name: round(value, 6) for name, value in seconds.items()},
            }

    def seconds(self, name: str) -> float:
        """Seconds booked on a stage so far, 0 of one that never ran."""
        with self._lock:
            return self._stages[name].seconds if name in self._stages else 0.0

    def case_seconds(self, case_id: str) -> float:
        """Seconds booked on a case so far, all stages together."""
        with self._lock:
            return sum(self._case_seconds[case_id].values())

    def write(self, path: Path, *, exit_status: int | None = None) -> None:
        """Write the report, whole or not at all; it may be written again and again as the run proceeds.

        Args:
            path: usually `run.json` beside the results.
            exit_status: the status the command is about to return. None while it still runs: then `ended` is null, and
                inputs whose hash is not ready have none yet.
        """
        ended = exit_status is not None
        inputs = [_input_entry(file, future, wait=ended) for file, future in list(self._inputs.items())]
        with self._lock:
            report = {
                "command": self._command,
                "exit_status": exit_status,
                "started": self._started.isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds") if ended else None,
                "seconds": round(time.perf_counter() - self._clock, 3),
                "versions": versions(),
                "machine": machine(),
                "seeds": self._seeds,
                "bundle": plain(self.bundle),
                "config": self._config,
                "inputs": inputs,
                "stages": {name: _stage_entry(stage) for name, stage in self._stages.items()},
                "process_peak_rss_mib": round(peak_rss_mib(), 1),
                "cases": list(self._cases.values()),
            }
        write_json(path, report)

    def book(self, name: str, seconds: float, case_id: str | None = None) -> None:
        """Add seconds of a stage that were counted elsewhere, such as in another process."""
        with self._lock:
            stage = self._stages[name]
            stage.seconds += seconds
            stage.count += 1
            stage.process_peak_rss_mib = peak_rss_mib()
            stage.cuda_peak_mib = _cuda_peak_mib()
            if case_id is not None:
                booked = self._case_seconds[case_id]
                booked[name] = booked.get(name, 0.0) + seconds


def versions() -> dict[str, str]:
    """Version of Python, of this package with its git revision, and of the packages that decide a result."""
    found = {"python": platform.python_version(), "ich-pipeline": ich_pipeline.__version__}
    if revision := git_revision():
        found["git"] = revision
    names = [*_PACKAGES, *(name for name in _PACKAGES_WHEN_IMPORTED if name in sys.modules)]
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path | None = None) -> str | None:
    """Commit of the checkout that holds this package, with `-dirty` when tracked files differ from it.

    Args:
        folder: a folder of the checkout; default is the package's own.

    Returns:
        None outside a checkout, without git, and when the package merely lies inside somebody else's checkout, as one
        installed into a project's `.venv` does.
    """
    folder = folder or Path(ich_pipeline.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        revision = git("rev-parse", "HEAD")
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Cores this process may use, memory, and the GPUs if this process uses any."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": platform.platform(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpu_names(),
    }


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB; it never falls, so a stage that raised it stands out.

    Linux is asked for VmHWM: ru_maxrss there is inherited from the process that started this one.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / _MIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB  # bytes on macOS


def plain(value: Any) -> Any:
    """The same as mappings, lists, strings and finite numbers; anything else becomes its text, without passwords."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return without_password(str(value))


def without_password(text: str) -> str:
    """`https://user:secret@host` becomes `https://***@host`."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def _input_entry(path: Path, future: Future[str], *, wait: bool) -> dict[str, str | None]:
    if not wait and not future.done():
        return {"path": str(path), "sha256": None}
    try:
        return {"path": str(path), "sha256": future.result()}
    except OSError as error:
        return {"path": str(path), "sha256": None, "error": str(error)}


def _stage_entry(stage: _Stage) -> dict[str, float | int | None]:
    return {
        "seconds": round(stage.seconds, 6),
        "count": stage.count,
        "process_peak_rss_mib": round(stage.process_peak_rss_mib, 1),
        "cuda_peak_mib": None if stage.cuda_peak_mib is None else round(stage.cuda_peak_mib, 1),
    }


def _cuda() -> Any:
    """`torch.cuda` when this process already uses a GPU; asking a GPU that is idle would take hold of it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # absent while torch is still being imported in another thread
    return cuda if cuda is not None and cuda.is_initialized() else None


def _cuda_peak_mib() -> float | None:
    cuda = _cuda()
    return cuda and max(cuda.max_memory_allocated(index) for index in range(cuda.device_count())) / _MIB


def _gpu_names() -> list[str]:
    cuda = _cuda()
    return [cuda.get_device_name(index) for index in range(cuda.device_count())] if cuda else []
