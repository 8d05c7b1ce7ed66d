"""Class names, crops, and the programs that classify, verify and compare."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnest.backbones import create_backbone, decode_predictions, preprocess_input
from keras_resnest.data import center_crop_image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_preprocess_input():
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype="uint8")
    assert preprocess_input(x) is x
    normalized = preprocess_input(x, mode="torch")
    want = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalized, want, atol=1e-5)
    assert x.dtype == "uint8"
    with pytest.raises(ValueError, match="`mode` must be"):
        preprocess_input(x, mode="caffe")


def test_decode_predictions():
    names = ["ape", "bee", "cat"]
    found = decode_predictions([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], 2, names)
    assert found == [[(1, "bee", 0.5), (2, "cat", 0.3)], [(0, "ape", 0.4), (2, "cat", 0.4)]]
    for wrong, top in (([0.2, 0.5, 0.3], 2), ([[0.1, 0.9]], 2), ([[0.2, 0.5, 0.3]], 4)):
        with pytest.raises(ValueError, match="Received"):
            decode_predictions(wrong, top, names)
    with pytest.raises(ValueError, match=r"\(batch, 1000\)"):
        decode_predictions([[0.1, 0.9]])


def test_center_crop():
    image = np.zeros((100, 200, 3), "uint8")
    image[:, 50:150] = (np.arange(100)[None, :, None] * 2).astype("uint8")  # the middle square
    crop = center_crop_image(image, 100, crop_ratio=1.0)
    assert np.array_equal(crop, image[:, 50:150])
    # 87.5 %: the shorter side becomes 64, of which the middle 56 are cut.
    crop = center_crop_image(image, 56)
    want = Image.fromarray(image).resize((128, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(crop, np.asarray(want)[4:60, 36:92])
    assert center_crop_image(image[:1, :1], 7).shape == (7, 7, 3)
    for options in ({"crop_size": 0}, {"crop_size": 8, "crop_ratio": 1.5}):
        with pytest.raises(ValueError, match="Received"):
            center_crop_image(image, **options)


# === Programs ===


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in ImageNet's layout and a classifier, whose answers are computed here too."""
    folder = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    for name in ("n01", "n02", "n03"):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (80 + 5 * i, 100, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / "val" / name / f"{i}.png")
    (folder / "val" / "n01" / "broken.png").write_bytes(b"no image")
    model = create_backbone("resnest14_tiny", classes=3, input_shape=(64, 64, 3))
    for layer in model.layers:  # so that the classes differ from image to image
        if layer.name == "fc":
            layer.kernel.assign(rng.normal(size=layer.kernel.shape) * 5)
    model.save(folder / "model.keras")
    (folder / "names.txt").write_text("ape\nbee\ncat\n")
    return folder


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def predictions(folder, paths):
    model = keras.saving.load_model(folder / "model.keras")
    crops = [center_crop_image(np.asarray(Image.open(path)), 64) for path in paths]
    return model.predict(np.stack(crops), verbose=0)


def test_classify(folder):
    arguments = ("--model", folder / "model.keras", "--classes", folder / "names.txt", "--top", 2)
    result = run("classify.py", folder / "val" / "n01", *arguments, "--json", folder / "found.json")
    assert result.returncode == 0, result.stderr
    assert "broken.png" in result.stderr
    found = json.loads((folder / "found.json").read_text())
    paths = [folder / "val" / "n01" / f"{i}.png" for i in range(4)]
    assert [entry["file"] for entry in found] == [str(path) for path in paths]
    for entry, row in zip(found, predictions(folder, paths), strict=True):
        best = np.argsort(-row)[:2]
        assert [c["name"] for c in entry["classes"]] == [["ape", "bee", "cat"][i] for i in best]
        np.testing.assert_allclose([c["probability"] for c in entry["classes"]], row[best], 1e-3)


def test_verify(folder):
    (folder / "val" / "n01" / "broken.png").unlink(missing_ok=True)
    result = run("verify_imagenet.py", folder / "val", "--model", folder / "model.keras")
    assert result.returncode == 0, result.stderr
    paths = [folder / "val" / f"n0{c + 1}" / f"{i}.png" for c in range(3) for i in range(4)]
    right = predictions(folder, paths).argmax(axis=1) == np.repeat(np.arange(3), 4)
    assert f"top-1 {right.mean():.2%}, top-5 100.00%" in result.stdout
    assert "12 images at 64 pixels" in result.stdout and "top-1: unknown" in result.stdout


def test_compare(tmp_path):
    files = ("--csv", tmp_path / "table.csv", "--plot", tmp_path / "plot.png")
    result = run("compare_backbones.py", "regnetx_002", "--runs", 2, *files)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["name"] for row in rows] == ["regnetx_002"]
    assert rows[0]["parameters"] == "2684792" and rows[0]["top1"] == "68.76"
    assert all(float(row["latency_ms"]) > 0 and float(row["memory_mb"]) > 0 for row in rows)
    assert Image.open(tmp_path / "plot.png").size[0] > 500


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("classify.py", (), "give at least one image"),
        ("classify.py", ("a.png", "--model", "resnet51"), "Unknown backbone"),
        ("compare_backbones.py", ("resnet51",), "no network is called"),
        ("verify_imagenet.py", ("absent",), "absent"),
    ],
)
def test_wrong_commands_end_with_a_sentence(name, arguments, match):
    result = run(name, *arguments)
    assert result.returncode == 2
    assert match in result.stderr and "Traceback" not in result.stderr
