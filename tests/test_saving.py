"""Saving a detector: whole models, weights alone, and training that goes on after loading."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from detectors import CLASS_NAMES, WHOLE, rectangles, small_backbone, small_detector

from keras_resnest import layers
from keras_resnest.backbones import ResNet
from keras_resnest.backbones.weights.torch_names import _named_variables, load_torch_state_dict
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.cli.common import load_keras_file
from keras_resnest.detection.builders import refinedet_tiny
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import LOSS_NAMES, RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet

PROGRAM = Path(__file__).parent / "programs" / "load_models.py"
OUTPUTS = ("boxes", "confidence", "labels", "num_detections")


def custom_detector():
    """Every part unlike the default, with numpy numbers where one easily gets them."""
    keras.utils.set_random_seed(3)
    return RefineDet(
        num_classes=np.int64(3),
        backbone=small_backbone("another"),
        image_shape=[64, 128, 3],
        bounding_box_format="center_xywh",
        class_names=np.array(CLASS_NAMES),
        anchor_generator=AnchorGenerator(sizes=np.array([16, 32, 64, 128]), clip=True),
        heads=RefineDetHeads(np.int32(16)),
        detection_loss=RefineDetLoss(BoxMatcher(np.float32(0.6)), 2.0, variances=(0.1, 0.25)),
        decoder=DetectionDecoder(max_detections=np.int64(7), variances=np.array([0.1, 0.25])),
        name="custom",
    )


@pytest.fixture(scope="module")
def models():
    trained = small_detector(heads=WHOLE)
    # Eager steps, since tracing a training graph takes longer than the rest of this file.
    trained.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.ExponentialDecay(1e-3, 1, 0.5), global_clipnorm=10.0
        ),
        run_eagerly=True,
    )
    images, truth = rectangles(2)
    for _ in range(2):
        trained.train_on_batch(images, truth)
        trained.reset_metrics()
    return {"trained": trained, "custom": custom_detector()}


@pytest.fixture(scope="module")
def networks():
    """A backbone and a model of our layers, with images for each."""
    arguments = {"radix": 2, "stem_width": 4, "deep_stem": True, "avg_down": True, "avd": "after"}
    arguments |= {"dropblock_rate": 0.1, "include_top": True, "classes": 3}
    resnet = ResNet([8, 16], [2, 1], [1, 2], **arguments)
    resnet.compile("sgd", "sparse_categorical_crossentropy")
    inputs = keras.Input((8, 8, 4))
    x = layers.SplitAttention(8, radix=2, cardinality=2, dropblock_rate=0.1)(inputs)
    x = layers.L2Normalization(10.0)(layers.DropBlock2D(0.1, 3)(x))
    upper = layers.GroupedConv2D(8, 3, 2, "same", groups=4)(x)
    upper = layers.TransferConnectionBlock(8)(upper)
    x = layers.TransferConnectionBlock(8, use_batch_norm=True)(x, upper)
    images = np.random.default_rng(0).uniform(0, 1, (2, 35, 35, 4)).astype("float32")
    return {
        "resnet": (resnet, 255 * images[..., :3]),
        "layers": (keras.Model(inputs, x), images[:, :8, :8]),
    }


@pytest.fixture(scope="module")
def saved(models, networks, tmp_path_factory):
    """Folder with the models and what the fresh process has found, and what was to be found."""
    root = tmp_path_factory.mktemp("saving")
    images, truth = rectangles(2)
    np.savez(root / "batch.npz", images=images, **truth)
    want = {}
    for name, model in models.items():
        model.save(root / f"{name}.keras")
        for output, value in model.predict(images, verbose=0).items():
            want[f"{name}/{output}"] = value
    for name, (network, inputs) in networks.items():
        network.save(root / f"{name}.keras")
        np.save(root / f"{name}.npy", inputs)
    want["iterations"] = models["trained"].optimizer.iterations.numpy()
    want["next losses"] = models["trained"].train_on_batch(images, truth)
    want["next kernel"] = models["trained"].get_layer("conv6_1").kernel.numpy()
    run = subprocess.run([sys.executable, PROGRAM, root], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return root, want


@pytest.fixture(scope="module")
def found(saved):
    with np.load(saved[0] / "found.npz") as arrays:
        return dict(arrays)


# === Whole models ===


@pytest.mark.parametrize("name", ["trained", "custom"])
def test_a_fresh_process_loads_the_same_detector(saved, found, name):
    _, want = saved
    assert (want[f"{name}/num_detections"] > 0).all()
    for output in OUTPUTS:
        key = f"{name}/{output}"
        np.testing.assert_allclose(found[key], want[key], rtol=1e-5, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["resnet", "layers"])
def test_a_fresh_process_loads_networks_and_layers(networks, found, name):
    model, images = networks[name]
    want = np.asarray(model(images))
    np.testing.assert_allclose(found[name], want, atol=1e-5 * np.abs(want).max())
    assert found[f"{name}/levels"].tolist() == (["P2", "P3"] if name == "resnet" else [])


def test_training_goes_on_where_it_stopped(saved, found):
    """Optimizer moments, step count and schedule survive: the next step is the same."""
    _, want = saved
    assert found["iterations"] == want["iterations"] == 2
    assert len(want["next losses"]) == 1 + len(LOSS_NAMES)
    np.testing.assert_allclose(found["next losses"], want["next losses"], rtol=1e-5)
    np.testing.assert_allclose(found["next kernel"], want["next kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["trained", "custom"])
def test_configs_survive(models, saved, name):
    configs = json.loads((saved[0] / "configs.json").read_text())
    assert configs[name] == json.loads(json.dumps(models[name].get_config()))
    assert configs[name]["class_names"] == CLASS_NAMES


def test_config_holds_what_was_asked_for(models):
    model = RefineDet.from_config(models["custom"].get_config())
    assert model.anchor_generator.clip
    np.testing.assert_array_equal(np.ravel(model.anchor_generator.sizes), [16, 32, 64, 128])
    assert model.detection_loss.matcher.iou_threshold == pytest.approx(0.6)
    assert (model.decoder.max_detections, model.decoder.variances) == (7, (0.1, 0.25))
    assert (model.num_classes, model.heads.filters, model.name) == (3, 16, "custom")
    assert model.image_shape == (64, 128, 3) and model.bounding_box_format == "center_xywh"
    np.testing.assert_array_equal(model.anchors, models["custom"].anchors)


def test_loading_without_compiling(saved):
    model = keras.saving.load_model(saved[0] / "trained.keras", compile=False)
    assert isinstance(model, RefineDet) and not model.compiled
    assert model.class_name(1) == "green"


def test_a_copy_by_config_and_weights(models):
    """`keras.models.clone_model` gives a plain functional model; this gives a detector."""
    model = models["custom"]
    copy = RefineDet.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    images, _ = rectangles(1)
    for a, b in zip(copy(images).values(), model(images).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# === Weights alone ===


def test_weights_round_trip(models, tmp_path):
    original = models["trained"]
    original.save_weights(tmp_path / "w.weights.h5")
    keras.utils.set_random_seed(99)
    other = RefineDet.from_config(original.get_config())
    images, _ = rectangles(1)
    assert not np.allclose(other(images)["odm_logits"], original(images)["odm_logits"])
    other.load_weights(tmp_path / "w.weights.h5")
    for a, b in zip(other.weights, original.weights, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    # The network has no part that depends on the size of the images.
    larger = small_detector((128, 128, 3), WHOLE)
    larger.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(larger.get_weights()[0], original.get_weights()[0])


@pytest.mark.parametrize(
    "other, layer",
    [
        (lambda: small_detector(heads={**WHOLE, "filters": 32}), "tcb_p6|bn1"),
        (small_detector, "conv6_1"),
        (lambda: refinedet_tiny(3, image_shape=(64, 128, 3)), "conv1_0"),
    ],
    ids=["filters", "batch_norm", "backbone"],
)
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_weights_of_another_model_are_refused(models, tmp_path, other, layer):
    """The error names layers that do not fit."""
    path = tmp_path / "w.weights.h5"
    models["trained"].save_weights(path)
    with pytest.raises(ValueError, match=rf"(?s)objects could not be loaded.*({layer})"):
        other().load_weights(path)


def test_weights_for_other_classes_are_refused(models, tmp_path):
    models["custom"].save_weights(tmp_path / "w.weights.h5")
    config = {**models["custom"].get_config(), "num_classes": 5, "class_names": None}
    other = RefineDet.from_config(config)
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"(?s)4 objects could not be loaded.*classes_0"):
        other.load_weights(tmp_path / "w.weights.h5")
    for a, b in zip(before, other.get_weights(), strict=True):  # all or nothing
        np.testing.assert_array_equal(a, b)


def test_damaged_weight_files_are_refused_and_named(models, tmp_path):
    path, model = tmp_path / "w.weights.h5", models["custom"]
    model.save_weights(path)
    content = path.read_bytes()
    for broken in (b"", b"text" * 99, content[:100], content[:-100]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"w\.weights\.h5 cannot be loaded: Unable to"):
            model.load_weights(path)
    for missing in (tmp_path / "missing.weights.h5", None, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            model.load_weights(missing)


@pytest.mark.parametrize("stored", [False, True])
def test_weights_with_and_without_predicted_iou(tmp_path, stored):
    """Neither is loaded in part: Keras would leave out what the model lacks."""
    with_iou = small_detector((64, 64, 3), heads={"predict_iou": True})
    source, target = small_detector((64, 64, 3)), with_iou
    if stored:
        source, target = target, source
    source.set_weights([w + 1.0 for w in source.get_weights()])
    source.save_weights(tmp_path / "w.weights.h5")
    before = target.get_weights()
    message = r"file alone: \['iou_0'" if stored else "Layer 'iou_0' expected 2 variables"
    with pytest.raises(ValueError, match=rf"w\.weights\.h5 cannot be loaded: .*{message}"):
        target.load_weights(tmp_path / "w.weights.h5")
    arrays = {n: w.numpy() for n, w in _named_variables(source, {})}
    arrays = {n: w.transpose(3, 2, 0, 1) if w.ndim == 4 else w for n, w in arrays.items()}
    with pytest.raises(
        ValueError, match="left over: odm_iou_0" if stored else "missing: odm_iou_0"
    ):
        load_torch_state_dict(target, arrays)
    for a, b in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    again = source.replace_classes(["blue", "other"])
    assert again.heads.predict_iou is stored and ("odm_iou" in again.output) is stored


def _surplus(file):
    file["layers/conv2d_77/vars/0"] = np.zeros(3)
    file["layers/conv2d_77/vars"].attrs["name"] = "unknown"


def _missing(file):
    del file["layers/conv2d/vars"]


def _nan(file):
    file["layers/conv2d/vars/0"][:] = np.nan


DAMAGES = [
    (_surplus, r"alone: \['unknown'\]"),
    (_missing, "Layer 'conv6_1' expected "),
    (_nan, "1 arrays hold NaN"),
]


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("change, match", DAMAGES, ids=["surplus", "missing", "nan"])
def test_files_with_other_layers_or_nan_are_refused(models, tmp_path, change, match):
    paths, model = [tmp_path / "m.keras", tmp_path / "m.weights.h5"], models["custom"]
    model.save(paths[0])
    model.save_weights(paths[1])
    with h5py.File(paths[1], "a") as file:
        change(file)
    replace_in_archive(paths[0], "model.weights.h5", paths[1].read_bytes())
    before = model.get_weights()
    for path in paths:
        with pytest.raises(ValueError, match=rf"{path.name} cannot be loaded: .*{match}"):
            model.load_weights(path)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    if change is _surplus:
        with pytest.raises(ValueError, match=rf"m\.keras is not a usable model. .*{match}"):
            load_keras_file(str(paths[0]))


def replace_in_archive(path, name, content):
    """Replaces or removes one file of a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        files = {**{n: archive.read(n) for n in archive.namelist()}, name: content}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("config.json", None, "no item named 'config.json'"),
        ("config.json", b"{not", "Expecting property name"),
        ("config.json", b"[]", "list indices"),
        ("model.weights.h5", None, "Expected a model.weights.h5"),
        ("model.weights.h5", b"text", "Unable to synchronously open"),
    ],
)
def test_the_program_names_a_damaged_keras_file(saved, tmp_path, name, content, match):
    path = tmp_path / "m.keras"
    path.write_bytes(Path(saved[0] / "trained.keras").read_bytes())
    replace_in_archive(path, name, content)
    with pytest.raises(ValueError, match=rf"^\S+m\.keras is not a usable model\. .*{match}.*$"):
        load_keras_file(str(path))


@pytest.mark.parametrize("content", [b"", b"text" * 999, None], ids=["empty", "text", "truncated"])
def test_the_program_names_a_file_that_is_no_archive(saved, tmp_path, content):
    path = tmp_path / "m.keras"
    whole = Path(saved[0] / "trained.keras").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"m\.keras is not a usable model\. It is damaged"):
        load_keras_file(str(path))


def test_a_damaged_file_is_refused(saved, tmp_path):
    path = tmp_path / "damaged.keras"
    path.write_bytes(Path(saved[0] / "trained.keras").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"damaged\.keras"):
        keras.saving.load_model(path)


PARTS = ("backbone", "anchor_generator", "heads", "detection_loss", "decoder")


@pytest.mark.parametrize("value", ["text", 5])
def test_files_with_other_things_in_place_of_objects_are_refused(value):
    config = keras.saving.serialize_keras_object(small_detector((64, 64, 3)))
    for part in PARTS:
        broken = {**config, "config": {**config["config"], part: value}}
        with pytest.raises(ValueError, match=rf"`{part}` must be|Received: (name=)?'?{value}"):
            keras.saving.deserialize_keras_object(broken)
        own = {**config["config"][part], "config": value}
        broken = {**config, "config": {**config["config"], part: own}}
        with pytest.raises(ValueError, match=r"The configuration of RefineDet is not valid"):
            keras.saving.deserialize_keras_object(broken)


def test_a_backbone_with_text_in_place_of_a_list_is_refused():
    config = keras.saving.serialize_keras_object(small_backbone())
    config["config"] = {**config["config"], "stackwise_num_filters": "text"}
    with pytest.raises(ValueError):
        keras.saving.deserialize_keras_object(config)
