"""What the programs for classification accept, refuse and print, beside test_classification.py."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from keras_resnest.backbones import create_backbone, decode_predictions, list_models
from keras_resnest.backbones.zoo import count_multiply_adds

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import classify  # noqa: E402
import compare_backbones  # noqa: E402
import verify_imagenet  # noqa: E402

NAMES = ("black", "gray", "white")
GREYS = (0, 120, 255)


def brightness_classifier(path):
    """A model whose answer is known: which of three grays is nearest to the image's average."""
    inputs = keras.Input((32, 32, 3))
    mean = keras.layers.GlobalAveragePooling2D()(inputs)
    # -(gray - mean)^2 without the part that all classes share is linear in the mean.
    dense = keras.layers.Dense(3, activation="softmax")
    model = keras.Model(inputs, dense(mean))
    dense.set_weights(
        [np.tile(np.array(GREYS) / 50 / 3, (3, 1)), -(np.array(GREYS, "float32") ** 2) / 100]
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
    for name, gray in zip(NAMES, GREYS, strict=True):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(2):
            is_wrong = name == "white" and i == 1
            gray_image(0 if is_wrong else gray).save(folder / "val" / name / f"{i}.png")
    return folder


def classified(folder, *arguments):
    found = folder / "found.json"
    options = ["--model", folder / "model.keras", "--classes-file", folder / "names.txt"]
    assert classify.main(list(map(str, [*arguments, *options, "--json", found]))) == 0
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
    # The default of five classes is no fault where there are three.
    assert [len(classes) for classes in found.values()] == [3] * 5


def test_classify_takes_a_file_whose_name_looks_like_a_pattern(folder):
    gray_image(255).save(folder / "a[1].png")
    assert classified(folder, folder / "a[1].png")["a[1].png"][0]["name"] == "white"


def test_classify_a_named_network_with_weights_of_a_file(folder, capsys):
    model = create_backbone("resnest14_tiny", classes=3, input_shape=(224, 224, 3))
    model.save_weights(folder / "tiny.weights.h5")
    arguments = [folder / "val/gray/0.png", "--model", "resnest14_tiny", "--top", 1]
    arguments += ["--weights", folder / "tiny.weights.h5", "--classes", folder / "names.txt"]
    arguments += ["--json", folder / "tiny.json"]
    assert classify.main(list(map(str, arguments))) == 0
    # 40 rows become 256, of which the middle 224 are cut; 50 columns become 320.
    image = gray_image(120).resize((320, 256), Image.Resampling.BILINEAR).crop((48, 16, 272, 240))
    want = model.predict(np.asarray(image)[None], verbose=0)[0]
    (entry,) = json.loads((folder / "tiny.json").read_text())
    assert entry["classes"][0]["id"] == str(want.argmax())
    assert entry["classes"][0]["probability"] == pytest.approx(want.max(), rel=1e-4)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["absent/*.png"], 2, "nothing fits the pattern"),
        (["{folder}/val/gray/0.png"], 2, "the model has 3 classes: name them with --classes"),
        (["{folder}/val/gray/0.png", "--classes", "{folder}/two.txt"], 2, "holds 2 names"),
        (["{folder}/absent.png", "--classes", "{folder}/names.txt"], 1, "no such file"),
    ],
)
def test_classify_says_what_is_wrong(folder, capsys, arguments, status, message):
    (folder / "two.txt").write_text("one\ntwo\n\n")
    arguments = [*(a.format(folder=folder) for a in arguments), "--model"]
    assert classify.main([*arguments, str(folder / "model.keras")]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", [classify, verify_imagenet, compare_backbones])
def test_numbers_must_be_positive(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["something", "--batch-size", "0"])
    assert stop.value.code == 2 and "must be 1 or more" in capsys.readouterr().err


def test_classify_refuses_a_network_without_classifier(folder, capsys):
    inputs = keras.Input((None, None, 3))
    keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs)).save(folder / "map.keras")
    arguments = [folder / "val/gray", "--model", folder / "map.keras"]
    assert classify.main(list(map(str, arguments))) == 2
    assert "is no classifier of images" in capsys.readouterr().err


# --- Accuracy --------------------------------------------------------------------------------


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


def verified(capsys, *arguments):
    assert verify_imagenet.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_verify_a_folder_whose_accuracy_is_known(folder, capsys):
    model = ("--model", folder / "model.keras")
    text = verified(capsys, folder / "val", *model, "--batch-size", 4)
    assert "6 images at 32 pixels" in text
    assert "top-1 83.33%, top-5 100.00%" in text and "published top-1: unknown" in text
    assert "2 images at 32 pixels" in verified(capsys, folder / "val", *model, "--limit", 2)


def test_verify_a_data_set_of_tfds(folder, capsys, tmp_path):
    ClassifySample(data_dir=tmp_path).download_and_prepare()
    options = ("--data-dir", tmp_path, "--split", "test", "--model", folder / "model.keras")
    text = verified(capsys, "tfds:classify_sample", *options)
    assert "4 images at 32 pixels" in text and "top-1 75.00%" in text


def test_verify_says_what_is_wrong(folder, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    for data, message in (("empty", "holds no folders of classes"), ("val/gray", "no folders")):
        assert verify_imagenet.main([str(folder / data)]) == 2
        assert message in capsys.readouterr().err
    os.makedirs(folder / "two" / "a", exist_ok=True)
    gray_image(0).save(folder / "two" / "a" / "0.png")
    arguments = [folder / "two", "--model", folder / "model.keras"]
    assert verify_imagenet.main(list(map(str, arguments))) == 2
    assert "knows 3 classes, the data has 1" in capsys.readouterr().err


def test_published_figures_come_with_the_size_of_their_images():
    # The authors' table: 82.83 % at 256 pixels; timm's: 83.88 % at 320, crop 0.909.
    assert verify_imagenet.published_figure("resnest101", "official").startswith("82.83% at 256 ")
    text = "83.88% at 320 pixels, crop 0.909"
    assert verify_imagenet.published_figure("ResNeSt200", "imagenet") == text
    assert verify_imagenet.published_figure("resnest14_tiny", "imagenet") == "unknown"
    assert verify_imagenet.published_figure("resnest200", "own.weights.h5") == "unknown"


# --- Comparison ------------------------------------------------------------------------------


def test_compare_measures_what_runs():
    arguments = compare_backbones.parse_arguments(["x", "--size", "65", "--features"])
    arguments.runs = 2
    ballast = np.ones(2**27)  # 1 GB in this process, which is not the network's
    row = compare_backbones.row_of(list_models("resnest14_tiny")[0], arguments)
    del ballast
    model = create_backbone("resnest14_tiny", include_top=False)
    assert row["gflops"] == round(count_multiply_adds(model, (65, 65, 3)) / 1e9, 2)
    trainable = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert row["parameters"] == trainable and row["top1"] is None and row["size"] == 65
    # 1 M parameters are 4 MB; the rest is TensorFlow's.
    assert 4 < row["memory_mb"] < 800


def test_peak_memory_is_that_of_the_process_alone():
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import compare_backbones as c;"
    code += "import time; x = bytearray(300 << 20); print(c.peak_memory())"
    ballast = np.ones(2**27)
    found = float(subprocess.check_output([sys.executable, "-c", code]))
    del ballast
    assert 300 < found < 500


# --- ImageNet's names ------------------------------------------------------------------------


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


def test_names_of_imagenet_without_network(tmp_path):
    code = (
        "import numpy as np; from keras_resnest.backbones import decode_predictions\n"
        "try: decode_predictions(np.ones((1, 1000)))\n"
        "except ConnectionError as error: print('SAID', error)"
    )
    # Nothing listens at port 9.
    proxies = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = {**os.environ, **proxies, "KERAS_HOME": str(tmp_path)}
    text = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert "SAID The names of ImageNet's classes could not be fetched" in text
    assert "give `class_names`" in text


@pytest.mark.parametrize("top", [0, -1, 4, 1.5, None])
def test_top_must_fit(top):
    with pytest.raises(ValueError, match="`top` must be an integer from 1 to 3"):
        decode_predictions(np.ones((1, 3)) / 3, top, NAMES)
