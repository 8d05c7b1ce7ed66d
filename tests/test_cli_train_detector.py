"""examples/train_detector.py on a small VOC folder that the test writes, as a user would run it."""

import importlib.util
import json
import shutil
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


OPTIONS = ["--image-size", 64, 128, "--epochs", 1, "--batch-size", 4]


@pytest.fixture(scope="module")
def trained(voc_folder, tmp_path_factory):
    """The finished process and its output folder."""
    folder = tmp_path_factory.mktemp("trained")
    return run(voc_folder, *OPTIONS, "--output", folder), folder


def test_trains_and_writes_everything(trained):
    result, folder = trained
    assert result.returncode == 0, result.stderr[-2000:]
    assert "8 images" in result.stdout and "mAP@0.5" in result.stdout
    names = ("dataset", "history", "precision_recall", "detections")
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 50, f"{name}.png is empty"
    assert (folder / "detector.keras").exists()
    assert (folder / "serving/1/saved_model.pb").exists()
    summary = json.loads((folder / "result.json").read_text())
    assert set(summary["AP50"]) <= set(CLASS_NAMES)
    assert summary["arguments"]["epochs"] == 1


def test_another_model_does_not_go_on_in_the_same_folder(voc_folder, trained, tmp_path):
    shutil.copytree(trained[1] / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "result.json").write_text("of the other model")
    again = run(voc_folder, *OPTIONS, "--anchor-sizes", 16, 32, 64, 128, "--output", tmp_path)
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert "checkpoint of another model" in again.stderr and "anchor_generator" in again.stderr
    assert (tmp_path / "result.json").read_text() == "of the other model"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_folder"], "no_such_folder"),
        (["FOLDER", "--test-split", "valid"], "valid"),
        (["FOLDER", "--epochs", "0"], "--epochs: must be above 0"),
        (["FOLDER", "--learning-rate", "0"], "--learning-rate: must be above 0"),
        (["FOLDER", "--epochs", "some"], "invalid int value"),
    ],
)
def test_faulty_data_is_one_plain_sentence(voc_folder, tmp_path, arguments, words):
    arguments = [voc_folder if a == "FOLDER" else a for a in arguments]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unusable_output_folder_is_one_plain_sentence(voc_folder, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(voc_folder, "--output", tmp_path / "file" / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "This cannot be trained" in result.stderr and "file" in result.stderr


def load_program():
    spec = importlib.util.spec_from_file_location("train_detector", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def ids(*datasets):
    return [[record.image_id for record in dataset.records] for dataset in datasets]


def test_data_without_splits_are_parted(voc_folder, tmp_path):
    """Never is the model tested on images that it was trained on."""
    program = load_program()
    rows = [f"JPEGImages/{i}.jpg,1,2,30,40,{CLASS_NAMES[i % 3]}" for i in range(10)]
    file = voc_folder / "objects.csv"
    file.write_text("\n".join(["image,x1,y1,x2,y2,label", *rows]))
    try:
        first = ids(*program.read_data(program.parse_arguments([str(file)])))
        again = ids(*program.read_data(program.parse_arguments([str(file)])))
        other = ids(*program.read_data(program.parse_arguments([str(file), "--seed", "5"])))
    finally:
        file.unlink()
    assert [len(part) for part in first] == [8, 2] and len({*first[0], *first[1]}) == 10
    assert first == again and first != other


@pytest.mark.parametrize("test_split", ["test", "val", "valid"])
def test_splits_are_found(voc_folder, tmp_path, test_split):
    program = load_program()
    splits = voc_folder / "ImageSets/Main"
    (splits / "test.txt").rename(splits / f"{test_split}.txt")
    try:
        found = ids(*program.read_data(program.parse_arguments([str(voc_folder)])))
    finally:
        (splits / f"{test_split}.txt").rename(splits / "test.txt")
    assert found == [[str(i) for i in range(8)], ["8", "9"]]


def test_help():
    result = run("--help")
    assert result.returncode == 0 and "--anchor-sizes" in result.stdout
