"""The exported SavedModel: it needs TensorFlow alone and finds what `predict` and `detect` find."""

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_backbone
from exported_models import DECODER, KINDS, encode, load, model_of, saved_model, with_alpha
from sample_images import photograph

from keras_resnest.atomic import atomic_folder
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.images import load_image

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

PROGRAM = Path(__file__).parent / "programs" / "run_saved_models.py"
DETECTORS = [kind for kind in KINDS if kind != "classifier"]
RAW = ("arm_boxes", "arm_objectness", "odm_boxes", "odm_logits")
MAX = DECODER.max_detections
# Largest difference of each output; that of boxes is in pixels.
TOLERANCES = {"boxes": 1e-2, "confidence": 1e-4, "predictions": 1e-5}


@functools.cache
def encoded_images():
    """Images of different sizes and kinds, by file name."""
    wide = rectangles(1, (96, 200, 3), seed=4)[0][0]
    tall = rectangles(1, (150, 90, 3), seed=5)[0][0]
    other = rectangles(1, (75, 75, 3), seed=6, objects=1)[0][0]
    return {
        "0_wide.jpg": encode(wide, "JPEG", quality=80),
        "1_tall.png": encode(tall, "PNG"),
        "2_tall.jpg": encode(tall, "JPEG", quality=95, progressive=True),
        "3_gray.jpg": encode(other, "JPEG", "L"),
        "4_cmyk.jpg": encode(wide, "JPEG", "CMYK"),
        "5_rgba.png": encode(with_alpha(wide), "PNG", "RGBA"),
        "6_gray_alpha.png": encode(with_alpha(tall), "PNG", "LA"),
        "7_palette.png": encode(other, "PNG", "P", transparency=3),
    }


@functools.cache
def images_of(kind):
    """Three images of the model's size."""
    shape = KINDS[kind][1].get("image_shape") or model_of(kind).image_shape
    return rectangles(3, shape, seed=3, objects=1)[0]


@functools.cache
def predicted(kind):
    """Results of the Keras model, by the names of an export."""
    results = model_of(kind).predict(images_of(kind), verbose=0)
    return results if isinstance(results, dict) else {"predictions": results}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Answers by kind and call, and facts by kind, of a process without Keras."""
    root = tmp_path_factory.mktemp("serving")
    for folder in ("images", "models"):
        (root / folder).mkdir()
    for file_name, encoded in encoded_images().items():
        (root / "images" / file_name).write_bytes(encoded)
    for kind in KINDS:
        (root / "models" / kind).symlink_to(saved_model(kind))
        np.save(root / f"{kind}.npy", images_of(kind))
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(root)], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = {}
    with np.load(root / "found.npz") as arrays:
        for key, value in arrays.items():
            kind, call, output = key.split("/")
            answers.setdefault((kind, call), {})[output] = value
    return answers, json.loads((root / "facts.json").read_text())


@pytest.fixture(scope="module")
def answers(served):
    return served[0]


@pytest.fixture(scope="module")
def facts(served):
    return served[1]


# === The same results ===


CALLS = ["float 3", "float 1", "uint8", "serve float", "serve uint8"]


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *(("detector", call) for call in CALLS),
        *(("classifier", call) for call in CALLS),
        *((kind, "float 3") for kind in ("relative", "aware", "frozen")),
    ],
)
def test_tensors_give_what_predict_gives(answers, kind, call):
    want = predicted(kind)
    if kind in DETECTORS:
        assert ((want["num_detections"] > 0) & (want["num_detections"] < MAX)).all()
    got, count = answers[kind, call], 1 if call == "float 1" else 3
    assert set(got) == set(want)
    for output, value in want.items():
        is_fraction = kind == "relative" and output == "boxes"
        atol = 1e-4 if is_fraction else TOLERANCES.get(output, 0)
        assert got[output].dtype == value.dtype
        np.testing.assert_allclose(got[output], value[:count], rtol=0, atol=atol, err_msg=output)


@pytest.mark.parametrize("kind", ["detector", "relative", "aware", "frozen"])
def test_files_give_what_detect_gives(answers, kind):
    """For images of any kind and size; boxes in the pixels of each, or fractions."""
    images, model = encoded_images(), model_of(kind)
    got = answers[kind, "bytes"]
    want = model.detect(list(images.values()), confidence_threshold=0.0, batch_size=8)
    assert got["readable"].all()
    for i, (file_name, encoded) in enumerate(images.items()):
        n = got["num_detections"][i]
        assert 0 < n == len(want[i]["labels"]), file_name
        for output in ("boxes", "confidence", "labels"):
            assert (got[output][i, n:] == -1).all()
        height, width, _ = load_image(encoded).shape
        boxes = (
            np.array(convert_boxes(b, model.bounding_box_format, "xyxy", height, width))
            for b in (got["boxes"][i, :n], want[i]["boxes"])
        )
        np.testing.assert_allclose(*boxes, atol=1e-2, err_msg=file_name)
        np.testing.assert_allclose(
            got["confidence"][i, :n], want[i]["confidence"], atol=1e-4, err_msg=file_name
        )
        np.testing.assert_array_equal(got["labels"][i, :n], want[i]["labels"])


def test_boxes_of_files_fill_the_images(answers):
    """Boxes reach far, but never outside: in pixels, or as fractions (top, left, bottom, right)."""
    sizes = np.array([load_image(e).shape[:2] for e in encoded_images().values()])
    pixels, relative = (answers[kind, "bytes"]["boxes"] for kind in ("detector", "relative"))
    for corner, side in ((2, 1), (3, 0)):
        reach = pixels[..., corner].max(axis=1)
        assert (reach <= sizes[:, side] + 1e-3).all() and (reach > 0.6 * sizes[:, side]).all()
    assert 0.6 < relative.max() <= 1.0 + 1e-6


def test_photographs(odd_images, tmp_path):
    """Photographs and odd files, in the same pixels; only EXIF orientation is left out."""
    import tensorflow as tf

    paths = [tmp_path / f"{height}.jpg" for height in (512, 300, 400)]
    for path in paths:
        photograph(int(path.stem), 500).save(path, quality=88)
    paths += [odd_images / n for n in ("rgba.png", "cmyk.jpg", "one_pixel.png")]
    serve = load("detector").signatures["serve_bytes"]
    got = serve(image_bytes=tf.constant([p.read_bytes() for p in paths]))
    want = model_of("detector").detect(paths, confidence_threshold=0.0)
    for i, one in enumerate(want):
        n = int(got["num_detections"][i])
        assert n == len(one["labels"])
        np.testing.assert_allclose(got["boxes"][i, :n], one["boxes"], atol=1e-2)
        np.testing.assert_allclose(got["confidence"][i, :n], one["confidence"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_outputs(answers, kind):
    outputs = model_of(kind)(images_of(kind), training=False)
    want = outputs if isinstance(outputs, dict) else {"predictions": outputs}
    got = answers[kind, "raw"]
    names = {*RAW, "odm_iou"} if kind == "aware" else RAW
    assert set(got) == set(want) == (set(names) if kind in DETECTORS else {"predictions"})
    for output, value in want.items():
        assert got[output].dtype == np.float32
        if kind == "bfloat16":  # rounded, but not much
            assert 1e-4 < np.abs(got[output] - value).max() < 4e-2 * np.abs(value).max()
        else:
            np.testing.assert_allclose(got[output], value, atol=1e-4)


# === What is inside ===


@pytest.mark.parametrize("kind", KINDS)
def test_standard_operations_only(facts, kind):
    """TensorFlow Serving knows them all, and none calls back into Python or requires XLA."""
    ops = set(facts[kind]["ops"])
    assert {"DecodeJpeg", "Conv2D"} <= ops
    # Greedy suppression within classes is one operation.
    assert ("CombinedNonMaxSuppression" in ops) == (kind in ("detector", "frozen", "bfloat16"))
    assert facts[kind]["not in TensorFlow"] == []
    assert not {"PyFunc", "EagerPyFunc", "PyFuncStateless", "NumpyFunc"} & ops
    assert not [a for a in facts[kind]["attributes"] if "Xla" in a]
    assert not [op for op in ops if op.startswith("Xla") or "Apply" in op]


@pytest.mark.parametrize("kind", KINDS)
def test_signatures(facts, kind):
    shape = [None, *images_of(kind).shape[1:]]
    assert facts[kind]["signatures"] == {
        "serving_default": {"images": ["float32", shape]},
        "serve_uint8": {"images": ["uint8", shape]},
        "serve_bytes": {"image_bytes": ["string", [None]]},
        "raw_outputs": {"images": ["float32", shape]},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_training_only_operations_are_removed(facts, kind):
    """No normalization, no dropout, and no variables if the graph is frozen."""
    ops = set(facts[kind]["ops"])
    assert not {"FusedBatchNormV3", "RandomUniform"} & ops
    assert ({"VarHandleOp", "ReadVariableOp"} & ops == set()) == (kind == "frozen")


def test_weights_in_variables_are_not_in_the_graph(facts, answers):
    assert facts["detector"]["largest"] < 20_000 < facts["frozen"]["largest"]
    graph = (saved_model("detector") / "saved_model.pb").stat().st_size
    frozen = (saved_model("frozen") / "saved_model.pb").stat().st_size
    assert graph + size_of_weights("detector") < 1.1 * frozen  # stored once
    for call in ("float 3", "bytes"):
        for output, value in answers["frozen", call].items():
            np.testing.assert_allclose(answers["detector", call][output], value, atol=1e-4)


def size_of_weights(kind):
    return (saved_model(kind) / "variables/variables.data-00000-of-00001").stat().st_size


def test_bfloat16_halves_the_weights():
    assert size_of_weights("bfloat16") < 0.51 * size_of_weights("detector")


# === What lies beside the model ===


def metadata(kind):
    return json.loads((saved_model(kind) / "assets.extra/model.json").read_text())


def test_metadata_of_a_detector():
    extra = saved_model("detector") / "assets.extra"
    assert (extra / "class_names.txt").read_text().split() == CLASS_NAMES
    assert metadata("detector")["class_names"] == CLASS_NAMES
    assert metadata("detector")["precision"] == "float32"
    assert metadata("bfloat16")["precision"] == "bfloat16"
    assert metadata("frozen")["freeze"] and not metadata("detector")["freeze"]
    assert not (saved_model("relative") / "assets.extra/class_names.txt").exists()
    found = metadata("relative")
    assert found["task"] == "detection" and found["image_shape"] == [128, 64, 3]
    assert found["bounding_box_format"] == "rel_yxyx"
    assert found["decoder"]["max_detections"] == MAX
    assert found["decoder"]["two_step_regression"] is True
    assert found["decoder"]["negative_anchor_filtering"] is True
    found = metadata("aware")["decoder"]
    assert (found["suppression"], found["class_agnostic"], found["alpha"]) == ("soft", True, 0.5)


def test_metadata_of_a_classifier():
    assert metadata("classifier") == {
        "task": "classification",
        "image_shape": [64, 64, 3],
        "class_names": None,
        "crop_ratio": 0.875,
        "precision": "float32",
        "freeze": False,
    }


def test_warm_up_requests_are_answered():
    """Read with the protocol buffers of TensorFlow Serving, as the server does."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    loaded, seen = load("detector"), set()
    file = saved_model("detector") / "assets.extra/tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(file)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        inputs = {k: tf.constant(tf.make_ndarray(v)) for k, v in request.inputs.items()}
        answer = loaded.signatures[request.model_spec.signature_name](**inputs)
        assert answer["boxes"].shape[0] == 1 and answer.get("readable", [True])[0]
        seen.add(request.model_spec.signature_name)
    assert seen == {"serving_default", "serve_uint8", "serve_bytes"}


def test_batching_parameters_are_those_of_the_server():
    """The text format of a message; names are from the server's documentation."""
    text = (saved_model("detector") / "assets.extra/batching_parameters.txt").read_text()
    fields = dict(re.findall(r"^(\w+) \{ value: (\d+) \}$", text, re.MULTILINE))
    assert set(fields) == {
        "max_batch_size",
        "batch_timeout_micros",
        "max_enqueued_batches",
        "num_batch_threads",
    }


# === The folder ===


def test_a_server_never_sees_half_a_model(tmp_path):
    """A folder with a number as its name is always complete, even while it is replaced."""
    versions, seen, stop = tmp_path / "detector", [], threading.Event()
    versions.mkdir()

    def poll():
        while not stop.is_set():
            for child in versions.iterdir():
                if child.name.isdigit():
                    try:
                        folder = child.stat().st_ino
                        names = {p.name for p in child.iterdir()}
                        extra = {p.name for p in (child / "assets.extra").iterdir()}
                        if child.stat().st_ino != folder:
                            continue  # replaced between two looks
                    except FileNotFoundError:
                        continue  # removed between two looks
                    seen.append(names | extra)

    thread, model = threading.Thread(target=poll), small_backbone()
    thread.start()
    for version in ("1", "1"):
        model.export(versions / version)
    stop.set()
    thread.join()
    assert seen and all({"saved_model.pb", "variables", "model.json"} <= names for names in seen)
    assert sorted(p.name for p in versions.iterdir()) == ["1"]  # no temporary files


def test_a_failed_export_changes_nothing(tmp_path):
    target = tmp_path / "1"
    shutil.copytree(saved_model("detector"), target)
    before = (target / "saved_model.pb").read_bytes()
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "saved_model.pb").write_text("half")
        raise OSError("the disk is full")
    assert (target / "saved_model.pb").read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("...")
    model = small_backbone()
    with pytest.raises(ValueError, match=r"saved_model\.pb.*letters"):
        model.export(tmp_path / "letters")
    with pytest.raises(ValueError, match=r"folder.*dear"):
        model.export(tmp_path / "letters" / "dear.txt")


def test_unknown_formats_and_options(tmp_path):
    export = functools.partial(model_of("detector").export, tmp_path / "model")
    with pytest.raises(ValueError, match=r"`format`.*onnx.*Received: 'caffe'"):
        export(format="caffe")
    with pytest.raises(ValueError, match=r"`precision`.*Received: precision='int8'"):
        export(precision="int8")
    with pytest.raises(ValueError, match="input_signature"):
        export(input_signature=[])
    with pytest.raises(ValueError, match="raw_outputs"):
        export(decode=False)
    assert not (tmp_path / "model").exists()
