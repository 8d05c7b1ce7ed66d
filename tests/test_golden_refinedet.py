"""Whole RefineDet networks against the PyTorch references: same weights, same raw outputs."""

import json

import keras
import numpy as np
import pytest
from golden_networks import load_recipe, values_at

from keras_resnest.backbones import create_backbone, load_torch_state_dict
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
