"""Fixtures shared by the tests."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
from sample_images import write_odd_images

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference numbers and images beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference folder {SHARED.name}/ is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory) -> Path:
    """Folder of unusual and broken image files; see `write_odd_images`."""
    folder = tmp_path_factory.mktemp("odd")
    write_odd_images(folder)
    return folder
