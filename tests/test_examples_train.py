"""examples/train_detector.py on a small VOC folder that the test writes, as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles
from PIL import Image

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "train_detector.py"
OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture(scope="module")
def voc_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    images, truth = rectangles(10, (64, 128, 3))
    for i, (image, boxes, labels) in enumerate(
        zip(images, truth["boxes"], truth["labels"], strict=True)
    ):
        Image.fromarray(image.astype("uint8")).save(folder / f"JPEGImages/{i}.jpg")
        objects = [
            OBJECT.format(CLASS_NAMES[k], int(x1) + 1, int(y1) + 1, int(x2), int(y2))
            for k, (x1, y1, x2, y2) in zip(labels, boxes, strict=True)
        ]
        xml = f"<annotation><filename>{i}.jpg</filename>{''.join(objects)}</annotation>"
        (folder / f"Annotations/{i}.xml").write_text(xml)
    for split, numbers in (("train", range(8)), ("test", range(8, 10))):
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(map(str, numbers)))
    return folder


def run(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_trains_and_writes_everything(voc_folder, tmp_path):
    options = ["--image-size", 64, 128, "--epochs", 1, "--batch-size", 4, "--output", tmp_path]
    result = run(voc_folder, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "8 images" in result.stdout and "mAP@0.5" in result.stdout
    names = ("dataset", "history", "precision_recall", "detections")
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 50, f"{name}.png is empty"
    assert (tmp_path / "detector.keras").exists()
    assert (tmp_path / "serving/1/saved_model.pb").exists()
    summary = json.loads((tmp_path / "result.json").read_text())
    assert set(summary["AP50"]) <= set(CLASS_NAMES)
    assert summary["arguments"]["epochs"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_folder"], "no_such_folder"),
        (["FOLDER", "--test-split", "valid"], "valid"),
    ],
)
def test_faulty_data_is_one_plain_sentence(voc_folder, tmp_path, arguments, words):
    arguments = [voc_folder if a == "FOLDER" else a for a in arguments]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_help():
    result = run("--help")
    assert result.returncode == 0 and "--anchor-sizes" in result.stdout
