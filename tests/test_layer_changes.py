"""What users change on a finished network - frozen layers, regularizers, precision - is saved."""

import keras
import numpy as np
import pytest
from detectors import WHOLE, rectangles, small_detector

import keras_resnest as kr
from keras_resnest.layers.changes import _inner_layers
from keras_resnest.layers.normalization import set_batch_norm

IMAGES, _ = rectangles(2, (64, 64, 3))
SIZES = {"stackwise_num_filters": [8, 8], "stackwise_num_blocks": [1, 1]}


def classifier(**kwargs):
    """A ResNeSt whose layers have layers, some of which `build` makes."""
    keras.utils.set_random_seed(0)
    options = {"stackwise_num_strides": [1, 2], "radix": 2, "stem_width": 4, "classes": 4}
    options |= {"include_top": True, "dropout_rate": 0.2, "include_rescaling": True}
    return kr.backbones.ResNet(**SIZES, **{**options, "name": "small", **kwargs})


def split_attention(model):
    return next(x for x in model.layers if isinstance(x, kr.layers.SplitAttention))


def change_everything(model):
    for layer in model.layers[:9]:
        layer.trainable = False
    set_batch_norm(model, synchronized=True)
    layer = split_attention(model)
    layer.trainable = True
    layer.fc1.trainable = False  # `build` makes it
    layer.bn0.trainable = False
    layer.bn1.momentum = 0.5
    layer.conv.enable_lora(2)
    layer.fc2.kernel_regularizer = keras.regularizers.L2(1e-2)
    layer.fc2.kernel.regularizer = layer.fc2.kernel_regularizer
    model.get_layer("dropout").rate = 0.7
    model.layers[-4].dtype_policy = "mixed_bfloat16"


def state(model):
    """What users see of the layers, by name; Keras keeps no state of inputs and models."""
    return {
        layer.name: (
            layer.trainable,
            layer.dtype_policy.name,
            [getattr(layer, name, None) for name in ("synchronized", "momentum", "rate")],
            [(w.path.rsplit("/", 1)[-1], w.shape, w.trainable) for w in layer.weights],
        )
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.Model | keras.layers.InputLayer)
    }


@pytest.fixture(scope="module")
def changed():
    model = classifier()
    pristine = state(model)
    change_everything(model)
    assert sum(value != pristine[name] for name, value in state(model).items()) > 9
    return model


CONTAINERS = {
    "alone": lambda model: model,
    "Sequential": lambda model: keras.Sequential([model, keras.layers.Dense(2, name="last")]),
    "functional": lambda model: keras.Model(model.input, model.layers[-2].output),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_changes_survive_saving_and_cloning(changed, container, tmp_path):
    model = CONTAINERS[container](changed)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    assert container != "alone" or again.get_config() == model.get_config()
    assert state(again) == state(clone) == state(model)
    # The shares of one layer's weights; LoRA starts with zeros.
    assert len(clone.losses) == len(again.losses) == 1
    np.testing.assert_allclose(again.losses, model.losses, rtol=1e-5)
    np.testing.assert_allclose(again(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_new_top_keeps_changes(changed):
    again = changed.replace_top(3)
    assert state(again).keys() == state(changed).keys()
    for name, value in state(changed).items():
        assert name in ("fc", "predictions") or state(again)[name] == value


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_quantized_classifier_survives_saving(tmp_path):
    model = classifier(dropout_rate=0.0)
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("fc")._kernel.dtype == "int8"
    np.testing.assert_allclose(again(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_arguments_win_over_what_was_not_changed(frozen):
    model = classifier(trainable=not frozen)
    model.trainable = frozen
    assert "layer_changes" not in model.get_config()
    again = type(model).from_config({**model.get_config(), "trainable": not frozen})
    assert {layer.trainable for layer in again._flatten_layers()} == {not frozen}


def test_all_layers_inside_have_names_of_their_own():
    """Changes are kept by name, so a second network in one process has the same names."""
    for make in (classifier, lambda: small_detector(heads={"use_residual_blocks": True})):
        names, again = (list(_inner_layers(make())) for _ in range(2))
        assert names == again and len({name.strip("_") for name in names}) == len(names)


# === Detectors ===


def trainable(model):
    return [w.path for w in model.trainable_weights], len(model.weights)


def freeze_backbone(model):
    model.backbone.trainable = False


def thaw_part_of_a_frozen_backbone(model):
    model.backbone.trainable = False
    model.backbone.layers[-2].trainable = True
    model.backbone.layers[-4].trainable = True
    model.get_layer("odm").box_convolutions[0].trainable = False


def thaw_a_frozen_batch_norm(model):
    next(x for x in model.layers if "norm" in x.name and x.weights).trainable = True


@pytest.mark.parametrize(
    "change, options",
    [
        (freeze_backbone, {}),
        (thaw_part_of_a_frozen_backbone, {}),
        (thaw_a_frozen_batch_norm, {"heads": WHOLE, "freeze_batch_norm": True}),
    ],
)
def test_a_partly_frozen_detector_survives(change, options, tmp_path):
    model = small_detector((64, 64, 3), **options)
    before = trainable(model)
    change(model)
    assert trainable(model) != before
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    for i, momentum in enumerate(model.optimizer.variables[2:]):
        momentum.assign(np.full(momentum.shape, i))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert trainable(again) == trainable(model) and again.get_config() == model.get_config()
    assert len(again.optimizer.variables) == 2 + len(trainable(model)[0])
    for a, b in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    other = model.replace_classes(["red", "violet"])
    assert trainable(other) == trainable(model)
    assert other.get_config().keys() == model.get_config().keys()


def test_other_batch_norm_for_other_classes():
    """The option of the detector does not stick to its backbone."""
    model = small_detector((64, 64, 3), freeze_batch_norm=True)
    thawed = model.replace_classes(["red"], freeze_batch_norm=False)
    assert {layer.trainable for layer in model._flatten_layers()} == {True, False}
    assert {layer.trainable for layer in thawed._flatten_layers()} == {True}
