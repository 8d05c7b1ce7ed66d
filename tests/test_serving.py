"""The exported SavedModel: it needs TensorFlow alone and finds what `predict` and `detect` find."""

import functools
import io
import json
import re
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_detector
from sample_images import photograph

from keras_resnest import atomic
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.detection.builders import refinedet_tiny
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.images import load_image

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

# So few that random weights leave no near ties, and the lists of all images end with padding.
DECODER = DetectionDecoder(confidence_threshold=0.9, max_detections=40)
OUTPUTS = {"boxes", "confidence", "labels", "num_detections"}
RAW = ("arm_boxes", "arm_objectness", "odm_boxes", "odm_logits")
SMALL, RELATIVE, TINY, VARIABLES = MODELS = ("small", "relative", "tiny", "variables")

# Run by a fresh interpreter in which Keras and this package cannot be imported.
FRESH = """
import json, pathlib, sys
for name in ("keras", "tf_keras", "keras_resnest"):
    sys.modules[name] = None  # so that importing it fails
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

def nodes_of(folder):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def
        yield function  # its attributes are of interest as well

def answers(loaded, images, images, every_way):
    floats, integers = tf.constant(images, tf.float32), tf.constant(images, tf.uint8)
    default, serve_bytes = (loaded.signatures[n] for n in ("serving_default", "serve_bytes"))
    if not every_way:
        return {
            "float 3": default(images=floats),
            "bytes": serve_bytes(image_bytes=tf.constant(images)),
        }
    return {
        "float 1": default(images=floats[:1]),
        "float 3": default(images=floats),
        "float 0": default(images=floats[:0]),
        "uint8": loaded.signatures["serve_uint8"](images=integers),
        "serve float": loaded.serve(floats),
        "serve uint8": loaded.serve(integers),
        "bytes": serve_bytes(image_bytes=tf.constant(images)),
        "raw": loaded.signatures["raw_outputs"](images=floats),
        "raw 0": loaded.signatures["raw_outputs"](images=floats[:0]),
        "bytes 0": serve_bytes(image_bytes=tf.constant([], tf.string)),
    }

root, found, facts = pathlib.Path(sys.argv[1]), {}, {}
images = [p.read_bytes() for p in sorted((root / "images").iterdir())]
for folder in (root / "models").iterdir():
    nodes = list(nodes_of(folder))
    ops = {n.op for n in nodes if hasattr(n, "op")}
    facts[folder.name] = {
        "ops": sorted(ops),
        "not in TensorFlow": sorted(op for op in ops if not hasattr(tf.raw_ops, op)),
        "attributes": sorted({name for n in nodes for name in n.attr}),
        "largest": max(n.ByteSize() for n in nodes if getattr(n, "op", "") == "Const"),
    }
    loaded = tf.saved_model.load(str(folder))
    facts[folder.name]["signatures"] = {
        name: {
            k: [spec.dtype.name, spec.shape.as_list()]
            for k, spec in signature.structured_input_signature[1].items()
        }
        for name, signature in loaded.signatures.items()
    }
    images = np.load(root / f"{folder.name}.npy")
    for call, answer in answers(
        loaded, images, images, folder.name == "small"
    ).items():
        for output, value in answer.items():
            found[f"{folder.name}/{call}/{output}"] = value.numpy()
for name in ("keras", "tf_keras", "keras_resnest"):
    assert sys.modules[name] is None
np.savez(root / "found.npz", **found)
(root / "facts.json").write_text(json.dumps(facts))
"""


def encode(array, image_format, mode="RGB", **options):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array.astype("uint8")).convert(mode).save(stream, image_format, **options)
    return stream.getvalue()


def transparent(array):
    """RGBA, clear at the left and opaque at the right."""
    alpha = np.linspace(0, 255, array.shape[1]).round()
    return np.concatenate([array, np.broadcast_to(alpha[:, None], (*array.shape[:2], 1))], -1)


def encoded_images():
    """Images of different sizes and kinds, by file name."""
    wide, tall = (
        rectangles(1, (96, 200, 3), seed=4)[0][0],
        rectangles(1, (150, 90, 3), seed=5)[0][0],
    )
    other = rectangles(1, (75, 75, 3), seed=6, objects=1)[0][0]
    return {
        "0_wide.jpg": encode(wide, "JPEG", quality=80),
        "1_tall.png": encode(tall, "PNG"),
        "2_tall.jpg": encode(tall, "JPEG", quality=95, progressive=True),
        "3_gray.jpg": encode(other, "JPEG", "L"),
        "4_cmyk.jpg": encode(wide, "JPEG", "CMYK"),
        "5_rgba.png": encode(transparent(wide), "PNG", "RGBA"),
        "6_gray_alpha.png": encode(transparent(tall), "PNG", "LA"),
        "7_palette.png": encode(other, "PNG", "P", transparency=3),
        "8_frames.gif": encode(wide, "GIF", "P", save_all=True, append_images=[_frame(wide)]),
        "9_other.bmp": encode(other, "BMP"),
        "9_other.webp": encode(other, "WEBP"),
    }


def _frame(array):
    from PIL import Image

    return Image.fromarray(array[::-1].astype("uint8")).convert("P")


@pytest.fixture(scope="module")
def models():
    return {
        SMALL: small_detector(decoder=DECODER),
        RELATIVE: small_detector(
            (128, 64, 3), decoder=DECODER, bounding_box_format="rel_yxyx", class_names=None
        ),
        TINY: refinedet_tiny(2, image_shape=(64, 64, 3), decoder=DECODER),
        VARIABLES: small_detector(decoder=DECODER),
    }


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Folder with the SavedModels and what the fresh process has found with them."""
    root = tmp_path_factory.mktemp("serving")
    (root / "images").mkdir()
    for file_name, encoded in encoded_images().items():
        (root / "images" / file_name).write_bytes(encoded)
    for name, model in models.items():
        model.export(root / "models" / name, freeze=name != VARIABLES)
        np.save(root / f"{name}.npy", rectangles(3, model.image_shape, seed=3, objects=1)[0])
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(root)], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def found(exported):
    with np.load(exported / "found.npz") as arrays:
        flat = dict(arrays)
    calls = {}
    for key, value in flat.items():
        name, call, output = key.split("/")
        calls.setdefault((name, call), {})[output] = value
    return calls


@pytest.fixture(scope="module")
def facts(exported):
    return json.loads((exported / "facts.json").read_text())


def assert_same(got, want, box_tolerance=1e-2):
    assert set(got) == OUTPUTS
    np.testing.assert_array_equal(got["num_detections"], want["num_detections"])
    np.testing.assert_array_equal(got["labels"], want["labels"])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-4)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=box_tolerance)


# === The same detections ===


@pytest.mark.parametrize("name", MODELS)
def test_served_images_give_what_predict_gives(models, exported, found, name):
    want = models[name].predict(np.load(exported / f"{name}.npy"), verbose=0)
    assert ((want["num_detections"] > 0) & (want["num_detections"] < 40)).all()
    tolerance = 1e-4 if name == RELATIVE else 1e-2  # fractions, or pixels
    assert_same(found[name, "float 3"], want, tolerance)


def test_every_signature_gives_the_same(found):
    want = found[SMALL, "float 3"]
    for call in ("uint8", "serve float", "serve uint8"):
        assert_same(found[SMALL, call], want)
    assert_same(found[SMALL, "float 1"], {output: value[:1] for output, value in want.items()})


@pytest.mark.parametrize("call", ["float 0", "bytes 0"])
def test_a_batch_without_images(found, call):
    shapes = {output: value.shape for output, value in found[SMALL, call].items()}
    assert shapes.pop("readable", (0,)) == (0,)
    assert shapes == {
        "boxes": (0, 40, 4),
        "confidence": (0, 40),
        "labels": (0, 40),
        "num_detections": (0,),
    }


@pytest.mark.parametrize("name", [SMALL, RELATIVE])
def test_served_files_give_what_detect_gives(models, found, name):
    """Whatever the kind and the size of the image; boxes in its own pixels, or fractions."""
    images = encoded_images()
    got = found[name, "bytes"]
    want = models[name].detect(list(images.values()), confidence_threshold=0.0, batch_size=11)
    assert got["readable"].all()
    for i, (file_name, encoded) in enumerate(images.items()):
        n = got["num_detections"][i]
        assert 0 < n == len(want[i]["labels"]), file_name
        for output in ("boxes", "confidence", "labels"):
            assert (got[output][i, n:] == -1).all()
        height, width, _ = load_image(encoded).shape
        boxes = (
            np.array(convert_boxes(b, models[name].bounding_box_format, "xyxy", height, width))
            for b in (got["boxes"][i, :n], want[i]["boxes"])
        )
        np.testing.assert_allclose(*boxes, atol=1e-2, err_msg=file_name)
        np.testing.assert_allclose(
            got["confidence"][i, :n], want[i]["confidence"], atol=1e-4, err_msg=file_name
        )
        np.testing.assert_array_equal(got["labels"][i, :n], want[i]["labels"])


def test_boxes_of_files_fill_the_images(found):
    """Boxes reach far, but never outside: in pixels, or as fractions (top, left, bottom, right)."""
    sizes = np.array([load_image(e).shape[:2] for e in encoded_images().values()])
    small, relative = found[SMALL, "bytes"]["boxes"], found[RELATIVE, "bytes"]["boxes"]
    for corner, side in ((2, 1), (3, 0)):
        reach = small[..., corner].max(axis=1)
        assert (reach <= sizes[:, side] + 1e-3).all() and (reach > 0.6 * sizes[:, side]).all()
    assert 0.6 < relative.max() <= 1.0 + 1e-6


def test_photographs(models, exported, odd_images, tmp_path):
    """Photographs and odd files, in the same pixels; only EXIF orientation is left out."""
    import tensorflow as tf

    paths = [tmp_path / f"{height}.jpg" for height in (512, 300, 400)]
    for path in paths:
        photograph(int(path.stem), 500).save(path, quality=88)
    paths += [odd_images / n for n in ("rgba.png", "cmyk.jpg", "one_pixel.png")]
    serve = tf.saved_model.load(str(exported / "models" / SMALL)).signatures["serve_bytes"]
    got = serve(image_bytes=tf.constant([p.read_bytes() for p in paths]))
    want = models[SMALL].detect(paths, confidence_threshold=0.0)
    for i, one in enumerate(want):
        n = int(got["num_detections"][i])
        assert n == len(one["labels"])
        np.testing.assert_allclose(got["boxes"][i, :n], one["boxes"], atol=1e-2)
        np.testing.assert_allclose(got["confidence"][i, :n], one["confidence"], atol=1e-4)


def test_raw_outputs(models, exported, found):
    want = models[SMALL](np.load(exported / f"{SMALL}.npy"), training=False)
    assert set(found[SMALL, "raw"]) == set(RAW)
    for output in RAW:
        np.testing.assert_allclose(found[SMALL, "raw"][output], want[output], atol=1e-4)
        assert found[SMALL, "raw 0"][output].shape == (0, *want[output].shape[1:])


# === What is inside ===


@pytest.mark.parametrize("name", MODELS)
def test_standard_operations_only(facts, name):
    """TensorFlow Serving knows them all, and none calls back into Python or demands XLA."""
    ops = facts[name]["ops"]
    assert {"CombinedNonMaxSuppression", "DecodeJpeg", "Conv2D"} <= set(ops)
    assert facts[name]["not in TensorFlow"] == []
    assert not {"PyFunc", "EagerPyFunc", "PyFuncStateless", "NumpyFunc"} & set(ops)
    assert not [a for a in facts[name]["attributes"] if "Xla" in a]
    assert not [op for op in ops if op.startswith("Xla") or "Apply" in op]


@pytest.mark.parametrize("name", MODELS)
def test_signatures(models, facts, name):
    shape = [None, *models[name].image_shape]
    assert facts[name]["signatures"] == {
        "serving_default": {"images": ["float32", shape]},
        "serve_uint8": {"images": ["uint8", shape]},
        "serve_bytes": {"image_bytes": ["string", [None]]},
        "raw_outputs": {"images": ["float32", shape]},
    }


def test_nothing_of_training_is_left(facts):
    """No variables, no normalization, no dropout; nothing is multiplied behind a convolution."""
    for name in MODELS:
        ops = set(facts[name]["ops"])
        assert not {"FusedBatchNormV3", "RandomUniform"} & ops
        assert ({"VarHandleOp", "ReadVariableOp"} & ops != set()) == (name == VARIABLES)


def test_weights_in_variables_are_not_in_the_graph(exported, facts, found):
    assert facts[VARIABLES]["largest"] < 20_000 < facts[SMALL]["largest"]
    folders = {name: exported / "models" / name for name in (SMALL, VARIABLES)}
    graphs = {n: (f / "saved_model.pb").stat().st_size for n, f in folders.items()}
    weights = (folders[VARIABLES] / "variables/variables.data-00000-of-00001").stat().st_size
    assert graphs[VARIABLES] + weights < 1.1 * graphs[SMALL]  # they are there once
    for call in ("float 3", "bytes"):
        for output, value in found[SMALL, call].items():
            np.testing.assert_allclose(found[VARIABLES, call][output], value, atol=1e-4)


def test_what_lies_beside_the_model(models, exported):
    extra = exported / "models" / SMALL / "assets.extra"
    assert (extra / "class_names.txt").read_text().split() == CLASS_NAMES
    assert json.loads((extra / "model.json").read_text())["class_names"] == CLASS_NAMES
    extra = exported / "models" / RELATIVE / "assets.extra"
    assert not (extra / "class_names.txt").exists()
    facts = json.loads((extra / "model.json").read_text())
    assert facts["bounding_box_format"] == "rel_yxyx" and facts["image_shape"] == [128, 64, 3]
    assert facts["decoder"]["max_detections"] == 40 and facts["task"] == "detection"


def test_warm_up_requests_are_answered(models, exported):
    """Read with the protocol buffers of TensorFlow Serving, as the server does."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    loaded = tf.saved_model.load(str(exported / "models" / SMALL))
    file = exported / "models" / SMALL / "assets.extra/tf_serving_warmup_requests"
    seen = set()
    for record in tf.data.TFRecordDataset(str(file)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        inputs = {k: tf.constant(tf.make_ndarray(v)) for k, v in request.inputs.items()}
        answer = loaded.signatures[request.model_spec.signature_name](**inputs)
        assert answer["boxes"].shape[0] == 1 and answer.get("readable", [True])[0]
        seen.add(request.model_spec.signature_name)
    assert seen == {"serving_default", "serve_uint8", "serve_bytes"}


def test_batching_parameters_are_those_of_the_server(exported):
    """The text format of a message whose fields are known; names from its documentation."""
    text = (exported / "models" / SMALL / "assets.extra/batching_parameters.txt").read_text()
    fields = dict(re.findall(r"^(\w+) \{ value: (\d+) \}$", text, re.MULTILINE))
    assert set(fields) == {
        "max_batch_size",
        "batch_timeout_micros",
        "max_enqueued_batches",
        "num_batch_threads",
    }


# === The folder ===


def test_a_server_never_sees_half_a_model(models, tmp_path):
    """Whatever has a number as its name is complete, at any time, also when it is replaced."""
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
                        continue  # taken away between two looks
                    seen.append(names | extra)

    thread = threading.Thread(target=poll)
    thread.start()
    for version in ("1", "1", "2"):
        models[SMALL].export(versions / version)
    stop.set()
    thread.join()
    assert seen and all({"saved_model.pb", "variables", "model.json"} <= names for names in seen)
    assert sorted(p.name for p in versions.iterdir()) == ["1", "2"]  # nothing else is left


def test_a_failed_export_leaves_everything_as_it_was(models, tmp_path):
    target = tmp_path / "1"
    models[SMALL].export(target)
    before = (target / "saved_model.pb").read_bytes()
    with pytest.raises(OSError, match="full"), atomic.atomic_folder(target) as folder:
        (folder / "saved_model.pb").write_text("half")
        raise OSError("the disk is full")
    assert (target / "saved_model.pb").read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_folders_of_others_are_not_replaced(models, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("...")
    with pytest.raises(ValueError, match=r"SavedModel.*letters"):
        models[SMALL].export(tmp_path / "letters")
    with pytest.raises(ValueError, match=r"folder.*dear"):
        models[SMALL].export(tmp_path / "letters" / "dear.txt")


def test_unknown_formats_and_options(models, tmp_path):
    export = functools.partial(models[SMALL].export, tmp_path / "model")
    with pytest.raises(ValueError, match=r"`format`.*onnx.*Received: 'caffe'"):
        export(format="caffe")
    with pytest.raises(ValueError, match=r"`precision`.*Received: precision='int8'"):
        export(precision="int8")
    with pytest.raises(ValueError, match="input_signature"):
        export(input_signature=[])
    with pytest.raises(ValueError, match="raw_outputs"):
        export(decode=False)
    assert not (tmp_path / "model").exists()
