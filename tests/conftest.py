"""Fixtures shared by the tests."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# There is a process per core: more threads only get in each other's way.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tf2onnx raises errors instead of copying the graph before each of its optimizations.
os.environ.setdefault("TF2ONNX_CATCH_ERRORS", "0")

import pytest
from sample_images import photograph, write_odd_images

# Tracing makes millions of objects that stay: looking for garbage less often saves a tenth.
gc.set_threshold(50_000)

# A runner in the background may ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

# The files that take longest start first, so that all processes end at the same time.
LONGEST = (
    *("test_distribution", "test_export_formats", "test_refinedet", "test_precision"),
    *("test_zoo_promises", "test_resume", "test_backends", "test_pretrained", "test_epochs"),
    *("test_callbacks", "test_cli_train_detector", "test_cli_train_classifier"),
    *("test_golden_refinedet", "test_golden_backbones", "test_drop_in", "test_mixing"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_runtest_teardown(item, nextitem):
    """Keeps what earlier files have made: TensorFlow takes a minute to free its many graphs."""
    if nextitem is None or nextitem.path != item.path:
        gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real datasets beside the project; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED.name}/ is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory) -> Path:
    """Folder of unusual and broken image files; see `write_odd_images`."""
    folder = tmp_path_factory.mktemp("odd")
    write_odd_images(folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> list[Path]:
    """Three JPEG files of different sizes."""
    folder, paths = tmp_path_factory.mktemp("photographs"), []
    for seed, (height, width) in enumerate([(512, 512), (300, 451), (480, 640)]):
        paths.append(folder / f"{height}x{width}.jpg")
        photograph(height, width, seed).save(paths[-1], quality=88)
    return paths
