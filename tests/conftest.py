"""Fixtures that more than one test file uses."""

import os
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
