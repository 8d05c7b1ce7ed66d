"""What every network promises, whatever its family.

One network of each family always runs, all of them with `pytest -m slow`.
"""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import rectangles

from keras_resnest.backbones import VARIANTS, create_backbone
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.refinedet import RefineDet

ONE_OF_EACH = [
    "resnest14_tiny",
    "seresnet18",
    "skresnet18",
    "regnety_002",
    "shufflenet_v1_g3_0_5x",
    "shufflenet_v2_0_5x",
    "shufflenet_v2_plus_small",
    "vgg16_reduced",
]
# Export takes longest: one network per kind of convolution.
EXPORTED = ["resnest14_tiny", "skresnet18", "shufflenet_v1_g3_0_5x"]


def networks(always):
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n not in always]
    return [*always, *slow]


@pytest.fixture(scope="module", params=networks(ONE_OF_EACH))
def backbone(request):
    """A network without a classifier, shared by the tests below."""
    gc.collect()  # sixty networks would fill the memory: graphs hold reference cycles
    keras.utils.set_random_seed(0)
    return with_quiet_branches(create_backbone(request.param, include_top=False))


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()


def with_quiet_branches(model):
    """A hundred random residual branches in a row would magnify rounding errors."""
    paths = {variable.path for variable in model.variables}
    for variable in model.variables:
        ends_block = variable.path.endswith("bn3/gamma") or (
            variable.path.endswith("bn2/gamma") and variable.path.replace("bn2", "bn3") not in paths
        )
        if ends_block:
            variable.assign(0.2 * variable)
    return model


def test_pyramid_of_any_size_and_keras_file(backbone, tmp_path):
    assert list(backbone.pyramid_outputs) == ["P2", "P3", "P4", "P5"]
    assert backbone.pyramid_strides == {"P2": 4, "P3": 8, "P4": 16, "P5": 32}
    features = keras.Model(backbone.input, backbone.pyramid_outputs)
    x = pixels(2, 97, 131, 3)
    maps = features(x, training=False)
    for level, stride in backbone.pyramid_strides.items():
        sides = maps[level].shape[1:3]
        # Paddings round up; VGG's poolings round down.
        up, down = (
            (-(-side // stride) for side in (97, 131)),
            (side // stride for side in (97, 131)),
        )
        assert sides in (tuple(up), tuple(down)), (level, sides)
        assert np.isfinite(maps[level]).all()
        assert maps[level].shape[-1] == backbone.pyramid_outputs[level].shape[-1]
    backbone.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")  # safe mode
    assert type(loaded) is type(backbone) and loaded.get_config() == backbone.get_config()
    assert np.array_equal(loaded(x, training=False), backbone(x, training=False))


@pytest.mark.parametrize("name", networks(ONE_OF_EACH))
def test_classifier_gives_probabilities_and_a_batch_equals_its_images(name):
    if name == "vgg16_reduced":
        with pytest.raises(ValueError, match="no classifier"):
            create_backbone(name, include_top=True)
        return
    x = pixels(3, 224, 230, 3) if name == "vgg16" else pixels(3, 64, 97, 3)
    model = with_quiet_branches(create_backbone(name, classes=7, input_shape=x.shape[1:]))
    assert None not in model.pyramid_outputs["P5"].shape[1:]
    batch = np.asarray(model(x, training=False))
    assert batch.shape == (3, 7)
    np.testing.assert_allclose(batch.sum(axis=-1), 1.0, atol=1e-5)
    one = np.concatenate([np.asarray(model(x[i : i + 1], training=False)) for i in range(3)])
    np.testing.assert_allclose(one, batch, atol=2e-5)
    assert model.dtype_policy.name == "float32"


def test_channels_first_gives_the_same_numbers(backbone):
    first = create_backbone(backbone.name, include_top=False, data_format="channels_first")
    first.set_weights(backbone.get_weights())
    x = pixels(1, 65, 83, 3)
    want = np.asarray(backbone(x, training=False))
    got = np.asarray(first(x.transpose(0, 3, 1, 2), training=False)).transpose(0, 2, 3, 1)
    assert relative_error(got, want) < 1e-4


def test_images_of_one_pixel(backbone):
    if backbone.name == "vgg16":
        pytest.skip("its pooling rounds down to nothing")
    tiny = backbone(pixels(1, 1, 1, 3), training=False)
    assert tiny.shape[1:3] == (1, 1) and np.isfinite(tiny).all()


def test_detector_on_top_trains_a_step(backbone):
    model = RefineDet(3, backbone, (64, 64, 3), heads=RefineDetHeads(16, use_batch_norm=True))
    model.compile(keras.optimizers.SGD(1e-3, global_clipnorm=10.0), run_eagerly=True)
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    before = [np.array(v) for v in backbone.trainable_variables]
    logs = model.train_on_batch(images, truth, return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    moved = [
        not np.array_equal(v, old)
        for v, old in zip(backbone.trainable_variables, before, strict=True)
    ]
    # Biases before a normalization and dead ReLU units do not move.
    assert np.mean(moved) > 0.6
    assert np.isfinite(model.predict(images, verbose=0)["boxes"]).all()


@pytest.mark.parametrize("name", networks(EXPORTED))
def test_saved_model_has_standard_operations_only(name, tmp_path):
    backbone = with_quiet_branches(create_backbone(name, include_top=False))
    backbone.export(tmp_path / "model", verbose=False)
    graph = (tmp_path / "model" / "saved_model.pb").read_bytes()
    assert b"_XlaMustCompile" not in graph and b"PyFunc" not in graph
    x = pixels(1, 64, 96, 3)
    served = tf.saved_model.load(str(tmp_path / "model"))
    assert relative_error(served.serve(x)["features"], backbone(x, training=False)) < 1e-4
