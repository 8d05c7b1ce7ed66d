"""Whole RefineDet networks against the PyTorch reference: same weights, same raw outputs."""

import json
import sys

import numpy as np
import pytest

from keras_resnest.backbones import create_backbone
from keras_resnest.backbones.torch_names import VGG16_TORCH_NAMES, load_torch_state_dict
from keras_resnest.detection.refinedet import RefineDet

OUTPUTS = {
    "arm_loc": "arm_boxes",
    "arm_conf": "arm_objectness",
    "odm_loc": "odm_boxes",
    "odm_conf": "odm_logits",
}


def detector_names() -> dict[str, str]:
    """The ports' module of each of our layers behind the backbone."""
    names = {"conv6_1": "extras.0", "conv6_2": "extras.1"}
    names |= {"l2_normalization_p3": "conv4_3_L2Norm", "l2_normalization_p4": "conv5_3_L2Norm"}
    for i, level in enumerate((3, 4, 5, 6)):
        for stage in ("arm", "odm"):
            names[f"{stage}_boxes_{i}"] = f"{stage}_loc.{i}"
            names[f"{stage}_classes_{i}"] = f"{stage}_conf.{i}"
        block = f"tcb_p{level}"
        names[f"{block}_conv1"], names[f"{block}_conv2"] = f"tcb0.{3 * i}", f"tcb0.{3 * i + 2}"
        names[f"{block}_conv3"], names[f"{block}_upsample"] = f"tcb2.{3 * i + 1}", f"tcb1.{i}"
    return names


def without_prefix(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): array for name, array in weights.items()}


# reference: backbone, prefix of the backbone's modules, their names
CASES = {
    "luuuyi.refinedet_vgg16_320": ("vgg16_reduced", "", VGG16_TORCH_NAMES),
    "pengyang1225.refinedet_resnest50_320": ("resnest50", "model.", {}),
}


@pytest.mark.parametrize("reference", sorted(CASES))
def test_raw_outputs_equal_the_reference(reference, shared):
    sys.path.insert(0, str(shared / "golden"))
    import recipe

    folder = shared / "golden"
    entry = json.loads((folder / "networks_refinedet.json").read_text())[reference]
    manifest = recipe.load_manifest(folder / "manifests" / f"{reference}.json")
    weights = recipe.make_state_dict(manifest, entry["seed"])
    name, prefix, backbone_names = CASES[reference]
    backbone = create_backbone(name, include_top=False, include_rescaling=False)
    side = entry["input_shape"][2]
    model = RefineDet(20, backbone, (side, side, 3))
    load_torch_state_dict(
        model, without_prefix(weights, prefix), {**backbone_names, **detector_names()}
    )
    image = recipe.make_input(entry["input_shape"], entry["seed"], entry["input_name"])
    outputs = model(image.transpose(0, 2, 3, 1), training=False)
    with np.load(folder / "networks" / f"{reference}.npz") as arrays:
        for theirs, ours in OUTPUTS.items():
            facts, index = entry["outputs"][theirs], arrays[f"{theirs}_index"]
            values = np.asarray(outputs[ours])
            assert list(values.shape) == facts["shape"]
            error = np.abs(values[tuple(index.T)] - arrays[f"{theirs}_value"]).max()
            # As the reference documents: up to twenty times its own rounding error.
            assert error / facts["absmax"] < 20 * facts["rel_err"], (theirs, error)
