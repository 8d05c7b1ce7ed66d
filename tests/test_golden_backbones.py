"""The backbones against reference numbers of the PyTorch implementations.

Weights are drawn by a recipe, so no file of weights is needed.
"""

import json
import sys

import keras
import numpy as np
import pytest

from keras_resnest.backbones import VARIANTS, create_backbone, load_torch_state_dict
from keras_resnest.backbones.torch_names import VGG16_TORCH_NAMES
from keras_resnest.layers import L2Normalization, TransferConnectionBlock

# Rounding alone gives about 1e-6 here, a mistake of structure more than 1e-3.
TOLERANCE = 1e-5

# Reference network: our name.
NETWORKS = {
    "timm.resnest14d": "resnest14",
    "timm.resnest26d": "resnest26",
    "timm.resnest50d": "resnest50",
    "official.resnest101": "resnest101",
    "official.resnest50_fast_1s1x64d": "resnest50_fast_1s1x64d",
    "official.resnest50_fast_2s1x64d": "resnest50_fast_2s1x64d",
    "official.resnest50_fast_4s1x64d": "resnest50_fast_4s1x64d",
    "official.resnest50_fast_1s2x40d": "resnest50_fast_1s2x40d",
    "official.resnest50_fast_2s2x40d": "resnest50_fast_2s2x40d",
    "official.resnest50_fast_4s2x40d": "resnest50_fast_4s2x40d",
    "official.resnest50_fast_1s4x24d": "resnest50_fast_1s4x24d",
    "timm.resnet18": "resnet18",
    "timm.resnet50": "resnet50",
    "timm.resnext50_32x4d": "resnext50_32x4d",
}
SLOW_NETWORKS = {
    "official.resnest200": "resnest200",
    "official.resnest269": "resnest269",
    "timm.resnet34": "resnet34",
    "timm.resnet101": "resnet101",
    "timm.resnet152": "resnet152",
    "timm.resnet50c": "resnet50c",
    "timm.resnet26d": "resnet26d",
    "timm.resnet50d": "resnet50d",
    "timm.resnet101d": "resnet101d",
    "timm.resnext101_32x8d": "resnext101_32x8d",
}


@pytest.fixture(scope="module")
def recipe(shared):
    sys.path.insert(0, str(shared / "golden"))
    try:
        import recipe
    finally:
        sys.path.pop(0)
    return recipe


@pytest.fixture(scope="module")
def networks(shared):
    return json.loads((shared / "golden" / "networks.json").read_text())


def relative_error(actual, expected, largest):
    return np.abs(np.asarray(actual) - expected).max() / largest


def values_at(feature_map, index):
    """Values of a channels_last map at (image, channel, row, column)."""
    return np.asarray(feature_map)[index[:, 0], index[:, 2], index[:, 3], index[:, 1]]


def check_network(reference, name, shared, recipe, networks):
    folder = shared / "golden"
    entry = networks[reference]
    manifest = recipe.load_manifest(folder / "manifests" / f"{reference}.json")
    model = create_backbone(name, include_rescaling=False, classifier_activation=None)
    load_torch_state_dict(model, recipe.make_state_dict(manifest, entry["seed"]))
    # PyTorch does not count the running statistics, which are not trained.
    num_params = sum(np.prod(variable.shape) for variable in model.trainable_variables)
    assert num_params == entry["num_params"]
    features = keras.Model(model.input, {**model.pyramid_outputs, "logits": model.output})
    with np.load(folder / "networks" / f"{reference}.npz") as arrays:
        for case, facts in entry["cases"].items():
            image = recipe.make_input(facts["input_shape"], entry["seed"], facts["input_name"])
            outputs = features(image.transpose(0, 2, 3, 1))
            expected = arrays[f"{case}_logits"]
            error = relative_error(outputs["logits"], expected, facts["logits_absmax"])
            assert error < TOLERANCE, (case, "logits")
            for level, stage in zip(("P2", "P3", "P4", "P5"), range(1, 5), strict=True):
                stage_facts = facts["stages"][stage - 1]
                shape = stage_facts["shape"]
                assert outputs[level].shape == (shape[0], shape[2], shape[3], shape[1])
                values = values_at(outputs[level], arrays[f"{case}_stage{stage}_index"])
                error = relative_error(
                    values, arrays[f"{case}_stage{stage}_value"], stage_facts["absmax"]
                )
                assert error < TOLERANCE, (case, level)


@pytest.mark.parametrize("reference", NETWORKS)
def test_network_equals_reference(reference, shared, recipe, networks):
    check_network(reference, NETWORKS[reference], shared, recipe, networks)


@pytest.mark.slow
@pytest.mark.parametrize("reference", SLOW_NETWORKS)
def test_large_network_equals_reference(reference, shared, recipe, networks):
    check_network(reference, SLOW_NETWORKS[reference], shared, recipe, networks)


def test_every_published_variant_has_a_reference():
    ours = {*NETWORKS.values(), *SLOW_NETWORKS.values(), "resnest14_tiny", "vgg16_reduced"}
    assert ours == set(VARIANTS)


def test_vgg16_and_transfer_connections_equal_reference(shared, recipe):
    reference = "luuuyi.refinedet_vgg16_320"
    folder = shared / "golden"
    entry = json.loads((folder / "networks_refinedet.json").read_text())[reference]
    manifest = recipe.load_manifest(folder / "manifests" / f"{reference}.json")
    weights = recipe.make_state_dict(manifest, entry["seed"])
    model, names = refinedet_features()
    parts = ("vgg.", "conv4_3", "conv5_3", "extras.", "tcb")
    weights = {name: array for name, array in weights.items() if name.startswith(parts)}
    load_torch_state_dict(model, weights, names)
    image = recipe.make_input(entry["input_shape"], entry["seed"], entry["input_name"])
    outputs = model(image.transpose(0, 2, 3, 1))
    with np.load(folder / "networks" / f"{reference}.npz") as arrays:
        for module, facts in entry["features"].items():
            values = values_at(outputs[module], arrays[f"feature.{module}_index"])
            error = relative_error(values, arrays[f"feature.{module}_value"], facts["absmax"])
            # As the reference documents: up to twenty times its own rounding error.
            assert error < 20 * facts["rel_err"], module


def refinedet_features():
    """Backbone, extra level and transfer connections of RefineDet, with the port's names."""
    backbone = create_backbone("vgg16_reduced", include_rescaling=False)
    names = dict(VGG16_TORCH_NAMES)
    p3, p4, p5 = (backbone.pyramid_outputs[level] for level in ("P3", "P4", "P5"))
    x = keras.layers.Conv2D(256, 1, activation="relu", name="extras_0")(p5)
    x = keras.layers.ZeroPadding2D(1)(x)
    p6 = keras.layers.Conv2D(512, 3, strides=2, activation="relu", name="extras_1")(x)
    p3 = L2Normalization(10.0, name="conv4_3_L2Norm")(p3)
    p4 = L2Normalization(8.0, name="conv5_3_L2Norm")(p4)
    outputs = {"conv4_3_L2Norm": p3, "conv5_3_L2Norm": p4, "vgg.34": p5}
    upper = None
    for level, x in ((3, p6), (2, p5), (1, p4), (0, p3)):
        upper = TransferConnectionBlock(256, name=f"level{level}")(x, upper)
        outputs[f"tcb2.{3 * level + 2}"] = upper
        names[f"level{level}_conv1"] = f"tcb0.{3 * level}"
        names[f"level{level}_conv2"] = f"tcb0.{3 * level + 2}"
        names[f"level{level}_upsample"] = f"tcb1.{level}"
        names[f"level{level}_conv3"] = f"tcb2.{3 * level + 1}"
    return keras.Model(backbone.input, outputs), names
