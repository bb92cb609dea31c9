"""Fixtures that more than one test file uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Real scans live beside the checkout and are never part of it; docs/testing.md says what is expected there.
REAL_DATA = Path(os.environ.get("ICH_REAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans, or a skip that says what is missing."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real scans at {REAL_DATA}; set ICH_REAL_DATA")
    return REAL_DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums depend on how many threads add them up, and processes that tests start use one."""
    import torch  # most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
