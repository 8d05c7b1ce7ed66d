"""ResNeSt as the backbone of detectors and segmentation networks of other packages.

ResNeSt-14, with the levels and widths of ResNeSt-50, trains a step; ResNeSt-50 comes back from a
file. KerasHub's segmentation network trains in a graph; the others eagerly, because tracing takes
long.
"""

import keras
import numpy as np
import pytest

from keras_resnest.backbones import create_backbone

SHAPE = (64, 64, 3)
BOXES = np.array([[[8, 8, 40, 40]], [[16, 4, 60, 50]]], "float32")  # "xyxy"
LABELS = np.array([[0], [1]])
# Levels P3 to P7 of 64 x 64 pixels have 8 x 8, 4 x 4, 2 x 2, 1 and 1 cells of 9 anchors.
ANCHORS = (64 + 16 + 4 + 1 + 1) * 9


def backbone(name):
    return create_backbone(name, include_top=False, input_shape=SHAPE)


def images():
    return np.random.default_rng(0).uniform(0, 255, (2, *SHAPE)).astype("float32")


def masks():
    return np.random.default_rng(0).integers(0, 3, (2, 64, 64, 1))


def keras_cv_retinanet(name="resnest14"):
    keras_cv = pytest.importorskip("keras_cv", reason="KerasCV is not installed")
    return keras_cv.models.RetinaNet(
        num_classes=2,
        bounding_box_format="xyxy",
        backbone=backbone(name),
    )


def keras_cv_deeplab(name="resnest14"):
    keras_cv = pytest.importorskip("keras_cv", reason="KerasCV is not installed")
    return keras_cv.models.DeepLabV3Plus(num_classes=3, backbone=backbone(name))


def keras_hub_retinanet(name="resnest14"):
    keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    levels = keras_hub.models.RetinaNetBackbone(
        image_encoder=backbone(name),
        min_level=3,
        max_level=7,
        use_p5=False,
        image_shape=SHAPE,
    )
    return keras_hub.models.RetinaNetObjectDetector(
        backbone=levels,
        num_classes=2,
        bounding_box_format="xyxy",
        use_prediction_head_norm=True,
    )


def keras_hub_deeplab(name="resnest14"):
    keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    levels = keras_hub.models.DeepLabV3Backbone(
        image_encoder=backbone(name),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        dilation_rates=[6, 12, 18],
        upsampling_size=8,  # from P5 to P2
        image_shape=SHAPE,
    )
    return keras_hub.models.DeepLabV3ImageSegmenter(
        backbone=levels, num_classes=3, activation="softmax"
    )


def gentle_sgd():
    return keras.optimizers.SGD(1e-3, global_clipnorm=1.0)


def check_trains_a_step(model, y):
    """Trains a step: the loss is finite and the first layer of the backbone changes."""
    kernel = next(v for v in model.trainable_variables if "conv1_0" in v.path)
    before = np.array(keras.ops.convert_to_numpy(kernel))
    loss = model.fit(images(), y, batch_size=2, epochs=1, verbose=0).history["loss"][0]
    assert np.isfinite(loss) and loss > 0
    assert not np.array_equal(before, keras.ops.convert_to_numpy(kernel))


def check_detections(found):
    # Both packages keep up to 100 boxes.
    assert found["boxes"].shape == (2, 100, 4)
    assert found["confidence"].shape == (2, 100)
    assert np.isfinite(found["boxes"]).all()


def check_probabilities(found):
    assert found.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, atol=1e-4)


def test_keras_cv_retinanet():
    model = keras_cv_retinanet()
    model.compile(
        optimizer=gentle_sgd(),
        classification_loss="focal",
        box_loss="smoothl1",
        run_eagerly=True,
    )
    check_trains_a_step(model, {"boxes": BOXES, "classes": LABELS.astype("float32")})
    check_detections(model.predict(images(), verbose=0))


def test_keras_cv_deeplab():
    model = keras_cv_deeplab()
    model.compile(gentle_sgd(), "sparse_categorical_crossentropy", run_eagerly=True)
    check_trains_a_step(model, masks())
    check_probabilities(model.predict(images(), verbose=0))


def test_keras_hub_retinanet():
    model = keras_hub_retinanet()
    model.compile(
        optimizer=gentle_sgd(),
        box_loss=keras.losses.Huber(reduction="sum"),
        classification_loss=keras.losses.BinaryFocalCrossentropy(reduction="sum"),
        run_eagerly=True,
    )
    check_trains_a_step(model, {"boxes": BOXES, "labels": LABELS})
    check_detections(model.predict(images(), verbose=0))


def test_keras_hub_deeplab():
    model = keras_hub_deeplab()
    model.compile(gentle_sgd(), "sparse_categorical_crossentropy", jit_compile=False)
    check_trains_a_step(model, masks())
    check_probabilities(model.predict(images(), verbose=0))


@pytest.mark.slow
@pytest.mark.parametrize("build", [keras_cv_retinanet, keras_hub_retinanet])
def test_detectors_have_all_anchors_and_come_back_from_a_file(build, tmp_path):
    model = build("resnest50")
    outputs = list(model(images()).values())
    assert {tuple(output.shape) for output in outputs} == {(2, ANCHORS, 4), (2, ANCHORS, 2)}
    model.save(tmp_path / "detector.keras")
    loaded = keras.saving.load_model(tmp_path / "detector.keras")
    for now, before in zip(loaded(images()).values(), outputs, strict=True):
        np.testing.assert_allclose(now, before, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("build", [keras_cv_deeplab, keras_hub_deeplab])
def test_segmenters_come_back_from_a_file(build, tmp_path):
    model = build("resnest50")
    model.save(tmp_path / "segmenter.keras")
    loaded = keras.saving.load_model(tmp_path / "segmenter.keras")
    np.testing.assert_allclose(loaded(images()), model(images()), rtol=1e-5, atol=1e-6)
