"""The detector: graph, loss, training, bad input, prediction of images of any size."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import CLASS_NAMES, WHOLE, rectangles, small_backbone, small_detector

import keras_resnest as kr
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.boxes.overlap import pairwise_iou
from keras_resnest.detection import builders
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.loss import LOSS_NAMES, RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet
from keras_resnest.images import load_image, resize_image


@pytest.fixture(scope="module")
def trained():
    """A detector that has learned to find rectangles."""
    model = small_detector(heads=WHOLE)
    model.compile(keras.optimizers.AdamW(4e-3, global_clipnorm=10.0))
    images, truth = rectangles(64)
    model.fit(images, truth, batch_size=16, epochs=32, verbose=0)
    return model


# === The graph ===


@pytest.mark.parametrize("image_shape", [(64, 64, 3), (128, 192, 3), (320, 320, 3)])
def test_output_shapes_and_anchors_agree(image_shape):
    model = small_detector(image_shape)
    outputs = model(np.zeros((2, *image_shape), "float32"))
    height, width, _ = image_shape
    cells = sum((height // s) * (width // s) for s in (8, 16, 32, 64))
    assert model.anchors.shape == (3 * cells, 4)
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "arm_boxes": (2, 3 * cells, 4),
        "arm_objectness": (2, 3 * cells, 2),
        "odm_boxes": (2, 3 * cells, 4),
        "odm_logits": (2, 3 * cells, 4),
    }


def test_rows_follow_the_anchors():
    """A single bright cell moves the outputs of the anchors over it most."""
    model = small_detector((64, 192, 3))
    dark = np.zeros((1, 64, 192, 3), "float32")
    bright = dark.copy()
    bright[:, 16:24, 136:144] = 255  # the stride-8 cell of row 2, column 17
    change = np.abs(np.array(model(bright)["arm_boxes"]) - np.array(model(dark)["arm_boxes"]))
    first_level = change[0].sum(-1)[: 8 * 24 * 3]
    x, y = convert_boxes(model.anchors, "xyxy", "center_xywh", 64, 192)[int(first_level.argmax())][
        :2
    ]
    assert abs(float(x) - 140) <= 24 and abs(float(y) - 20) <= 24


@pytest.mark.parametrize("name", sorted(builders.BUILDERS))
def test_builders_are_in_the_table(name):
    assert callable(getattr(builders, name))
    assert "num_classes" in getattr(builders, name).__doc__


def test_builder_passes_its_options_on():
    model = builders.refinedet_tiny(5, image_shape=(64, 128, 3), class_names=list("abcde"))
    assert (model.num_classes, model.image_shape, model.name) == (5, (64, 128, 3), "refinedet_tiny")
    assert model.class_name(3) == "d"
    assert model.backbone.name == "resnest14_tiny"


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"image_shape": (100, 128, 3)}, "multiples of 64"),
        ({"image_shape": (128, 128, 1)}, "image_shape"),
        ({"num_classes": 0}, "num_classes"),
        ({"class_names": ["a", "b"]}, "class_names"),
        ({"class_names": ["a", "a", "b"]}, "class_names"),
        ({"bounding_box_format": "coco"}, "bounding_box_format"),
        ({"backbone": "resnest51"}, "resnest50"),
        ({"backbone": keras.Sequential([keras.Input((None, None, 3))])}, "pyramid_outputs"),
        ({"anchor_generator": AnchorGenerator(strides=(8,), sizes=(32,))}, "anchor_generator"),
        ({"decoder": "text"}, "must be DetectionDecoder .* Received: decoder='text'"),
        ({"heads": RefineDetLoss()}, "`heads` must be RefineDetHeads"),
        ({"dtype": "int32"}, "`dtype` must be a float type"),
    ],
)
def test_bad_arguments(arguments, word):
    options = {"num_classes": 3, "backbone": small_backbone(), "image_shape": (64, 64, 3)}
    with pytest.raises(ValueError, match=word):
        RefineDet(**{**options, **arguments})


def test_channels_first_is_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="RefineDet is channels_last"):
            RefineDet(3, backbone="resnest14_tiny")
    finally:
        keras.config.set_image_data_format("channels_last")


# === Training ===


def test_both_layouts_and_all_formats_give_the_same_loss():
    images, truth = rectangles(4)
    want = None
    for box_format in ("xyxy", "rel_yxyx", "center_xywh"):
        model = small_detector(bounding_box_format=box_format)
        model.compile(run_eagerly=True)  # faster than tracing
        boxes = np.array(convert_boxes(truth["boxes"], "xyxy", box_format, 64, 128))
        converted = {"boxes": boxes, "labels": truth["labels"]}
        logs = model.evaluate(images, converted, verbose=0, return_dict=True)
        want = want or logs
        assert logs == pytest.approx(want, rel=1e-4)
    as_dict = model.evaluate(
        {"images": images, "bounding_boxes": converted}, verbose=0, return_dict=True
    )
    assert as_dict == pytest.approx(logs, rel=1e-5)
    assert set(want) == {"loss", *LOSS_NAMES}
    assert want["loss"] == pytest.approx(sum(want[n] for n in LOSS_NAMES), rel=1e-5)


def test_the_loss_of_the_predicted_iou():
    """It is logged and weighted as the others, in training and evaluation."""
    model = small_detector((64, 64, 3), heads={"predict_iou": True})
    images, truth = rectangles(2, (64, 64, 3))
    model.compile(keras.optimizers.SGD(1e-3), run_eagerly=True)  # faster than tracing
    options = {"verbose": 0, "return_dict": True}
    one = {name: rows[:1] for name, rows in truth.items()}
    first = model.evaluate(images[:1], one, **options)
    both = model.evaluate(images, truth, sample_weight=np.array([3.0, 0.0]), **options)
    assert set(first) == {"loss", *LOSS_NAMES, "odm_iou_loss"}
    assert first["loss"] == pytest.approx(sum(v for k, v in first.items() if k != "loss"), rel=1e-5)
    assert first["odm_iou_loss"] > 0 and both == pytest.approx(first, rel=1e-4)
    kernel = model.get_layer("odm").iou_convolutions[0].kernel
    before = kernel.numpy()
    logs = model.fit(images, truth, sample_weight=np.ones(2), verbose=0).history
    assert np.isfinite(logs["odm_iou_loss"]).all() and (kernel.numpy() != before).any()


def test_padding_rows_do_not_matter():
    model = small_detector()
    model.compile(run_eagerly=True)
    images, truth = rectangles(4)
    padded = {
        "boxes": np.pad(truth["boxes"], [(0, 0), (0, 3), (0, 0)], constant_values=33.0),
        "labels": np.pad(truth["labels"], [(0, 0), (0, 3)], constant_values=-1),
    }
    want = model.evaluate(images, truth, verbose=0, return_dict=True)
    assert model.evaluate(images, padded, verbose=0, return_dict=True) == pytest.approx(want)


def test_learns_to_detect(trained):
    """Most of the rectangles of the training images are found, in the right color."""
    images, truth = rectangles(64)
    found = trained.predict(images[:16], verbose=0)
    hits = 0
    for i in range(16):
        for box, label in zip(truth["boxes"][i], truth["labels"][i], strict=True):
            confident = (found["confidence"][i] > 0.5) & (found["labels"][i] == label)
            iou = np.array(pairwise_iou(box[None], found["boxes"][i][confident]))
            hits += bool(iou.size and iou.max() > 0.6)
    assert hits >= 26, f"{hits} of 32"


def adversarial_truth(step, rng, num_classes=3):
    """Ground truth of one batch of two images of 64 x 64, never twice the same kind."""
    kind = step % 6
    count = (0, 300, 40, 5, 60, 3)[kind]
    corner = rng.uniform(2, 60, (2, count, 2))
    size = {1: 20, 2: 1e-3, 3: 500, 4: 8, 5: 0}.get(kind, 1) * rng.uniform(0.1, 1, (2, count, 2))
    boxes = np.concatenate([corner, corner + size], -1)
    if kind == 3:  # far larger than the image
        boxes = boxes * [-1, -1, 1, 1]
    if kind == 4:  # all the same
        boxes[:] = boxes[:, :1]
    labels = rng.integers(0, num_classes, (2, count))
    if kind == 5:
        labels[0] = -1
    padding = 300 - count
    return {
        "boxes": np.pad(boxes, [(0, 0), (0, padding), (0, 0)]).astype("float32"),
        "labels": np.pad(labels, [(0, 0), (0, padding)], constant_values=-1).astype("int32"),
    }


def test_126_steps_on_adversarial_ground_truth_stay_finite():
    """No objects, hundreds, tiny, huge, duplicated, without area: with a high learning rate.

    Each of the 42 pairs of ground truth and images comes three times.
    """
    model = small_detector((64, 64, 3))
    model.compile(keras.optimizers.SGD(1e-2, momentum=0.9, global_clipnorm=10.0))
    rng = np.random.default_rng(0)
    history = []
    for step in range(126):
        images = rng.uniform(0, 255, (2, 64, 64, 3)).astype("float32") * (step % 7 > 0)
        logs = model.train_on_batch(images, adversarial_truth(step, rng), return_dict=True)
        history.append(list(logs.values()))
        model.reset_metrics()
    assert np.isfinite(history).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("objects", [0, 4])
def test_an_epoch_without_objects(objects):
    """No row at all, or padding rows alone."""
    model = small_detector()
    model.compile("sgd", run_eagerly=objects == 0)
    images, _ = rectangles(4)
    truth = {
        "boxes": np.zeros((4, objects, 4), "float32"),
        "labels": -np.ones((4, objects), "int32"),
    }
    logs = model.fit(images, truth, batch_size=2, verbose=0).history
    assert logs["loss"] == [0.0]
    assert all(np.isfinite(w).all() for w in model.get_weights())


def bad_batches():
    images, truth = rectangles(2)
    boxes, labels = truth["boxes"], truth["labels"]
    nan_image, nan_box = images.copy(), boxes.copy()
    nan_image[0, 0, 0, 0], nan_box[0, 0, 0] = np.nan, np.nan
    return [
        (images / 255.0, boxes, labels, r"`images` must be 0 to 255"),
        (nan_image, boxes, labels, r"`images` must be finite"),
        (images, nan_box, labels, r"`boxes` must be finite"),
        (images, boxes / 128.0, labels, r"`boxes` must be in pixels"),
        (images, boxes[..., [2, 1, 0, 3]], labels, r"negative width"),
        (images, boxes, labels + 3, r"`labels` must be 0 to 2.*Received"),
        (images, boxes, labels - 5, r"`labels` must be 0 to 2.*Received"),
    ]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="checked inside the graph")
def test_faulty_batches_raise_value_errors():
    model = small_detector()
    model.compile("sgd")
    import tensorflow as tf

    for images, boxes, labels, message in bad_batches():
        truth = {"boxes": boxes, "labels": labels}
        with pytest.raises(ValueError, match=message):
            model.fit(images, truth, verbose=0)
        dataset = tf.data.Dataset.from_tensors((images, truth))
        with pytest.raises(ValueError, match=message):
            model.fit(dataset, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_relative_format_with_pixels_raises():
    model = small_detector(bounding_box_format="rel_xyxy")
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"must be fractions of the image.*rel_xyxy"):
        model.evaluate(*rectangles(2), verbose=0)


def test_wrong_shapes_and_arguments():
    model = small_detector()
    for argument in ({"loss": "mse"}, {"metrics": ["accuracy"]}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            model.compile("sgd", **argument)
    model.compile("sgd")
    images, truth = rectangles(2)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 64, 128, 3\)"):
        model.predict(images[:, :, :64], verbose=0)
    with pytest.raises(ValueError, match=r"boxes.*labels"):
        model.fit(images, {"boxes": truth["boxes"]}, verbose=0)


# === Prediction ===


def test_predict_decodes_the_raw_outputs(trained):
    images, _ = rectangles(3, seed=5)
    raw = trained(images, training=False)
    want = trained.decoder(raw, trained.anchors, trained.image_shape)
    got = trained.predict(images.astype("uint8"), verbose=0)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], np.array(value), atol=2e-3, err_msg=name)


def test_detect_one_and_many_of_mixed_sizes(trained, tmp_path):
    """An image of twice the size gives the same boxes, twice as large."""
    from PIL import Image

    images, _ = rectangles(2, seed=6)
    small = images[0].astype("uint8")
    large = np.array(Image.fromarray(small).resize((256, 128), Image.Resampling.NEAREST))
    path = tmp_path / "image.png"
    Image.fromarray(small).save(path)
    one = trained.detect(small, confidence_threshold=0.4)
    several = trained.detect([str(path), large, path.read_bytes()], confidence_threshold=0.4)
    assert len(one["boxes"]) and len(several) == 3
    assert one["class_names"] == [CLASS_NAMES[label] for label in one["labels"]]
    assert (np.diff(one["confidence"]) <= 0).all() and one["confidence"].min() >= 0.4
    for other in (several[0], several[2]):
        np.testing.assert_allclose(other["boxes"], one["boxes"], atol=1e-2)
    best = several[1]["boxes"][0]
    assert np.array(pairwise_iou(best[None], one["boxes"] * 2)).max() > 0.8
    assert trained.detect(images[:0]) == []


def test_detect_agrees_with_predict(trained):
    image = rectangles(1, seed=9)[0][0]
    got = trained.detect(image, confidence_threshold=0.0)
    want = trained.predict(image[None], verbose=0)
    n = want["num_detections"][0]
    np.testing.assert_allclose(got["boxes"], want["boxes"][0, :n], atol=1e-3)
    np.testing.assert_allclose(got["confidence"], want["confidence"][0, :n], atol=1e-5)


def test_detect_takes_the_darkest_images(trained):
    """The noise of a covered lens is no image scaled to 0-1."""
    noise = np.random.default_rng(0).integers(0, 2, (100, 150, 3)).astype("uint8")
    for image in (noise, np.zeros_like(noise), np.ones((1, 1, 3), "uint8")):
        assert np.isfinite(trained.detect(image, confidence_threshold=0.0)["boxes"]).all()
    with pytest.raises(ValueError, match="0 to 255"):
        trained.detect(rectangles(1)[0][0] / 255.0)


def test_detect_odd_images(trained, odd_images):
    """Readable ones give a result, the others None and a warning that names them."""
    names = sorted(p.name for p in odd_images.iterdir())
    with pytest.warns(UserWarning) as warned:
        results = trained.detect([odd_images / n for n in names], confidence_threshold=0.0)
    failed = {n for n, r in zip(names, results, strict=True) if r is None}
    assert failed == {"truncated.jpg", "text_not_image.jpg"}
    for name in failed:
        assert any(name in str(w.message) for w in warned)
        with pytest.raises(ValueError, match=name):
            trained.detect(odd_images / name)


def test_detect_respects_exif_orientation(trained, odd_images):
    path = odd_images / "exif_orientation6.jpg"
    upright = load_image(path)
    assert upright.shape == (212, 320, 3)
    got = trained.detect(path, confidence_threshold=0.0)
    resized = np.array(resize_image(upright, 64, 128))[None]
    want = trained.predict(resized, verbose=0)
    n = want["num_detections"][0]
    scale = np.array([320 / 128, 212 / 64] * 2)
    np.testing.assert_allclose(got["boxes"], want["boxes"][0, :n] * scale, atol=1e-2)


def test_a_new_decoder_counts_at_once(trained):
    """In `detect`, `predict` and `predict_on_batch`; replaced or changed in place."""
    image = rectangles(1, seed=9)[0]
    old = trained.decoder

    def counts():
        return (
            len(trained.detect(image[0], confidence_threshold=0.0)["boxes"]),
            int(trained.predict(image, verbose=0)["num_detections"][0]),
            int(trained.predict_on_batch(image)["num_detections"][0]),
        )

    before = counts()
    trained.decoder = DetectionDecoder(max_detections=2)
    assert counts() == (2, 2, 2)
    trained.decoder.max_detections = 1
    assert counts() == (1, 1, 1)
    trained.decoder = old
    assert counts() == before and before[0] > 2


def test_arguments_are_those_of_keras():
    """Names, order and defaults; positional arguments arrive where they belong."""
    for method in ("fit", "evaluate", "predict"):
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (RefineDet, keras.Model))
        assert ours == theirs
    model = small_detector()
    model.compile("sgd", run_eagerly=True)
    epochs = []
    seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    model.fit(*rectangles(2), 2, 1, 0, [seen])
    assert epochs == [0]


# === Why a box ===


def test_explains_a_detection_by_its_object(trained):
    """At least three times the heat that lies in a box of this size by chance."""
    images, _ = rectangles(4, seed=77)
    ratios = []
    for image in images:
        found = trained.detect(image, confidence_threshold=0.6)
        for i, box in enumerate(found["boxes"].round().astype(int)):
            heat = kr.visualization.explain(trained, image, {k: v[i] for k, v in found.items()})
            assert heat.shape == (64, 128) and heat.min() >= 0 and heat.max() == 1
            inside = heat[box[1] : box[3], box[0] : box[2]]
            ratios.append(inside.sum() / heat.sum() * heat.size / inside.size)
    assert len(ratios) > 4 and np.mean(ratios) >= 3


def test_explains_detections_of_any_image_size_and_format(trained):
    """The heat follows the image, and the format of the boxes changes nothing."""
    image = rectangles(1, seed=78)[0][0].astype("uint8")
    large = image.repeat(3, axis=0).repeat(2, axis=1)
    found = trained.detect(large, confidence_threshold=0.0)
    best = {name: values[:1] for name, values in found.items()}
    heat = kr.visualization.explain(trained, large, best)
    assert heat.shape == (192, 256)
    relative = small_detector(heads=WHOLE, bounding_box_format="rel_yxyx")
    relative.set_weights(trained.get_weights())
    other = {"boxes": best["boxes"][0, [1, 0, 3, 2]] / [192, 256, 192, 256]}
    other["labels"] = best["labels"]
    np.testing.assert_allclose(kr.visualization.explain(relative, large, other), heat, atol=1e-3)
    shown = kr.visualization.overlay_heat(large, heat)
    assert shown.dtype == "uint8" and shown.shape == large.shape
    np.testing.assert_array_equal(shown[heat == 0], large[heat == 0])


@pytest.mark.parametrize(
    "heads",
    [
        {"use_transfer_connection": False},
        {"use_residual_blocks": True, "use_transfer_connection": False},
        {"use_alignment": True, "use_residual_blocks": True, "predict_iou": True},
    ],
)
def test_explains_detections_of_all_heads(heads):
    model, image = small_detector(heads=heads), rectangles(1)[0][0]
    found = model.detect(image, confidence_threshold=0.0)
    heat = kr.visualization.explain(model, image, {k: v[:1] for k, v in found.items()})
    assert np.isfinite(heat).all() and heat.max() == 1


def test_explains_a_box_that_the_border_leaves_no_area():
    outside = AnchorGenerator(sizes=(16, 32, 64, 128), offset=-2.0)
    model, image = small_detector(anchor_generator=outside), rectangles(1)[0][0]
    found = model.detect(image, confidence_threshold=0.0)
    flat = np.flatnonzero((found["boxes"][:, 2:] == found["boxes"][:, :2]).any(axis=1))
    heat = kr.visualization.explain(model, image, {k: v[flat[0]] for k, v in found.items()})
    assert np.isfinite(heat).all() and heat.max() == 1


def test_refuses_to_explain_what_is_not_a_detection(trained):
    image = rectangles(1)[0][0]
    found = trained.detect(image, confidence_threshold=0.0)
    with pytest.raises(ValueError, match=r"`detection` must be a single one.*labels"):
        kr.visualization.explain(trained, image, found)
    nothing = {"boxes": [2000, 2000, 2010, 2010], "labels": 0}
    with pytest.raises(ValueError, match=r"that the model finds.*label 0 at"):
        kr.visualization.explain(trained, image, nothing)
    with pytest.raises(ValueError, match=r"that the model finds.*nan"):
        kr.visualization.explain(trained, image, {"boxes": [np.nan] * 4, "labels": 0})
    with pytest.raises(ValueError, match=r"label of 0 to 2.*7"):
        kr.visualization.explain(trained, image, {"boxes": [0, 0, 9, 9], "labels": 7})


# === Serialization ===


def test_config_names_every_argument():
    model = small_detector(
        bounding_box_format="rel_xyxy",
        detection_loss=RefineDetLoss(BoxMatcher(0.6)),
        decoder=DetectionDecoder(max_detections=9),
    )
    config = model.get_config()
    arguments = set(inspect.signature(RefineDet.__init__).parameters) - {"self"}
    assert set(config) == arguments
    again = RefineDet.from_config(config)
    assert again.get_config() == config
    assert again.decoder.max_detections == 9 and again.detection_loss.matcher.iou_threshold == 0.6
    np.testing.assert_array_equal(again.anchors, model.anchors)


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_data_of_other_classes_are_refused(method):
    images, truth = rectangles(2)
    data = tf.data.Dataset.from_tensor_slices({"images": images, "bounding_boxes": truth})

    class Named:
        class_names = ["red", "blue", "green"]

        def as_dataset(self):
            return data

    batches = kr.data.training_batches(Named(), (64, 128), 2, augmentation=None, seed=0)
    model = small_detector()
    model.compile()
    with pytest.raises(ValueError, match=r"same classes in the same order.*'red', 'blue', 'green'"):
        getattr(model, method)(batches, verbose=0)


UNKNOWN_SIZE = (
    tf.TensorSpec((None, None, None, 3)),
    {"boxes": tf.TensorSpec((None, None, 4)), "labels": tf.TensorSpec((None, None), tf.int32)},
)


def test_training_takes_images_of_several_sizes():
    """Each size gives the loss that a model built for it gives."""
    model = small_detector()
    model.compile(keras.optimizers.SGD(0.0))
    for shape in ((64, 128, 3), (128, 64, 3), (128, 192, 3)):
        images, truth = rectangles(2, shape, objects=1)
        own = small_detector(shape)
        own.set_weights(model.get_weights())
        outputs = own(images, training=False)
        want = own.detection_loss(outputs, truth["boxes"], truth["labels"], own.anchors)
        data = tf.data.Dataset.from_generator(
            lambda pair=(images, truth): iter([pair]), output_signature=UNKNOWN_SIZE
        )
        got = model.evaluate(data, return_dict=True, verbose=0)
        for name, value in want.items():
            assert got[name] == pytest.approx(float(value), rel=1e-4), (shape, name)
