"""`keras-resnest classify`, `evaluate` and `export` of classifiers, and `list`."""

import io
import json
import os
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from keras_resnest.backbones import create_backbone, decode_predictions, list_models
from keras_resnest.cli import main
from keras_resnest.cli.evaluate import published_figure
from keras_resnest.data import center_crop_image

NAMES = ("black", "gray", "white")
GRAYS = (0, 120, 255)


def brightness_classifier(path):
    """A model whose answer is known: which of three grays is nearest to the image's average."""
    inputs = keras.Input((32, 32, 3))
    mean = keras.layers.GlobalAveragePooling2D()(inputs)
    # -(gray - mean)^2 without the part that all classes share is linear in the mean.
    dense = keras.layers.Dense(3, activation="softmax")
    model = keras.Model(inputs, dense(mean))
    dense.set_weights(
        [np.tile(np.array(GRAYS) / 50 / 3, (3, 1)), -(np.array(GRAYS, "float32") ** 2) / 100]
    )
    model.save(path)


def gray_image(gray, size=(50, 40)):
    """An image of one gray whose margins, which the crop cuts off, are of another."""
    pixels = np.full((*size[::-1], 3), 255 - gray, "uint8")
    pixels[4:-4, 8:-8] = gray
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of each class but one, which is black and lies among the white ones."""
    folder = tmp_path_factory.mktemp("classes")
    brightness_classifier(folder / "model.keras")
    (folder / "names.txt").write_text("\n".join(NAMES))
    for name, gray in zip(NAMES, GRAYS, strict=True):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(2):
            is_wrong = name == "white" and i == 1
            gray_image(0 if is_wrong else gray).save(folder / "val" / name / f"{i}.png")
    return folder


# === classify ===


def classified(folder, *arguments):
    found = folder / "found.json"
    options = ["--model", folder / "model.keras", "--classes", folder / "names.txt"]
    assert main(["classify", *arguments, *options, "--json", found]) == 0
    return {
        Path(entry["file"]).relative_to(folder).as_posix(): entry["classes"]
        for entry in json.loads(found.read_text())
    }


def test_classify_takes_files_folders_and_patterns(folder):
    found = classified(
        folder, folder / "val" / "black" / "0.png", folder / "val" / "gray", folder / "val/w*/*.png"
    )
    best = {path: classes[0]["name"] for path, classes in found.items()}
    assert best == {
        "val/black/0.png": "black",
        "val/gray/0.png": "gray",
        "val/gray/1.png": "gray",
        "val/white/0.png": "white",
        "val/white/1.png": "black",
    }
    # The default of five classes is not an error where there are three.
    assert [len(classes) for classes in found.values()] == [3] * 5


def test_classify_takes_a_file_whose_name_looks_like_a_pattern(folder):
    gray_image(255).save(folder / "a[1].png")
    assert classified(folder, folder / "a[1].png")["a[1].png"][0]["name"] == "white"


def test_classify_with_a_named_network_and_weights_from_a_file(folder, capsys):
    """The crop, the order of the classes, and an image that cannot be read."""
    rng = np.random.default_rng(0)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (80 + 5 * i, 100, 3), dtype="uint8")
        Image.fromarray(pixels).save(photos / f"{i}.png")
    (photos / "broken.png").write_bytes(b"no image")
    model = create_backbone("resnest14_tiny", classes=3, input_shape=(224, 224, 3))
    (top,) = (layer for layer in model.layers if layer.name == "fc")
    top.kernel.assign(rng.normal(size=top.kernel.shape) * 5)  # classes differ between images
    model.save_weights(folder / "tiny.weights.h5")
    arguments = [photos, "--model", "resnest14_tiny", "--weights", folder / "tiny.weights.h5"]
    arguments += ["--classes", folder / "names.txt", "--top", 2, "--batch-size", 2]
    assert main(["classify", *arguments, "--json", folder / "tiny.json"]) == 0
    assert "broken.png" in capsys.readouterr().err
    found = json.loads((folder / "tiny.json").read_text())
    paths = [photos / f"{i}.png" for i in range(3)]
    assert [entry["file"] for entry in found] == [str(path) for path in paths]
    # The shorter side becomes 256 pixels, of which the middle 224 are cut.
    crops = [center_crop_image(np.asarray(Image.open(path)), 224) for path in paths]
    for entry, row in zip(found, model.predict(np.stack(crops), verbose=0), strict=True):
        best = np.argsort(-row)[:2]
        assert [c["id"] for c in entry["classes"]] == [str(i) for i in best]
        assert [c["name"] for c in entry["classes"]] == [NAMES[i] for i in best]
        probabilities = [c["probability"] for c in entry["classes"]]
        np.testing.assert_allclose(probabilities, row[best], rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["absent/*.png"], 2, "nothing matches the pattern"),
        (["{folder}/val/gray/0.png"], 2, "the model has 3 classes: name them with --classes"),
        (["{folder}/val/gray/0.png", "--classes", "{folder}/two.txt"], 2, "holds 2 names"),
        (["{folder}/absent.png", "--classes", "{folder}/names.txt"], 1, "no such file"),
        (["{folder}/val/gray", "--weights", "imagenet"], 2, "has its own"),
        (["{folder}/val/gray", "--model", "{folder}/absent.keras"], 2, "no such model"),
        (["{folder}/val/gray", "--model", "resnet51"], 2, "Unknown backbone"),
    ],
)
def test_classify_says_what_is_wrong(folder, capsys, arguments, status, message):
    (folder / "two.txt").write_text("one\ntwo\n\n")
    arguments = ["--model", "{folder}/model.keras", *arguments]
    assert main(["classify", *(a.format(folder=folder) for a in arguments)]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["classify", "a.png"], ["evaluate", "a.keras", "folder"]])
def test_numbers_must_be_positive(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--batch-size", "0"])
    assert stop.value.code == 2 and "must be above 0" in capsys.readouterr().err


def test_classify_refuses_a_network_without_classifier(folder, capsys):
    inputs = keras.Input((None, None, 3))
    keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs)).save(folder / "map.keras")
    assert main(["classify", folder / "val/gray", "--model", folder / "map.keras"]) == 2
    assert "is not an image classifier" in capsys.readouterr().err


# === evaluate ===


class ClassifySample(tfds.core.GeneratorBasedBuilder):
    """Four gray images of one channel, one of them with a wrong label."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for i, (gray, label) in enumerate(((0, 0), (120, 1), (255, 2), (255, 0))):
            stream = io.BytesIO()
            gray_image(gray).convert("L").save(stream, "PNG")
            stream.seek(0)
            yield i, {"image": stream, "label": label}


def evaluated(folder, capsys, tmp_path, *arguments):
    """What is printed, and result.json."""
    command = ["evaluate", folder / "model.keras", *arguments, "--output", tmp_path / "out"]
    assert main(command) == 0
    return capsys.readouterr().out, json.loads((tmp_path / "out/result.json").read_text())


def test_evaluate_on_a_folder_whose_accuracy_is_known(folder, capsys, tmp_path):
    for data in ([folder / "val"], [folder, "--split", "val"]):
        text, result = evaluated(folder, capsys, tmp_path, *data, "--batch-size", 4)
        assert "6 images at 32 pixels" in text
        assert "top-1 83.33%, top-5 100.00%" in text and "published top-1: unknown" in text
        assert (result["images"], result["top1"], result["top5"]) == (6, 5 / 6, 1.0)
    text, result = evaluated(folder, capsys, tmp_path, folder / "val", "--limit", 2)
    assert "2 images at 32 pixels" in text and result["images"] == 2


def test_evaluate_on_a_dataset_of_tfds(folder, capsys, tmp_path):
    ClassifySample(data_dir=tmp_path).download_and_prepare()
    data = ["tfds:classify_sample", "--data-dir", tmp_path, "--split", "test"]
    text, result = evaluated(folder, capsys, tmp_path, *data)
    assert "4 images at 32 pixels" in text and "top-1 75.00%" in text
    assert result["split"] == "test"


def test_evaluate_says_what_is_wrong(folder, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    for data, message in (
        ("empty", "must hold one folder of images for each class"),
        ("val/gray", "one folder of images for each class"),
        ("absent", "absent"),
    ):
        assert main(["evaluate", "resnest50", folder / data]) == 2
        assert message in capsys.readouterr().err
    os.makedirs(folder / "two" / "a", exist_ok=True)
    gray_image(0).save(folder / "two" / "a" / "0.png")
    assert main(["evaluate", folder / "model.keras", folder / "two"]) == 2
    assert "has 3 classes, the data has 1" in capsys.readouterr().err


def test_published_figures_come_with_the_size_of_their_images():
    # The authors' table: 82.83 % at 256 pixels; timm's: 83.88 % at 320, crop 0.909.
    assert published_figure("resnest101", "official").startswith("82.83% at 256 ")
    text = "83.88% at 320 pixels, crop 0.909"
    assert published_figure("ResNeSt200", "imagenet") == text
    assert published_figure("resnest200", None) == text
    assert published_figure("resnest14_tiny", "imagenet") == "unknown"
    assert published_figure("resnest200", "own.weights.h5") == "unknown"


# === export ===


def test_export_a_classifier(folder, tmp_path, capsys):
    model = create_backbone("resnest14_tiny", classes=3, input_shape=(32, 32, 3))
    model.save(tmp_path / "tiny.keras")
    names = ["--classes", folder / "names.txt"]
    assert main(["export", tmp_path / "tiny.keras", tmp_path / "serving/1", *names]) == 0
    facts = json.loads((tmp_path / "serving/1/assets.extra/model.json").read_text())
    assert facts["class_names"] == list(NAMES) and facts["image_shape"] == [32, 32, 3]
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    served = keras.layers.TFSMLayer(tmp_path / "serving" / "1", "serve")(images)
    want = model.predict(images, verbose=0)
    np.testing.assert_allclose(served["predictions"], want, atol=1e-4)


# === list ===


def test_list_shows_what_matches(capsys):
    assert main(["list", "resnest50", "resnet5*", "resnest50"]) == 0
    names = [line.split(" | ")[0][2:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["resnest50", *(model.name for model in list_models("resnet5*"))]
    assert main(["list", "--kind", "detectors", "*tiny"]) == 0
    assert capsys.readouterr().out.split() == [
        "refinedet_tiny",
        "resnest14_tiny",
        "320",
        "x",
        "320",
    ]
    assert main(["list", "--kind", "detectors", "*320_resnet101"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n\n{list_models('*320_resnet101', kind='detector')}\n")
    assert "| 32.0 | coco_refinedet_resnet101_320x320_final.caffemodel | https:" in printed
    assert main(["list", "--kind", "recipes"]) == 0
    assert "refinedet_voc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resnet51"], "no network matches 'resnet51'"),
        (["--kind", "detectors", "resnet51"], "no detector matches 'resnet51'"),
    ],
)
def test_list_says_what_is_wrong(capsys, arguments, message):
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err


# === ImageNet's names ===


def test_names_of_imagenet(monkeypatch):
    from keras.src.applications import imagenet_utils

    # What Keras keeps after it has fetched its file of names.
    index = {str(i): [f"n{i:08d}", f"name{i}"] for i in range(1000)}
    monkeypatch.setattr(imagenet_utils, "CLASS_INDEX", index)
    preds = np.zeros((2, 1000), "float32")
    preds[0, [7, 8]], preds[1, 999] = (0.7, 0.2), 1.0
    first, second = decode_predictions(preds=keras.ops.convert_to_tensor(preds), top=2)
    assert [(i, name) for i, name, _ in first] == [("n00000007", "name7"), ("n00000008", "name8")]
    assert second[0] == ("n00000999", "name999", 1.0)


def test_names_of_imagenet_without_network(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers proxies
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    monkeypatch.setattr("keras.src.applications.imagenet_utils.CLASS_INDEX", None)
    words = "^The names of ImageNet's classes could not be fetched.*pass `class_names`"
    with pytest.raises(ConnectionError, match=words):
        decode_predictions(np.ones((1, 1000)))


@pytest.mark.parametrize("top", [0, -1, 4, 1.5, None])
def test_top_must_fit(top):
    with pytest.raises(ValueError, match=r"`top` must be (an integer from 1 to 3|int)"):
        decode_predictions(np.ones((1, 3)) / 3, top, NAMES)
