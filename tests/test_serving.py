"""The exported SavedModel: it needs TensorFlow alone and finds what `predict` and `detect` find."""

import io
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles, small_detector

from keras_resnest.data.images import load_image
from keras_resnest.detection.boxes import convert_boxes
from keras_resnest.detection.builders import refinedet_tiny
from keras_resnest.detection.decoding import DetectionDecoder

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

# So few that random weights leave no near ties, and the lists of all pictures end with padding.
DECODER = DetectionDecoder(confidence_threshold=0.9, max_detections=40)
OUTPUTS = {"boxes", "confidence", "labels", "num_detections"}
SMALL, RELATIVE, TINY = MODELS = ("small", "relative", "tiny")

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

def answers(loaded, images, pictures, every_way):
    floats, integers = tf.constant(images, tf.float32), tf.constant(images, tf.uint8)
    default, serve_bytes = (loaded.signatures[n] for n in ("serving_default", "serve_bytes"))
    if not every_way:
        return {
            "float 3": default(images=floats),
            "bytes": serve_bytes(image_bytes=tf.constant(pictures)),
        }
    return {
        "float 1": default(images=floats[:1]),
        "float 3": default(images=floats),
        "float 0": default(images=floats[:0]),
        "uint8": loaded.signatures["serve_uint8"](images=integers),
        "serve float": loaded.serve(floats),
        "serve uint8": loaded.serve(integers),
        "bytes": serve_bytes(image_bytes=tf.constant(pictures)),
        "bytes 0": serve_bytes(image_bytes=tf.constant([], tf.string)),
    }

root, found, facts = pathlib.Path(sys.argv[1]), {}, {}
pictures = [p.read_bytes() for p in sorted((root / "pictures").iterdir())]
for folder in (root / "models").iterdir():
    nodes = list(nodes_of(folder))
    ops = {n.op for n in nodes if hasattr(n, "op")}
    facts[folder.name] = {
        "ops": sorted(ops),
        "not in TensorFlow": sorted(op for op in ops if not hasattr(tf.raw_ops, op)),
        "attributes": sorted({name for n in nodes for name in n.attr}),
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
        loaded, images, pictures, folder.name == "small"
    ).items():
        for output, value in answer.items():
            found[f"{folder.name}/{call}/{output}"] = value.numpy()
for name in ("keras", "tf_keras", "keras_resnest"):
    assert sys.modules[name] is None
np.savez(root / "found.npz", **found)
(root / "facts.json").write_text(json.dumps(facts))
"""


def encode(array, picture_format, mode="RGB", **options):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array.astype("uint8")).convert(mode).save(stream, picture_format, **options)
    return stream.getvalue()


def transparent(array):
    """RGBA, clear at the left and opaque at the right."""
    alpha = np.linspace(0, 255, array.shape[1]).round()
    return np.concatenate([array, np.broadcast_to(alpha[:, None], (*array.shape[:2], 1))], -1)


def encoded_pictures():
    """Pictures of different sizes and kinds, by file name."""
    wide, tall = (
        rectangles(1, (96, 200, 3), seed=4)[0][0],
        rectangles(1, (150, 90, 3), seed=5)[0][0],
    )
    other = rectangles(1, (75, 75, 3), seed=6, objects=1)[0][0]
    return {
        "0_wide.jpg": encode(wide, "JPEG", quality=80),
        "1_tall.png": encode(tall, "PNG"),
        "2_tall.jpg": encode(tall, "JPEG", quality=95, progressive=True),
        "3_grey.jpg": encode(other, "JPEG", "L"),
        "4_cmyk.jpg": encode(wide, "JPEG", "CMYK"),
        "5_rgba.png": encode(transparent(wide), "PNG", "RGBA"),
        "6_grey_alpha.png": encode(transparent(tall), "PNG", "LA"),
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
    }


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Folder with the SavedModels and what the fresh process has found with them."""
    root = tmp_path_factory.mktemp("serving")
    (root / "pictures").mkdir()
    for file_name, encoded in encoded_pictures().items():
        (root / "pictures" / file_name).write_bytes(encoded)
    for name, model in models.items():
        model.export(root / "models" / name)
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
def test_a_batch_without_pictures(found, call):
    shapes = {output: value.shape for output, value in found[SMALL, call].items()}
    assert shapes == {
        "boxes": (0, 40, 4),
        "confidence": (0, 40),
        "labels": (0, 40),
        "num_detections": (0,),
    }


@pytest.mark.parametrize("name", [SMALL, RELATIVE])
def test_served_files_give_what_detect_gives(models, found, name):
    """Whatever the kind and the size of the picture; boxes in its own pixels, or fractions."""
    pictures = encoded_pictures()
    got = found[name, "bytes"]
    want = models[name].detect(list(pictures.values()), confidence_threshold=0.0, batch_size=11)
    for i, (file_name, encoded) in enumerate(pictures.items()):
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


def test_boxes_of_files_fill_the_pictures(found):
    """Boxes reach far, but never outside: in pixels, or as fractions (top, left, bottom, right)."""
    sizes = np.array([load_image(e).shape[:2] for e in encoded_pictures().values()])
    small, relative = found[SMALL, "bytes"]["boxes"], found[RELATIVE, "bytes"]["boxes"]
    for corner, side in ((2, 1), (3, 0)):
        reach = small[..., corner].max(axis=1)
        assert (reach <= sizes[:, side] + 1e-3).all() and (reach > 0.6 * sizes[:, side]).all()
    assert 0.6 < relative.max() <= 1.0 + 1e-6


def test_photographs(models, exported, shared):
    """Camera JPEGs and odd ones, in the same pixels; only EXIF orientation is left out."""
    import tensorflow as tf

    paths = sorted((shared / "data/photos").glob("*.jpg"))[:3]
    paths += [shared / "data/photos/odd" / n for n in ("rgba.png", "cmyk.jpg", "one_pixel.png")]
    serve = tf.saved_model.load(str(exported / "models" / SMALL)).signatures["serve_bytes"]
    got = serve(image_bytes=tf.constant([p.read_bytes() for p in paths]))
    want = models[SMALL].detect(paths, confidence_threshold=0.0)
    for i, one in enumerate(want):
        n = int(got["num_detections"][i])
        assert n == len(one["labels"])
        np.testing.assert_allclose(got["boxes"][i, :n], one["boxes"], atol=1e-2)
        np.testing.assert_allclose(got["confidence"][i, :n], one["confidence"], atol=1e-4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="JPEG"):
        serve(image_bytes=tf.constant([b"no picture"]))


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
        "serve": {"images": ["float32", shape]},
        "serve_uint8": {"images": ["uint8", shape]},
        "serve_bytes": {"image_bytes": ["string", [None]]},
    }


def test_what_lies_beside_the_model(exported):
    names = exported / "models" / SMALL / "assets.extra/class_names.txt"
    assert names.read_text().split() == CLASS_NAMES
    assert not (exported / "models" / RELATIVE / "assets.extra/class_names.txt").exists()
    detector = json.loads(
        (exported / "models" / RELATIVE / "assets.extra/detector.json").read_text()
    )
    assert detector == {"bounding_box_format": "rel_yxyx", "image_shape": [128, 64, 3]}


def test_unknown_formats_and_options(models, tmp_path):
    with pytest.raises(ValueError, match=r"tf_saved_model.*Received.*onnx"):
        models[SMALL].export(tmp_path / "model", format="onnx")
    with pytest.raises(ValueError, match="input_signature"):
        models[SMALL].export(tmp_path / "model", input_signature=[])
