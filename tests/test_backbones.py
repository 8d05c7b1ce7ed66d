"""Backbones: names, pyramid levels, options, files and errors."""

import inspect
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from fresh_process import run_program

from keras_resnest import backbones
from keras_resnest.backbones import (
    VARIANTS,
    ResNeSt50,
    ResNet,
    create_backbone,
    load_torch_state_dict,
)

# A network of every option that fits into a second.
SMALL = {
    "stackwise_num_filters": [8, 16],
    "stackwise_num_blocks": [2, 1],
    "stackwise_num_strides": [1, 2],
    "radix": 2,
    "stem_width": 4,
    "deep_stem": True,
    "avg_down": True,
    "avd": "after",
}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()


# === Names ===


def test_create_backbone_names():
    assert create_backbone("ResNeSt14_Tiny", include_top=False).name == "resnest14_tiny"
    with pytest.raises(ValueError, match=r"resnest50.*list_models"):
        create_backbone("resnet-st50")


def test_builders_are_rows_with_one_signature():
    expected = list(inspect.signature(ResNeSt50).parameters)
    assert expected[:6] == [
        "include_top",
        "weights",
        "input_shape",
        "pooling",
        "classes",
        "classifier_activation",
    ]
    for name, variant in VARIANTS.items():
        builder = variant.build
        assert getattr(backbones, builder.__name__) is builder
        assert list(inspect.signature(builder).parameters) == expected
        assert builder.__name__ in builder.__doc__ and repr(name) in builder.__doc__


# === Feature maps ===


@pytest.mark.parametrize("name", ["resnest14_tiny", "vgg16_reduced"])
def test_pyramid_levels_have_their_strides_at_any_size(name):
    backbone = create_backbone(name, include_top=False, input_shape=(None, None, 3))
    assert list(backbone.pyramid_outputs) == ["P2", "P3", "P4", "P5"]
    assert backbone.pyramid_strides == {"P2": 4, "P3": 8, "P4": 16, "P5": 32}
    features = keras.Model(backbone.input, backbone.pyramid_outputs)
    for size in ((64, 96), (33, 47)):
        maps = features(pixels(1, *size, 3))
        for level, stride in backbone.pyramid_strides.items():
            assert maps[level].shape[1:3] == tuple(-(-side // stride) for side in size)
            assert maps[level].shape[-1] == backbone.pyramid_outputs[level].shape[-1]
    for level, layer_name in backbone.pyramid_level_inputs.items():
        assert backbone.get_layer(layer_name).output is backbone.pyramid_outputs[level]


def test_a_level_is_the_last_map_of_its_stride():
    model = ResNet(**{**SMALL, "stackwise_num_strides": [2, 1]})
    assert list(model.pyramid_outputs) == ["P3"]
    assert model.pyramid_outputs["P3"] is model.output


# === Options ===


def test_include_rescaling_normalizes_pixels_by_imagenet_statistics():
    model = ResNet(**SMALL, include_rescaling=True)
    plain = ResNet(**SMALL, include_rescaling=False)
    plain.set_weights(model.get_weights())
    x = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype="uint8")
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = ((x / 255 - mean) / deviation).astype("float32")
    expected = plain(normalized)
    assert relative_error(model(x), expected) < 1e-5
    assert relative_error(model(x.astype("float32")), expected) < 1e-5


def test_vgg_rescaling_subtracts_the_mean():
    model = create_backbone("vgg16_reduced")
    normalized = model.get_layer("rescaling")(pixels(1, 2, 2, 3) * 0 + 200)
    assert np.array(normalized)[0, 0, 0] == pytest.approx([200 - 123, 200 - 117, 200 - 104])
    with pytest.raises(ValueError, match="no classifier"):
        create_backbone("vgg16_reduced", include_top=True)


def test_top_and_pooling():
    x = pixels(2, 40, 40, 3)
    model = create_backbone("resnest14_tiny", classes=7)
    assert np.array(model(x)).sum(axis=-1) == pytest.approx(1.0, abs=1e-5)
    assert model.output_shape == (None, 7)
    feature_map = create_backbone("resnest14_tiny", include_top=False)
    for pooling, reduce in (("avg", np.mean), ("max", np.max)):
        pooled = create_backbone("resnest14_tiny", include_top=False, pooling=pooling)
        pooled.set_weights(feature_map.get_weights())
        assert relative_error(pooled(x), reduce(feature_map(x), axis=(1, 2))) < 1e-5


def test_zero_init_last_gamma_starts_blocks_as_their_shortcut():
    model = ResNet(**SMALL, zero_init_last_gamma=True)
    block = keras.Model(
        model.get_layer("layer1_0_relu").output, model.get_layer("layer1_1_relu").output
    )
    x = pixels(1, 8, 8, 32)
    assert np.array_equal(block(x), x)


def test_dropblock_acts_while_training_in_the_last_two_stages():
    options = {**SMALL, "stackwise_num_filters": [8] * 3, "stackwise_num_blocks": [1] * 3}
    options["stackwise_num_strides"] = [1, 2, 2]
    model = ResNet(**options, dropblock_rate=0.3, dropout_rate=0.5, include_top=True, classes=3)
    dropblocks = [layer.name for layer in model.layers if "dropblock" in layer.name]
    assert dropblocks == [
        f"layer{stage}_0_dropblock{place}" for stage in (2, 3) for place in (1, 3)
    ]
    rates = [model.get_layer(f"layer{stage}_0_conv2").dropblock_rate for stage in (1, 2, 3)]
    assert rates == [0.0, 0.3, 0.3]
    x = pixels(2, 64, 64, 3)
    assert np.array_equal(model(x), model(x))
    assert not np.allclose(model(x, training=True), model(x, training=True))


@pytest.mark.parametrize("block", [{}, {"block_type": "basic"}, {"avd": "before", "radix": 1}])
def test_channels_first_gives_the_same_numbers(block):
    options = {**SMALL, "include_top": True, "classes": 3, **block}
    if block.get("block_type") == "basic":
        options.update(radix=0, avd=None)
    last = ResNet(**options)
    first = ResNet(**options, data_format="channels_first")
    first.set_weights(last.get_weights())
    x = pixels(2, 37, 29, 3)
    assert first.image_shape == (3, None, None)
    assert relative_error(first(x.transpose(0, 3, 1, 2)), last(x)) < 1e-5


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_and_predicts_in_float32(dtype):
    model = ResNet(**SMALL, include_top=True, classes=3, dtype=dtype)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    computed = {layer.name: layer.compute_dtype for layer in model.layers}
    assert computed.pop("predictions") == "float32"
    computed.pop("images")
    assert set(computed.values()) == {dtype.removeprefix("mixed_")}
    history = model.fit(pixels(4, 32, 32, 3), np.array([0, 1, 2, 0]), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.predict(pixels(1, 32, 32, 3), verbose=0).dtype == "float32"
    assert ResNet.from_config(model.get_config()).dtype_policy.name == dtype


def test_training_lowers_the_loss():
    keras.utils.set_random_seed(0)
    model = ResNet(**SMALL, include_top=True, classes=2)
    labels = np.arange(16) % 2
    x = pixels(16, 32, 32, 3) * 0.5 + labels[:, None, None, None] * 60
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    losses = model.fit(x, labels, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stackwise_num_blocks": [1]}, "one number per stage"),
        ({"stackwise_num_blocks": [0, 1]}, "at least 1 in every stage"),
        ({"stackwise_num_strides": [1, 3]}, "must be 1 or 2"),
        ({"block_type": "dense"}, "`block_type` must be one of"),
        ({"avd": "middle"}, "`avd` must be one of"),
        ({"pooling": "sum"}, "`pooling` must be one of"),
        ({"data_format": "NCHW"}, "`data_format` must be one of"),
        ({"dtype": "int32"}, "`dtype` must be a float type"),
        ({"block_type": "basic"}, "Basic blocks have no radix"),
    ],
)
def test_resnet_refuses(options, match):
    with pytest.raises(ValueError, match=match) as error:
        ResNet(**{**SMALL, **options})
    assert "Received" in str(error.value)


# === Files ===


def test_saved_model_serves_without_xla(tmp_path):
    model = ResNet(**SMALL, include_top=True, classes=3)
    model.export(tmp_path / "model", verbose=False)
    x = pixels(2, 35, 45, 3)
    served = tf.saved_model.load(str(tmp_path / "model"))
    assert relative_error(served.serve(x)["predictions"], model(x)) < 1e-5
    assert b"_XlaMustCompile" not in (tmp_path / "model" / "saved_model.pb").read_bytes()


# === PyTorch weights ===


def torch_state_dict(model, rng):
    """Arrays for all weights of a model, in PyTorch's layout and under PyTorch's names."""
    arrays = {}
    names = {"gamma": "weight", "beta": "bias", "kernel": "weight", "bias": "bias"}
    names.update(moving_mean="running_mean", moving_variance="running_var")
    for weight in model.weights:
        if weight.name == "seed_generator_state":
            continue
        *modules, last = weight.path.split("/")
        array = rng.uniform(0.5, 1.5, weight.shape).astype("float32")
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        arrays[f"{'_'.join(modules)}.{names[last]}"] = array.transpose(order)
    return arrays


@pytest.fixture(scope="module")
def small_model():
    # The state of random generators is no weight: dropout must not disturb.
    return ResNet(**SMALL, include_top=True, classes=3, dropblock_rate=0.1, dropout_rate=0.1)


def test_torch_weights_arrive_in_keras_layout(small_model):
    state_dict = torch_state_dict(small_model, np.random.default_rng(0))
    state_dict["bn1.num_batches_tracked"] = np.array(7)
    load_torch_state_dict(small_model, state_dict)
    kernel = small_model.get_layer("layer1_0_conv2").conv.kernel.numpy()
    assert np.array_equal(kernel[1, 2, 3, 4], state_dict["layer1_0_conv2_conv.weight"][4, 3, 1, 2])
    kernel = small_model.get_layer("fc").kernel.numpy()
    assert np.array_equal(kernel, state_dict["fc.weight"].T)
    variance = small_model.get_layer("bn1").moving_variance.numpy()
    assert np.array_equal(variance, state_dict["bn1.running_var"])


def test_torch_weights_load_all_or_nothing(small_model):
    state_dict = torch_state_dict(small_model, np.random.default_rng(1))
    before = small_model.get_weights()
    del state_dict["bn1.bias"]
    state_dict["extra.weight"] = np.zeros(3, "float32")
    state_dict["fc.weight"] = np.zeros((4, 64), "float32")
    state_dict["fc.bias"] = np.full(3, np.nan, "float32")
    with pytest.raises(ValueError) as error:
        load_torch_state_dict(small_model, state_dict)
    message = str(error.value)
    for line in (
        "missing: bn1_bias",
        "left over: extra.weight",
        "wrong shape: fc.weight has (4, 64)",
        "not finite: fc.bias",
    ):
        assert line in message
    assert message.count("\n") == 4
    for now, then in zip(small_model.get_weights(), before, strict=True):
        assert np.array_equal(now, then)


def test_two_arrays_for_one_weight_are_refused(small_model):
    state_dict = torch_state_dict(small_model, np.random.default_rng(1))
    state_dict["fc_weight"] = state_dict["fc.weight"]
    with pytest.raises(ValueError, match=r"left over: fc_weight, beside fc\.weight"):
        load_torch_state_dict(small_model, state_dict)


def test_torch_weights_with_other_names_and_modules_to_ignore(small_model):
    state_dict = torch_state_dict(small_model, np.random.default_rng(2))
    for weight in ("weight", "bias"):
        state_dict[f"head.linear.{weight}"] = state_dict.pop(f"fc.{weight}")
    state_dict["decoder.weight"] = np.zeros(3, "float32")
    load_torch_state_dict(small_model, state_dict, {"fc": "head.linear"}, ignore=("decoder",))
    assert np.array_equal(small_model.get_layer("fc").bias.numpy(), state_dict["head.linear.bias"])


# === Other backends ===


@pytest.mark.slow  # test_backends.py always compares small networks
def test_jax_gives_the_same_numbers(tmp_path):
    python = os.environ.get("JAX_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import jax"], capture_output=True)
    if found.returncode:
        pytest.skip("JAX is not installed; JAX_PYTHON may name a Python that has it")
    # One block: JAX compiles each initializer of each shape.
    options = {**SMALL, "stackwise_num_filters": [8], "stackwise_num_blocks": [1]}
    options |= {"stackwise_num_strides": [2], "cardinality": 2, "dropblock_rate": 0.1}
    model = ResNet(**options)
    x = pixels(2, 37, 29, 3)
    model.save_weights(tmp_path / "small.weights.h5")
    np.save(tmp_path / "pixels.npy", x)
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    arguments = ("jax_resnet.py", tmp_path, json.dumps(options))
    assert run_program(*arguments, python=python, **environment) == "jax"
    assert relative_error(np.load(tmp_path / "outputs.npy"), model(x)) < 1e-4
