"""Every builder builds a network that predicts, and has the parts of the published one."""

import inspect

import numpy as np
import pytest

from keras_resnest.detection import builders
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.layers import AlignedConvolution, L2Normalization, TransferConnectionBlock

DEEP = ("101", "plus_plus")  # minutes on two busy cores
NAMES = [  # the others for 512 pixels are the same networks
    pytest.param(n, marks=pytest.mark.slow) if any(d in n for d in DEEP) else n
    for n in sorted(builders.BUILDERS)
    if "512" not in n or "plus_plus" in n
]


def test_every_builder_has_the_size_of_its_name():
    for name, row in builders.BUILDERS.items():
        side = row.side
        assert callable(getattr(builders, name))
        assert str(side) in name or name == "refinedet_tiny"
        assert f"{side} x {side}" in getattr(builders, name).__doc__
        build = inspect.signature(getattr(builders, name))
        assert build.parameters["image_shape"].default == (side, side, 3)
        if side == 512:
            small = builders.BUILDERS[name.replace("_plus_plus", "").replace("512", "320")]
            aligned = {"use_alignment": True} if "plus_plus" in name else {}
            assert row == small._replace(side=512, heads={**small.heads, **aligned})
        if name != "refinedet_tiny":  # the published networks
            assert row.loss == row.decoder == {}


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_predicts_on_a_small_image(name):
    model = getattr(builders, name)(num_classes=4, image_shape=(64, 64, 3))
    outputs = model(np.full((1, 64, 64, 3), 128, "float32"), training=False)
    assert outputs["odm_logits"].shape == (1, 3 * 85, 5)
    found = model.decode(outputs)  # tracing `predict` takes longer than the rest
    assert found["boxes"].shape == (1, model.decoder.max_detections, 4)
    assert np.isfinite(found["boxes"]).all()
    _check_parts(model, is_resnet="resnet" in name)
    aligned = [type(c) is AlignedConvolution for c in model.get_layer("odm").box_convolutions]
    assert aligned == ["plus_plus" in name] * 4


def _check_parts(model, is_resnet: bool):
    """ResNet models as the authors': no L2 normalization, residual blocks, TCBs with BN."""
    norms = [layer for layer in model.layers if isinstance(layer, L2Normalization)]
    blocks = [layer for layer in model.layers if isinstance(layer, TransferConnectionBlock)]
    names = {layer.name for layer in model.layers}
    assert len(norms) == (0 if is_resnet else 2) and len(blocks) == 4
    assert ("res6_conv2" in names) == is_resnet and ("conv6_2" in names) != is_resnet
    if is_resnet:
        assert all(block.use_batch_norm for block in blocks)
        assert {
            f"{stage}_p{level}_conv3" for stage in ("arm", "odm") for level in range(3, 7)
        } <= names
        channels = [c.kernel.shape[2] for c in model.get_layer("odm").class_convolutions]
        assert channels == [1024] * 4


def test_width_of_a_builder_is_an_argument():
    narrow = builders.refinedet_tiny(2, (64, 64, 3), heads=RefineDetHeads(16, (8, 24)))
    wide = builders.refinedet_tiny(2, (64, 64, 3))
    assert narrow.heads.filters == 16 and narrow.get_layer("conv6_2").filters == 24
    assert narrow.count_params() < wide.count_params() / 2
