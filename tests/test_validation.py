"""Ground truth that cannot be what it is said to be is refused, and the rest is let through."""

import keras
import numpy as np
import pytest

from keras_resnest.boxes.formats import BOX_FORMATS
from keras_resnest.data.validation import check_ground_truth

XYXY = np.array([[10.0, 20, 50, 80], [0, 0, 100, 200], [99, 5, 100, 6]])
SIZE = (200, 100)


def in_format(bounding_box_format):
    return np.array(
        keras.utils.bounding_boxes.convert_format(
            XYXY, source="xyxy", target=bounding_box_format, height=SIZE[0], width=SIZE[1]
        )
    )


@pytest.mark.parametrize("bounding_box_format", BOX_FORMATS)
def test_good_boxes_pass_in_every_format_of_keras(bounding_box_format):
    boxes = in_format(bounding_box_format)
    check_ground_truth(boxes, [0, 1, 2], 3, SIZE, bounding_box_format)
    check_ground_truth(boxes[None], [[0, 1, 2]], 3, None, bounding_box_format)
    check_ground_truth(boxes.tolist(), [0.0, 1.0, 2.0], 3, SIZE, bounding_box_format)


@pytest.mark.parametrize("bounding_box_format", BOX_FORMATS)
def test_negative_sizes_in_every_format(bounding_box_format):
    boxes = in_format(bounding_box_format)
    if bounding_box_format.endswith("wh") or bounding_box_format.endswith("hw"):
        boxes[1, 2] *= -1
    else:
        boxes[1] = boxes[1, [2, 3, 0, 1]]
    with pytest.raises(ValueError, match=r"negative width or height.*boxes\[1\]"):
        check_ground_truth(boxes, [0, 1, 2], 3, SIZE, bounding_box_format)


@pytest.mark.parametrize("bounding_box_format", BOX_FORMATS)
def test_wrong_units_in_every_format(bounding_box_format):
    relative = bounding_box_format.startswith("rel_")
    layout = bounding_box_format.removeprefix("rel_")
    if relative:
        with pytest.raises(ValueError, match=r"0 to 1, not pixels"):
            check_ground_truth(in_format(layout), [0, 1, 2], 3, SIZE, bounding_box_format)
    else:
        boxes = in_format(bounding_box_format) / 200
        with pytest.raises(ValueError, match="must be in pixels"):
            check_ground_truth(boxes, [0, 1, 2], 3, SIZE, bounding_box_format)


def test_padding_is_not_looked_at():
    boxes = np.array([XYXY, XYXY])
    labels = np.array([[0, -1, 2], [-1, -1, -1]])
    boxes[labels == -1] = np.nan
    check_ground_truth(boxes, labels, 3, SIZE)
    boxes[labels == -1] = (-1, -1, -5, -5)
    check_ground_truth(boxes, labels, 3, SIZE)
    # padding with zeros hides no relative coordinates
    boxes[labels == -1], boxes[labels != -1] = 0, boxes[labels != -1] / 200
    with pytest.raises(ValueError, match="must be in pixels"):
        check_ground_truth(boxes, labels, 3, SIZE)


def test_empty_ground_truth_passes():
    check_ground_truth(np.zeros((0, 4)), np.zeros(0), 3)
    check_ground_truth(np.zeros((2, 0, 4)), np.zeros((2, 0)), 3)


def test_a_picture_of_one_pixel_may_have_a_box_of_one_pixel():
    check_ground_truth([[0, 0, 1, 1]], [0], 1, image_size=(1, 1))


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (XYXY, [0, 1, 3], r"0 to 2.*Labels begin with 0.*3\.0"),
        (XYXY, [0, 1, -2], r"-2"),
        (XYXY, [0, 1.5, 2], r"1\.5"),
        (XYXY, [0, np.nan, 2], "integers"),
        (XYXY, [0, 1], r"one label for each box.*\(2,\)"),
        (XYXY[:, :3], [0, 1, 2], r"\(M, 4\)"),
        (XYXY[0], [0], r"\(M, 4\)"),
        (np.where(XYXY == 80, np.nan, XYXY), [0, 1, 2], "finite"),
        (np.where(XYXY == 80, np.inf, XYXY), [0, 1, 2], "finite"),
        ([[[1, 2, 3, 4]], []], [[0], []], "arrays of numbers"),
        (XYXY + 150, [0, 1, 2], "must lie in the picture of 100 x 200"),
    ],
)
def test_faults(boxes, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        check_ground_truth(boxes, labels, 3, SIZE, name="y_true")
    assert "y_true" in str(error.value)


def test_xywh_taken_for_xyxy_is_recognised():
    with pytest.raises(ValueError, match="are they xywh"):
        check_ground_truth([[60, 50, 20, 30]], [0], 1)


def test_place_in_a_batch_is_named():
    boxes, labels = np.tile(XYXY, (2, 1, 1)), np.zeros((2, 3))
    boxes[1, 2] = (9, 9, 3, 3)
    with pytest.raises(ValueError, match=r"boxes\[1\]\[2\]"):
        check_ground_truth(boxes, labels, 1)


def test_unknown_format():
    with pytest.raises(ValueError, match="coco"):
        check_ground_truth(XYXY, [0, 0, 0], 1, bounding_box_format="coco")
