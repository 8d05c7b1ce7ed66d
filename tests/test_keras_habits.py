"""What users of Keras pass to a detector: weights of images, ragged boxes, tensors of any size."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import rectangles, small_backbone, small_detector
from PIL import Image

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.data import classification_batches, evaluation_batches, training_batches
from keras_resnest.data.dataset import (
    ClassificationDataset,
    DetectionDataset,
    ImageRecord,
    LabeledImage,
)
from keras_resnest.data.readers.csv import read_csv
from keras_resnest.data.readers.detect_format import read_detection
from keras_resnest.data.readers.voc import read_voc
from keras_resnest.detection.anchor_fit import fit_anchors
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.loss import RefineDetLoss
from keras_resnest.evaluation.collect import collect_detections
from keras_resnest.layers import SplitAttention
from keras_resnest.serving.export import export_model
from keras_resnest.training.callbacks import DetectionEvaluation
from keras_resnest.training.resume import ResumeTraining
from keras_resnest.visualization import plot_dataset

SHAPE = (64, 128, 3)
IMAGES, TRUTH = rectangles(4, SHAPE)
WEIGHTS = np.array([1.0, 0.0, 2.0, 1.0])
REPEATED = [0, 2, 2, 3]


def take(rows):
    return IMAGES[rows], {name: values[rows] for name, values in TRUTH.items()}


class OneBatch(keras.utils.PyDataset):
    def __init__(self, *batch):
        super().__init__()
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


@pytest.fixture(scope="module")
def model():
    detector = small_detector(SHAPE, freeze_batch_norm=True)
    detector.compile(keras.optimizers.SGD(1e-3), run_eagerly=True)
    return detector


# === sample_weight ===

FORMS = {
    "arrays": ((IMAGES, TRUTH), {"sample_weight": WEIGHTS}),
    "column": ((IMAGES, TRUTH), {"sample_weight": WEIGHTS[:, None]}),
    "dictionary": (({"images": IMAGES, "bounding_boxes": TRUTH},), {"sample_weight": WEIGHTS}),
    "dataset": ((tf.data.Dataset.from_tensors((IMAGES, TRUTH, WEIGHTS)),), {}),
    "PyDataset": ((OneBatch(IMAGES, TRUTH, WEIGHTS),), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_weight_two_counts_as_two(model, form):
    data, options = FORMS[form]
    want = model.evaluate(*take(REPEATED), verbose=0)
    assert model.evaluate(*data, **options, verbose=0) == pytest.approx(want, rel=1e-5)
    assert model.evaluate(IMAGES, TRUTH, verbose=0) != pytest.approx(want, rel=1e-2)


def test_weights_reach_the_gradients(model):
    start = model.get_weights()
    model.fit(*take(REPEATED), verbose=0)
    want = model.get_weights()
    model.set_weights(start)
    model.fit(IMAGES, TRUTH, sample_weight=0.1 * WEIGHTS, verbose=0)  # the scale is of no account
    moved = 0.0
    for a, b, c in zip(model.get_weights(), want, start, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        moved += np.abs(b - c).sum()
    assert moved > 1.0
    model.set_weights(start)


def test_no_weight_is_no_loss(model):
    losses = model.evaluate(IMAGES, TRUTH, sample_weight=np.zeros(4), verbose=0)
    assert losses == [0.0] * 5


@pytest.mark.parametrize(
    "weight, message",
    [
        (-WEIGHTS, "not negative.*-2.0"),
        (WEIGHTS * np.nan, "finite"),
        (np.ones((4, 2)), r"one weight for each image.*\(4, 2\)"),
    ],
)
def test_weights_that_make_no_sense(model, weight, message):
    with pytest.raises(ValueError, match=rf"`sample_weight` .*{message}"):
        model.train_on_batch(IMAGES, TRUTH, sample_weight=weight)


def test_class_weight_is_refused(model):
    message = r"no `class_weight`; `RefineDetLoss\(class_weights=.*`sample_weight` whole images"
    with pytest.raises(ValueError, match=message):
        model.fit(tf.data.Dataset.from_tensors((IMAGES, TRUTH)), class_weight={0: 2.0})
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(IMAGES, TRUTH, class_weight={0: 2.0})


# === Ragged boxes ===

COUNTS = [2, 0, 1, 2]


def ragged(values):
    rows = [value[:count] for value, count in zip(values, COUNTS, strict=True)]
    return tf.RaggedTensor.from_row_lengths(np.concatenate(rows), COUNTS)


def test_ragged_boxes_equal_padded_ones(model):
    boxes = {name: ragged(values) for name, values in TRUTH.items()}
    padded = {name: values.copy() for name, values in TRUTH.items()}
    for i, count in enumerate(COUNTS):
        padded["labels"][i, count:] = -1
    want = model.evaluate(IMAGES, padded, verbose=0)
    dataset = tf.data.Dataset.from_tensor_slices({"images": IMAGES, "bounding_boxes": boxes})
    dataset = dataset.batch(4)
    for data in ((IMAGES, boxes), ({"images": IMAGES, "bounding_boxes": boxes},), (dataset,)):
        assert model.evaluate(*data, verbose=0) == pytest.approx(want, rel=1e-5)
    assert model.test_on_batch(IMAGES, boxes) == pytest.approx(want, rel=1e-5)
    truth, _ = collect_detections(model, dataset)
    assert [len(rows["labels"]) for rows in truth] == COUNTS


def test_ragged_boxes_train_in_a_graph():
    model = small_detector(SHAPE)
    model.compile(keras.optimizers.SGD(1e-3))
    boxes = {name: ragged(values) for name, values in TRUTH.items()}
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, boxes)).batch(2)
    history = model.fit(dataset, validation_data=dataset, verbose=0).history
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
    # Sizes that only the graph knows.
    images = np.zeros((2, 64, 64, 3), "float32")
    spec = tf.TensorSpec((None, None, None, 3))
    unknown = tf.data.Dataset.from_generator(lambda: iter([images]), output_signature=spec)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 64, 128, 3\)"):
        model.predict(unknown, verbose=0)


# === Lists and generators ===

ROWS = {
    name: [v[:n] for v, n in zip(values, COUNTS, strict=True)] for name, values in TRUTH.items()
}
LISTS = {name: [row.tolist() for row in rows] for name, rows in ROWS.items()}
OBJECTS = {name: np.array([*rows, None], object)[:-1] for name, rows in ROWS.items()}


@pytest.mark.parametrize("boxes", [ROWS, LISTS, OBJECTS], ids=["arrays", "lists", "objects"])
def test_lists_of_boxes_equal_padded_boxes(model, boxes):
    padded = {name: values.copy() for name, values in TRUTH.items()}
    for i, count in enumerate(COUNTS):
        padded["labels"][i, count:] = -1
    want = pytest.approx(model.evaluate(IMAGES, padded, verbose=0), rel=1e-5)
    batch = {"images": IMAGES, "bounding_boxes": boxes}
    assert model.evaluate(IMAGES, boxes, verbose=0) == want
    assert model.evaluate(batch, verbose=0) == want
    assert model.evaluate(iter([batch]), steps=1, verbose=0) == want
    assert model.evaluate(iter([(IMAGES, boxes)]), steps=1, verbose=0) == want
    assert model.test_on_batch(batch) == want
    truth, _ = collect_detections(model, [batch])
    assert [len(rows["labels"]) for rows in truth] == COUNTS


def test_generators_of_dictionaries_train_and_detect(model):
    def batches():
        for count in (1, 2, 0):  # objects per image
            truth = {name: values[:2, :count].tolist() for name, values in TRUTH.items()}
            yield {"images": IMAGES[:2], "bounding_boxes": truth}

    validation = {"validation_data": (IMAGES, LISTS), "steps_per_epoch": 2}
    history = model.fit(batches(), **validation, verbose=0).history
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
    found, want = model.predict(batches(), verbose=0), model.predict(IMAGES[:2], verbose=0)
    np.testing.assert_allclose(found["boxes"][4:], want["boxes"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "truth, message",
    [
        ({"boxes": [[[1, 2, 3]], []], "labels": [[0], []]}, "`boxes` must be an array, or a list"),
        ({"boxes": [], "labels": []}, "`boxes` must be an array, or a list"),
        ({"boxes": [[[1, 2, 3, 4]], []], "labels": [["red"], []]}, "`labels` must be an array, or"),
        ([{"boxes": [[1, 2, 3, 4]], "labels": [0]}], "must be a dictionary.*Received: list"),
        (None, "must be a dictionary.*Received: NoneType"),
    ],
)
def test_other_ground_truth_is_refused(model, truth, message):
    for method in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match=message):
            method(IMAGES[:2], truth)


# === Images that cannot be read ===


BAD = "bäd[1].png"
BAD_PATTERN = re.escape(BAD)


def damaged_folder(folder):
    """Images of which `BAD` is damaged behind its header, as readers of headers find it."""
    records = []
    for i, name in enumerate(("a.png", "b.jpg", BAD, "c.png")):
        Image.fromarray(IMAGES[i].astype("uint8")).save(folder / name)
        records.append((str(folder / name), name, TRUTH["boxes"][i], TRUTH["labels"][i]))
    content = (folder / BAD).read_bytes()
    middle = len(content) // 2
    (folder / BAD).write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    return [ImageRecord(*record) for record in records]


def test_an_unreadable_image_is_named(model, tmp_path):
    dataset = DetectionDataset(damaged_folder(tmp_path), model.class_names)
    test = evaluation_batches(dataset, SHAPE, 2)
    derived = test.map(lambda batch: (batch["images"], batch["bounding_boxes"])).repeat()
    elements = dataset.as_dataset().skip(1)
    sources = (dataset, True), (dataset, False), (elements, False)
    trains = [training_batches(data, SHAPE, 2, None, cache=cache) for data, cache in sources]
    first, options = (IMAGES[:1], {k: v[:1] for k, v in TRUTH.items()}), {"verbose": 0}
    for run in (
        *(lambda data=data: model.fit(data, verbose=0) for data in trains),
        lambda: model.fit(*first, validation_data=test, **options),
        lambda: model.fit(*first, callbacks=[DetectionEvaluation(test)], **options),
        lambda: model.evaluate(derived, steps=4, verbose=0),
        lambda: model.predict(test, verbose=0),
        lambda: plot_dataset(dataset),
    ):
        with pytest.raises(ValueError, match=rf"^Cannot read the image '.*/{BAD_PATTERN}': \w+"):
            run()
    for data in (test, elements):  # TensorFlow's errors name it too
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"Cannot read .*d\[1\]\.png"):
            list(data)
    cached = evaluation_batches(elements, SHAPE, 2)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Cannot read .*d\[1\]\.png"):
        list(cached)
    with pytest.raises(ValueError, match="cache=False names it"):
        model.evaluate(cached, verbose=0)


def test_files_of_a_cache_belong_to_their_data(tmp_path):
    damaged = damaged_folder(tmp_path)
    (tmp_path / BAD).write_bytes((tmp_path / "a.png").read_bytes())

    def content(classes=("red", "green", "blue"), boxes=None, make=training_batches, **options):
        records = [ImageRecord(r.image, r.image_id, r.boxes, r.labels) for r in damaged]
        records[0].boxes = records[0].boxes if boxes is None else boxes
        data = DetectionDataset(records, classes)
        (batch,) = make(data, SHAPE, 4, cache=str(tmp_path / "cache"), **options)
        return [batch["images"].numpy().tobytes(), batch["bounding_boxes"]["boxes"].numpy()]

    options = {"augmentation": None, "shuffle_buffer": 0}
    first, files = content(**options), set(tmp_path.glob("cache*.index"))
    assert len(files) == 1
    assert content(**options)[0] == first[0] and set(tmp_path.glob("cache*.index")) == files
    moved = damaged[0].boxes + 1
    np.testing.assert_array_equal(content(boxes=moved, **options)[1][0], moved)
    Image.fromarray(IMAGES[3].astype("uint8")).save(tmp_path / "a.png")
    assert content(**options)[0] != first[0]
    content(classes=("blue", "green", "red"), **options)
    content(use_difficult=False, **options)
    content(make=evaluation_batches)
    assert len(set(tmp_path.glob("cache*.index"))) == 6


def test_an_unreadable_image_of_a_classifier_is_named(tmp_path):
    records = [LabeledImage(r.image, r.image_id, 0, r.info) for r in damaged_folder(tmp_path)]
    dataset = ClassificationDataset(records, ["one", "two"])
    classifier = small_backbone().replace_top(2)
    classifier.compile("sgd", "categorical_crossentropy", run_eagerly=True)
    (tmp_path / BAD).unlink()
    for training in (True, False):
        batches = classification_batches(dataset, (64, 64), 2, training=training)
        for run in (classifier.fit, classifier.evaluate):
            with pytest.raises(ValueError, match=rf"Cannot read .*/{BAD_PATTERN}': no such file"):
                run(batches, verbose=0)


# === Images of another size ===


@pytest.mark.parametrize("method", ["predict", "predict_on_batch"])
@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (64, 128, 3), (1, 64, 128, 1)])
def test_tensors_of_another_size_are_refused(model, method, shape):
    with pytest.raises(ValueError, match=r"must have shape \(batch, 64, 128, 3\); `detect` takes"):
        getattr(model, method)(tf.zeros(shape))


@pytest.mark.parametrize("method", ["predict", "predict_on_batch", "evaluate", "fit"])
def test_no_image_is_refused(model, method):
    arguments = (TRUTH,) if method in ("evaluate", "fit") else ()
    with pytest.raises(
        ValueError, match=r"at least one image. Received: x.shape=\(0, 64, 128, 3\)"
    ):
        getattr(model, method)(IMAGES[:0], *arguments)


def test_images_of_several_sizes_are_refused(model):
    images = tf.ragged.stack([tf.zeros((64, 128, 3)), tf.zeros((32, 128, 3))])
    with pytest.raises(ValueError, match="images of several sizes"):
        model.predict(images, verbose=0)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    "boxes, labels",
    [((4, 2, 4), (4, 2, 3)), ((4, 4), (4,)), ((4, 2, 5), (4, 2)), ((4, 2, 4), (4, 3))],
)
def test_ground_truth_of_other_shapes_is_refused(model, boxes, labels, graph):
    truth = {"boxes": np.zeros(boxes, "float32"), "labels": np.zeros(labels, "int32")}
    message = r"`labels` \(batch, objects\). Received: \(.*\) and \(.*\)"
    with pytest.raises(ValueError, match=message):
        if graph:
            tf.function(lambda: model.compute_loss(IMAGES, truth, model(IMAGES)))()
        else:
            model.train_on_batch(IMAGES, truth)


@pytest.mark.parametrize("method", ["predict", "evaluate"])
def test_lists_are_refused(model, method):
    with pytest.raises(ValueError, match="one array of images; `detect` takes lists"):
        getattr(model, method)(list(IMAGES))


def test_datasets_of_another_size_are_refused(model):
    dataset = tf.data.Dataset.from_tensors(tf.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match=r"x.shape=\(1, 64, 64, 3\)"):
        model.predict(dataset, verbose=0)


# === Subclasses ===


def test_a_loss_without_training_is_called_as_in_keras(model):
    """Keras calls an override that has no argument `training` without it."""

    class Doubled(type(model)):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)

    double = Doubled.from_config(model.get_config())
    double.set_weights(model.get_weights())
    double.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    want = 2.0 * model.evaluate(IMAGES, TRUTH, verbose=0)[0]
    assert double.train_on_batch(IMAGES, TRUTH)[0] == pytest.approx(want, rel=1e-4)


# === Values of another kind ===


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.export(None), r"`filepath` must be str \| PathLike.*None"),
        (lambda m: m.export("1", format=["onnx"]), r"`format` must be str\..*\['onnx'\]"),
        (lambda m: m.export("1", foo=1), "RefineDet takes nothing besides.*Received: foo"),
        (lambda m: export_model(None, "1"), "`model` must be a Keras model. Received: None"),
        (lambda m: m.fit(), "`x` must be images.*Received: x=None"),
        (lambda m: m.train_on_batch("images"), "`x` must be one array.*Received: a str"),
        (lambda m: m.detect(IMAGES, None), "`confidence_threshold` must be between.*None"),
        (lambda m: m.detect(IMAGES, batch_size="8"), "`batch_size` must be a positive.*'8'"),
        (lambda m: m.replace_classes(3), "`class_names` must be a list of names. Received: 3"),
        (lambda m: collect_detections(m, None), "`dataset` must be Iterable.*None"),
        (lambda m: DetectionDecoder(max_detections=None), "`max_detections` must be int"),
        (lambda m: DetectionDecoder(iou_threshold=[0.5]), "`iou_threshold` must be float"),
        (lambda m: BoxMatcher(None), "`iou_threshold` must be float.*None"),
        (lambda m: RefineDetLoss(negative_ratio="3"), "`negative_ratio` must be float.*'3'"),
        (lambda m: RefineDetLoss(variances=None), "`variances` must be two positive.*None"),
        (lambda m: AnchorGenerator(sizes=32), "`sizes` must be.*Received: sizes=32"),
        (lambda m: SplitAttention("8"), "`filters` must be int. Received: filters='8'"),
        (lambda m: read_detection(None), "`source` must be str.*None"),
        (lambda m: read_voc(3), "`folder` must be str.*3"),
        (lambda m: read_csv(None), "`file` must be str.*None"),
        (lambda m: fit_anchors(None, (64, 64)), "`dataset` must be a dataset. Received: None"),
        (lambda m: ResumeTraining(None), "`folder` must be str.*None"),
        (lambda m: DetectionEvaluation([], frequency=None), "`frequency` must be int.*None"),
    ],
)
def test_values_of_another_kind_are_named(model, call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(model)


# === What is for other models ===


def test_clone_and_quantize_say_what_to_do(model):
    with pytest.raises(ValueError, match=r"use RefineDet.from_config\(model.get_config\(\)\)"):
        keras.models.clone_model(model)
    with pytest.raises(ValueError, match="`export` has a `precision`"):
        model.quantize("int8")


def test_hdf5_files_load_with_the_class(model, tmp_path):
    model.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="Unknown layer: 'RefineDet'"):
        keras.saving.load_model(tmp_path / "model.h5")
    classes = {"RefineDet": type(model)}
    again = keras.saving.load_model(tmp_path / "model.h5", custom_objects=classes, compile=False)
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
