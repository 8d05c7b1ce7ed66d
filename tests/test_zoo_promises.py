"""What every network of the table promises, whatever its family.

The first of each family runs always, all of them with `pytest -m slow`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import rectangles

from keras_resnest.backbones import VARIANTS, create_backbone
from keras_resnest.detection.refinedet import RefineDet

ONE_OF_EACH = [
    name
    for name in (
        "resnest14_tiny",
        "seresnet18",
        "skresnet18",
        "regnety_002",
        "shufflenet_v1_g3_0_5x",
        "shufflenet_v2_0_5x",
        "shufflenet_v2_plus_small",
        "vgg16_reduced",
    )
    if name in VARIANTS
]
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in ONE_OF_EACH
]
every_network = pytest.mark.parametrize("name", ONE_OF_EACH + OTHERS)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()


def with_quiet_branches(model):
    """Random residual branches, a hundred in a row, would magnify rounding errors."""
    for variable in model.variables:
        if variable.path.endswith("bn3/gamma"):
            variable.assign(0.2 * variable)
    return model


@every_network
def test_pyramid_of_any_size_and_keras_file(name, tmp_path):
    backbone = create_backbone(name, include_top=False)
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


@every_network
def test_classifier_gives_probabilities_and_a_batch_equals_its_images(name):
    if name == "vgg16_reduced":
        with pytest.raises(ValueError, match="no classifier"):
            create_backbone(name, include_top=True)
        return
    model = with_quiet_branches(create_backbone(name, classes=7))
    x = pixels(3, 224, 230, 3) if name == "vgg16" else pixels(3, 64, 97, 3)
    batch = np.asarray(model(x, training=False))
    assert batch.shape == (3, 7)
    np.testing.assert_allclose(batch.sum(axis=-1), 1.0, atol=1e-5)
    one = np.concatenate([np.asarray(model(x[i : i + 1], training=False)) for i in range(3)])
    np.testing.assert_allclose(one, batch, atol=2e-5)
    assert model.dtype_policy.name == "float32"


@every_network
def test_channels_first_gives_the_same_numbers(name):
    last = with_quiet_branches(create_backbone(name, include_top=False))
    first = create_backbone(name, include_top=False, data_format="channels_first")
    first.set_weights(last.get_weights())
    x = pixels(1, 65, 83, 3)
    want = np.asarray(last(x, training=False))
    got = np.asarray(first(x.transpose(0, 3, 1, 2), training=False)).transpose(0, 2, 3, 1)
    assert relative_error(got, want) < 1e-4


@every_network
def test_images_as_small_as_one_pixel_or_a_static_shape(name):
    backbone = create_backbone(name, include_top=False, input_shape=(64, 64, 3))
    assert None not in backbone.output_shape[1:]
    if "vgg16" in name:
        return  # its poolings need the sizes that they halve
    tiny = create_backbone(name, include_top=False)(pixels(1, 1, 1, 3), training=False)
    assert tiny.shape[1:3] == (1, 1) and np.isfinite(tiny).all()


@every_network
def test_detector_on_top_trains_a_step(name):
    keras.utils.set_random_seed(0)
    backbone = create_backbone(name, include_top=False)
    if name == "resnest269":  # at its random weights gradients are 1e20, their squares infinite
        with_quiet_branches(backbone)
    model = RefineDet(3, backbone, (64, 64, 3), filters=16, use_batch_norm=True)
    model.compile(keras.optimizers.SGD(1e-3, global_clipnorm=10.0), run_eagerly=True)
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    before = [np.array(v) for v in backbone.trainable_variables]
    logs = model.train_on_batch(images, truth, return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    moved = [
        not np.array_equal(v, old)
        for v, old in zip(backbone.trainable_variables, before, strict=True)
    ]
    # Biases before a normalization and units that ReLU switched off may rest.
    assert np.mean(moved) > 0.6
    assert np.isfinite(model.predict(images, verbose=0)["boxes"]).all()


# Exporting takes longest: one network of each way to convolve.
EXPORTED = ["resnest14_tiny", "skresnet18", "shufflenet_v1_g3_0_5x"]


@pytest.mark.parametrize(
    "name",
    EXPORTED
    + [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in EXPORTED],
)
def test_saved_model_has_standard_operations_only(name, tmp_path):
    backbone = create_backbone(name, include_top=False)
    backbone.export(tmp_path / "model", verbose=False)
    graph = (tmp_path / "model" / "saved_model.pb").read_bytes()
    assert b"_XlaMustCompile" not in graph and b"PyFunc" not in graph
    x = pixels(1, 64, 96, 3)
    served = tf.saved_model.load(str(tmp_path / "model"))
    assert relative_error(served.serve(x)["features"], backbone(x, training=False)) < 1e-4
