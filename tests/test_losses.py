"""The loss against a plain numpy loss and the reference's values and gradients."""

import keras
import numpy as np
import pytest
import reference
from golden.recipe import make_array
from golden_data import load_arrays, load_cases
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import ATSSMatcher, BoxMatcher
from keras_resnest.detection.loss import (
    RefineDetLoss,
    binary_cross_entropy,
    hard_negatives,
    mined_cross_entropy,
    smooth_l1,
)

BATCH, ANCHORS, CLASSES = 3, 50, 4


def random_stage(seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(1, CLASSES, (BATCH, ANCHORS)) * (rng.random((BATCH, ANCHORS)) < 0.1)
    classes[-1] = 0  # an image without objects
    logits = rng.normal(size=(BATCH, ANCHORS, CLASSES)).astype("f4") * 3
    return classes.astype("i4"), logits


def cross_entropy_by_hand(classes, logits, ratio, negative_mask=None):
    """Loops over images and anchors, in float64."""
    total = 0.0
    for b in range(BATCH):
        logp = logits[b].astype("f8")
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        total -= sum(logp[a, classes[b, a]] for a in np.flatnonzero(classes[b]))
        negatives = [
            -logp[a, 0]
            for a in range(ANCHORS)
            if classes[b, a] == 0 and (negative_mask is None or negative_mask[b, a])
        ]
        wanted = int(ratio * (classes[b] > 0).sum())
        total += sum(sorted(negatives, reverse=True)[:wanted])
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 100.0])
def test_equals_plain_numpy(seed, ratio):
    stage = random_stage(seed)
    got = np.array(mined_cross_entropy(*stage, ratio)).sum()
    assert got == pytest.approx(cross_entropy_by_hand(*stage, ratio), rel=1e-5)


def test_negative_mask_keeps_positives():
    stage = random_stage(7)
    mask = np.random.default_rng(8).random((BATCH, ANCHORS)) < 0.3
    got = np.array(mined_cross_entropy(*stage, 3.0, ops.convert_to_tensor(mask))).sum()
    assert got == pytest.approx(cross_entropy_by_hand(*stage, 3.0, mask), rel=1e-5)


def test_no_positives_mine_nothing():
    classes, logits = random_stage(1)
    assert np.array(mined_cross_entropy(np.zeros_like(classes), logits, 3.0)).sum() == 0.0


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


@pytest.mark.parametrize("knee", [0.1, 1.0, 3.0])
def test_knee_of_smooth_l1(knee):
    """Keras' Huber loss has slope `delta` where ours has slope 1."""
    a, b = np.random.default_rng(0).normal(size=(2, 30, 4)).astype("f4") * 2
    want = keras.losses.Huber(delta=knee, reduction=None)(a, b) * 4 / knee
    np.testing.assert_allclose(np.array(smooth_l1(a, b, knee)), np.array(want), rtol=1e-5)


def test_binary_cross_entropy_equals_keras():
    rng = np.random.default_rng(0)
    targets, logits = rng.random((50, 1)).astype("f4"), rng.normal(size=(50, 1)).astype("f4") * 5
    want = keras.losses.BinaryCrossentropy(from_logits=True, reduction=None)(targets, logits)
    got = binary_cross_entropy(targets, logits)[:, 0]
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4)


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
        logits = ops.zeros((1, len(anchors), 2))
        outputs = {"arm_boxes": arm, "arm_objectness": logits, "odm_logits": logits}
        outputs["odm_boxes"] = ops.zeros_like(arm)
        loss = RefineDetLoss()(outputs, boxes, ops.zeros((1, 1), "int32"), anchors)["odm_box_loss"]
    assert float(loss) > 0
    assert tape.gradient(loss, arm) is None


def random_outputs(seed, anchors, scale=1.0, batch=2):
    rng = np.random.default_rng(seed)
    widths = {"arm_boxes": 4, "arm_objectness": 2, "odm_boxes": 4, "odm_logits": 4, "odm_iou": 1}
    shapes = {name: (batch, len(anchors), width) for name, width in widths.items()}
    return {name: rng.normal(size=s).astype("f4") * scale for name, s in shapes.items()}


SCENE = AnchorGenerator()((64, 128))
OBJECTS = np.array([[[10, 5, 40, 45], [60, 3, 110, 60]], [[20, 20, 60, 50], [0, 0, 0, 0]]], "f4")
CLASSES_OF_OBJECTS = np.array([[0, 2], [1, -1]], "i4")


@pytest.mark.parametrize("joint", [False, True])
def test_stages_by_hand(joint):
    """Matchers and box losses of their own, and the loss of the predicted IoU."""
    outputs = random_outputs(3, SCENE)
    loss = RefineDetLoss(
        odm_matcher=BoxMatcher(0.6),
        box_loss="giou",
        odm_box_loss="smooth_l1",
        box_loss_weight=2.0,
        joint_regression=joint,
    )
    got = {k: float(v) for k, v in loss(outputs, OBJECTS, CLASSES_OF_OBJECTS, SCENE).items()}
    assert len(got) == 5
    sums = dict.fromkeys(("arm_box", "odm_box", "odm_iou"), 0.0)
    count = {"arm": 0, "odm": 0}
    for i in range(2):
        refined = reference.decode(outputs["arm_boxes"][i], SCENE)
        final = reference.decode(outputs["odm_boxes"][i], refined)
        valid = CLASSES_OF_OBJECTS[i] >= 0
        arm = reference.match(reference.iou(OBJECTS[i], SCENE), valid, 0.5)
        start = SCENE if joint else refined
        odm = reference.match(reference.iou(OBJECTS[i], start), valid, 0.6)
        for a in np.flatnonzero(arm >= 0):
            box = OBJECTS[i, arm[a]]
            sums["arm_box"] += 2 * (1 - generalized_iou_by_hand(refined[a], box))
            count["arm"] += 1
        for a in np.flatnonzero(odm >= 0):
            box = OBJECTS[i, odm[a]]
            wanted, found = (reference.encode(b, start[a]) for b in (box, final[a]))
            error = np.abs(wanted - found)
            sums["odm_box"] += 2 * np.where(error < 1, error**2 / 2, error - 0.5).sum()
            p, iou = 1 / (1 + np.exp(-outputs["odm_iou"][i, a, 0])), reference.iou(final[a], box)
            sums["odm_iou"] -= float(iou[0, 0] * np.log(p) + (1 - iou[0, 0]) * np.log(1 - p))
            count["odm"] += 1
    for name, value in sums.items():
        assert got[f"{name}_loss"] == pytest.approx(value / count[name[:3]], rel=1e-4), name


def test_class_weights_by_hand():
    """The cross entropy of positives is weighted; mining, divisor and other losses are not."""
    outputs, weights = random_outputs(3, SCENE), [1.0, 0.5, 3.0, 7.0]  # background first
    total, count = 0.0, 0
    for i in range(2):
        refined = reference.decode(outputs["arm_boxes"][i], SCENE)
        iou = reference.iou(OBJECTS[i], refined)
        matches = reference.match(iou, CLASSES_OF_OBJECTS[i] >= 0, 0.5)
        classes = np.where(matches >= 0, CLASSES_OF_OBJECTS[i, matches] + 1, 0)
        loss = -np.log(reference.softmax(outputs["odm_logits"][i]))[np.arange(len(SCENE)), classes]
        minable = reference.softmax(outputs["arm_objectness"][i])[:, 1] > 0.01
        positive = classes > 0
        negatives = np.sort(loss[minable & ~positive])[::-1][: 3 * positive.sum()]
        total += negatives.sum() + (loss * np.take(weights, classes))[positive].sum()
        count += positive.sum()
    arguments = outputs, OBJECTS, CLASSES_OF_OBJECTS, SCENE
    got = RefineDetLoss(class_weights=weights[1:])(*arguments)
    assert float(got["odm_classification_loss"]) == pytest.approx(total / count, rel=1e-4)
    plain = RefineDetLoss()(*arguments)
    ones = RefineDetLoss(class_weights=[1, 1, 1])(*arguments)
    for name in plain:
        assert float(ones[name]) == float(plain[name])
        assert float(got[name]) == float(plain[name]) or name == "odm_classification_loss"


def test_class_weights_for_another_number_of_classes():
    with pytest.raises(ValueError, match=r"`class_weights` must be 3 numbers.*\[1.0, 2.0\]"):
        RefineDetLoss(class_weights=[1, 2])(
            random_outputs(3, SCENE), OBJECTS, CLASSES_OF_OBJECTS, SCENE
        )


def generalized_iou_by_hand(a, b):
    iou = reference.iou(a, b)[0, 0]
    union = ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) / (1 + iou)
    hull = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    return iou - (hull - union) / hull


LOSSES = {
    "smooth_l1": {},
    "giou": {"box_loss": "giou"},
    "joint": {"joint_regression": True},
    "joint_giou": {"joint_regression": True, "box_loss": "giou"},
    "atss": {
        "matcher": ATSSMatcher(),
        "odm_matcher": BoxMatcher(0.7),
        "smooth_l1_knee": 0.1,
    },
    "weighted": {"class_weights": np.array([0.0, 2.5, 100.0])},
}


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes gradients with a tape")
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e18])
def test_finite_for_any_output(options, scale):
    """Collapsed and gigantic refined anchors; images with and without objects."""
    import tensorflow as tf

    labels = np.array([[0, 2], [-1, -1]], "i4")
    variables = {n: tf.Variable(v) for n, v in random_outputs(4, SCENE, scale).items()}
    with tf.GradientTape() as tape:
        sizes = AnchorGenerator().level_sizes((64, 128))
        losses = RefineDetLoss(**options)(variables, OBJECTS, labels, SCENE, None, sizes)
        total = sum(losses.values())
    assert all(np.isfinite(float(value)) for value in losses.values()), losses
    for name, gradient in tape.gradient(total, variables).items():
        assert np.isfinite(gradient.numpy()).all(), name


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_loss_survives_serialization(options):
    loss = RefineDetLoss(**options)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert copy.get_config() == loss.get_config()
    assert type(copy.matcher) is type(loss.matcher)


@pytest.mark.parametrize(
    "arguments",
    [
        {"box_loss": "l1"},
        {"odm_box_loss": "l1"},
        {"box_loss_weight": 0},
        {"smooth_l1_knee": -1},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": [1.0, float("nan")]},
        {"class_weights": [True, 1.0]},
        {"class_weights": {"cat": 1.0}},
        {"class_weights": "balanced"},
        {"class_weights": 2.0},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RefineDetLoss(**arguments)
