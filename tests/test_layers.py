"""The layers against reference numbers, algebra and brute force."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from fresh_process import run_program
from golden.recipe import make_array, make_split_attention_tensor, sample
from golden_data import load_arrays, load_cases
from keras import ops
from scipy import ndimage
from tensorflow.core.protobuf import saved_model_pb2

from keras_resnest.backbones import load_torch_state_dict
from keras_resnest.layers import (
    DropBlock2D,
    GroupedConv2D,
    L2Normalization,
    RadixSoftmax,
    SplitAttention,
    TransferConnectionBlock,
)


def relative_error(actual, expected):
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


# === Convolution ===


def brute_force_convolution(x, kernel, groups, strides, dilation, padding):
    """Convolution (cross-correlation) of NHWC arrays, one output cell at a time."""
    size, _, _, filters = kernel.shape
    reach = dilation * (size - 1) + 1
    if padding == "same":
        pads = []
        for length in x.shape[1:3]:
            total = max((-(-length // strides) - 1) * strides + reach - length, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows = (x.shape[1] - reach) // strides + 1
    columns = (x.shape[2] - reach) // strides + 1
    width, group_filters = x.shape[-1] // groups, filters // groups
    y = np.zeros((len(x), rows, columns, filters))
    for row, column, group in np.ndindex(rows, columns, groups):
        top, left = row * strides, column * strides
        patch = x[:, top : top + reach : dilation, left : left + reach : dilation]
        patch = patch[..., group * width : (group + 1) * width]
        out = slice(group * group_filters, (group + 1) * group_filters)
        y[:, row, column, out] = np.tensordot(patch, kernel[..., out], axes=3)
    return y


CONVOLUTIONS = [
    {"groups": 1},
    {"groups": 2},
    {"groups": 4, "padding": "same"},
    {"groups": 2, "strides": 2, "padding": "same"},
    {"groups": 4, "strides": 2},
    {"groups": 2, "dilation_rate": 2, "padding": "same"},
    {"groups": 8},
    {"groups": 2, "kernel_size": 1},
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_grouped_convolution_and_gradients_equal_brute_force(options, data_format):
    rng = np.random.default_rng(0)
    x, dx = rng.standard_normal((2, 2, 7, 6, 8)).astype("float32")
    options = {"kernel_size": 3, "strides": 1, "dilation_rate": 1, "padding": "valid", **options}
    layer = GroupedConv2D(16, bias_initializer="normal", data_format=data_format, **options)

    def to_layout(array):
        return array if data_format == "channels_last" else array.transpose(0, 3, 1, 2)

    with tf.GradientTape() as tape:
        inputs = tf.constant(to_layout(x))
        tape.watch(inputs)
        outputs = layer(inputs)
        cotangent = rng.standard_normal(outputs.shape).astype("float32")
        total = tf.reduce_sum(outputs * cotangent)
    x_gradient, kernel_gradient = tape.gradient(total, [inputs, layer.kernel.value])

    def brute_force(x, kernel):
        y = brute_force_convolution(
            x,
            kernel,
            options["groups"],
            options["strides"],
            options["dilation_rate"],
            options["padding"],
        )
        return to_layout(y)

    kernel = layer.kernel.numpy()
    bias = np.reshape(layer.bias.numpy(), (-1,) if data_format == "channels_last" else (-1, 1, 1))
    expected = brute_force(x, kernel) + bias
    assert layer.compute_output_shape(inputs.shape) == expected.shape
    assert relative_error(outputs, expected) < 1e-5
    # Convolution is linear in both arguments, so derivatives along a direction are convolutions.
    along_x = np.sum(cotangent * brute_force(dx, kernel))
    assert np.sum(x_gradient * to_layout(dx)) == pytest.approx(along_x, rel=1e-3, abs=1e-2)
    dk = rng.standard_normal(kernel.shape).astype("float32")
    along_kernel = np.sum(cotangent * brute_force(x, dk))
    assert np.sum(kernel_gradient * dk) == pytest.approx(along_kernel, rel=1e-3, abs=1e-2)


def test_grouped_convolution_is_a_drop_in_for_conv2d():
    options = {"groups": 2, "activation": "relu", "kernel_regularizer": "l2", "padding": "same"}
    ours, theirs = GroupedConv2D(8, 3, **options), keras.layers.Conv2D(8, 3, **options)
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 4)).astype("float32")
    ours(x), theirs(x)
    ours.set_weights(theirs.get_weights())
    assert relative_error(ours(x), theirs(x)) < 1e-6
    config, expected = ours.get_config(), theirs.get_config()
    config.pop("name"), expected.pop("name")
    assert config == expected
    assert isinstance(ours, keras.layers.Conv2D)


@pytest.mark.parametrize("channels, filters, groups", [(6, 8, 4), (8, 6, 4)])
def test_grouped_convolution_refuses_channels_that_do_not_divide(channels, filters, groups):
    with pytest.raises(ValueError, match="evenly divisible"):
        GroupedConv2D(filters, 3, groups=groups)(np.zeros((1, 4, 4, channels), "float32"))


def test_grouped_convolution_compiles_with_xla():
    layer = GroupedConv2D(8, 3, groups=2, padding="same")
    x = tf.random.normal((1, 5, 5, 4))
    assert relative_error(tf.function(layer, jit_compile=True)(x), layer(x)) < 1e-5


def operations_of_saved_model(path):
    with open(path / "saved_model.pb", "rb") as file:
        saved_model = saved_model_pb2.SavedModel.FromString(file.read())
    graph = saved_model.meta_graphs[0].graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    attributes = {a for f in graph.library.function for a in f.attr if f.attr[a].b}
    return {node.op for node in nodes}, attributes | {a for n in nodes for a in n.attr}


def test_saved_model_has_neither_xla_nor_python_calls(tmp_path):
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, SplitAttention(8, radix=2, cardinality=2)(inputs))
    model.export(tmp_path / "ours", verbose=False)
    operations, attributes = operations_of_saved_model(tmp_path / "ours")
    assert "Conv2D" in operations
    assert not {"PyFunc", "EagerPyFunc", "XlaLaunch"} & operations
    assert "_XlaMustCompile" not in attributes
    # The check finds what it looks for: Keras' own layer leaves it.
    model = keras.Model(inputs, keras.layers.Conv2D(8, 3, groups=2)(inputs))
    model.export(tmp_path / "keras", verbose=False)
    assert "_XlaMustCompile" in operations_of_saved_model(tmp_path / "keras")[1]
    served = tf.saved_model.load(str(tmp_path / "ours"))
    assert served.serve(tf.zeros((3, 8, 8, 4))).shape == (3, 8, 8, 8)


def test_grouped_convolution_without_onednn_has_gradients():
    result = run_program("convolutions.py", "gradients", TF_ENABLE_ONEDNN_OPTS="0")
    assert float(result) < 1e-5


def test_narrow_pointwise_convolutions_keep_to_their_memory():
    """TensorFlow's own gradient writes out of bounds; glibc aborts a process that does."""
    assert run_program("convolutions.py", "narrow", MALLOC_CHECK_="3") == "done"


# === Split-Attention ===

SPLAT_CASES = [
    f"r{radix}_c{cardinality}_{norm}_{bias}"
    for radix in (1, 2, 4)
    for cardinality in (1, 2, 4)
    for norm in ("bn", "nobn")
    for bias in ("bias", "nobias")
    if norm == "bn" or bias == "bias" or cardinality == 2
]
# Without batch normalization, training changes nothing.
SPLAT_RUNS = [(case, "eval") for case in SPLAT_CASES] + [
    (case, "train") for case in SPLAT_CASES if "_bn_" in case
]


def splat_unit(case, data_format="channels_last"):
    shape = (None, None, 32) if data_format == "channels_last" else (32, None, None)
    inputs = keras.Input(shape)
    unit = SplitAttention(
        case["channels"],
        kernel_size=case["kernel_size"],
        strides=case["stride"],
        radix=case["radix"],
        cardinality=case["cardinality"],
        use_bias=case["bias"],
        use_batch_norm=case["batch_norm"],
        data_format=data_format,
        name="unit",
    )
    model = keras.Model(inputs, unit(inputs))
    weights = {
        f"unit.{name}": make_split_attention_tensor(name, shape, case["seed"])
        for name, shape in case["weights"].items()
    }
    load_torch_state_dict(model, weights)
    return unit


def test_all_splat_cases_are_tested():
    assert sorted(load_cases("split_attention")) == sorted(SPLAT_CASES)


def splat_error(actual, key):
    """Relative error at the stored places of a golden array, which is channels first."""
    expected = load_arrays("split_attention")[key]
    return relative_error(sample(actual, len(expected)), expected)


@pytest.mark.parametrize("name, mode", SPLAT_RUNS)
def test_split_attention_equals_reference(name, mode):
    case = load_cases("split_attention")[name]
    unit = splat_unit(case)
    training = mode == "train"
    before = {v.path: v.numpy() for v in unit.variables}
    x = tf.constant(make_array((4, 32, 6, 8), case["seed"], "input").transpose(0, 2, 3, 1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = unit(x, training=training)
        cotangent = make_array((4, 32, 6, 8), case["seed"], "cotangent")
        total = tf.reduce_sum(output * cotangent.transpose(0, 2, 3, 1))
    gradient = np.transpose(tape.gradient(total, x), (0, 3, 1, 2))
    key = f"{name}/{mode}"
    assert output.shape == (4, 6, 8, 32)
    assert splat_error(np.transpose(output, (0, 3, 1, 2)), f"{key}/output") < 1e-5
    assert splat_error(gradient, f"{key}/input_grad") < 1e-4
    if training:
        check_running_statistics(unit, before, key, x)
    attention = unit._attention(unit._splits(x, training), training)
    assert np.shape(attention) == (4, 1, 1, 32 * case["radix"])
    assert splat_error(attention, f"{key}/attention") < 1e-5


def check_running_statistics(unit, before, key, x):
    # PyTorch keeps the unbiased variance, Keras the variance of the batch.
    arrays = load_arrays("split_attention")
    counts = {"bn0": x.shape[0] * x.shape[1] * x.shape[2], "bn1": x.shape[0]}
    for name, count in counts.items():
        norm = getattr(unit, name)
        mean = arrays[f"{key}/after/{name}.running_mean"]
        assert relative_error(norm.moving_mean.numpy(), mean) < 1e-5
        old = 0.9 * before[norm.moving_variance.path]
        unbiased = old + (norm.moving_variance.numpy() - old) * count / (count - 1)
        assert relative_error(unbiased, arrays[f"{key}/after/{name}.running_var"]) < 1e-5


@pytest.mark.parametrize("name", ["r1_c2_bn_nobias", "r2_c1_bn_nobias", "r4_c2_bn_bias"])
def test_split_attention_channels_first(name):
    case = load_cases("split_attention")[name]
    unit = splat_unit(case, "channels_first")
    output = unit(make_array((4, 32, 6, 8), case["seed"], "input"), training=False)
    assert splat_error(output, f"{name}/eval/output") < 1e-5


def test_radix_softmax_sums_to_one_within_a_channel():
    logits = np.random.default_rng(0).standard_normal((2, 1, 1, 3 * 4 * 5)).astype("float32")
    attention = np.array(RadixSoftmax(radix=3, cardinality=4)(logits)).reshape(2, 3, 4, 5)
    assert attention.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
    # (cardinality, radix, channel) on the way in, (radix, cardinality, channel) on the way out.
    weights = np.exp(logits.reshape(2, 4, 3, 5))
    expected = (weights / weights.sum(axis=2, keepdims=True)).transpose(0, 2, 1, 3)
    assert relative_error(attention, expected) < 1e-6


@pytest.mark.parametrize("options", [{"strides": 2}, {"padding": "valid"}, {"dilation_rate": 2}])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_split_attention_shapes_and_dtypes(options, dtype):
    layer = SplitAttention(8, radix=2, dropblock_rate=0.2, dtype=dtype, **options)
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 4)).astype("float32")
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
        total = tf.reduce_sum(tf.cast(y, "float32") ** 2)
    assert y.shape == layer.compute_output_shape(x.shape)
    assert y.dtype == layer.compute_dtype
    gradients = tape.gradient(total, [v.value for v in layer.trainable_variables])
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"filters": 0}, "`filters` must be positive"),
        ({"filters": 8, "radix": 0}, "`radix` must be positive"),
        ({"filters": 10, "cardinality": 4}, "divisible"),
        ({"filters": 9, "cardinality": 3}, "32 hidden channels"),
    ],
)
def test_split_attention_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        SplitAttention(**options)(np.zeros((1, 4, 4, 12), "float32"))


# === DropBlock ===


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("size, block", [((16, 12), 3), ((9, 9), 4), ((20, 20), 7), ((3, 5), 1)])
def test_dropblock_drops_whole_blocks_at_its_rate(size, block, data_format):
    rate = 0.2
    channels_first = data_format == "channels_first"
    shape = (16, 64, *size) if channels_first else (16, *size, 64)
    layer = DropBlock2D(rate, block, seed=0, data_format=data_format)
    y = np.array(layer(ops.ones(shape), training=True))
    maps = (y if channels_first else y.transpose(0, 3, 1, 2)).reshape(-1, *size)
    dropped = maps == 0
    assert dropped.mean() == pytest.approx(rate, abs=0.03)
    assert y.mean() == pytest.approx(1.0, abs=1e-4)
    # Opening by the block changes nothing: the dropped area is a union of whole blocks.
    opened = ndimage.binary_opening(dropped, np.ones((1, block, block)))
    assert (opened == dropped).all()
    # Channels and images draw independently.
    assert len(np.unique(dropped.reshape(len(dropped), -1), axis=0)) > 32 or min(size) <= block


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 9), (3, 4)])
def test_dropblock_on_maps_smaller_than_the_block(size):
    layer = DropBlock2D(0.3, block_size=7, seed=1)
    y = np.array(layer(ops.ones((64, *size, 128)), training=True))
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.03)
    assert np.isfinite(y).all()
    if max(size) <= 7:  # the block is the map
        assert ((y == 0).all(axis=(1, 2)) | (y != 0).all(axis=(1, 2))).all()


def test_dropblock_is_identity_at_inference_and_repeatable_by_seed():
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
    assert (np.array(DropBlock2D(0.5, 3)(x, training=False)) == x).all()
    assert (np.array(DropBlock2D(0.0, 3)(x, training=True)) == x).all()
    a, b = (np.array(DropBlock2D(0.5, 3, seed=7)(x, training=True)) for _ in range(2))
    assert (a == b).all()


def test_dropblock_in_a_graph_with_unknown_size():
    layer = DropBlock2D(0.2, 3)
    specification = tf.TensorSpec((None, None, None, 4))
    drop = tf.function(lambda x: layer(x, training=True), input_signature=[specification])
    assert drop(tf.ones((2, 10, 8, 4))).shape == (2, 10, 8, 4)
    assert np.isfinite(drop(tf.ones((1, 1, 1, 4)))).all()


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"rate": -0.1}, {"rate": 0.1, "block_size": 0}])
def test_dropblock_refuses(options):
    with pytest.raises(ValueError, match="Received"):
        DropBlock2D(**options)


# === L2Normalization ===


@pytest.mark.parametrize("axis", [-1, 1])
def test_l2_normalization_gives_vectors_of_length_scale(axis):
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 6)).astype("float32")
    layer = L2Normalization(scale=8.0, axis=axis)
    y = np.array(layer(x))
    assert np.linalg.norm(y, axis=axis) == pytest.approx(8.0, rel=1e-5)
    factors = np.arange(1, x.shape[axis] + 1, dtype="float32")
    layer.gamma.assign(factors)
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    expected = x / np.linalg.norm(x, axis=axis, keepdims=True) * factors.reshape(shape)
    assert relative_error(layer(x), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_l2_normalization_of_zero_pixels_is_zero_with_zero_gradient(dtype):
    x = np.zeros((1, 2, 2, 512), "float32")
    x[0, 0, 0] = 100.0  # the squares overflow half precision
    layer = L2Normalization(scale=10.0, dtype=dtype)
    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        outputs = layer(inputs)
        total = tf.reduce_sum(tf.cast(outputs, "float32") * np.linspace(0, 1, 512, dtype="float32"))
    x_gradient, gamma_gradient = tape.gradient(total, [inputs, layer.gamma.value])
    assert np.array(outputs)[0, 0, 0] == pytest.approx(10 / np.sqrt(512), rel=1e-3)
    assert not np.array(outputs)[0, 1].any()
    assert np.isfinite(x_gradient).all() and np.isfinite(gamma_gradient).all()
    assert not np.array(x_gradient)[0, 1].any()


# === TransferConnectionBlock ===


def test_transfer_connection_equals_its_description():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 8, 5)).astype("float32")
    upper = rng.standard_normal((2, 3, 4, 7)).astype("float32")
    block = TransferConnectionBlock(4)
    y = np.array(block(x, upper))

    def convolution(x, layer):
        return (
            brute_force_convolution(x, layer.kernel.numpy(), 1, 1, 1, "same") + layer.bias.numpy()
        )

    inner = convolution(np.maximum(convolution(x, block.conv1), 0), block.conv2)
    # A 2x2 transposed convolution with stride 2 puts one matrix product into each of 4 cells.
    kernel = block.upsample.kernel.numpy()  # (2, 2, out, in)
    cells = np.einsum("bhwi,xyoi->bhxwyo", upper, kernel).reshape(2, 6, 8, 4)
    inner = np.maximum(inner + cells + block.upsample.bias.numpy(), 0)
    assert relative_error(y, np.maximum(convolution(inner, block.conv3), 0)) < 1e-5
    assert y.shape == (2, 6, 8, 4)


def test_transfer_connection_of_the_top_level_has_no_upsampling():
    top = TransferConnectionBlock(4)
    assert top(np.zeros((1, 5, 5, 3), "float32")).shape == (1, 5, 5, 4)
    assert len(top.weights) == 6
    below = TransferConnectionBlock(4, use_batch_norm=True)
    below(np.zeros((1, 6, 6, 3), "float32"), np.zeros((1, 3, 3, 4), "float32"))
    assert len(below.weights) == 4 + 4 * 4  # kernels without bias, four normalizations


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("known_size", [True, False])
def test_transfer_connection_crops_odd_levels(data_format, known_size):
    shape, upper_shape = (5, 7, 3), (3, 4, 4)
    if data_format == "channels_first":
        shape, upper_shape = (3, 5, 7), (4, 3, 4)

    def unknown(shape):
        return tuple(n if known_size or n in (3, 4) else None for n in shape)

    inputs = keras.Input(unknown(shape)), keras.Input(unknown(upper_shape))
    block = TransferConnectionBlock(4, data_format=data_format)
    model = keras.Model(inputs, block(*inputs))
    if not known_size and data_format == "channels_last":
        assert model.output_shape == (None, None, None, 4)
    y = model([np.ones((1, *shape), "float32"), np.ones((1, *upper_shape), "float32")])
    assert y.shape == (1, *block.compute_output_shape((None, *shape))[1:])
