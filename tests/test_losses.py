"""The loss against a plain numpy loss and the reference's values and gradients."""

import keras
import numpy as np
import pytest
from golden.recipe import make_array
from golden_data import load_arrays, load_cases
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.boxes.offsets import decode_boxes
from keras_resnest.detection.loss import (
    RefineDetLoss,
    encode_targets,
    hard_negatives,
    multibox_loss,
    smooth_l1,
)

BATCH, ANCHORS, CLASSES = 3, 50, 4


def random_stage(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(1, CLASSES, (BATCH, ANCHORS)) * (rng.random((BATCH, ANCHORS)) < 0.1)
    classes[-1] = 0  # an image without objects
    return {
        "target_offsets": rng.normal(size=(BATCH, ANCHORS, 4)).astype("f4") * 2,
        "target_classes": classes.astype("i4"),
        "offsets": rng.normal(size=(BATCH, ANCHORS, 4)).astype("f4"),
        "logits": rng.normal(size=(BATCH, ANCHORS, CLASSES)).astype("f4") * 3,
    }


def stage_by_hand(s, ratio, negative_mask=None):
    """Loops over images and anchors, in float64."""
    box_sum = class_sum = 0.0
    for b in range(BATCH):
        logits = s["logits"][b].astype("f8")
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        classes = s["target_classes"][b]
        for a in np.flatnonzero(classes):
            error = np.abs(s["target_offsets"][b, a].astype("f8") - s["offsets"][b, a])
            box_sum += np.where(error < 1, 0.5 * error**2, error - 0.5).sum()
            class_sum -= logp[a, classes[a]]
        negatives = [
            -logp[a, 0]
            for a in range(ANCHORS)
            if classes[a] == 0 and (negative_mask is None or negative_mask[b, a])
        ]
        class_sum += sum(sorted(negatives, reverse=True)[: int(ratio * (classes > 0).sum())])
    return box_sum, class_sum, (s["target_classes"] > 0).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 100.0])
def test_equals_plain_numpy(seed, ratio):
    stage = random_stage(seed)
    got = multibox_loss(**stage, negative_ratio=ratio)
    np.testing.assert_allclose([float(v) for v in got], stage_by_hand(stage, ratio), rtol=1e-5)


def test_negative_mask_keeps_positives():
    stage = random_stage(7)
    mask = np.random.default_rng(8).random((BATCH, ANCHORS)) < 0.3
    got = multibox_loss(**stage, negative_ratio=3.0, negative_mask=ops.convert_to_tensor(mask))
    want = stage_by_hand(stage, 3.0, mask)
    np.testing.assert_allclose([float(v) for v in got], want, rtol=1e-5)


def test_smooth_l1_is_huber():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 4)).astype("f4") * 2
    want = keras.losses.Huber(reduction=None)(a, b) * 4  # Keras takes the mean of the four
    np.testing.assert_allclose(np.array(smooth_l1(a, b)), np.array(want), rtol=1e-5)


def test_hard_negatives_of_equal_loss():
    """Ties must not let more negatives in than were asked for."""
    loss, candidates = ops.ones((1, 10)), ops.ones((1, 10), "bool")
    mined = hard_negatives(loss, candidates, ops.convert_to_tensor([4]))
    assert np.array(mined).sum() == 4


def test_no_positives_is_zero_and_finite():
    stage = random_stage(1)
    stage["target_classes"][:] = 0
    assert [float(v) for v in multibox_loss(**stage, negative_ratio=3.0)] == [0.0, 0.0, 0.0]


def test_unmatched_targets_of_any_size_do_not_matter():
    stage = random_stage(2)
    want = [float(v) for v in multibox_loss(**stage, negative_ratio=3.0)]
    stage["target_offsets"][stage["target_classes"] == 0] = np.inf
    assert [float(v) for v in multibox_loss(**stage, negative_ratio=3.0)] == want


def golden_stages(name):
    """Ground truth and predictions of a golden case."""
    case, arrays = load_cases("losses")[name], load_arrays("losses")
    batch = case["batch"]
    targets = [arrays[f"{name}/targets{i}"] for i in range(batch)]
    longest = max(map(len, targets))
    boxes, labels = np.zeros((batch, longest, 4), "f4"), np.full((batch, longest), -1, "i4")
    for i, rows in enumerate(targets):
        boxes[i, : len(rows)], labels[i, : len(rows)] = rows[:, :4], rows[:, 4]
    shapes = {"arm_loc": 4, "arm_conf": 2, "odm_loc": 4, "odm_conf": 21}
    predictions = {
        n: make_array((batch, 6375, c), case["seed"], n, case["scales"][n])
        for n, c in shapes.items()
    }
    shift = case["arm_conf_shift"]
    predictions["arm_conf"] += np.array([shift, -shift], "f4")
    return boxes, labels, predictions


def losses_of(boxes, labels, predictions):
    """The detector's loss; the goldens have boxes as fractions, and so the anchors here."""
    outputs = {
        "arm_boxes": predictions["arm_loc"],
        "arm_objectness": predictions["arm_conf"],
        "odm_boxes": predictions["odm_loc"],
        "odm_logits": predictions["odm_conf"],
    }
    anchors = AnchorGenerator(clip=True)((320, 320)) / 320.0
    return RefineDetLoss()(
        outputs, ops.convert_to_tensor(boxes), ops.convert_to_tensor(labels), anchors
    )


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes gradients with a tape")
def test_golden_losses_and_gradients():
    """ARM as the reference; ODM as paper and Caffe code (the reference drops positives)."""
    import tensorflow as tf

    arrays = load_arrays("losses")
    for case_name, case in load_cases("losses").items():
        boxes, labels, predictions = golden_stages(case_name)
        variables = {n: tf.Variable(v) for n, v in predictions.items()}
        with tf.GradientTape() as tape:
            losses = losses_of(boxes, labels, variables)
            total = sum(losses.values())
        want = {
            "arm_box_loss": case["loss"]["arm_loc"],
            "arm_classification_loss": case["loss"]["arm_conf"],
            "odm_box_loss": case["odm_paper"]["loss_loc"],
            "odm_classification_loss": case["odm_paper"]["loss_conf"],
        }
        for name, value in want.items():
            assert float(losses[name]) == pytest.approx(value, rel=1e-5), (case_name, name)
        for name, gradient in tape.gradient(total, variables).items():
            index, value = arrays[f"{case_name}/{name}_index"], arrays[f"{case_name}/{name}"]
            got = gradient.numpy().reshape(-1)[index]
            assert np.abs(got - value).max() <= 1e-4 * np.abs(value).max(), (case_name, name)


def test_golden_case_where_the_reference_is_nan():
    """All positives filtered: the reference divides 0 by 0; ours stays finite."""
    assert load_cases("losses")["all_filtered"]["loss"]["odm_conf"] is None
    losses = losses_of(*golden_stages("all_filtered"))
    assert all(np.isfinite(float(v)) for v in losses.values())


def test_targets_carry_no_gradient():
    """The ODM's targets depend on the ARM's boxes, and must not pull on them."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("takes gradients with a tape")
    import tensorflow as tf

    anchors = AnchorGenerator()((64, 64))
    boxes = ops.convert_to_tensor(np.array([[[10, 10, 40, 50]]], "f4"))
    arm = tf.Variable(np.full((1, len(anchors), 4), 0.1, "f4"))
    with tf.GradientTape() as tape:
        refined = ops.stop_gradient(decode_boxes(arm, anchors))
        offsets, classes = encode_targets(boxes, ops.zeros((1, 1), "int32"), refined, BoxMatcher())
        box_sum, _, count = multibox_loss(
            offsets, classes, ops.zeros_like(offsets), ops.zeros((1, len(anchors), 2)), 3.0
        )
    assert float(count) > 0 and float(box_sum) > 0
    assert tape.gradient(box_sum, arm) is None
