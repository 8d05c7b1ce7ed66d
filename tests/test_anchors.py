"""AnchorGenerator against numbers worked out by hand and the reference's boxes."""

import numpy as np
import pytest
from golden_data import load_arrays

from keras_resnest.boxes.anchors import AnchorGenerator


def test_first_and_last_anchor_by_hand():
    anchors = AnchorGenerator(bounding_box_format="center_xywh")((64, 128))
    # levels of 8x16, 4x8, 2x4 and 1x2 cells, three anchors each
    assert anchors.shape == (3 * (128 + 32 + 8 + 2), 4)
    root2 = np.sqrt(2.0)
    np.testing.assert_allclose(anchors[0], [4, 4, 32, 32])
    np.testing.assert_allclose(anchors[1], [4, 4, 32 * root2, 32 / root2], rtol=1e-6)
    np.testing.assert_allclose(anchors[2], [4, 4, 32 / root2, 32 * root2], rtol=1e-6)
    np.testing.assert_allclose(anchors[3], [12, 4, 32, 32])  # next column before next row
    np.testing.assert_allclose(anchors[-3], [96, 32, 256, 256])


def test_formats_agree():
    corners = AnchorGenerator()((128, 64))
    yxyx = AnchorGenerator(bounding_box_format="yxyx")((128, 64))
    xywh = AnchorGenerator(bounding_box_format="xywh")((128, 64))
    relative = AnchorGenerator(bounding_box_format="rel_xyxy")((128, 64))
    np.testing.assert_allclose(yxyx[:, [1, 0, 3, 2]], corners)
    np.testing.assert_allclose(xywh[:, :2] + xywh[:, 2:], corners[:, 2:], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(relative * [64, 128, 64, 128], corners, rtol=1e-5, atol=1e-4)


def test_several_sizes_on_a_level():
    generator = AnchorGenerator(sizes=((16, 32), 64, 128, 256), aspect_ratios=(1.0,))
    assert generator.num_anchors_per_cell == (2, 1, 1, 1)
    anchors = generator((64, 64))
    assert len(anchors) == 2 * 64 + 16 + 4 + 1
    np.testing.assert_allclose(anchors[1], [4 - 16, 4 - 16, 4 + 16, 4 + 16])


@pytest.mark.parametrize("side, count", [(320, 6375), (512, 16320)])
def test_golden_anchors(side, count):
    """The PyTorch ports clip center and size to the image; quirk documented in `clip`."""
    want = load_arrays("anchors")[f"priors_{side}"]
    got = AnchorGenerator(clip=True, bounding_box_format="rel_center_xywh")((side, side, 3))
    assert got.shape == (count, 4)
    np.testing.assert_allclose(got, want, atol=1e-6)
    unclipped = AnchorGenerator(bounding_box_format="rel_center_xywh")((side, side, 3))
    np.testing.assert_allclose(np.clip(unclipped, 0, 1), want, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"strides": (8, 16)}, "strides"),
        ({"sizes": (32, 64, 128, -1)}, "sizes"),
        ({"aspect_ratios": (1.0, 0.0)}, "aspect_ratios"),
        ({"bounding_box_format": "cxcywh"}, "bounding_box_format"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        AnchorGenerator(**arguments)
