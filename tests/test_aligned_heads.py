"""RefineDet++: the ODM reads its maps inside the refined anchors."""

import keras
import numpy as np
import pytest
from detectors import aligned_detector, rectangles, small_detector
from keras import ops
from reference import aligned_convolution, decode

STRIDES = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def model():
    return aligned_detector((64, 64, 3), {"predict_iou": True})


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
        small_detector(heads={"use_alignment": True}, switches={"two_step_regression": False})


def test_iou_is_an_output_of_the_ordinary_head_too():
    model = small_detector((64, 64, 3), heads={"predict_iou": True})
    raw = model(rectangles(2, (64, 64, 3))[0])
    assert raw["odm_iou"].shape == (2, 255, 1) and set(raw) - set(small_detector().output) == {
        "odm_iou"
    }


def test_a_graph_of_unknown_sizes(model):
    import tensorflow as tf

    graph = tf.function(
        lambda x: model(x, training=False), [tf.TensorSpec((None, None, None, 3))], autograph=False
    )
    for shape in ((64, 64, 3), (128, 64, 3)):
        images, _ = rectangles(2, shape)
        for name, value in model(images, training=False).items():
            np.testing.assert_allclose(graph(images)[name], value, atol=1e-4)


def test_trains():
    model = small_detector((64, 64, 3), heads={"use_alignment": True})
    batch = rectangles(2, (64, 64, 3))
    kernel = model.get_layer("odm").class_convolutions[0].kernel
    before = kernel.numpy()
    model.compile(keras.optimizers.SGD(1e-2, global_clipnorm=10.0), run_eagerly=True)
    losses = [model.train_on_batch(*batch)[0] for _ in range(3)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert (kernel.numpy() != before).any()


def test_saved_and_with_other_classes(model, tmp_path):
    images, _ = rectangles(1, (64, 64, 3))
    raw = model(images)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")(images)
    other = model.replace_classes(["blue", "new", "red"])(images)
    for name, value in raw.items():
        np.testing.assert_array_equal(again[name], value)
        columns = [0, 3, 1] if name == "odm_logits" else slice(None)  # background, blue, red
        kept = [0, 1, 3] if name == "odm_logits" else slice(None)
        np.testing.assert_allclose(
            np.array(other[name])[..., kept], np.array(value)[..., columns], atol=1e-5
        )


def test_half_precision_does_not_round_positions(model):
    """In an export; a map of 64 cells rounded to bfloat16 is off by a quarter of a cell."""
    import tensorflow as tf

    from keras_resnest.serving.graph import deployment_function

    images, _ = rectangles(1, (64, 512, 3))
    specification = tf.TensorSpec((1, 64, 512, 3), name="images")
    want = model(images, training=False)
    got = deployment_function(lambda x: model(x, training=False), specification, "bfloat16")(
        tf.constant(images)
    )
    for name, value in want.items():
        error = np.abs(got[name] - value).max() / np.std(value)
        assert 1e-3 < error < 0.2, name  # seen: 0.1, and 0.8 with rounded positions
