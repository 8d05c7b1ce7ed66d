"""The deployment graph: folded, it computes what the Keras model computes."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import small_backbone, small_detector

from keras_resnest.backbones import VGG, ResNet, ShuffleNet, create_backbone
from keras_resnest.serving.graph import deployment_function, float32_compute
from keras_resnest.serving.tasks import create_task

if keras.backend.backend() != "tensorflow":
    pytest.skip("graphs are TensorFlow's", allow_module_level=True)

import tensorflow as tf

LINEAR = {"Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul"}
TRAINING = {"VarHandleOp", "ReadVariableOp", "FusedBatchNormV3", "RandomUniform", "Dropout"}
CALLS = {"PyFunc", "EagerPyFunc", "PyFuncStateless", "PartitionedCall", "StatefulPartitionedCall"}
RNG = np.random.default_rng(3)
# Largest difference, relative to the largest output; about three times what was measured.
TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3}


def operations(function):
    """All operations of a concrete function, which calls no other functions."""
    found = function.graph.get_operations()
    assert not CALLS & {op.type for op in found}
    return found


def types(function):
    return [op.type for op in operations(function)]


def assert_close(got, want, tolerance):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].dtype == tf.float32
        assert got[name].shape == value.shape
        difference = np.abs(got[name].numpy() - np.asarray(value))
        assert difference.max() <= tolerance * np.abs(value).max(), name


def constant_behind(op):
    """The only consumer of a result if its other input is a constant, else None."""
    consumers = op.outputs[0].consumers()
    if len(consumers) != 1 or consumers[0].type not in ("Mul", "AddV2", "Sub", "BiasAdd"):
        return None
    return consumers[0] if any(x.op.type == "Const" for x in consumers[0].inputs) else None


def assert_folded(function):
    """At most one constant follows a convolution: its bias."""
    linear = [op for op in operations(function) if op.type in LINEAR]
    assert linear
    for op in linear:
        behind = constant_behind(op)
        if behind is not None:
            assert behind.type == "BiasAdd" and constant_behind(behind) is None, op.name


# === Networks ===

SMALL = {
    "stackwise_num_filters": [8, 16],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "stem_width": 8,
    "include_top": True,
    "classes": 5,
    "classifier_activation": None,
    "image_shape": (48, 64, 3),
}
TOP = {name: SMALL[name] for name in ("include_top", "classes", "classifier_activation")}
SHUFFLE = {**TOP, "image_shape": (48, 64, 3)}


def resnet(**kwargs):
    return ResNet(**{**SMALL, **kwargs})


NETWORKS = {
    "resnest14_tiny": lambda: create_backbone("resnest14_tiny", classes=3, image_shape=(64, 64, 3)),
    "ResNeSt with groups": lambda: resnet(
        radix=2,
        cardinality=2,
        deep_stem=True,
        avg_down=True,
        avd="before",
        dropblock_rate=0.1,
        dropout_rate=0.2,
    ),
    "basic, normalized images": lambda: resnet(block_type="basic", include_rescaling=False),
    "features": lambda: resnet(include_top=False),
    "SE": lambda: resnet(se_ratio=0.25),
    "SK": lambda: resnet(selective_kernel={}),
    "Res2Net": lambda: resnet(scale=4, base_width=26),
    "RegNet": lambda: resnet(
        expansion=1,
        group_width=8,
        se_ratio=0.25,
        se_position="middle",
        stem_kernel_size=3,
        stem_pooling=False,
    ),
    "channels_first": lambda: resnet(
        data_format="channels_first", image_shape=(3, 48, 64), radix=2
    ),
    "ShuffleNet V1": lambda: ShuffleNet([48, 96], [2, 1], groups=3, **SHUFFLE),
    "ShuffleNet V2": lambda: ShuffleNet([32, 64], [2, 1], head_filters=32, **SHUFFLE),
    "ShuffleNet V2+": lambda: ShuffleNet(
        [32, 64],
        [2, 1],
        channel_split="alternate",
        block_kinds=[3, "xception", 5],
        stackwise_activations=["relu", "hard_swish"],
        stackwise_se=[False, True],
        head_filters=32,
        head_units=24,
        trained_on_bgr=True,
        **SHUFFLE,
    ),
    "VGG": lambda: VGG([8, 8, 8, 8, 8], [1, 1, 1, 1, 1], reduced_top=True, image_shape=(64, 64, 3)),
    "detector": lambda: small_detector((64, 64, 3)),
    "detector with other heads": lambda: small_detector(
        (64, 64, 3),
        {
            "use_batch_norm": False,
            "use_residual_blocks": True,
            "use_l2_normalization": False,
            "use_transfer_connection": False,
        },
    ),
}


def trained(build, seed=0):
    """A model whose statistics, scales, offsets and biases differ from their initial values."""
    keras.utils.set_random_seed(seed)
    model, rng = build(), np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built:
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0.0, 0.5, layer.beta.shape))
            layer.moving_mean.assign(rng.normal(0.0, 0.5, layer.beta.shape))
            layer.moving_variance.assign(rng.uniform(0.3, 2.0, layer.beta.shape))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(0.0, 0.3, layer.bias.shape))
    return model


def images_of(model, count=2):
    """Smooth images with some noise, channels last."""
    height, width, _ = create_task(model).image_shape
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width][..., None] / 16.0
    waves = [np.sin(y * a + x * b + [0, 1, 2]) for a, b in rng.uniform(0.3, 2, (count, 2))]
    images = 127.5 + 100 * np.array(waves) + rng.uniform(-25, 25, (count, height, width, 3))
    if getattr(model, "include_rescaling", True):
        return images.astype("float32")
    return (images / 60 - 2).astype("float32")


def deployed(model, precision="float32"):
    task = create_task(model)
    specification = tf.TensorSpec((None, *task.image_shape), name="images")
    return deployment_function(task.network, specification, precision)


def predicted(model, images):
    """Outputs of the Keras model itself, by the names of an export."""
    if getattr(model, "data_format", "") == "channels_first":
        images = images.transpose(0, 3, 1, 2)
    outputs = model(images, training=False)
    if isinstance(outputs, dict):
        return {name: value.numpy() for name, value in outputs.items()}
    name = "predictions" if model.include_top else "features"
    return {name: outputs.numpy()}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = trained(NETWORKS[name])
    images = images_of(model)
    function = deployed(model)
    want = predicted(model, images)
    assert_close(function(tf.constant(images)), want, TOLERANCES["float32"])
    # Images are independent, and the batch size is open.
    first = {output: value[:1] for output, value in want.items()}
    assert_close(function(tf.constant(images[:1])), first, TOLERANCES["float32"])
    assert {op.type for op in operations(function) if not op.inputs} <= {"Placeholder", "Const"}
    assert not TRAINING & set(types(function))
    assert not [a for op in operations(function) for a in op.node_def.attr if "Xla" in a]
    assert_folded(function)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("ResNeSt with groups", "bfloat16"),
        ("ResNeSt with groups", "float16"),
        ("ShuffleNet V2+", "bfloat16"),
        ("detector", "bfloat16"),
        ("detector", "float16"),
    ],
)
def test_reduced_precision(name, precision):
    model = trained(NETWORKS[name])
    images = images_of(model)
    function = deployed(model, precision)
    assert function.structured_input_signature[0][0].dtype == tf.float32
    assert_close(function(tf.constant(images)), predicted(model, images), TOLERANCES[precision])
    of_type = {op.get_attr("T") for op in operations(function) if op.type in LINEAR}
    assert of_type == {tf.as_dtype(precision)}
    sensitive = [op for op in operations(function) if op.type in ("Softmax", "Rsqrt", "Mean")]
    assert sensitive and {op.get_attr("T") for op in sensitive} == {tf.float32}
    assert_folded(function)


def mixed_detector(policy):
    return small_detector((64, 64, 3), backbone=small_backbone(dtype=policy), dtype=policy)


def mixed_classifier(policy):
    return resnet(radix=2, se_ratio=0.25, dtype=policy)


@pytest.mark.parametrize(
    ("build", "policy"),
    [(mixed_detector, "mixed_bfloat16"), (mixed_classifier, "mixed_float16")],
    ids=["detector", "classifier"],
)
def test_mixed_precision_models_are_deployed_in_float32(build, policy):
    mixed = trained(lambda: build(policy))
    plain = build("float32")
    plain.set_weights(mixed.get_weights())
    images = images_of(mixed)
    policies = [layer.dtype_policy.name for layer in mixed._flatten_layers()]
    assert policy in policies
    before = predicted(mixed, images)
    function = deployed(mixed)
    assert_close(function(tf.constant(images)), predicted(plain, images), TOLERANCES["float32"])
    reduced = {tf.bfloat16, tf.float16}
    assert not reduced & {x.dtype for op in operations(function) for x in op.outputs}
    assert_folded(function)
    # The model itself does not change.
    assert [layer.dtype_policy.name for layer in mixed._flatten_layers()] == policies
    for name, value in predicted(mixed, images).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("adapted", [False, True])
def test_statistics_of_images_are_exact(adapted):
    """Keras rounds them in mixed precision when it builds the layer."""
    images = RNG.uniform(0, 255, (4, 5, 6, 3)).astype("float32")
    mean, variance = images.mean((0, 1, 2)), images.var((0, 1, 2))
    given = {} if adapted else {"mean": mean, "variance": variance}
    layer = keras.layers.Normalization(dtype="mixed_bfloat16", **given)
    layer.adapt(images) if adapted else layer.build(images.shape)
    model = keras.Model(x := keras.Input((5, 6, 3)), layer(x))
    before = np.asarray(layer.mean)

    def network(images):
        with float32_compute(model):
            return {"y": model(images)}

    function = deployment_function(network, tf.TensorSpec((None, 5, 6, 3), name="images"))
    want = {"y": (images - mean) / np.sqrt(variance)}
    assert_close(function(tf.constant(images)), want, 1e-5)
    np.testing.assert_array_equal(np.asarray(layer.mean), before)
    assert np.abs(before.ravel() - mean).max() > 1e-3  # the model itself has rounded ones


def test_policies_are_restored_after_an_error():
    model = small_backbone(dtype="mixed_bfloat16")
    means = model.get_layer("rescaling").mean
    before = [layer.dtype_policy.name for layer in model._flatten_layers()]
    with pytest.raises(RuntimeError, match="in between"), float32_compute(model):
        assert {layer.compute_dtype for layer in model._flatten_layers()} == {"float32"}
        raise RuntimeError("in between")
    assert [layer.dtype_policy.name for layer in model._flatten_layers()] == before
    assert model.get_layer("rescaling").mean is means


# === Folding of small graphs ===

CHANNELS = 6
IMAGE = RNG.normal(size=(2, 5, CHANNELS, 4)).astype("float32")  # its width is CHANNELS
ROWS = RNG.normal(size=(3, 4)).astype("float32")


def numbers(*shape):
    """Random constants far from 0."""
    return (RNG.uniform(0.5, 2.0, shape) * RNG.choice([-1, 1], shape)).astype("float32")


V, W, B = numbers(CHANNELS), numbers(CHANNELS), numbers(CHANNELS)
KERNEL, DEEP = numbers(3, 3, 4, CHANNELS), numbers(3, 3, 4, 3)
UP, DENSE = numbers(2, 2, CHANNELS, 4), numbers(4, CHANNELS)


def conv(x, kernel=KERNEL, **kwargs):
    return tf.nn.conv2d(x, kernel, 1, "SAME", **kwargs)


def depthwise(x):
    return tf.nn.depthwise_conv2d(x, DEEP[:, :, :, :2], (1, 1, 1, 1), "SAME")


def transposed(x):
    shape = (tf.shape(x)[0], 10, 2 * CHANNELS, CHANNELS)
    return tf.nn.conv2d_transpose(x, UP, shape, 2)


def dense(x):
    return tf.matmul(x, DENSE)


def check_graph(network, x, left):
    """The graph computes what TensorFlow does eagerly, with the operations `left`."""
    outputs = network(tf.constant(x))
    outputs = outputs if isinstance(outputs, dict) else {"y": outputs}

    def named(images):
        result = network(images)
        return result if isinstance(result, dict) else {"y": result}

    specification = tf.TensorSpec((None, *x.shape[1:]), name="images")
    function = deployment_function(named, specification)
    assert_close(function(tf.constant(x)), {k: v.numpy() for k, v in outputs.items()}, 1e-5)
    counted = (*LINEAR, "BiasAdd", "Mul", "AddV2", "Sub", "Neg")
    assert sorted(t for t in types(function) if t in counted) == sorted(left)
    return function


def per_channel(count):
    """A vector of constants for each channel of an operation's result."""
    return np.resize(V, count), np.resize(W, count), np.resize(B, count)


@pytest.mark.parametrize(
    ("linear", "kind"),
    [
        (conv, "Conv2D"),
        (depthwise, "DepthwiseConv2dNative"),
        (transposed, "Conv2DBackpropInput"),
        (dense, "MatMul"),
        (lambda x: tf.matmul(x, DENSE.T, transpose_b=True), "MatMul"),
        (lambda x: conv(x, KERNEL[:, :, :2]), "Conv2D"),  # two groups
        (lambda x: conv(x, KERNEL, dilations=2), "Conv2D"),
        (lambda x: conv(x, KERNEL[..., :1]), "Conv2D"),  # of one channel
    ],
    ids=["conv", "depthwise", "transposed", "dense", "dense^T", "grouped", "dilated", "one"],
)
@pytest.mark.parametrize(
    "chain",
    [
        lambda y, v, w, b: tf.nn.bias_add(y, b) * v + w,
        lambda y, v, w, b: v * (y - w) + 3.0,
        lambda y, v, w, b: b + 0.5 * (v * y * 2.0 - 1.0) + w[None],
        lambda y, v, w, b: w.reshape([1] * (len(y.shape) - 1) + [-1]) + y * np.float32(-2.0),
    ],
    ids=["bias, mul, add", "from the left", "scalars", "full rank"],
)
def test_scales_and_offsets_are_folded(linear, kind, chain):
    x = ROWS if kind == "MatMul" else IMAGE

    def network(images):
        y = linear(images)
        return chain(y, *per_channel(y.shape[-1]))

    check_graph(network, x, [kind, "BiasAdd"])


def test_without_an_offset_there_is_no_bias():
    check_graph(lambda x: 2.0 * (conv(x) * V), IMAGE, ["Conv2D"])


def test_large_kernels_are_folded():
    """They are withheld from TensorFlow's own folding, which copies constants."""
    kernel = numbers(3, 3, 4, 600)
    scale, offset = numbers(600), numbers(600)
    assert kernel.nbytes > 2**16
    check_graph(lambda x: conv(x, kernel) * scale + offset, IMAGE, ["Conv2D", "BiasAdd"])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_weights_are_copied_a_few_times_only():
    """TensorFlow's own freezing takes a dozen copies."""
    kernel = tf.Variable(tf.ones((4096, 4096)))
    specification = tf.TensorSpec((None, 4096), name="rows")

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    function = deployment_function(
        lambda x: {"y": tf.matmul(x, kernel) * 2.0}, specification, freeze=False
    )
    assert memory("VmHWM") - before < 5.5 * 2**26
    assert function(tf.ones((1, 4096)))["y"].numpy().max() == 8192.0
    assert [v.shape for v in function.network_variables] == [(4096, 4096)]


def test_one_kernel_of_two_convolutions():
    def network(x):
        return {"a": conv(x) * V, "b": conv(x + 1.0) * W + B, "c": conv(x + 2.0)}

    left = [*["Conv2D", "AddV2"] * 2, "Conv2D", "BiasAdd"]
    check_graph(network, IMAGE, left)


def test_results_used_twice_are_not_folded():
    def result(x):
        y = conv(x)
        return tf.nn.relu(y) + y * V

    def middle(x):
        y = conv(x) * V
        return tf.nn.relu(y) + (y + B)

    def by_itself(x):
        y = conv(x)
        return y * y + V

    check_graph(result, IMAGE, ["Conv2D", "Mul", "AddV2"])
    check_graph(middle, IMAGE, ["Conv2D", "AddV2", "AddV2"])
    check_graph(by_itself, IMAGE, ["Conv2D", "Mul", "AddV2"])


def test_outputs_of_the_graph_keep_their_values():
    def first(x):
        y = conv(x)
        return {"a": y, "b": y * V}

    def middle(x):
        y = conv(x) * V
        return {"a": y + B, "b": y}

    def last_twice(x):
        y = conv(x) * V + B
        return {"a": y, "b": y, "c": tf.nn.relu(y)}

    check_graph(first, IMAGE, ["Conv2D", "Mul"])
    check_graph(middle, IMAGE, ["Conv2D", "AddV2"])
    check_graph(last_twice, IMAGE, ["Conv2D", "BiasAdd"])


OTHER_AXES = {
    "height": numbers(1, 5, 1, 1),
    "width, as many as channels": numbers(1, 1, CHANNELS, 1),
    "width, without the batch": numbers(CHANNELS, 1),
    "one image": numbers(1, 5, CHANNELS, CHANNELS),
    "one image, without the batch": numbers(5, CHANNELS, CHANNELS),
    "every number": numbers(2, 5, CHANNELS, CHANNELS),
    "one more axis": numbers(1, 1, 1, 1, CHANNELS),
}


@pytest.mark.parametrize("name", OTHER_AXES)
def test_constants_along_other_axes_are_not_folded(name):
    constant = OTHER_AXES[name]
    check_graph(lambda x: conv(x) * constant, IMAGE, ["Conv2D", "Mul"])
    check_graph(lambda x: constant + conv(x), IMAGE, ["Conv2D", "AddV2"])


def test_factors_that_change_the_shape_are_not_folded():
    check_graph(lambda x: dense(x) * V[None, None], ROWS, ["MatMul", "Mul"])
    check_graph(lambda x: dense(x) * V[:1, None, None], ROWS, ["MatMul", "Mul"])
    check_graph(lambda x: conv(x, KERNEL[..., :1]) * V, IMAGE, ["Conv2D", "Mul"])
    check_graph(lambda x: conv(x) * V[:1].reshape(1, 1, 1, 1, 1), IMAGE, ["Conv2D", "Mul"])


def test_a_constant_minus_a_result_is_not_folded():
    check_graph(lambda x: V - conv(x), IMAGE, ["Conv2D", "Sub"])
    check_graph(lambda x: 1.0 - dense(x), ROWS, ["MatMul", "Sub"])
    check_graph(lambda x: (V - conv(x)) * W, IMAGE, ["Conv2D", "Sub", "Mul"])


def test_variable_factors_are_not_folded():
    check_graph(lambda x: conv(x) * tf.reduce_mean(x), IMAGE, ["Conv2D", "Mul"])
    check_graph(lambda x: conv(x, KERNEL * tf.reduce_mean(x)) * V, IMAGE, ["Conv2D", "Mul", "Mul"])
    check_graph(lambda x: tf.matmul(x, x, transpose_a=True) * V[:4], ROWS, ["MatMul", "Mul"])
    check_graph(lambda x: tf.matmul(x, ROWS, transpose_a=True) * V[:4], ROWS, ["MatMul", "Mul"])


def test_only_direct_successors_are_folded():
    check_graph(lambda x: tf.nn.relu(conv(x)) * V, IMAGE, ["Conv2D", "Mul"])
    check_graph(lambda x: conv(x * V[:4]) + B, IMAGE, ["Mul", "Conv2D", "BiasAdd"])


# === Errors ===


@pytest.mark.parametrize("precision", ["int8", "float64", "mixed_bfloat16", None])
def test_unknown_precision(precision):
    specification = tf.TensorSpec((None, 4), name="rows")
    with pytest.raises(ValueError, match="`precision` must be"):
        deployment_function(lambda x: {"y": x}, specification, precision)
