"""ResNeSt-50 as the backbone of other packages' detectors and segmentation networks."""

import keras
import numpy as np
import pytest

from keras_resnest.backbones import ResNeSt50

BOXES = np.array([[[8, 8, 40, 40]], [[16, 4, 60, 50]]], "float32")  # "xyxy"
LABELS = np.array([[0], [1]])


def pixels(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def backbone(size=64):
    return ResNeSt50(include_top=False, input_shape=(size, size, 3))


def gentle_sgd():
    return keras.optimizers.SGD(1e-3, global_clipnorm=1.0)


def check_trains_a_step(model, x, y):
    """One step of `fit`: the loss is finite, and the first layers of the backbone learned."""
    kernel = next(v for v in model.trainable_variables if "conv1_0" in v.path)
    before = np.array(kernel)
    loss = model.fit(x, y, batch_size=2, epochs=1, verbose=0).history["loss"][0]
    assert np.isfinite(loss) and loss > 0
    assert not np.array_equal(before, kernel)


def test_keras_cv_retinanet():
    keras_cv = pytest.importorskip("keras_cv")
    model = keras_cv.models.RetinaNet(
        num_classes=2, bounding_box_format="xyxy", backbone=backbone()
    )
    model.compile(
        optimizer=gentle_sgd(), classification_loss="focal", box_loss="smoothl1", jit_compile=False
    )
    images = pixels(2, 64, 64, 3)
    check_trains_a_step(model, images, {"boxes": BOXES, "classes": LABELS.astype("float32")})
    found = model.predict(images, verbose=0)
    assert found["boxes"].shape[0] == 2 and found["boxes"].shape[-1] == 4


def test_keras_cv_deeplab():
    keras_cv = pytest.importorskip("keras_cv")
    model = keras_cv.models.DeepLabV3Plus(num_classes=3, backbone=backbone())
    model.compile(gentle_sgd(), "sparse_categorical_crossentropy", jit_compile=False)
    images = pixels(2, 64, 64, 3)
    check_trains_a_step(model, images, np.random.default_rng(0).integers(0, 3, (2, 64, 64, 1)))
    masks = model.predict(images, verbose=0)
    assert masks.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(masks.sum(axis=-1), 1.0, atol=1e-4)


def test_keras_hub_retinanet():
    keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    body = keras_hub.models.RetinaNetBackbone(
        image_encoder=backbone(), min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    )
    model = keras_hub.models.RetinaNetObjectDetector(
        backbone=body,
        num_classes=2,
        bounding_box_format="xyxy",
        use_prediction_head_norm=True,
    )
    model.compile(
        optimizer=gentle_sgd(),
        box_loss=keras.losses.Huber(reduction="sum"),
        classification_loss=keras.losses.BinaryFocalCrossentropy(reduction="sum"),
        jit_compile=False,
    )
    images = pixels(2, 64, 64, 3)
    check_trains_a_step(model, images, {"boxes": BOXES, "labels": LABELS})
    found = model.predict(images, verbose=0)
    assert found["boxes"].shape[0] == 2 and found["boxes"].shape[-1] == 4


def test_keras_hub_deeplab():
    keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    body = keras_hub.models.DeepLabV3Backbone(
        image_encoder=backbone(),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        dilation_rates=[6, 12, 18],
        upsampling_size=8,
        image_shape=(64, 64, 3),
    )
    model = keras_hub.models.DeepLabV3ImageSegmenter(
        backbone=body, num_classes=3, activation="softmax"
    )
    model.compile(gentle_sgd(), "sparse_categorical_crossentropy", jit_compile=False)
    images = pixels(2, 64, 64, 3)
    side = model.predict(images, verbose=0).shape[1]
    masks = np.random.default_rng(0).integers(0, 3, (2, side, side, 1))
    check_trains_a_step(model, images, masks)
    assert model.predict(images, verbose=0).shape == (2, side, side, 3)
