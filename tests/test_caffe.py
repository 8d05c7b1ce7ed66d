"""Caffe's weight files: the reader, and the authors' networks against OpenCV and float64 code.

`golden/caffe/make_caffemodel.py` draws the weights and writes the files; every value of the golden
arrays was computed by another program. The networks whose arrays are not in the repository are
compared where `../shared` has them.
"""

import gzip
import json
import struct
import tracemalloc
from pathlib import Path

import keras
import numpy as np
import pytest
from golden.caffe import make_caffemodel as recipe

import keras_resnest as kr
from keras_resnest.backbones import (
    ResNet,
    ResNet101,
    VGG16Reduced,
    create_backbone,
    load_pretrained,
    read_state_dict,
)
from keras_resnest.backbones.weights.caffe import read_caffemodel
from keras_resnest.boxes.offsets import decode_boxes
from keras_resnest.detection import builders
from keras_resnest.detection.decoding import DetectionDecoder

FOLDER = Path(__file__).parent / "golden" / "caffe"
CASES, MANIFESTS = (
    json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    for name in ("networks", "manifests")
)

# === The reader ===


@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.glob("format/*.caffemodel")))
def test_reader_equals_protobuf(name):
    path = FOLDER / "format" / name
    expected = dict(np.load(FOLDER / "format" / "expected.npz"))
    layers = read_caffemodel(path)
    arrays = {f"{name}/{i}": a for name, blobs in layers.items() for i, a in enumerate(blobs)}
    if path.stem.startswith("new"):
        assert set(arrays) == set(expected)
    else:
        assert len(arrays) == 8
    for name, array in arrays.items():
        want = expected[name]
        assert array.dtype == ("float64" if "double" in path.stem else "float32")
        # A scalar is a vector of one where dimensions are four numbers.
        assert array.shape == want.shape or (want.shape, array.shape) == ((), (1,))
        assert np.array_equal(array.reshape(want.shape), want), name


def layer(*blobs: bytes) -> bytes:
    content = recipe.field_text(1, "conv1") + b"".join(recipe.field_bytes(7, b) for b in blobs)
    return recipe.field_bytes(100, content)


def blob(shape, values=b"") -> bytes:
    dims = recipe.field_bytes(1, b"".join(recipe.varint(n) for n in shape))
    return recipe.field_bytes(7, dims) + values


FOUR = recipe.field_bytes(5, struct.pack("<4f", 1, 2, 3, 4))
GOOD = layer(blob((2, 2), FOUR))
HOSTILE = {
    "empty": b"",
    "text": b'name: "VGG"\nlayer { name: "conv1" }\n' * 9,
    "zeros": bytes(1000),
    "no_layers": recipe.field_text(1, "VGG_ILSVRC_16_layers"),
    "no_arrays": layer(),
    "truncated": GOOD[:-1],
    "ends_in_a_number": GOOD + b"\xa2",
    "terabytes": recipe.tag(100, 2) + recipe.varint(1 << 42) + GOOD,
    "terabytes_of_values": layer(blob((1 << 40,), recipe.tag(5, 2) + recipe.varint(1 << 42))),
    "shape_of_terabytes": layer(blob((1 << 20, 1 << 20, 1 << 22), FOUR)),
    "shape_of_nothing": layer(blob((1 << 40, 0), b"")),
    "no_values": layer(b""),
    "negative_shape": layer(blob((2**64 - 2, 2), FOUR)),
    "shape_of_1000": layer(blob((1,) * 1000, recipe.field_float(5, 1.0))),
    "long_number": recipe.tag(100, 0) + b"\xff" * 11,
    "five_values": layer(blob((5,), FOUR)),
    "broken_values": layer(blob((1,), recipe.field_bytes(5, b"123"))),
    "values_as_numbers": layer(blob((4,), recipe.field_varint(5, 1) * 4)),
    "layer_as_number": recipe.field_varint(100, 7),
    "array_as_number": recipe.field_bytes(100, recipe.field_varint(7, 7)),
    "shape_as_number": layer(recipe.field_varint(7, 7)),
    "dimension_as_bytes": layer(recipe.field_bytes(1, b"1") + FOUR),
    "group": b"\x0b" * 10_000,
    "twice": GOOD + GOOD,
    "a_million_arrays": layer(*[b""] * 1_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_sentence(name, tmp_path):
    path = tmp_path / f"{name}.caffemodel"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{name}.caffemodel is (not|a)") as error:
        read_state_dict(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 3 * len(HOSTILE[name]) + 3_000_000


def test_unknown_fields_and_nesting_are_skipped(tmp_path):
    nested = b""
    for _ in range(3000):
        nested = recipe.field_bytes(9, nested)
    unknown = nested + recipe.field_float(11, 1.0) + b"\x61" + bytes(8) + recipe.field_varint(13, 1)
    path = tmp_path / "odd.caffemodel"
    path.write_bytes(unknown + recipe.field_bytes(100, unknown + GOOD[3:]) + unknown)
    assert np.array_equal(read_caffemodel(path)["conv1"][0], [[1, 2], [3, 4]])


@pytest.mark.parametrize("values", ["float", "double", "unpacked"])
def test_memory_is_three_times_the_file(values, tmp_path):
    array = np.arange(500_000, dtype="float32").reshape(500, 1000)
    path = tmp_path / "large.caffemodel"
    content = recipe.encode_layer("ip", "InnerProduct", [array], values=values, diff=True)
    path.write_bytes(content)
    tracemalloc.start()
    state = read_state_dict(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(state["ip.weight"], array)
    assert peak < 2 * len(content)  # the file itself is the third part


def test_statistics_and_colors(tmp_path):
    rng = np.random.default_rng(0)
    kernel, mean, variance = (rng.normal(size=s).astype("f") for s in ((4, 3, 5, 5), 4, 4))
    factor, zero = np.array([37.5], "f"), np.zeros(1, "f")
    layers = {"conv1": [kernel], "bn": [mean, variance, factor], "unused": [mean, variance, zero]}
    path = tmp_path / "x.caffemodel"
    path.write_bytes(b"".join(recipe.encode_layer(n, "X", blobs) for n, blobs in layers.items()))
    state = read_state_dict(path)
    assert np.array_equal(state["conv1.weight"][:, 0], kernel[:, 2])
    np.testing.assert_allclose(state["bn.running_var"], variance / 37.5, rtol=1e-6)
    assert not state["unused.running_mean"].any() and not state["unused.running_var"].any()


# === Networks ===

BACKBONE_MAPS = {
    **{f"conv{n}": f"conv{n}" for n in ("1_2", "4_3")},
    **{"pool1": "pool1", "pool2": "pool2", "pool5": "pool5", "fc6": "fc6", "fc7": "fc7"},
}
RESNET_MAPS = {
    **{"conv1": "relu", "pool1": "maxpool", "res2a": "layer1_0_relu", "res2c": "layer1_2_relu"},
    **{"res3b3": "layer2_3_relu", "res4b22": "layer3_22_relu", "res5c": "layer4_2_relu"},
}
DETECTOR_MAPS = {
    **{"conv4_3_norm": "l2_normalization_p3", "conv5_3_norm": "l2_normalization_p4"},
    **{"conv6_2": "conv6_2_relu", "res6": "res6_relu"},
    **{"resres3b3_relu_inter": "arm_p3_relu", "resP3_inter": "odm_p3_relu"},
    **{f"P{level}": f"tcb_p{level}" for level in range(3, 7)},
}
OUTPUTS = {
    "arm_loc": "arm_boxes",
    "arm_conf": "arm_objectness",
    "odm_loc": "odm_boxes",
    "odm_conf": "odm_logits",
}


def write_file(path, manifest, seed=1, crc32=None, **options):
    blobs = recipe.make_blobs(manifest, seed)
    if crc32 is not None:
        assert recipe.crc32_of(b for layer in blobs.values() for b in layer) == crc32
    recipe.write_caffemodel(path, manifest, blobs, **options)


def golden_case(key, path, request):
    """Facts and arrays of a network, and its image; its weights are written to the path."""
    folder = FOLDER
    if not (FOLDER / f"{key}.npz").exists():
        folder = request.getfixturevalue("shared") / "golden" / "caffe" / "networks"
    facts = CASES[key]
    write_file(path, MANIFESTS[Path(facts["manifest"]).stem], 1, facts["weights_crc32"])
    image = recipe.make_image(facts["image"]["height"], facts["image"]["width"], 1)
    return facts, dict(np.load(folder / f"{key}.npz")), image[None, ..., ::-1]  # RGB


def check(arrays, facts, name, values, tolerance):
    """Compares a channels_last map, or an output (anchors, values), at the places of the arrays."""
    values = np.asarray(values)
    if values.ndim == 4:
        values = values[0].transpose(2, 0, 1)
    assert list(values.shape) == facts[name]["shape"], name
    error = np.abs(values[tuple(arrays[f"{name}_index"].T)] - arrays[f"{name}_value"]).max()
    assert error < tolerance * facts[name]["absmax"], (name, error / facts[name]["absmax"])


def check_maps(arrays, facts, model, layers, image, tolerance):
    """Returns the number of maps, and the outputs."""
    wanted = {n: model.get_layer(layer).output for n, layer in layers.items() if n in facts["maps"]}
    found, outputs = keras.Model(model.input, [wanted, model.output])(image, training=False)
    for name, values in found.items():
        check(arrays, facts["maps"], name, values, 1e-4 if name[0] != "P" else tolerance)
    return len(found), outputs


def test_backbone_of_the_old_format(tmp_path, request):
    facts, arrays, image = golden_case("vgg16_fc_reduced_v1", tmp_path / "x.caffemodel", request)
    model = VGG16Reduced(weights=tmp_path / "x.caffemodel")
    checked, _ = check_maps(arrays, facts, model, BACKBONE_MAPS, image, 1e-4)
    assert checked == len(facts["maps"])


@pytest.mark.parametrize(
    "key",
    [
        "vgg16_voc_320",
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in (
                *("vgg16_voc_512", "vgg16_coco_320"),
                *("resnet101_coco_320", "resnet101_coco_512"),
            )
        ),
    ],
)
def test_detector_equals_the_authors_network(key, tmp_path, request):
    path = tmp_path / "x.caffemodel"
    facts, arrays, image = golden_case(key, path, request)
    network, _, side = key.split("_")
    model = getattr(builders, f"refinedet{side}_{network}")(weights=path)
    assert model.num_classes == facts["num_classes"] - 1 == len(model.class_names)
    ends = (
        ("person", "bird", "toothbrush") if "coco" in key else ("aeroplane", "person", "tvmonitor")
    )
    assert tuple(model.class_names[i] for i in (0, 14, -1)) == ends
    tolerance = 5e-4 if network == "vgg16" else 1e-4
    maps = BACKBONE_MAPS if network == "vgg16" else RESNET_MAPS
    of_backbone, _ = check_maps(arrays, facts, model.backbone, maps, image, tolerance)
    of_heads, outputs = check_maps(arrays, facts, model, DETECTOR_MAPS, image, tolerance)
    assert of_backbone + of_heads == len(facts["maps"]) - 2  # TL3_2 and P5-up: inside the TCBs
    for theirs, ours in OUTPUTS.items():
        values = np.asarray(outputs[ours])[0]
        check(arrays, facts["outputs"], theirs, values, 1e-4 if theirs[0] == "a" else tolerance)
    check_detections(model, outputs, arrays, int(side))


def check_detections(model, outputs, arrays, side):
    raw = {name: np.asarray(value)[0] for name, value in outputs.items()}
    boxes = decode_boxes(raw["odm_boxes"], decode_boxes(raw["arm_boxes"], model.anchors))
    places, want = arrays["boxes_index"], arrays["boxes_value"]
    error = np.abs(np.asarray(boxes)[places] / side - want) / (1 + np.abs(want))
    assert error.max() < 5e-4
    config = model.decoder.get_config()
    assert (config["pre_nms_top_k"], config["max_detections"]) == (1000, 500)
    model.decoder = DetectionDecoder(**{**config, "clip_to_image": False})
    found = {name: np.asarray(value)[0] for name, value in model.decode(outputs).items()}
    ours = np.column_stack([found["labels"] + 1, found["confidence"], found["boxes"] / side])
    near = np.abs(ours[None] - arrays["detections"][:, None]) < (0.5, *[5e-4] * 5)
    assert near.all(axis=2).any(axis=1).sum() >= 490


@pytest.mark.slow  # 45 million weights
def test_resnet_classifier_in_the_old_format(tmp_path, monkeypatch):
    """The detector's backbone, whose maps are known, and fc1000."""
    facts, arrays = CASES["resnet101_coco_320"], dict(np.load(FOLDER / "resnet101_coco_320.npz"))
    types = {**recipe.V1_TYPES, "BatchNorm": 0, "Scale": 0}
    monkeypatch.setattr(recipe, "V1_TYPES", types)
    layers = MANIFESTS["resnet101_coco"]["layers"]
    end = [layer["name"] for layer in layers].index("res5c_branch2c") + 3
    shapes = [{"shape": [1000, 2048], "kind": "dense"}, {"shape": [1000], "kind": "bias"}]
    top = {"name": "fc1000", "type": "InnerProduct", "blobs": shapes}
    layers = [x for x in layers[:end] if x["type"] in recipe.V1_TYPES] + [top]
    manifest = {"name": "ResNet-101", "format": "layers", "layers": layers}
    path = tmp_path / "x.caffemodel"
    write_file(path, manifest)
    image = recipe.make_image(320, 320, 1)[None, ..., ::-1]
    model = ResNet101(weights=path, classifier_activation=None)
    checked, logits = check_maps(arrays, facts, model, RESNET_MAPS, image, 1e-4)
    assert checked == len(RESNET_MAPS)
    last = keras.Model(model.input, model.get_layer("layer4_2_relu").output)
    features = np.asarray(last(image, training=False))
    kernel, bias = (
        recipe.make_blob("fc1000", i, s["shape"], s["kind"], 1) for i, s in enumerate(shapes)
    )
    want = features.mean(axis=(1, 2)) @ kernel.T + bias
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
    ResNet101(weights=path, include_top=False)


@pytest.mark.parametrize("side", [20, 21, 22, 23])
def test_pooling_of_the_stem_rounds_up(side):
    model = ResNet([8], [1], [1], stem_width=4, caffe_stem=True, stride_in_1x1=True)
    layers = [model.get_layer(name).output for name in ("rescaling", "relu", "maxpool")]
    image = np.random.default_rng(side).uniform(0, 255, (1, side, side, 3)).astype("float32")
    inputs, x, pooled = (np.asarray(y) for y in keras.Model(model.input, layers)(image))
    np.testing.assert_allclose(inputs, image - (123, 117, 104), atol=1e-4)
    starts = range(0, -(-(x.shape[1] - 3) // 2) * 2 + 1, 2)  # Caffe's formula
    want = [[x[:, i : i + 3, j : j + 3].max(axis=(1, 2)) for j in starts] for i in starts]
    assert np.array_equal(pooled, np.array(want).transpose(2, 0, 1, 3))


# === Files that do not fit ===


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A VGG-16 detector for VOC that lacks most layers."""
    path = tmp_path_factory.mktemp("caffe") / "voc.caffemodel"
    layers = [
        layer
        for layer in MANIFESTS["vgg16_voc"]["layers"]
        if layer["name"] in ("conv1_1", "P3_mbox_loc") or layer["name"][2:] == "_mbox_conf"
    ]
    write_file(path, {"name": "x", "format": "layer", "layers": layers})
    return path


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda f: builders.refinedet320_vgg16(3, weights=f), "is for 20 classes.*num_classes=3"),
        (
            lambda f: builders.refinedet320_vgg16(class_names=["cat"], weights=f),
            "is for 20 classes.*num_classes=1",
        ),
        (
            lambda f: builders.refinedet320_vgg16(weights=f),
            "is for another network than refinedet320_vgg16: 86 arrays differ.*missing: conv1_2",
        ),
        (lambda f: builders.refinedet_tiny(weights=f), "Caffe files are for .* resnest14_tiny"),
        (lambda f: create_backbone("vgg16", weights=f), "Caffe files are for .* vgg16$"),
        (
            lambda f: builders.refinedet_plus_plus512_vgg16(weights=f),
            r"is for RefineDet\. Received: RefineDet\+\+",
        ),
        (lambda f: VGG16Reduced(weights=f), "left over: P3_mbox_loc.weight"),
        (
            lambda f: load_pretrained(ResNet([8], [1], [1]), f, "resnet101"),
            "is for a network with .*stride_in_1x1.*Received: one with .*False",
        ),
        (
            lambda f: VGG16Reduced(weights=f.with_name("absent.caffemodel")),
            "absent.caffemodel",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(file, build, match):
    with pytest.raises(ValueError, match=match) as error:
        build(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [None, (), (63, 256, 1, 1), (30_000, 1, 1, 1)])
def test_a_file_without_class_heads_is_no_detector(tmp_path, shape):
    layers = {} if shape is None else {f"P{i}_mbox_conf": np.ones(shape, "f") for i in (3, 4, 5, 6)}
    content = [recipe.encode_layer(name, "Convolution", [a]) for name, a in layers.items()]
    path = tmp_path / "x.caffemodel"
    path.write_bytes(b"".join([GOOD, *content]))
    with pytest.raises(ValueError, match=r"x.caffemodel holds no RefineDet.* P3_mbox_conf"):
        builders.refinedet320_vgg16(weights=path)


def test_scalars_are_no_kernels(tmp_path):
    one = np.float32(1)
    content = [recipe.encode_layer(n, "X", [one] * 2) for n in ("conv1_1", "conv1_2", "fc7")]
    content.append(recipe.encode_layer("conv2_1", "X", [one] * 3))
    (tmp_path / "x.caffemodel").write_bytes(b"".join(content))
    with pytest.raises(ValueError, match=r"missing: conv2_1_weight.*wrong shape.*left over"):
        VGG16Reduced(weights=tmp_path / "x.caffemodel")


# === Published files ===


def test_published_detectors_are_listed_and_looked_up(tmp_path, monkeypatch):
    files = kr.list_models(kind="detector")
    assert len(files) == 14 == len({f.source for f in files})
    assert all(f.name in builders.BUILDERS for f in files)
    best = {(f.name, f.weights): f.map for f in files}
    assert best["refinedet512_vgg16", "voc0712"] == 81.8
    (row,) = kr.list_models("RefineDet320_resnet*", kind="detector")
    text = str(kr.list_models("refinedet320_resnet*", kind="detector"))
    assert text.count("\n") == 2 and "| coco | COCO trainval35k | COCO test-dev | 32.0 |" in text
    with pytest.raises(ValueError, match="`kind` must be one of"):
        kr.list_models(kind="detectors")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{row.file} .* must be in {tmp_path}.* get .*id=1yrCf"):
        builders.refinedet320_resnet101(weights="coco")
    for wrong in ("voc07", True, ["voc0712"]):
        with pytest.raises(ValueError, match=r"must be None, .* tag \(voc0712, .*Received"):
            builders.refinedet320_vgg16(weights=wrong)
    with pytest.raises(ValueError, match=r"refinedet_tiny must be None, the path of a file\. "):
        builders.refinedet_tiny(weights="coco")
    folder = tmp_path / "models" / "keras_resnest"
    folder.mkdir(parents=True)
    (folder / row.file).write_bytes(GOOD)
    with pytest.raises(ValueError, match=f"{row.file} holds no RefineDet"):
        builders.refinedet320_resnet101(weights="coco")
