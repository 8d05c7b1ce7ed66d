"""The networks against reference numbers of the PyTorch implementations.

A recipe draws the weights, so no weight files are needed. `golden_networks.py` prints all
comparisons as a table.
"""

import keras
import numpy as np
import pytest
from golden_data import load_cases
from golden_networks import Comparison, our_name

from keras_resnest.backbones import VARIANTS, ResNet, create_backbone
from keras_resnest.backbones.regnet import regnet_arguments

# One network of every kind always runs, the other sizes of each with `pytest -m slow`.
ALWAYS = {
    *("resnest14", "resnest50", "resnest50_fast_1s4x24d", "resnest50_fast_4s2x40d"),
    *("resnet18", "resnet50", "resnet50c", "resnet26d", "seresnet50", "resnext50_32x4d"),
    *("skresnet18", "skresnext50_32x4d", "regnetx_002", "regnety_002"),
    *("shufflenet_v1_g3_0_5x", "shufflenet_v1_g8_0_5x", "shufflenet_v2_0_5x"),
    *("shufflenet_v2_0_5x_megvii", "shufflenet_v2_plus_small"),
}
# Rows without reference numbers, and how else they are proven.
UNPROVEN = {
    "resnest14_tiny": "not published",
    "vgg16_reduced": "test_golden_refinedet.py",
    "seresnet18": "seresnet50, other depth",
    "seresnet34": "seresnet50, other depth",
    "seresnet101": "seresnet50, other depth",
    "seresnet152": "seresnet50, other depth",
    "regnetx_006": "parameter count",
    "regnety_006": "parameter count",
}


NETWORKS = load_cases("networks")
# Many networks of the authors are timm's, by another name.
REFERENCES = [name for name, entry in NETWORKS.items() if "same_as" not in entry]


def runs_always(reference: str) -> bool:
    # timm published all of them, the authors some again.
    return our_name(reference) in ALWAYS and not reference.startswith("official.")


def check(reference):
    comparison = Comparison(reference)
    assert comparison.parameters == comparison.expected_parameters
    for what, error, tolerance in comparison.errors:
        assert error < tolerance, (what, error, tolerance)


@pytest.mark.parametrize("reference", [name for name in REFERENCES if runs_always(name)])
def test_network_equals_reference(reference):
    check(reference)


@pytest.mark.slow
@pytest.mark.parametrize("reference", [name for name in REFERENCES if not runs_always(name)])
def test_other_network_equals_reference(reference):
    check(reference)


def test_every_variant_has_a_reference_or_a_reason():
    assert {our_name(name) for name in NETWORKS} | set(UNPROVEN) == set(VARIANTS)
    assert len(NETWORKS) == 67


# timm's published numbers.
@pytest.mark.parametrize(
    "name, parameters",
    [("regnetx_006", 6_196_040), ("regnety_006", 6_055_160)],
)
def test_parameter_counts(name, parameters):
    model = create_backbone(name)
    assert sum(np.prod(v.shape) for v in model.trainable_variables) == parameters


def test_regnet_widths_follow_the_paper():
    # Table of the paper's appendix: RegNetX-1.6GF and RegNetY-3.2GF.
    arguments = regnet_arguments(18, 80, 34.01, 2.25, 24)
    assert arguments["stackwise_num_filters"] == [72, 168, 408, 912]
    assert arguments["stackwise_num_blocks"] == [2, 4, 10, 2]
    arguments = regnet_arguments(21, 80, 42.63, 2.66, 24, se_ratio=0.25)
    assert arguments["stackwise_num_filters"] == [72, 216, 576, 1512]
    assert arguments["stackwise_num_blocks"] == [2, 5, 13, 1]
    with pytest.raises(ValueError, match="Received: depth=0"):
        regnet_arguments(0, 80, 34.01, 2.25, 24)


# === The refinements B, C and D, against Keras' own ResNet ===


def test_without_refinements_it_is_the_network_of_keras_applications():
    """As first published, Keras' network has its strides in the 1x1 convolutions."""
    theirs = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(None, None, 3)
    )
    ours = create_backbone(
        "resnet50", include_top=False, include_rescaling=False, stride_in_1x1=True
    )
    rng = np.random.default_rng(0)

    def keras_name(name):  # "layer2_0_conv1" is "conv3_block1_1_conv"
        if not name.startswith("layer"):
            return {"conv1": "conv1_conv", "bn1": "conv1_bn"}[name]
        stage, block, *rest = name.removeprefix("layer").split("_")
        kind, place = ("conv", rest[0][4:]) if rest[0].startswith("conv") else ("bn", rest[0][2:])
        if rest[0] == "downsample":
            kind, place = ("conv", "0") if rest[1] == "0" else ("bn", "0")
        return f"conv{int(stage) + 1}_block{int(block) + 1}_{place}_{kind}"

    for layer in ours.layers:
        if isinstance(layer, keras.layers.Conv2D):
            bias = np.zeros(layer.filters, "float32")
            kernel = layer.kernel.numpy() * np.float32(0.7)
            layer.kernel.assign(kernel)
            theirs.get_layer(keras_name(layer.name)).set_weights([kernel, bias])
        elif isinstance(layer, keras.layers.BatchNormalization):
            weights = [rng.uniform(0.5, 1.0, w.shape).astype("float32") for w in layer.weights]
            layer.set_weights(weights)
            norm = theirs.get_layer(keras_name(layer.name))
            norm.epsilon = layer.epsilon
            norm.set_weights(weights)
    image = rng.normal(size=(1, 91, 107, 3)).astype("float32")
    want, got = np.asarray(theirs(image)), np.asarray(ours(image))
    assert want.std() > 1e-3
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_refinements_are_separate_switches():
    small = {
        "stackwise_num_filters": [8, 16],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": (1, 2),
        "stem_width": 8,
    }
    kinds = ("stride_in_1x1", "deep_stem", "avg_down")
    for code in range(8):
        switches = {name: bool(code >> i & 1) for i, name in enumerate(kinds)}
        model = ResNet(**small, **switches)
        layers = {layer.name: layer for layer in model.layers}
        first, spatial = layers["layer2_0_conv1"].strides, layers["layer2_0_conv2"].strides
        assert (first, spatial) == (
            ((2, 2), (1, 1)) if switches["stride_in_1x1"] else ((1, 1), (2, 2))
        )
        assert ("conv1_6" in layers) == switches["deep_stem"]
        pooled = layers.get("layer2_0_downsample_0").__class__.__name__ == "AveragePooling2D"
        assert pooled == switches["avg_down"]
        assert model(np.zeros((1, 33, 47, 3), "float32")).shape == (1, 5, 6, 64)


def test_no_builder_has_a_body_of_its_own():
    assert len({variant.build.__code__ for variant in VARIANTS.values()}) == 1
