"""The switches of RefineDet's ablation, the class transfer, and the widths of the heads."""

import keras
import numpy as np
import pytest
import reference
from detectors import WHOLE, rectangles, small_backbone, small_detector
from keras import ops

from keras_resnest.detection.class_transfer import class_sources
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet

SWITCHES = ("negative_anchor_filtering", "two_step_regression")


def random_outputs(model, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    n, c = len(model.anchors), model.num_classes + 1
    shapes = {"arm_boxes": 4, "arm_objectness": 2, "odm_boxes": 4, "odm_logits": c}
    return {k: rng.normal(size=(batch, n, w)).astype("float32") for k, w in shapes.items()}


def losses(model, outputs, truth):
    values = model.detection_loss(outputs, truth["boxes"], truth["labels"], model.anchors)
    return {name: float(value) for name, value in values.items()}


def test_default_is_the_full_model():
    model = RefineDet(3, small_backbone(), image_shape=(64, 64, 3))
    for name in SWITCHES:
        assert getattr(model.detection_loss, name) and getattr(model.decoder, name)
    assert model.heads.use_transfer_connection


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_serialize(name):
    model = small_detector(switches={name: False})
    again = RefineDet.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert not getattr(again.detection_loss, name) and not getattr(again.decoder, name)


def test_loss_and_decoder_must_agree():
    with pytest.raises(ValueError, match="same `two_step_regression`"):
        small_detector(decoder=DetectionDecoder(two_step_regression=False))
    with pytest.raises(ValueError, match="same `variances`"):
        small_detector(decoder=DetectionDecoder(variances=(0.1, 0.1)))


# === Two-step regression ===


def test_one_step_decoding_starts_from_the_anchors():
    model = small_detector(
        switches={"two_step_regression": False},
        decoder=DetectionDecoder(
            0.0,
            0.0,
            1.0,
            pre_nms_top_k=10_000,
            max_detections=3 * 510,
            clip_to_image=False,
            two_step_regression=False,
            negative_anchor_filtering=False,
        ),
    )
    outputs = random_outputs(model, batch=1)
    got = {k: np.array(v)[0] for k, v in model.decode(outputs).items()}
    confidence = reference.softmax(outputs["odm_logits"][0])
    boxes = reference.decode(outputs["odm_boxes"][0], model.anchors)
    order = np.argsort(-confidence[:, 1:].ravel())  # no NMS: every pair of anchor and class
    np.testing.assert_allclose(got["confidence"], confidence[:, 1:].ravel()[order], atol=1e-6)
    np.testing.assert_array_equal(got["labels"][:20], order[:20] % 3)
    np.testing.assert_allclose(got["boxes"][:20], boxes[order[:20] // 3], atol=1e-2)


def test_without_two_steps_the_odm_does_not_see_the_arm_boxes():
    """With it off, the ODM's losses do not depend on the ARM's boxes."""
    _, truth = rectangles(2)
    one_step = small_detector(switches=dict.fromkeys(SWITCHES, False))
    both = small_detector(switches={"negative_anchor_filtering": False})
    outputs = random_outputs(one_step)
    moved = {**outputs, "arm_boxes": outputs["arm_boxes"] * -3.0}
    for name in ("odm_box_loss", "odm_classification_loss"):
        assert losses(one_step, outputs, truth)[name] == losses(one_step, moved, truth)[name]
        assert losses(both, outputs, truth)[name] != losses(both, moved, truth)[name]


def test_perfect_offsets_from_the_anchors_have_no_box_loss():
    """Each anchor of IoU 0.5 or more with the only object, sent onto that object."""
    model = small_detector(switches={"two_step_regression": False})
    box = np.array([33.0, 20.0, 61.0, 50.0])
    truth = {"boxes": box[None, None].astype("float32"), "labels": np.zeros((1, 1), "int32")}
    perfect = reference.encode(box, model.anchors, epsilon=0.0)[None].astype("float32")
    outputs = random_outputs(model, batch=1)
    assert losses(model, {**outputs, "odm_boxes": perfect}, truth)["odm_box_loss"] < 1e-6
    assert losses(model, outputs, truth)["odm_box_loss"] > 0.1
    two_step = small_detector()
    assert losses(two_step, {**outputs, "odm_boxes": perfect}, truth)["odm_box_loss"] > 0.1


# === Negative anchor filtering ===


def test_negatives_that_the_arm_calls_empty():
    """All anchors are surely empty: positives alone have a gradient; unfiltered 3 more for each."""
    import tensorflow as tf

    on, off = small_detector(), small_detector(switches={"negative_anchor_filtering": False})
    _, truth = rectangles(2)
    outputs = random_outputs(on)
    outputs["arm_boxes"][:] = 0.0  # refined anchors are the regular ones
    outputs["arm_objectness"][:] = [30.0, -30.0]

    def touched(model):
        logits = tf.Variable(outputs["odm_logits"])
        with tf.GradientTape() as tape:
            raw = {**outputs, "odm_logits": logits}
            loss = model.detection_loss(raw, truth["boxes"], truth["labels"], model.anchors)
            loss = loss["odm_classification_loss"]
        return np.abs(tape.gradient(loss, logits).numpy()).sum(-1) > 0

    filtered, unfiltered = touched(on), touched(off)
    iou = [reference.iou(boxes, on.anchors).max(axis=0) for boxes in truth["boxes"]]
    positive = np.array(iou) >= 0.5
    assert filtered[positive].all()
    # An object keeps its best anchor below the threshold too: one each, no more.
    assert (filtered & ~positive).sum() <= truth["labels"].size
    assert unfiltered[filtered].all()
    np.testing.assert_array_equal(unfiltered.sum(axis=1), 4 * filtered.sum(axis=1))


def test_filtering_in_the_decoder():
    on, off = small_detector(), small_detector(switches={"negative_anchor_filtering": False})
    outputs = random_outputs(on)
    outputs["arm_objectness"][:] = [30.0, -30.0]
    assert np.array(on.decode(outputs)["num_detections"]).tolist() == [0, 0]
    assert np.array(off.decode(outputs)["num_detections"]).min() > 0
    outputs["arm_objectness"][:] = [-30.0, 30.0]
    for name, value in on.decode(outputs).items():
        np.testing.assert_allclose(value, off.decode(outputs)[name], atol=1e-5)


# === Transfer connection ===


def test_without_transfer_connection():
    """No TCB; the ODM reads the source maps, and levels do not talk to each other."""
    model = small_detector(heads={"use_transfer_connection": False, "filters": 12})
    assert not [w.path for w in model.weights if "tcb" in w.path]
    assert [w.path for w in small_detector(heads=WHOLE).weights if "tcb" in w.path]
    channels = [c.kernel.shape[2] for c in model.get_layer("odm").class_convolutions]
    assert channels == [c.kernel.shape[2] for c in model.get_layer("arm").class_convolutions]
    assert channels == [16, 16, 16, 512]


@pytest.mark.parametrize("transfer", [True, False])
def test_upper_levels_reach_lower_ones_through_the_tcb_alone(transfer):
    """What conv6_2 learns from the ODM's finest level: exactly nothing without TCBs."""
    import tensorflow as tf

    model = small_detector(heads={"use_transfer_connection": transfer, "use_batch_norm": False})
    images, _ = rectangles(2)  # of one image, oneDNN 3.7 crashes in the gradient of narrow convs
    with tf.GradientTape() as tape:
        finest = model(images)["odm_logits"][:, : 8 * 16 * 3]
        loss = ops.sum(finest)
    kernel = model.get_layer("conv6_2").kernel
    gradient = tape.gradient(loss, kernel.value, unconnected_gradients="zero")
    assert bool(np.any(gradient.numpy() != 0.0)) == transfer


# === Widths ===


def test_widths_are_arguments():
    narrow = small_detector(heads={**WHOLE, "filters": 8, "extra_filters": (6, 10)})
    assert narrow.get_layer("conv6_1").filters == 6 and narrow.get_layer("conv6_2").filters == 10
    odm = narrow.get_layer("odm").class_convolutions
    assert [c.kernel.shape[2] for c in odm] == [8, 8, 8, 8]
    assert tuple(narrow.get_layer("tcb_p4").conv2.kernel.shape) == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="extra_filters"):
        small_detector(heads={"extra_filters": (8,)})


def test_residual_blocks_have_the_published_shape():
    """P6 from a block 128, 128, 512, heads behind blocks 256, 256, 1024; no L2 normalization."""
    model = RefineDet(
        3,
        small_backbone(),
        (64, 64, 3),
        heads=RefineDetHeads(
            extra_filters=(128, 512),
            use_batch_norm=True,
            use_l2_normalization=False,
            use_residual_blocks=True,
        ),
    )

    def kernels(name):
        parts = [
            model.get_layer(f"{name}_{part}") for part in ("conv1", "conv2", "conv3", "shortcut")
        ]
        return [(layer.kernel.shape[0], layer.kernel.shape[3]) for layer in parts]

    assert kernels("res6") == [(1, 128), (3, 128), (1, 512), (1, 512)]
    for stage in ("arm", "odm"):
        for level in range(3, 7):
            assert kernels(f"{stage}_p{level}") == [(1, 256), (3, 256), (1, 1024), (1, 1024)]
    assert not [layer for layer in model.layers if "l2_norm" in layer.name]
    assert model(np.zeros((1, 64, 64, 3), "float32"))["odm_logits"].shape == (1, 255, 4)


# === Other classes ===


def test_class_sources():
    coco = [
        "person",
        "airplane",
        "motorcycle",
        "couch",
        "tv",
        "dining table",
        "potted plant",
        "cat",
    ]
    voc = [
        "aeroplane",
        "motorbike",
        "sofa",
        "tvmonitor",
        "diningtable",
        "pottedplant",
        "cat",
        "cow",
    ]
    want = [*coco[1:], None]
    assert list(class_sources(voc, coco).values()) == want
    assert class_sources(["Potted-Plant", "x"], coco, {"x": "cat"}) == {
        "Potted-Plant": "potted plant",
        "x": "cat",
    }
    assert class_sources(["cat"], coco, {"cat": None}) == {"cat": None}
    with pytest.raises(ValueError, match="no class of the model"):
        class_sources(["cat"], coco, {"cat": "lion"})
    with pytest.raises(ValueError, match="no new class"):
        class_sources(["cat"], coco, {"dog": "cat"})


def test_replaced_classes_keep_their_logits():
    coco = small_detector(class_names=["tv", "person", "motorcycle"])
    for weight in coco.weights:  # biases too: not their even start
        weight.assign(weight + 0.01 * np.random.default_rng(0).normal(size=weight.shape))
    voc = coco.replace_classes(
        ["motorbike", "cow", "person", "tvmonitor", "hand"], {"hand": "person"}
    )
    images, _ = rectangles(2)
    old, new = coco(images), voc(images)
    for name in ("arm_boxes", "arm_objectness", "odm_boxes"):
        np.testing.assert_array_equal(new[name], old[name])
    kept, source = [0, 1, 3, 4, 5], [0, 3, 2, 1, 2]  # background first
    old_logits, new_logits = np.array(old["odm_logits"]), np.array(new["odm_logits"])
    np.testing.assert_allclose(new_logits[..., kept], old_logits[..., source], atol=1e-6)
    assert np.abs(new_logits[..., 2]).max() > 0  # the cow starts at random
    assert voc.num_classes == 5 and voc.class_names[0] == "motorbike"
    voc.get_layer("odm").box_convolutions[0].bias.assign_add(np.ones(12))
    np.testing.assert_array_equal(coco(images)["odm_boxes"], old["odm_boxes"])  # its own weights


def test_class_weights_belong_to_the_classes_of_a_model():
    weighted = RefineDetLoss(class_weights=[1.0, 2.0, 3.0])
    model = small_detector(detection_loss=weighted)
    again = RefineDet.from_config(model.get_config())
    assert again.detection_loss.class_weights == (1.0, 2.0, 3.0)
    assert model.replace_classes(["a", "b", "c"]).detection_loss.class_weights is None
    other = model.replace_classes(["red"], detection_loss=RefineDetLoss(class_weights=[2.0]))
    assert other.detection_loss.class_weights == (2.0,)
    with pytest.raises(ValueError, match="`class_weights` must be 3 numbers"):
        small_detector(detection_loss=RefineDetLoss(class_weights=[1.0]))


@pytest.mark.slow
def test_all_switched_off_and_other_classes_train():
    switches = dict.fromkeys(SWITCHES, False)
    model = small_detector((64, 64, 3), {"use_transfer_connection": False}, switches)
    other = model.replace_classes(["green", "circle"])
    assert not any(getattr(other.detection_loss, name) for name in SWITCHES)
    assert not other.heads.use_transfer_connection
    other.compile(keras.optimizers.AdamW(3e-3, global_clipnorm=10.0))
    images, truth = rectangles(16, (64, 64, 3), objects=1)
    truth = {**truth, "labels": np.minimum(truth["labels"], 1)}
    losses = other.fit(images, truth, batch_size=8, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_replace_classes_refuses():
    with pytest.raises(ValueError, match="class_names"):
        small_detector(class_names=None).replace_classes(["a"])
    with pytest.raises(ValueError, match="keeps the network"):
        small_detector(heads=WHOLE).replace_classes(["a"], heads=RefineDetHeads())
