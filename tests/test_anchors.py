"""AnchorGenerator against numbers worked out by hand and the reference's boxes."""

import numpy as np
import pytest
import reference
from golden_data import load_arrays
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator


def test_first_and_last_anchor_by_hand():
    anchors = AnchorGenerator()((64, 128))
    # levels of 8x16, 4x8, 2x4 and 1x2 cells, three anchors each
    assert anchors.shape == (3 * (128 + 32 + 8 + 2), 4) and anchors.dtype == "float32"
    boxes = np.concatenate(reference.centers_and_sizes(anchors), axis=1)
    root2 = np.sqrt(2.0)
    np.testing.assert_allclose(boxes[0], [4, 4, 32, 32])
    np.testing.assert_allclose(boxes[1], [4, 4, 32 * root2, 32 / root2], rtol=1e-6)
    np.testing.assert_allclose(boxes[2], [4, 4, 32 / root2, 32 * root2], rtol=1e-6)
    np.testing.assert_allclose(boxes[3], [12, 4, 32, 32])  # next column before next row
    np.testing.assert_allclose(boxes[-3], [96, 32, 256, 256])


@pytest.mark.parametrize("clip", [False, True])
def test_tensor_sides_equal_integer_sides(clip):
    generator = AnchorGenerator(clip=clip)
    sides = ops.convert_to_tensor(np.array([100, 161], "i4"))
    got = generator((sides[0], sides[1], 3))
    assert ops.is_tensor(got)
    np.testing.assert_allclose(ops.convert_to_numpy(got), generator((100, 161)), atol=1e-4)


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
    for clip in (True, False):
        anchors = AnchorGenerator(clip=clip)((side, side, 3))
        assert anchors.shape == (count, 4)
        got = np.concatenate(reference.centers_and_sizes(anchors / side), axis=1)
        np.testing.assert_allclose(got if clip else np.clip(got, 0, 1), want, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"strides": (8, 16)}, "strides"),
        ({"sizes": (32, 64, 128, -1)}, "sizes"),
        ({"aspect_ratios": (1.0, 0.0)}, "aspect_ratios"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        AnchorGenerator(**arguments)
