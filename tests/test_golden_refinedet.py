"""Whole RefineDet networks against the PyTorch references: same weights, same raw outputs."""

import json

import keras
import numpy as np
import pytest
from golden_networks import load_recipe, values_at
from safetensors.numpy import save_file

from keras_resnest.backbones import create_backbone, load_torch_state_dict
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.detection.builders import refinedet320_resnest50, refinedet320_vgg16
from keras_resnest.detection.refinedet import RefineDet

OUTPUTS = {
    "arm_loc": "arm_boxes",
    "arm_conf": "arm_objectness",
    "odm_loc": "odm_boxes",
    "odm_conf": "odm_logits",
}
# The references' inner maps, and our layers.
FEATURES = {
    "conv4_3_L2Norm": "l2_normalization_p3",
    "conv5_3_L2Norm": "l2_normalization_p4",
    **{f"tcb2.{3 * i + 2}": f"tcb_p{i + 3}" for i in range(4)},
}
CASES = {
    "luuuyi.refinedet_vgg16_320": "vgg16_reduced",
    "luuuyi.refinedet_vgg16_512": "vgg16_reduced",
    "pengyang1225.refinedet_resnest50_320": "resnest50",
}


@pytest.mark.parametrize("reference", sorted(CASES))
def test_raw_outputs_equal_the_reference(reference, shared):
    golden = shared / "golden"
    recipe = load_recipe(golden)
    entry = json.loads((golden / "networks_refinedet.json").read_text())[reference]
    manifest = recipe.load_manifest(golden / "manifests" / f"{reference}.json")
    backbone = create_backbone(CASES[reference], include_top=False, include_rescaling=False)
    side = entry["input_shape"][2]
    model = RefineDet(20, backbone, (side, side, 3))
    load_torch_state_dict(model, recipe.make_state_dict(manifest, entry["seed"]))
    parameters = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert parameters == entry["num_params"]

    image = recipe.make_input(entry["input_shape"], entry["seed"], entry["input_name"])
    features = {name: model.get_layer(layer).output for name, layer in FEATURES.items()}
    network = keras.Model(model.input, {"features": features, "outputs": model.output})
    result = network(image.transpose(0, 2, 3, 1), training=False)
    outputs = result["outputs"]
    with np.load(golden / "networks" / f"{reference}.npz") as arrays:
        for theirs, ours in OUTPUTS.items():
            facts, index = entry["outputs"][theirs], arrays[f"{theirs}_index"]
            values = np.asarray(outputs[ours])
            assert list(values.shape) == facts["shape"]
            error = np.abs(values[tuple(index.T)] - arrays[f"{theirs}_value"]).max()
            # As the reference documents: up to twenty times its own rounding error.
            assert error / facts["absmax"] < 20 * facts["rel_err"], (theirs, error)
        for module, value in result["features"].items():
            facts = entry["features"][module]
            values = values_at(value, arrays[f"feature.{module}_index"])
            error = np.abs(values - arrays[f"feature.{module}_value"]).max() / facts["absmax"]
            assert error < 20 * facts["rel_err"], (module, error)


# --- Checkpoints by the builders -------------------------------------------------------------


def test_builder_loads_a_checkpoint_of_the_ports(shared, tmp_path):
    """The file of one port, with its unused modules; the same detections as array by array."""
    recipe = load_recipe(shared / "golden")
    manifest = shared / "golden" / "manifests" / "pengyang1225.refinedet_resnest50_320.json"
    weights = recipe.make_state_dict(recipe.load_manifest(manifest), 1)
    path = tmp_path / "refinedet.safetensors"
    unused = {"Resnet86.conv1.0.weight": weights["model.conv1.0.weight"]}
    unused["model.fc.bias"] = np.zeros(1000, "float32")
    save_file({**weights, **unused}, path)
    model = refinedet320_resnest50(20, weights=path)
    image = np.random.default_rng(0).uniform(0, 255, (1, 320, 320, 3)).astype("float32")
    backbone = create_backbone("resnest50", include_top=False)
    other = RefineDet(20, backbone, anchor_generator=AnchorGenerator(clip=True))
    load_torch_state_dict(other, weights)
    want, got = other(image, training=False), model(image, training=False)
    for name in OUTPUTS.values():
        assert np.array_equal(got[name], want[name])
    # The ports' prior boxes are clipped: (cx, cy, w, h) to 0 to 1.
    with np.load(shared / "golden" / "refinedet" / "priors.npz") as arrays:
        priors = arrays["priors_320"] * 320
    corners = np.concatenate(
        [priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], axis=1
    )
    np.testing.assert_allclose(np.asarray(model.anchors), corners, atol=1e-3)
    with pytest.raises(ValueError, match="wrong shape"):
        refinedet320_resnest50(3, weights=path)


def test_builder_loads_the_reduced_vgg(shared, tmp_path):
    """The file that SSD and RefineDet start from: the modules of VGG by number."""
    recipe = load_recipe(shared / "golden")
    manifest = shared / "golden" / "manifests" / "luuuyi.refinedet_vgg16_320.json"
    weights = recipe.make_state_dict(recipe.load_manifest(manifest), 1)
    numbered = {k.removeprefix("vgg."): v for k, v in weights.items() if k.startswith("vgg.")}
    save_file(numbered, tmp_path / "vgg16_reducedfc.safetensors")
    model = refinedet320_vgg16(3, backbone_weights=tmp_path / "vgg16_reducedfc.safetensors")
    kernel = model.backbone.get_layer("fc7").kernel
    assert np.array_equal(kernel[0, 0], weights["vgg.33.weight"][:, :, 0, 0].T)
    kernel = model.backbone.get_layer("conv1_1").kernel
    assert np.array_equal(kernel[0, 2], weights["vgg.0.weight"][:, :, 0, 2].T)
