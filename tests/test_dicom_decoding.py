"""Compressed pixels are decoded where a crash or a hang costs one case and not the batch."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gdcm
import psutil
import pydicom
import pytest
from dicom_cases import VALID, compress, head_series, save_series
from scan_files import BRAIN_ML, brain_ml

from ich_pipeline.dicom import decoding
from ich_pipeline.errors import ReadError
from ich_pipeline.reading import read_scan


@pytest.fixture
def compressed(tmp_path) -> Path:
    VALID["JPEG-LS .80 signed"](tmp_path / "compressed")
    return tmp_path / "compressed"


@pytest.fixture
def aborting(tmp_path) -> Path:
    """A series with a JPEG 2000 stream on which python-gdcm calls abort()."""
    folder = save_series(head_series(), tmp_path / "aborting")
    compress(folder, gdcm.TransferSyntax.JPEG2000Lossless)
    path = folder / "3.dcm"
    content = bytearray(path.read_bytes())
    start, end = content.index(b"\xff\x4f\xff\x51") + 10, content.rindex(b"\xff\xd9")
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    return folder


# pydicom 2 asks Pillow first, which refuses what GDCM aborts on.
aborts = pytest.mark.skipif(pydicom.__version__ < "3", reason="pydicom 2 does not ask GDCM for JPEG 2000 first")


def decoder_pid() -> int:
    assert decoding._process._process is not None
    return decoding._process._process.pid


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@aborts
def test_a_codec_that_aborts_costs_its_case_only(aborting, compressed):
    with pytest.raises(ReadError, match=r"aborting: pixels of 3\.dcm .*JPEG 2000.* crashed \(exit status -6\)"):
        read_scan(aborting)
    assert brain_ml(read_scan(compressed)) == pytest.approx(BRAIN_ML, rel=0.01)


@aborts
def test_this_process_would_have_been_aborted(aborting):
    code = (
        "import sys; from ich_pipeline.dicom.decode_worker import stored_pixels\n"
        "stored_pixels(sys.argv[1]); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, aborting / "3.dcm"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, b"")


def test_one_process_serves_many_cases(compressed):
    read_scan(compressed)
    pid = decoder_pid()
    read_scan(compressed)
    assert decoder_pid() == pid


def test_a_process_that_was_killed_is_started_anew(compressed):
    read_scan(compressed)
    pid = decoder_pid()
    os.kill(pid, signal.SIGKILL)
    while is_running(pid):
        time.sleep(0.01)
    read_scan(compressed)
    assert decoder_pid() != pid


def test_a_codec_that_hangs_is_stopped(compressed, monkeypatch):
    read_scan(compressed)
    monkeypatch.setattr(decoding, "SECONDS_A_FRAME", 0.3)
    pid = decoder_pid()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ReadError, match=r"the decoder took longer than 0\.3 s and was stopped"):
        read_scan(compressed)
    assert not is_running(pid)
    monkeypatch.undo()
    read_scan(compressed)


def test_plain_pixels_need_no_process(tmp_path, compressed, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for a process")

    monkeypatch.setattr(decoding._process, "pixels", refuse)
    for name in ("tilted", "big_endian", "deflated", "no_preamble"):
        VALID[name](tmp_path / name)
        read_scan(tmp_path / name)
    with pytest.raises(ReadError, match="asked for a process"):
        read_scan(compressed)


def test_workers_of_a_data_loader_may_decode(compressed):
    """They are forked and daemonic, and `multiprocessing` gives those no children."""
    read_scan(compressed)  # the worker is a copy of a process that has a decoder already
    worker = multiprocessing.get_context("fork").Process(target=read_scan, args=(compressed,), daemon=True)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    read_scan(compressed)


def test_the_process_ends_with_its_owner_even_one_that_was_killed(compressed):
    code = (
        "import os, signal, sys; from ich_pipeline.dicom import decoding; from ich_pipeline.reading import read_scan\n"
        "read_scan(sys.argv[1]); print(decoding._process._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, compressed],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid, until = int(done.stdout), time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)
