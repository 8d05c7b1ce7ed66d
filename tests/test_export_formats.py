"""ONNX, OpenVINO and LiteRT: their runtimes alone find what `predict` and `detect` find."""

import contextlib
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, rectangles
from exported_models import DECODER, model_of

from keras_resnest.backbones import ResNet, create_backbone
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.images import load_image, resize_image
from keras_resnest.serving import NumpyDetectionDecoder, decoder_numpy, export_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("models are exported by TensorFlow", allow_module_level=True)

PROGRAM = Path(__file__).parent / "programs" / "run_model_files.py"
SHAPE = (64, 128, 3)  # of the detector
MAX = DECODER.max_detections
DETECTIONS = ("boxes", "confidence", "labels", "num_detections")
RAW = ("arm_boxes", "arm_objectness", "odm_boxes", "odm_logits")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
PACKAGES = {
    "onnx": ("tf2onnx", "onnxruntime"),
    "openvino": ("openvino", "tf2onnx", "onnxruntime"),  # the latter two for int8
    "litert": ("ai_edge_litert",),
}
BATCHES = {"onnx": (1, 3), "openvino": (1, 3), "litert": (1,)}
# Largest difference, relative to the largest output; seen: 5e-3.
FLOAT16_TOLERANCE = 1e-2
INT8_CORRELATION = 0.95  # of outputs; seen: 0.99 (ONNX) and 0.975 (LiteRT)


@pytest.fixture(scope="module")
def detector():
    return model_of("detector")


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(1)
    return create_backbone("resnest14_tiny", classes=3, image_shape=(64, 64, 3))


@pytest.fixture(scope="module")
def open_classifier():
    """For images of any size."""
    keras.utils.set_random_seed(1)
    arguments = {"block_type": "basic", "stem_width": 8, "include_top": True, "classes": 4}
    return ResNet([8, 16], [1, 1], [1, 2], **arguments)


def random_images(shape=SHAPE, count=3, seed=3):
    return rectangles(count, shape, seed=seed, objects=1)[0]


PHOTOS = ("dog_bicycle.jpg", "eagle.jpg", "person_dog_horse.jpg")


@pytest.fixture(scope="module")
def photos():
    """Paths of photographs; none where they are not beside the project."""
    from conftest import SHARED

    paths = [SHARED / "data/photos" / name for name in PHOTOS]
    return [path for path in paths if path.is_file()]


@contextlib.contextmanager
def noise():
    """List of the Python warnings and logged warnings of a block."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
    finally:
        logging.getLogger().removeHandler(handler)
    messages += [str(warning.message) for warning in caught]


class Exported:
    """A folder with the models of one format, and what their runtime finds with them."""

    def __init__(self, folder: Path, format: str, models: dict, images: dict):
        self.folder, self.format, self.suffix = folder, format, SUFFIXES[format]
        with noise() as self.noise:
            for name, (model, options) in models.items():
                model.export(self.path(name), format=format, **options)
        for name, value in images.items():
            np.save(folder / f"{name}.npy", value)
        (folder / "runtime.json").write_text(json.dumps([self.suffix, BATCHES[format]]))
        command = [sys.executable, PROGRAM, decoder_numpy.__file__, folder, format]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        self.found = {}
        with np.load(folder / "found.npz") as arrays:
            for key, value in arrays.items():
                model, images_name, batch, output = key.split("/")
                self.found.setdefault((model, images_name, int(batch)), {})[output] = value

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    def size(self, name: str) -> int:
        """Bytes of all files that hold the network."""
        weights = self.path(name).with_suffix(".bin")
        return self.path(name).stat().st_size + (weights.stat().st_size if weights.exists() else 0)

    def batches(self, name: str, images: str = "images") -> list[dict]:
        return [self.found[name, images, batch] for batch in BATCHES[self.format]]


@pytest.fixture(scope="module", params=list(SUFFIXES))
def exported(request, tmp_path_factory, detector, classifier, open_classifier, photos):
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    models = {
        "detector": (detector, {}),
        "detector_raw": (detector, {"decode": False}),
        "detector_float16": (detector, {"decode": False, "precision": "float16"}),
        "classifier": (classifier, {"class_names": CLASS_NAMES}),
        "aligned": (model_of("aligned"), {}),
        "aware": (model_of("aware"), {}),
        "aware_raw": (model_of("aware"), {"decode": False}),
    }
    if request.param == "openvino":
        models["detector_decoded16"] = (detector, {"precision": "float16"})
    calibration = {"precision": "int8", "representative_images": random_images(count=12, seed=9)}
    models["detector_int8"] = (detector, {"decode": False, **calibration})
    if request.param == "onnx":
        models["detector_decoded8"] = (detector, calibration)
    images = {f"{name}_images": random_images() for name in ("detector", "aligned", "aware")}
    images["classifier_images"] = random_images((64, 64, 3))
    if request.param != "litert":
        models["open"] = (open_classifier, {})
        images["open_images"] = random_images((40, 56, 3))
        images["open_images_others"] = random_images((72, 48, 3))
    if photos:
        resized = [resize_image(load_image(path), *SHAPE[:2]) for path in photos]
        images["detector_images_photos"] = np.array(resized, "float32")
    folder = tmp_path_factory.mktemp(request.param)
    return Exported(folder, request.param, models, images)


def assert_same_detections(got, want):
    assert set(got) == set(DETECTIONS)
    assert got["labels"].dtype == got["num_detections"].dtype == np.int32
    np.testing.assert_array_equal(got["num_detections"], want["num_detections"])
    np.testing.assert_array_equal(got["labels"], want["labels"])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-4)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=1e-2)


# === The same results ===


@pytest.mark.parametrize("name", ["detector", "aligned"])
def test_detections(exported, name):
    want = model_of(name).predict(random_images(), verbose=0)
    assert ((want["num_detections"] > 0) & (want["num_detections"] < MAX)).all()
    for got in exported.batches(name):
        assert_same_detections(got, want)


def test_the_aligned_detector_needs_its_suppression():
    """With greedy suppression it finds less: an export without DIoU would be noticed."""
    model = model_of("aligned")
    greedy = DetectionDecoder(**{**model.decoder.get_config(), "suppression": "greedy"})
    outputs = model(random_images(), training=False)
    fewer = np.array(greedy(outputs, model.anchors, SHAPE)["num_detections"])
    assert (fewer < model.predict(random_images(), verbose=0)["num_detections"]).any()


def test_raw_outputs(exported, detector):
    want = detector(random_images(), training=False)
    for got in exported.batches("detector_raw"):
        assert set(got) == set(RAW)
        for name in RAW:
            assert got[name].dtype == np.float32
            np.testing.assert_allclose(got[name], want[name], atol=1e-4)


def test_raw_outputs_decoded_by_numpy(exported, detector):
    want = detector.predict(random_images(), verbose=0)
    for got in exported.batches("detector_raw_decoded"):
        assert_same_detections(got, want)


def test_predicted_iou_and_other_suppressions(exported):
    """The graph, and numpy with the raw outputs, find what `predict` finds."""
    soft = model_of("aware")
    want = soft.predict(random_images(), verbose=0)
    assert ((want["num_detections"] > 0) & (want["num_detections"] < MAX)).all()
    for name in ("aware", "aware_raw_decoded"):
        for got in exported.batches(name):
            assert_same_detections(got, want)
    raw = soft(random_images(), training=False)["odm_iou"]
    for got in exported.batches("aware_raw"):
        assert set(got) == {*RAW, "odm_iou"}
        np.testing.assert_allclose(got["odm_iou"], raw, atol=1e-4)


def test_classifier(exported, classifier):
    want = classifier.predict(random_images((64, 64, 3)), verbose=0)
    assert np.ptp(want, axis=0).max() > 1e-3  # the images differ
    for got in exported.batches("classifier"):
        assert set(got) == {"predictions"} and got["predictions"].dtype == np.float32
        np.testing.assert_allclose(got["predictions"], want, atol=1e-5)


def test_classifier_of_any_size(exported, open_classifier):
    if exported.format == "litert":
        pytest.skip("LiteRT takes one size")
    for name, shape in (("images", (40, 56, 3)), ("others", (72, 48, 3))):
        want = open_classifier.predict(random_images(shape), verbose=0)
        for got in exported.batches("open", name):
            np.testing.assert_allclose(got["predictions"], want, atol=1e-5)


def test_photographs(exported, detector, photos):
    """What `detect` finds, in the pixels of each photograph."""
    if not photos:
        pytest.skip("the photographs are not beside the project")
    want = detector.detect(photos, confidence_threshold=0.0)
    for got in exported.batches("detector", "photos"):
        for i, (path, one) in enumerate(zip(photos, want, strict=True)):
            count = got["num_detections"][i]
            assert 0 < count == len(one["labels"])
            height, width, _ = load_image(path).shape
            scale = np.array([width, height, width, height]) / [128, 64, 128, 64]
            np.testing.assert_array_equal(got["labels"][i, :count], one["labels"])
            np.testing.assert_allclose(got["confidence"][i, :count], one["confidence"], atol=1e-4)
            # A hundredth of a pixel of the network's image.
            np.testing.assert_allclose(got["boxes"][i, :count], one["boxes"] / scale, atol=1e-2)
            assert (got["boxes"][i, count:] == -1).all()


# === Smaller files ===


def test_float16(exported, detector):
    want = detector(random_images(), training=False)
    for got in exported.batches("detector_float16"):
        for name in RAW:
            assert got[name].dtype == np.float32
            difference = np.abs(got[name] - want[name]).max()
            # Something was rounded, and not more than float16 rounds.
            assert 1e-6 < difference / np.abs(want[name]).max() < FLOAT16_TOLERANCE
    assert exported.size("detector_float16") < 0.55 * exported.size("detector_raw")
    if exported.format == "openvino":  # which leaves much in float32 where shapes depend on it
        assert exported.size("detector_decoded16") < 0.6 * exported.size("detector")


def test_int8(exported, detector):
    want = detector(random_images(), training=False)
    for got in exported.batches("detector_int8"):
        assert set(got) == set(RAW)
        for name in RAW:
            assert got[name].dtype == np.float32
            correlation = np.corrcoef(got[name].ravel(), np.ravel(want[name]))[0, 1]
            assert INT8_CORRELATION < correlation < 0.999999
    # The last convolutions are not quantized, and OpenVINO's text of the graph is long.
    ratio = 0.3 if exported.format == "litert" else 0.4
    assert exported.size("detector_int8") < ratio * exported.size("detector_raw")


def test_int8_with_detections(exported):
    """The detections equal those decoded from the outputs of the quantized network."""
    if exported.format != "onnx":
        pytest.skip("the others need decode=False for int8")
    facts = f"{exported.path('detector_int8')}.json"
    decode = NumpyDetectionDecoder.from_files(facts)
    raw, found = exported.batches("detector_int8"), exported.batches("detector_decoded8")
    for got, outputs in zip(found, raw, strict=True):
        assert_same_detections(got, decode(outputs))


# === What lies beside the model ===


def test_facts(exported, detector):
    facts = json.loads((exported.folder / f"detector_raw{exported.suffix}.json").read_text())
    assert facts["task"] == "detection" and facts["image_shape"] == list(SHAPE)
    assert facts["class_names"] == CLASS_NAMES and facts["bounding_box_format"] == "xyxy"
    assert facts["decoder"]["max_detections"] == MAX
    assert facts["decode"] is False and facts["precision"] == "float32"
    anchors = np.load(exported.folder / facts["anchors"])
    np.testing.assert_array_equal(anchors, np.asarray(detector.anchors))
    facts = json.loads((exported.folder / f"detector{exported.suffix}.json").read_text())
    assert facts["decode"] is True and "anchors" not in facts
    facts = json.loads((exported.folder / f"detector_float16{exported.suffix}.json").read_text())
    assert facts["precision"] == "float16"
    facts = json.loads((exported.folder / f"classifier{exported.suffix}.json").read_text())
    assert facts["task"] == "classification" and facts["class_names"] == CLASS_NAMES


def tensors_of(path):
    """Name, element type and dimensions (-1: any) of the inputs and outputs of a model file."""
    if path.suffix == ".onnx":
        graph = pytest.importorskip("onnx").load(path).graph
        types = {1: "FP32", 6: "INT32"}
        rows = [(t.name, t.type.tensor_type) for t in (*graph.input, *graph.output)]
        return [
            (name, types[t.elem_type], [d.dim_value or -1 for d in t.shape.dim]) for name, t in rows
        ]
    model = pytest.importorskip("openvino").Core().read_model(path)
    types, tensors = {"f32": "FP32", "i32": "INT32"}, (*model.inputs, *model.outputs)
    shapes = [[side.get_max_length() for side in t.partial_shape] for t in tensors]
    kinds = [types[t.element_type.to_string()] for t in tensors]
    return list(zip([t.any_name for t in tensors], kinds, shapes, strict=True))


@pytest.mark.parametrize("name", ["detector", "aware_raw", "classifier", "open"])
def test_triton_knows_the_tensors(exported, name):
    if exported.format == "litert":
        pytest.skip("there is no server for LiteRT")
    path = exported.path(name)
    lines = path.with_name(f"{path.name}.config.pbtxt").read_text().splitlines()
    backend = {"onnx": "onnxruntime", "openvino": "openvino"}[exported.format]
    assert f'backend: "{backend}"' in lines and f'default_model_filename: "{path.name}"' in lines
    described = []
    for line in lines:
        if match := re.match(r'\w+ { name: "(\w+)", data_type: TYPE_(\w+), dims: (\[.*?\])', line):
            dims = [] if "reshape: { shape: [] }" in line else json.loads(match[3])
            described.append((match[1], match[2], [-1, *dims]))
    assert sorted(described) == sorted(tensors_of(path))


def test_openvino_model_server_finds_the_model(exported):
    if exported.format == "openvino":
        text = (exported.folder / "detector.xml.ovms.json").read_text()
        (model,) = json.loads(text)["model_config_list"]
        assert model == {"config": {"name": "detector", "base_path": "/models/detector"}}


def test_no_other_files(exported):
    models = {path.stem for path in exported.folder.glob(f"*{exported.suffix}")}
    wanted = {
        f"{stem}{end}" for stem in models for end in (exported.suffix, f"{exported.suffix}.json")
    }
    if exported.format != "litert":
        wanted |= {f"{stem}{exported.suffix}.config.pbtxt" for stem in models}
    if exported.format == "openvino":
        wanted |= {f"{stem}{end}" for stem in models for end in (".bin", ".xml.ovms.json")}
    raw = {stem for stem in models if stem.endswith(("_raw", "_float16", "_int8"))}
    wanted |= {f"{stem}{exported.suffix}.anchors.npy" for stem in raw}
    ours = {"found.npz", "runtime.json"} | {p.name for p in exported.folder.glob("*_images*.npy")}
    assert {path.name for path in exported.folder.iterdir()} - ours == wanted


def test_quiet(exported):
    assert exported.noise == []


# === Errors ===

ERRORS = {
    "suffix": ({"format": "onnx"}, "model.tflite", r"`filepath`.*ends with '.onnx'.*model.tflite"),
    "no suffix": ({"format": "litert"}, "model", r"`filepath`.*ends with '.tflite'"),
    "weights": ({"format": "openvino"}, "model.bin", r"`filepath`.*ends with '.xml'"),
    "onnx bfloat16": (
        {"format": "onnx", "precision": "bfloat16"},
        "model.onnx",
        r"`precision` of onnx must be one of float32, float16, int8. .*'bfloat16'",
    ),
    "openvino bfloat16": (
        {"format": "openvino", "precision": "bfloat16"},
        "model.xml",
        r"`precision` of openvino must be one of float32, float16, int8\. ",
    ),
    "litert float64": (
        {"format": "litert", "precision": "float64"},
        "model.tflite",
        r"`precision` of litert",
    ),
    "saved model float16": ({"precision": "float16"}, "model", r"`precision` of tf_saved_model"),
    "int8 without images": (
        {"format": "onnx", "precision": "int8"},
        "model.onnx",
        r"`representative_images` is required for .*=None",
    ),
    "images without int8": (
        {"format": "onnx", "representative_images": np.zeros((2, *SHAPE))},
        "model.onnx",
        r"`representative_images` is required for .*precision='float32'",
    ),
    "images of another size": (
        {
            "format": "onnx",
            "precision": "int8",
            "representative_images": np.zeros((2, 64, 64, 3)),
        },
        "model.onnx",
        r"`representative_images` must be \(n, 64, 128, 3\).*\(2, 64, 64, 3\)",
    ),
    "one image": (
        {"format": "onnx", "precision": "int8", "representative_images": np.zeros(SHAPE)},
        "model.onnx",
        r"`representative_images` must be \(n, 64, 128, 3\).*\(64, 128, 3\)",
    ),
    "no images": (
        {"format": "onnx", "precision": "int8", "representative_images": np.zeros((0, *SHAPE))},
        "model.onnx",
        r"`representative_images` must be \(n, 64, 128, 3\).*\(0, ",
    ),
    "raw saved model": ({"decode": False}, "model", r"`raw_outputs`.*decode=False"),
    "decoded int8 in OpenVINO": (
        {
            "format": "openvino",
            "precision": "int8",
            "representative_images": np.zeros((2, *SHAPE)),
        },
        "model.xml",
        r"decode=False.*NumpyDetectionDecoder",
    ),
    "decoded int8": (
        {
            "format": "litert",
            "precision": "int8",
            "representative_images": np.zeros((2, *SHAPE)),
        },
        "model.tflite",
        r"decode=False.*NumpyDetectionDecoder",
    ),
    "names for a detector": (
        {"format": "onnx", "class_names": CLASS_NAMES},
        "model.onnx",
        "RefineDet takes nothing besides the arguments .*Received: class_names",
    ),
    "size for a detector": (
        {"format": "openvino", "image_shape": SHAPE},
        "model.xml",
        r"Received: image_shape",
    ),
    "unknown": ({"format": "onnx", "opset": 11}, "model.onnx", r"Received: opset"),
}
CLASSIFIER_ERRORS = {
    "too few names": ({"class_names": ["a", "b"]}, r"`class_names` must hold 3 .*Received: 2"),
    "another size": ({"image_shape": (32, 32, 3)}, r"`image_shape`.*\(64, 64, 3\).*\(32, 32, 3\)"),
    "no channels": ({"image_shape": (64, 64)}, r"`image_shape`.*Received: image_shape=\(64, 64\)"),
    "a number": ({"image_shape": 64}, r"`image_shape`.*Received: image_shape=64"),
    "crop": ({"crop_ratio": 0.0}, r"`crop_ratio`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_detector(detector, tmp_path, name):
    options, filename, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        detector.export(tmp_path / "new" / filename, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CLASSIFIER_ERRORS)
def test_errors_of_a_classifier(classifier, tmp_path, name):
    options, message = CLASSIFIER_ERRORS[name]
    for format, suffix in (("tf_saved_model", ""), *SUFFIXES.items()):
        with pytest.raises(ValueError, match=message):
            classifier.export(tmp_path / f"model{suffix}", format=format, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_not_replaced(classifier, tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ValueError, match=r"`filepath`.*must be a file"):
        classifier.export(tmp_path / "model.onnx", format="onnx")


class Digamma(keras.layers.Layer):
    """An operation that no runtime but TensorFlow has."""

    def call(self, inputs):
        import tensorflow as tf

        return tf.math.digamma(inputs)

    def compute_output_shape(self, input_shape):
        return input_shape


def inconvertible():
    images = keras.Input((4, 4, 3))
    model = keras.Model(images, Digamma()(images))
    model.data_format = "channels_last"
    return model


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_failed_conversion_changes_nothing(format, tmp_path, capfd):
    for package in PACKAGES[format]:
        pytest.importorskip(package)
    path = tmp_path / f"model{SUFFIXES[format]}"
    path.write_text("the model of yesterday")
    with pytest.raises(Exception, match="Digamma"):
        export_model(inconvertible(), path, format=format)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "the model of yesterday"


# === Missing packages ===


@pytest.mark.parametrize(
    ("package", "format", "precision"),
    [
        ("tf2onnx", "onnx", "float32"),
        ("onnx", "onnx", "float16"),
        ("onnxruntime", "onnx", "int8"),
        ("openvino", "openvino", "float32"),
        ("onnxruntime", "openvino", "int8"),
    ],
)
def test_a_missing_package_is_named_before_the_conversion(
    package, format, precision, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    options = {"representative_images": np.zeros((1, 4, 4, 3))} if precision == "int8" else {}
    with pytest.raises(ModuleNotFoundError, match=r'pip install "keras_resnest\[export\]"') as e:
        export_model(
            inconvertible(), tmp_path / f"new/m{SUFFIXES[format]}", format, precision, **options
        )
    assert e.value.name == package and package in str(e.value)
    assert list(tmp_path.iterdir()) == []
