"""RefineDet++: the ODM reads its maps inside the refined anchors."""

import keras
import numpy as np
import pytest
from detectors import rectangles, small_detector
from keras import ops
from reference import aligned_convolution, decode

STRIDES = (8, 16, 32, 64)
HEADS = {"use_alignment": True, "predict_iou": True}


def randomize(head, seed=0):
    """Weights of which every output depends on its box."""
    rng = np.random.default_rng(seed)
    head.set_weights([rng.normal(size=w.shape) / w.shape[0] for w in head.weights])


@pytest.fixture(scope="module")
def model():
    model = small_detector((64, 64, 3), heads=HEADS)
    for name in ("arm", "odm"):
        randomize(model.get_layer(name))
    return model


@pytest.mark.parametrize("image_shape", [(64, 64, 3), (64, 128, 3)])
def test_equals_brute_force(model, image_shape):
    """At the size of the model and at another one."""
    maps = [model.get_layer(f"tcb_p{level}").output for level in (3, 4, 5, 6)]
    network = keras.Model(model.inputs[0], [maps, model.output])
    network.input_spec = model.input_spec
    images, _ = rectangles(2, image_shape, objects=1)
    maps, raw = keras.tree.map_structure(ops.convert_to_numpy, network(images))
    refined = decode(raw["arm_boxes"], model.anchor_generator(image_shape))
    odm = model.get_layer("odm")
    for name, layers in (
        ("odm_boxes", odm.box_convolutions),
        ("odm_logits", odm.class_convolutions),
        ("odm_iou", odm.iou_convolutions),
    ):
        start, want = 0, []
        for x, layer, stride in zip(maps, layers, STRIDES, strict=True):
            stop = start + 3 * x.shape[1] * x.shape[2]
            boxes = refined[:, start:stop] / stride
            want.append(aligned_convolution(x, boxes, *layer.get_weights(), num_anchors=3))
            start = stop
        want = np.concatenate(want, axis=1)
        assert want.shape == raw[name].shape and np.std(want) > 0.1
        np.testing.assert_allclose(raw[name], want, atol=1e-4 * np.abs(want).max())


def test_only_the_second_stage_is_aligned_and_it_sends_no_gradient_to_the_boxes(model):
    import tensorflow as tf

    images, _ = rectangles(1, (64, 64, 3), objects=1)
    with tf.GradientTape() as tape:
        loss = ops.sum(model(images)["odm_boxes"])
    arm, odm = model.get_layer("arm"), model.get_layer("odm")
    weights = [*arm.weights, odm.box_convolutions[0].kernel, model.get_layer("tcb_p3").weights[0]]
    *none, kernel, features = tape.gradient(loss, [w.value for w in weights])
    assert none == [None] * len(arm.weights)
    assert np.abs(kernel).max() > 0 and np.abs(features).max() > 0


def test_alignment_needs_two_steps():
    with pytest.raises(ValueError, match=r"use_alignment=True.*two_step_regression=False"):
        small_detector(heads=HEADS, switches={"two_step_regression": False})


def test_iou_is_an_output_of_the_ordinary_head_too():
    model = small_detector((64, 64, 3), heads={"predict_iou": True})
    raw = model(rectangles(2, (64, 64, 3))[0])
    assert raw["odm_iou"].shape == (2, 255, 1) and set(raw) - set(small_detector().output) == {
        "odm_iou"
    }
