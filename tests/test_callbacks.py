"""DetectionEvaluation and DetectionPlot in trainings of a small model."""

import csv
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import CLASS_NAMES, rectangles, small_detector
from keras import ops

from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.evaluation import (
    coco_average_precision,
    collect_detections,
    evaluate_detections,
    voc_average_precision,
)
from keras_resnest.trainer import DistributedTraining
from keras_resnest.training.callbacks import DetectionEvaluation, DetectionPlot, ResumeTraining

SIZE = 64
MOST = 4  # rows of padded boxes
NAMES = ["cell", "dust"]


class PlantedDetector(keras.Model):
    """Detects the boxes written into the image, displaced by a shift that training removes.

    Row i of an image holds one box: x1, y1, x2 | y2, label, 100 * confidence | 255. Its only
    weight is `shift`, in pixels; each training step halves it.
    """

    def __init__(self, shift=16.0, bounding_box_format="xyxy", num_classes=2, **kwargs):
        super().__init__(**kwargs)
        self.bounding_box_format = bounding_box_format
        self.num_classes = num_classes
        self.image_shape = (SIZE, SIZE, 3)
        self.first_shift = shift
        self.num_traces = 0

    def build(self, input_shape):
        start = keras.initializers.Constant(self.first_shift)
        self.shift = self.add_weight(shape=(), initializer=start, name="shift")

    def call(self, inputs):
        images = inputs["images"] if isinstance(inputs, dict) else inputs
        return ops.cast(images, "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.square(self.shift)

    def predict_step(self, data):
        self.num_traces += 1  # Python runs only while the function is traced
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        rows = self(x, training=False)[:, :MOST]
        exists = rows[:, :, 2, 0] > 0
        boxes = ops.concatenate([rows[:, :, 0], rows[:, :, 1, :1]], axis=-1) + self.shift
        boxes = convert_boxes(boxes, "xyxy", self.bounding_box_format, SIZE, SIZE)
        return {
            "boxes": ops.where(exists[..., None], boxes, -1.0),
            "confidence": ops.where(exists, rows[:, :, 1, 2] / 100, -1.0),
            "labels": ops.cast(ops.where(exists, rows[:, :, 1, 1], -1.0), "int32"),
            "num_detections": ops.sum(ops.cast(exists, "int32"), axis=1),
        }


def planted(num_images=5, seed=0, empty=False):
    """Images with boxes for `PlantedDetector` and their ground truth, the same boxes."""
    rng = np.random.default_rng(seed)
    images = np.zeros((num_images, SIZE, SIZE, 3), "uint8")
    boxes = np.zeros((num_images, MOST, 4), "float32")
    labels = np.full((num_images, MOST), -1, "int32")
    for image in range(num_images):
        for row in range(rng.integers(1, MOST + 1)):
            x, y = rng.integers(0, 32, 2)
            box, label = (x, y, x + 30, y + 30), rng.integers(0, 2)
            confidence = rng.integers(10, 100)
            images[image, row, :3] = box[:3], (box[3], label, confidence), (255, 0, 0)
            if not empty:
                boxes[image, row], labels[image, row] = box, label
    difficult = np.zeros(labels.shape, bool)
    return images, {"boxes": boxes, "labels": labels, "difficult": difficult}


def as_dataset(images, boxes, batch_size=2):
    """Batches of 2, 2 and 1 images of a set of five."""
    elements = {"images": images, "bounding_boxes": boxes}
    return tf.data.Dataset.from_tensor_slices(elements).batch(batch_size)


def compiled(**options):
    model = PlantedDetector(**options)
    # The gradient of shift**2 is 2 shift: this rate halves the shift at every step.
    model.compile(optimizer=keras.optimizers.SGD(0.25))
    return model


def train(callbacks, epochs=5, model=None, verbose=0, **options):
    """One step per epoch on one batch: the shift is 16, then 8, 4, 2, 1, 0.5."""
    model = compiled(**options) if model is None else model
    dataset = as_dataset(*planted(2, seed=9))
    history = model.fit(dataset, epochs=epochs, callbacks=callbacks, verbose=verbose)
    return model, history


def expected_map(shift, threshold=0.5):
    """mAP of the validation images with every detection displaced by `shift`."""
    images, boxes = planted()
    truth, found = [], []
    for image in range(len(images)):
        keep = boxes["labels"][image] >= 0
        own = {"boxes": boxes["boxes"][image][keep], "labels": boxes["labels"][image][keep]}
        confidence = images[image, : keep.sum(), 1, 2] / 100
        truth.append(own)
        found.append({**own, "boxes": own["boxes"] + shift, "confidence": confidence})
    return voc_average_precision(truth, found, num_classes=2, iou_threshold=threshold).mAP


def test_history_has_the_right_values():
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)
    _, history = train([evaluation])
    wanted = [expected_map(shift) for shift in (8, 4, 2, 1, 0.5)]
    assert wanted[0] < 0.5 and wanted[-1] == 1.0
    assert history.history["val_mAP50"] == pytest.approx(wanted)
    per_class = [history.history[f"val_AP50/{name}"] for name in NAMES]
    assert np.mean(per_class, axis=0) == pytest.approx(wanted)
    assert evaluation.result.mAP == 1.0
    assert evaluation.result.class_names == tuple(NAMES)
    assert evaluation.epoch == [0, 1, 2, 3, 4]
    assert evaluation.history["val_mAP50"] == history.history["val_mAP50"]


def test_later_callbacks_use_the_value(tmp_path):
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)
    monitor = {"monitor": "val_mAP50", "mode": "max"}
    path = str(tmp_path / "{epoch}-{val_mAP50:.2f}.weights.h5")
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_best_only=True, save_weights_only=True, **monitor
    )
    stopping = keras.callbacks.EarlyStopping(patience=2, **monitor)
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    callbacks = [evaluation, checkpoint, stopping, logger]
    _, history = train(callbacks, epochs=9)
    values = history.history["val_mAP50"]
    best = values.index(1.0)
    assert len(values) == best + 3  # stops after two epochs without a higher value
    increasing = [i for i, v in enumerate(values) if v > max(values[:i], default=-1)]
    saved = {f"{i + 1}-{values[i]:.2f}.weights.h5" for i in increasing}
    assert {p.name for p in tmp_path.glob("*.h5")} == saved
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["val_mAP50"]) for row in rows] == pytest.approx(values)
    assert "val_AP50/dust" in rows[0]


def test_tensorboard_event_file(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorFlow no longer installs tensorboard")
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)
    board = keras.callbacks.TensorBoard(str(tmp_path), write_graph=False)
    _, history = train([evaluation, board], epochs=3)
    written = {}
    for path in (tmp_path / "validation").iterdir():
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor)
                written.setdefault(value.tag, []).append((event.step, float(number)))
    wanted = list(enumerate(history.history["val_mAP50"]))
    assert np.array(written["epoch_mAP50"]) == pytest.approx(np.array(wanted))
    assert len(written["epoch_AP50/cell"]) == 3


@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "rel_yxyx", "rel_center_xywh"])
@pytest.mark.parametrize("structure", ["dictionary", "tuple"])
def test_every_box_format_and_structure(box_format, structure):
    images, boxes = planted()
    wanted = expected_map(3.0)
    converted = convert_boxes(boxes["boxes"], "xyxy", box_format, SIZE, SIZE)
    given = {"boxes": ops.convert_to_numpy(converted), "labels": boxes["labels"]}
    dataset = as_dataset(images, given)
    if structure == "tuple":
        dataset = dataset.map(lambda x: (x["images"], x["bounding_boxes"]))
    model = compiled(shift=3.0, bounding_box_format=box_format)
    result = evaluate_detections(model, dataset, NAMES)
    assert result.mAP == pytest.approx(wanted)
    # Ground truth in another format than the model's.
    pixels = as_dataset(images, boxes)
    result = evaluate_detections(model, pixels, bounding_box_format="xyxy")
    assert result.mAP == pytest.approx(wanted)
    assert result.class_names == ("0", "1")


def test_collect_detections_returns_the_planted_boxes():
    images, boxes = planted()
    truth, found = collect_detections(compiled(shift=0.0), as_dataset(images, boxes))
    assert len(truth) == len(found) == 5
    for image, (own, other) in enumerate(zip(truth, found, strict=True)):
        keep = boxes["labels"][image] >= 0
        assert set(own) == {"boxes", "labels", "difficult"}
        np.testing.assert_array_equal(own["boxes"], boxes["boxes"][image][keep])
        np.testing.assert_array_equal(other["boxes"], own["boxes"])
        np.testing.assert_array_equal(other["labels"], own["labels"])
        np.testing.assert_allclose(other["confidence"], images[image, : keep.sum(), 1, 2] / 100)


def test_boxes_in_pixels_of_the_images_before_resizing():
    """`image_size` in the batch converts boxes to original pixels."""
    images, boxes = planted()
    sizes = np.array([[640, 128]] * 4 + [[32, 320]], "int32")  # height, width
    dataset = as_dataset(images, boxes).unbatch()
    dataset = tf.data.Dataset.zip(dataset, tf.data.Dataset.from_tensor_slices(sizes))
    dataset = dataset.map(lambda element, size: {**element, "image_size": size}).batch(2)
    truth, found = collect_detections(compiled(shift=0.0), dataset)
    for image, scale in ((0, [2, 10, 2, 10]), (4, [5, 0.5, 5, 0.5])):
        keep = boxes["labels"][image] >= 0
        wanted = boxes["boxes"][image][keep] * scale
        np.testing.assert_allclose(truth[image]["boxes"], wanted)
        np.testing.assert_allclose(found[image]["boxes"], wanted)
    # Stretching does not change IoU.
    assert evaluate_detections(compiled(shift=3.0), dataset).mAP == expected_map(3.0)


def test_difficult_objects_are_ignored():
    images, boxes = planted()
    model = compiled(shift=0.0)
    boxes["difficult"] = boxes["labels"] >= 0
    boxes["difficult"][0, 0] = False
    result = evaluate_detections(model, as_dataset(images, boxes), NAMES)
    assert result.num_objects.sum() == result.true_positives.sum() == 1
    assert result.false_positives.sum() == 0


def test_reshuffled_data():
    """Predictions and ground truth come from one pass over the data."""
    images, boxes = planted(12)
    dataset = as_dataset(images, boxes, batch_size=1).shuffle(12, reshuffle_each_iteration=True)
    evaluation = DetectionEvaluation(dataset, NAMES, verbose=0)
    _, history = train([evaluation], shift=0.0, epochs=4)
    assert history.history["val_mAP50"] == [1.0] * 4


def test_predict_function_is_not_traced_again():
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)
    model, _ = train([evaluation], epochs=2)
    traces = model.num_traces
    assert traces <= 2  # batches of two, and one of another size
    train([evaluation], epochs=3, model=model)
    assert model.num_traces == traces


def test_frequency_first_and_last_epoch(tmp_path):
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, frequency=3, verbose=0)
    plot = DetectionPlot(as_dataset(*planted()), tmp_path, NAMES, frequency=3, num_images=1)
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    path = str(tmp_path / "{epoch}_{val_mAP50:.3f}.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    _, history = train([evaluation, plot, logger, checkpoint], epochs=8)
    assert len(list(tmp_path.glob("*.keras"))) == 8
    assert evaluation.epoch == [0, 2, 5, 7]
    # Between evaluations, the logs repeat the last values.
    first, third, sixth, last = evaluation.history["val_mAP50"]
    want = [first, first, third, third, third, sixth, sixth, last]
    assert history.history["val_mAP50"] == want
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["val_mAP50"]) for row in rows] == want
    assert [int(row["val_evaluated_epoch"]) for row in rows] == [1, 1, 3, 3, 3, 6, 6, 8]
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"epoch_{n:04d}.png" for n in (1, 3, 6, 8)]


def test_several_thresholds_and_coco(capfd):
    dataset = as_dataset(*planted())
    evaluation = DetectionEvaluation(
        dataset, NAMES, iou_threshold=[0.5, 0.75], coco=True, per_class=False
    )
    model, history = train([evaluation], epochs=3)
    logs = {name: values[-1] for name, values in history.history.items()}
    assert logs["val_mAP50"] == pytest.approx(expected_map(2.0, 0.5))
    assert logs["val_mAP75"] == pytest.approx(expected_map(2.0, 0.75))
    assert not any(name.startswith("val_AP50/") for name in logs)
    coco = coco_average_precision(*collect_detections(model, dataset), num_classes=2)
    assert logs["val_COCO/AP"] == pytest.approx(coco.metrics["AP"])
    assert logs["val_mAP"] == logs["val_COCO/AP"] and "val_AP/cell" not in logs
    assert "val_COCO/APlarge" not in logs  # undefined: there are no large objects
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert len(lines) == 3  # nothing of pycocotools
    means = "val_mAP [\\d.]+, val_mAP50 [\\d.]+, val_mAP75 [\\d.]+, AP75 "
    assert re.match(rf"Epoch 3: {means}.* \([\d.]+ s, \d+ obj", lines[2])


def test_printed_line_and_table(capsys):
    images, boxes = planted()
    train([DetectionEvaluation(as_dataset(images, boxes), NAMES)], epochs=1)
    text = capsys.readouterr().out
    number = r"\d\.\d{3}"
    assert re.fullmatch(
        rf"\nEpoch 1: val_mAP {number}\d, val_mAP50 {number}\d, AP75 {number}\d, "
        rf"APsmall {number}\d, APmedium -, APlarge - "
        rf"\(.* objects\): cell {number}, dust {number}\n",
        text,
    )
    names = [f"class {i}" for i in range(24)]
    train([DetectionEvaluation(as_dataset(images, boxes), names)], epochs=1, num_classes=24)
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("Epoch 1: val_mAP ") and 2 <= len(rows) <= 6
    assert all(len(row) <= 102 for row in rows)
    assert re.findall(r"class \d+", " ".join(rows)) == names
    assert len(re.findall(r" -(?!\d)", " ".join(rows))) == 22  # classes without objects


def test_progress_bar_shows_the_value(capsys):
    train([DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)], epochs=1, verbose=2)
    assert "val_mAP50: " in capsys.readouterr().out


def test_validation_data_without_objects(tmp_path, capsys):
    images, boxes = planted(empty=True)
    evaluation = DetectionEvaluation(as_dataset(images, boxes), NAMES, coco=True)
    plot = DetectionPlot(as_dataset(images, boxes), tmp_path, NAMES)
    _, history = train([evaluation, plot], epochs=2)
    assert "no objects, so mAP is undefined" in capsys.readouterr().out
    assert np.isnan(evaluation.result.mAP)
    assert evaluation.result.false_positives.sum() > 0
    # A checkpoint would keep a first value of nan as the best one.
    assert not any("AP" in name for name in history.history)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_plot_shows_planted_boxes(tmp_path):
    from PIL import Image

    images, boxes = planted(3)
    model, _ = train([DetectionPlot(as_dataset(images, boxes), tmp_path / "a" / "b", NAMES)], 1)
    assert model.num_traces <= 2
    image = np.asarray(Image.open(tmp_path / "a" / "b" / "epoch_0001.png").convert("RGB"))
    assert image.shape[0] > 2 * 300 and image.shape[1] > 2 * 300  # a grid of 2 x 2
    colorful = np.ptp(image.astype(int), axis=-1) > 100
    assert colorful.mean() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency": 0}, "frequency=0"),
        ({"iou_threshold": 50}, "iou_threshold=50"),
        ({"interpolation": "all"}, "interpolation='all'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionEvaluation(as_dataset(*planted()), NAMES, **options)


def test_bad_data_raise_before_the_first_epoch():
    images, boxes = planted()
    with pytest.raises(ValueError, match=r"iterator or\s+generator"):
        DetectionEvaluation(iter([1]), NAMES)
    dataset = as_dataset(images, boxes)
    for wrong, message in (
        (dataset.unbatch(), r"batches of images.*\(64, 64, 3\)"),
        (dataset.map(lambda x: x["images"]), "Ground truth must be a dictionary"),
        (dataset.map(lambda x: {"images": x["images"]}), "Ground truth .*NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            train([DetectionEvaluation(wrong, NAMES, verbose=0)])
    with pytest.raises(ValueError, match="`steps` must be given"):
        collect_detections(compiled(), dataset.repeat())
    assert len(collect_detections(compiled(), dataset.repeat(), steps=4)[0]) == 7
    with pytest.raises(ValueError, match="at least one batch"):
        collect_detections(compiled(), dataset.take(0))
    with pytest.raises(ValueError, match="dictionary of boxes"):
        plain = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
        evaluate_detections(plain, dataset, NAMES)
    with pytest.raises(ValueError, match="neither `class_names` nor"):
        evaluate_detections(plain, dataset)
    with pytest.raises(ValueError, match=r"list of 2 different names.*'c'"):
        train([DetectionEvaluation(dataset, ["a", "b", "c"], verbose=0)])


def test_data_of_other_classes_raise():
    """With other meanings of the labels, mAP would be silently wrong."""
    images, truth = rectangles(2)
    model, data = small_detector(), tf.data.Dataset.from_tensors((images, truth))
    data.class_names = ["blue", "green", "red"]
    evaluation = DetectionEvaluation(data)
    evaluation.set_model(model)
    with pytest.raises(ValueError, match="same classes in the same order"):
        evaluation.on_train_begin()
    with pytest.raises(ValueError, match="same classes in the same order"):
        evaluate_detections(model, data)
    data.class_names = list(CLASS_NAMES)
    assert evaluate_detections(model, data).class_names == tuple(CLASS_NAMES)


# === Averaged weights and the best model ===


class Averaging(DistributedTraining, PlantedDetector):
    """Its shift is 16, then a half of it after each epoch."""


def planted_model(rate=0.25, shift=16.0, **options):
    model = Averaging(shift=shift)
    model.build(None)
    model.compile(keras.optimizers.SGD(rate, **options))
    return model


def train_planted(model, epochs, *callbacks):
    return model.fit(as_dataset(*planted(2)), epochs=epochs, callbacks=callbacks, verbose=0)


@pytest.mark.parametrize("swap", [False, True])
def test_the_averages_are_evaluated(swap):
    """With and without Keras' callback, which puts them in place itself."""
    evaluation = DetectionEvaluation(as_dataset(*planted()), NAMES, verbose=0)
    swaps = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if swap else []
    model = planted_model(use_ema=True, ema_momentum=0.75)
    train_planted(model, 5, *swaps, evaluation)
    shifts = [8.0, 4.0, 2.0, 1.0, 0.5]
    averages = shifts[:1]
    for shift in shifts[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * shift)
    wanted = list(map(expected_map, averages))
    assert evaluation.history["val_mAP50"] == pytest.approx(wanted)
    assert wanted != pytest.approx(list(map(expected_map, shifts)))
    assert float(model.shift) == pytest.approx(averages[-1])


def test_fit_ends_with_the_best_weights_and_stops(tmp_path):
    """The rate lets the shift grow from epoch to epoch: 1, 2, 4, 8."""

    def train(epochs):
        best = DetectionEvaluation(
            as_dataset(*planted()), NAMES, verbose=0, restore_best_weights=True, patience=2
        )
        model = planted_model(rate=-0.5, shift=0.5)
        resume = ResumeTraining(tmp_path, callbacks=[best])
        return model, best, train_planted(model, epochs, best, resume)

    model, best, history = train(9)
    assert float(model.shift) == 1.0 and best.best_epoch == 0 and best.stopped
    assert history.epoch == [0, 1, 2] and best.best == best.history["val_mAP"][0]
    # The same program again: nothing is left to do, and its model is the same.
    model, best, history = train(9)
    assert float(model.shift) == 1.0 and history.epoch == [0, 1, 2] and best.best_epoch == 0


def test_checkpoints_hold_no_averages(tmp_path):
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), ResumeTraining(tmp_path)]
    with pytest.raises(ValueError, match="`SwapEMAWeights` must come after `ResumeTraining`"):
        train_planted(planted_model(use_ema=True), 1, *callbacks)
