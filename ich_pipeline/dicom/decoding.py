"""Pixels of DICOM files: plain ones here, compressed ones in a process of their own that may crash or hang."""

import atexit
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from ich_pipeline.dicom.decode_worker import is_native, stored_pixels
from ich_pipeline.dicom.headers import Image
from ich_pipeline.errors import ReadError

START_SECONDS = 60.0  # until the process has started and imported its codecs
SECONDS_A_FRAME = 10.0  # a slice of 512 x 512 takes some milliseconds
MAX_WORDS = 400  # characters of what a codec says


def decode(case_id: str, image: Image) -> NDArray[np.integer]:
    """(frames, rows, columns) stored values of the file that a slice is in.

    Raises:
        ReadError: pixels are missing or cut off, no codec for the transfer syntax is installed, or the codec failed,
            crashed or took longer than SECONDS_A_FRAME for each frame.
    """
    try:
        if is_native(image.syntax):
            return stored_pixels(str(image.path))
        return _process.pixels(image.path, image.n_frames)
    except Exception as error:  # pydicom raises many kinds: no decoder, cut off, wrong length
        raise ReadError(
            f"{case_id}: pixels of {image.path.name} cannot be decoded (transfer syntax {_name(image.syntax)}): "
            f"{' '.join(str(error).split())[:MAX_WORDS]}. Export uncompressed, or copy the file again."
        ) from error


def _name(syntax: str) -> str:
    return f"{pydicom.uid.UID(syntax).name} {syntax}".strip() if syntax else "not said"


class _DecodingProcess:
    """`decode_worker` in a process that is kept alive from file to file, and started anew after a crash.

    A program of its own and not a fork, whose copied locks may hang, nor `multiprocessing`, which daemonic workers of
    a data loader may not use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def pixels(self, path: Path, n_frames: int) -> NDArray[np.integer]:
        """Decode one file.

        Raises:
            RuntimeError: it failed, in words; after a crash or a time-out the process is gone.
        """
        with self._lock:
            timeout_s = SECONDS_A_FRAME * n_frames
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
                timeout_s += START_SECONDS
            try:
                self._connection.send_bytes(str(path).encode())
                if not self._connection.poll(timeout_s):
                    self.stop()
                    raise RuntimeError(f"the decoder took longer than {timeout_s:g} s and was stopped")
                answer = json.loads(self._connection.recv_bytes())
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return np.frombuffer(self._connection.recv_bytes(), answer["dtype"]).reshape(answer["shape"])
            except (EOFError, OSError) as error:
                code = self.stop()
                raise RuntimeError(f"the decoder crashed (exit status {code})") from error
            except BaseException as error:
                if not isinstance(error, RuntimeError):
                    self.stop()  # an interrupt leaves an answer behind that nobody asked for
                raise

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "ich_pipeline.dicom.decode_worker", str(theirs.fileno())]
        # It imports what this process imports, and one thread is enough for one slice.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # codecs write there what they find in a file
            start_new_session=True,  # an interrupt at the terminal is for this process, which then stops that one
        )
        theirs.close()
        self._owner = os.getpid()

    def stop(self) -> int | None:
        """End the process if this one started it; returns its exit status."""
        if self._process is None or self._owner != os.getpid():
            return None
        self._connection.close()
        try:
            code = self._process.wait(1)  # it may be writing its last words, or be gone already
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return code


_process = _DecodingProcess()
atexit.register(_process.stop)
