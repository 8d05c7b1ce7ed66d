"""Whole RefineDet networks against the PyTorch references: same weights, same raw outputs."""

import golden_data
import keras
import numpy as np
import pytest
from golden import recipe
from safetensors.numpy import save_file

from keras_resnest.backbones import create_backbone, load_torch_state_dict
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.detection.builders import refinedet320_resnest50, refinedet320_vgg16
from keras_resnest.detection.refinedet import RefineDet

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
def test_raw_outputs_equal_the_reference(reference):
    entry = golden_data.load_cases("detectors")[reference]
    arrays = golden_data.load_arrays("detectors")
    backbone = create_backbone(CASES[reference], include_top=False, include_rescaling=False)
    side = entry["input_shape"][2]
    model = RefineDet(20, backbone, (side, side, 3))
    load_torch_state_dict(model, golden_data.state_dict(reference, entry))
    parameters = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert parameters == entry["num_params"]

    images = golden_data.input_images(entry, entry["seed"])
    features = {name: model.get_layer(layer).output for name, layer in FEATURES.items()}
    network = keras.Model(model.input, {"features": features, "outputs": model.output})
    result = network(images, training=False)

    def check(name, facts, values, mean, std):
        # As the reference documents: up to twenty times its own rounding error.
        tolerance = 20 * facts["rel_err"] * facts["absmax"]
        error = np.abs(values - arrays[f"{reference}/{name}"]).max()
        assert error < tolerance, (name, error, tolerance)
        assert abs(mean - facts["mean"]) < tolerance, name
        assert abs(std - facts["std"]) < tolerance, name

    for theirs, ours in golden_data.OUTPUT_NAMES.items():
        facts, values = entry["outputs"][theirs], np.asarray(result["outputs"][ours])
        assert list(values.shape) == facts["shape"]
        check(theirs, facts, recipe.sample(values, 2000), values.mean(), values.std())
    for module, value in result["features"].items():
        values = np.asarray(value)
        sampled = golden_data.sample_map(values)
        check(module, entry["features"][module], sampled, values.mean(), values.std())


# --- Checkpoints by the builders -------------------------------------------------------------


def golden_weights(reference):
    return golden_data.state_dict(reference, golden_data.load_cases("detectors")[reference])


def test_builder_loads_a_checkpoint_of_the_ports(tmp_path):
    """The file of one port, with its unused modules; the same detections as array by array."""
    weights = golden_weights("pengyang1225.refinedet_resnest50_320")
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
    for name in golden_data.OUTPUT_NAMES.values():
        assert np.array_equal(got[name], want[name])
    # The ports' prior boxes are clipped: (cx, cy, w, h) to 0 to 1.
    priors = golden_data.load_arrays("anchors")["priors_320"] * 320
    corners = np.concatenate(
        [priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], axis=1
    )
    np.testing.assert_allclose(np.asarray(model.anchors), corners, atol=1e-3)
    with pytest.raises(ValueError, match="wrong shape"):
        refinedet320_resnest50(3, weights=path)


def test_builder_loads_the_reduced_vgg(tmp_path):
    """The file that SSD and RefineDet start from: the modules of VGG by number."""
    weights = golden_weights("luuuyi.refinedet_vgg16_320")
    numbered = {k.removeprefix("vgg."): v for k, v in weights.items() if k.startswith("vgg.")}
    save_file(numbered, tmp_path / "vgg16_reducedfc.safetensors")
    model = refinedet320_vgg16(3, backbone_weights=tmp_path / "vgg16_reducedfc.safetensors")
    kernel = model.backbone.get_layer("fc7").kernel
    assert np.array_equal(kernel[0, 0], weights["vgg.33.weight"][:, :, 0, 0].T)
    kernel = model.backbone.get_layer("conv1_1").kernel
    assert np.array_equal(kernel[0, 2], weights["vgg.0.weight"][:, :, 0, 2].T)
